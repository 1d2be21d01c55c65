"""The command: figures against an independent computation, one page that needs nothing else, and plain errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections import Counter
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from nextvit_deploy.data import load_images
from nextvit_deploy.pool import on_ray
from nextvit_deploy.terminal import counting
from nextvit_models.checkpoint import load_checkpoint
from nextvit_models.demo import DEMO_ACCURACY, DEMO_CHECKPOINT, DEMO_IMAGES
from tests.deploy.support import (
    Exported,
    Json,
    call,
    contents,
    forget,
    put_nan,
    refusal,
    strict_json,
    swap_classes,
    tamper,
    weights,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEXTVIT_DEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def few(folder: Path, count: int = 3) -> Path:
    """So many of the demo's pictures of each class."""
    for each in sorted(DEMO_IMAGES.iterdir()):
        if each.is_dir():
            (folder / each.name).mkdir(parents=True)
            for picture in sorted(each.glob("*.png"))[:count]:
                shutil.copy(picture, folder / each.name)
    return folder


def evaluated(*arguments: str | Path) -> Json:
    ran = call("evaluate", *arguments, "--json", "--workers", "1")
    assert (ran.status, ran.err) == (0, ""), ran
    return ran.json


def test_the_demo(demo: Exported, tmp_path: Path, cache: Path) -> None:
    path = demo.copied(tmp_path)
    found = evaluated(path, DEMO_IMAGES)
    figures = found["figures"]
    assert figures["count"] == found["dataset"]["total"] == 360
    assert figures["pytorch"] == figures["artefact"] == {"top1": DEMO_ACCURACY, "top5": 1.0}
    assert (figures["points"], figures["agreement"], figures["flips"]) == ({"top1": 0.0, "top5": 0.0}, 1.0, [])
    assert 0 < figures["relative_rms"] < 1e-6
    assert figures["sqnr_db"] == pytest.approx(-20 * np.log10(figures["relative_rms"]))
    assert found["dataset"]["classes"] == "class folders named as the checkpoint's"
    data, html = (tmp_path / f"{path.name}.evaluation.{kind}" for kind in ("json", "html"))
    assert strict_json(data.read_text()) | {"run": found["run"]} == found
    assert html.read_text().startswith("<!DOCTYPE html>")
    assert found["run"] == found["run"] | {"workers": 1, "ray": None, "resumed": 0}
    assert not contents(cache)
    assert set(contents(tmp_path)) == {path.name, f"{path.name}.json", data.name, html.name}


def test_flips_are_those_of_an_independent_computation(demo: Exported, tmp_path: Path) -> None:
    path, folder = tamper(demo.copied(tmp_path), swap_classes), few(tmp_path / "data", 5)
    figures = evaluated(path, folder)["figures"]

    checkpoint = load_checkpoint(DEMO_CHECKPOINT)
    images = load_images(folder, 1000, (64, 64), checkpoint.preprocessing)
    batch = images.normalised()
    with torch.no_grad():
        want = checkpoint.model(torch.from_numpy(batch)).numpy()
    session = ort.InferenceSession(str(path))
    got = np.concatenate([session.run(None, {"image": batch[index : index + 1]})[0] for index in range(len(batch))])
    truth = np.array([int(str(label)) for label in images.labels])

    pairs = Counter((w, g) for w, g in zip(want.argmax(1), got.argmax(1), strict=True) if w != g)
    assert set(pairs) == {(3, 5), (5, 3)}
    assert figures["flips"] == [
        {
            "pytorch": str(w),
            "artefact": str(g),
            "count": count,
            "made_right": sum((truth == g) & (want.argmax(1) == w) & (got.argmax(1) == g)),
            "made_wrong": sum((truth == w) & (want.argmax(1) == w) & (got.argmax(1) == g)),
        }
        for (w, g), count in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    ]
    assert figures["agreement"] == 1 - sum(pairs.values()) / 50
    assert figures["artefact"]["top1"] == np.mean(got.argmax(1) == truth)
    assert figures["points"]["top1"] == pytest.approx(100 * (np.mean(got.argmax(1) == truth) - DEMO_ACCURACY))
    error = np.sqrt(((got - want) ** 2).sum() / (want**2).sum())
    assert figures["relative_rms"] == pytest.approx(error, rel=1e-4)
    assert figures["max_abs"] == pytest.approx(np.abs(got - want).max(), rel=1e-4)
    ordered = np.sort(want, axis=1)
    margins = 2 * np.abs(got - want).max(1) / (ordered[:, -1] - ordered[:, -2])
    assert figures["can_flip"] == (margins >= 1).sum()


def test_tables_tell_of_flips(demo: Exported, tmp_path: Path) -> None:
    path, folder = tamper(demo.copied(tmp_path), swap_classes), few(tmp_path / "data", 1)
    ran = call("evaluate", path, folder, "--workers", "1")
    assert (ran.status, ran.err) == (0, "")
    assert re.search(r"top-1 +80.00% +100.00% +-20.00", ran.out)
    assert "agrees with PyTorch on 80.00%, 2 flips" in ran.out
    assert re.search(r"^3 +5 +1 +0 +1 *$", ran.out, re.MULTILINE)
    assert ran.out.endswith(f"written: {path}.evaluation.html\n")
    assert call("evaluate", path, folder, "--workers", "1", "-q").out == ""
    assert "Furthest from PyTorch" in call("evaluate", path, folder, "--workers", "1", "-v").out


def test_a_strangers_file_unlabelled_and_elsewhere(half: Exported, tmp_path: Path) -> None:
    """In FP16, three raw images at a time; the pictures lie in one folder, and the report goes to another."""
    path = tamper(half.copied(tmp_path), forget)
    data = tmp_path / "data"
    data.mkdir()
    for index, picture in enumerate(sorted(DEMO_IMAGES.rglob("*.png"))[:40]):
        shutil.copy(picture, data / f"{index}.png")
    found = evaluated(path, data, "--output", tmp_path / "new" / "out")
    figures = found["figures"]
    assert (figures["pytorch"], figures["artefact"], figures["points"]) == (None, None, None)
    assert (figures["count"], figures["agreement"]) == (40, 1.0)
    assert 1e-5 < figures["relative_rms"] < 1e-2
    assert found["executor"]["mode"] == "emulated"
    assert {each["label"] for each in found["worst"]["by_margin"]} == {None}
    assert set(contents(tmp_path / "new" / "out")) == {f"{path.name}.evaluation.{kind}" for kind in ("json", "html")}


def test_other_kinds_of_artefacts(engine: Exported, package: Exported, tmp_path: Path) -> None:
    for exported in (engine, package):
        found = evaluated(exported.path, DEMO_IMAGES, "--limit", "3", "--output", tmp_path)
        assert (found["figures"]["agreement"], found["executor"]["mode"]) == (1.0, "emulated")
        assert 1e-5 < found["figures"]["relative_rms"] < 1e-2


class Page(HTMLParser):
    """What a page holds: tags with their attributes, and the text outside of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else_and_believes_nobody(demo: Exported, tmp_path: Path) -> None:
    """Names from the file system are text, whatever they look like."""
    path = tamper(demo.copied(tmp_path), swap_classes)
    data = few(tmp_path / "<b>data & more<", 2)
    evil = "<img src=x onerror=alert(1)> \"'&amp;.png"
    (data / "3" / "000.png").rename(data / "3" / evil)
    evaluated(path, data)
    text = (tmp_path / f"{path.name}.evaluation.html").read_text()
    shown = Page(text)
    tags = {tag for tag, _ in shown.tags}
    assert not tags & {"script", "link", "iframe", "b>data", "object"}
    images = [attributes for tag, attributes in shown.tags if tag == "img"]
    assert images
    assert all(
        str(each["src"]).startswith("data:image/jpeg;base64,/9j/") and set(each) == {"src", "alt"} for each in images
    )
    assert f"3/{evil}" in [each["alt"] for each in images]
    assert f"3/{evil}" in shown.text
    assert "<b>data & more<" in shown.text
    assert "//" not in re.sub(r"base64,[^\"]*", "", text)
    assert "prefers-color-scheme: dark" in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in shown.tags
    assert shown.text.index("top-1") < shown.text.index("Flips") < shown.text.index("Nearest")


def test_names_that_are_no_text(demo: Exported, tmp_path: Path) -> None:
    """Bytes that are no UTF-8 are told in files and on the terminal as what they are."""
    data, name = few(tmp_path / "data", 1), os.fsdecode(b"caf\xe9.png")
    (data / "3" / "000.png").rename(data / "3" / name)
    path = demo.copied(tmp_path)
    ran = call("evaluate", path, data, "--workers", "1", "--verbose")
    assert ran.status == 0, ran
    assert "3/caf\\udce9.png" in ran.out
    told, html = ((tmp_path / f"{path.name}.evaluation.{kind}").read_text() for kind in ("json", "html"))
    assert any(each["name"] == "3/caf\\udce9.png" for each in strict_json(told)["worst"]["by_margin"])
    assert "3/caf\\udce9.png" in html


def test_without_a_folder_it_is_the_demos(demo: Exported, tmp_path: Path) -> None:
    path = demo.copied(tmp_path)
    found = evaluated(path, "--limit", "10")
    assert found["dataset"]["total"] == 360
    assert any(note.startswith("no folder given: evaluated on the demo's digits") for note in found["notes"])
    line = refusal("evaluate", path, "--checkpoint", DEMO_CHECKPOINT, "--output", tmp_path / "other")
    assert line.endswith("name a folder of images to evaluate on")


def test_an_artefact_that_answers_nan(demo: Exported, tmp_path: Path) -> None:
    path, folder = tamper(demo.copied(tmp_path), put_nan), few(tmp_path / "data", 1)
    found = evaluated(path, folder)
    assert (found["figures"]["not_finite"], found["figures"]["sqnr_db"]) == (10, "-inf")
    assert {each["artefact"] for each in found["figures"]["flips"]} == {"no number"}
    assert "NaN or infinity on 10 images" in call("evaluate", path, folder, "--workers", "1").out


def test_what_went_wrong_is_one_line(demo: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = demo.path, few(tmp_path / "data", 1)
    (tmp_path / "empty").mkdir()
    assert refusal("evaluate", path, tmp_path / "empty").startswith("no image in ")
    assert refusal("evaluate", path, tmp_path / "absent").endswith("absent is not a folder; name one that holds images")
    assert "there is no file" in refusal("evaluate", tmp_path / "no.onnx", data)
    assert "is no artefact of" in refusal("evaluate", DEMO_CHECKPOINT, data)
    assert "give its own --checkpoint" in refusal(
        "evaluate", path, data, "--checkpoint", weights(tmp_path / "7.pth", 7, 0)
    )
    (tmp_path / "file").touch()
    line = refusal("evaluate", path, data, "--output", tmp_path / "file")
    assert line.endswith("file can't be written: it is a file, not a folder; choose another output")
    (data / "0" / "000.png").write_bytes(b"no picture")
    for workers in ("1", "2"):
        line = refusal("evaluate", path, data, "--workers", workers, "--output", tmp_path)
        assert line == f"1 of 10 images in {data} cannot be read: 0/000.png; repair or remove them"
    assert "write auto, HOST:PORT or" in refusal("evaluate", path, data, "--ray", "here", "--output", tmp_path)
    line = refusal("evaluate", path, data, "--ray", "127.0.0.1:9", "--output", tmp_path)
    assert re.fullmatch(r"no Ray cluster can be reached at 127.0.0.1:9: .*; start one with: ray start --head", line)
    monkeypatch.setattr(on_ray, "find_spec", lambda _: None)
    assert "nextvit-deploy[ray]" in refusal("evaluate", path, data, "--ray", "auto", "--output", tmp_path)
    assert not list(tmp_path.glob("*.evaluation.*"))


class Terminal(StringIO):
    """Stderr that people look at."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_is_told_how_many_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    for quiet in (False, True):
        shown = Terminal()
        monkeypatch.setattr(sys, "stderr", shown)
        with counting(quiet=quiet) as tell:
            tell("load the checkpoint", 0, 0)
            tell("evaluate", 64, 360)
        assert ("64/360" in shown.getvalue() and "evaluate" in shown.getvalue()) is not quiet
    log = StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with counting(quiet=False) as tell:
        tell("evaluate", 64, 360)
    assert log.getvalue() == ""


def test_both_files_are_written_or_neither(demo: Exported, tmp_path: Path) -> None:
    """The page goes last, and something is in its way."""
    path, data = demo.copied(tmp_path), few(tmp_path / "data", 1)
    blocked = tmp_path / f"{path.name}.evaluation.html"
    (blocked / "inside").mkdir(parents=True)
    assert "is a folder" in refusal("evaluate", path, data)
    assert not (tmp_path / f"{path.name}.evaluation.json").exists()


def test_other_weights_are_noted(demo: Exported, tmp_path: Path) -> None:
    path, data = demo.copied(tmp_path), few(tmp_path / "data", 1)
    found = evaluated(path, data, "--checkpoint", weights(tmp_path / "other.pth", 10, 3))
    assert any("made from other weights than other.pth" in note for note in found["notes"])
    assert found["figures"]["agreement"] < 1
    assert json.loads((tmp_path / f"{path.name}.evaluation.json").read_text())["notes"] == found["notes"]
