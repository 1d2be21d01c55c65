"""The page: verdict first, complete, the same bytes each time, and safe whatever the folder holds."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from nextvit_deploy.cli.report import report
from nextvit_deploy.report.collect import collect
from nextvit_deploy.report.page import page, write_report
from nextvit_exporters.errors import DeployError, OutputNotWritten
from tests.deploy.report.support_report import EVIL, asked, checked, manifest, put, whole, write

CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Seen(HTMLParser):
    """Tags with their attributes, and the text outside of styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.parts.append(" ")

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.parts))


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page(collect(checked(tmp_path_factory.mktemp("bad"))))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page(collect(whole(tmp_path_factory.mktemp("good"))))


def test_everything_is_on_it_in_its_order(good: str) -> None:
    text = Seen(good).text
    body = text[text.index("nextvit-deploy report on") :]
    places = [
        body.index(each)
        for each in (
            "Verified All 4 artefacts were executed and stayed within tolerance of PyTorch.",
            "nextvit_nano",
            "10x inside the tolerance",
            "Size, latency, accuracy",
            "Error by layer",
            "How far it is from PyTorch",
            "Images nearest to another class",
            "Passes: 2 of 2 certified",
            "Provenance",
            "0.412 ms without transfers on Tesla T4",
            "Headroom",
        )
    ]
    assert places == sorted(places)
    assert "nextvit-export evaluate nano_fp16.onnx PICTURES" in body
    assert "Precision plan" in body
    assert "not measured" in body
    assert "Skipped files" not in body


def test_the_failed_come_first_and_are_open(bad: str) -> None:
    seen = Seen(bad)
    assert "Failed Of 6 artefacts: 2 failed, 1 not verified, 3 verified." in seen.text
    assert seen.text.index("not the same network") < seen.text.index("Artefacts")
    cards = [each["class"] for tag, each in seen.tags if tag == "li" and str(each.get("class")).startswith("card")]
    assert cards == ["card failed"] * 2 + ["card not-verified"] + ["card verified"] * 3
    opened = ["open" in each for tag, each in seen.tags if tag == "details" and each.get("class") == "artefact"]
    assert opened == [True] * 3 + [False] * 3
    assert "broken.json it is no JSON" in seen.text
    assert "size (regression)" in seen.text
    assert "parts from PyTorch at features.1.e_mhsa.q" in seen.text


def test_it_loads_and_runs_nothing_and_believes_nobody(bad: str) -> None:
    seen = Seen(bad)
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": CSP}) in seen.tags
    tags = {tag for tag, _ in seen.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "use", "image", "base"}
    assert not [name for _, each in seen.tags for name in each if name.startswith("on")]
    images = [each for tag, each in seen.tags if tag == "img"]
    assert images
    assert all(str(each["src"]).startswith("data:image/jpeg;base64,/9j/") for each in images)
    links = [str(each["href"]) for _, each in seen.tags if "href" in each]
    ids = [str(each["id"]) for _, each in seen.tags if "id" in each]
    assert links
    assert {each.removeprefix("#") for each in links} <= set(ids)
    assert len(ids) == len(set(ids))
    assert "//" not in re.sub(r"base64,[^\"]*", "", bad)
    assert "{{ 7*7 }}" in seen.text
    assert "\u202e" not in bad
    assert EVIL.replace("\u202e", "\\u202e") in seen.text


def test_every_chart_says_in_words_what_it_shows(bad: str) -> None:
    charts = [each for tag, each in Seen(bad).tags if tag == "svg" and each.get("role") == "img"]
    assert len(charts) > 4
    assert all(len(str(each["aria-label"])) > 20 for each in charts)


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        checked(tmp_path / name / "out")
    first = write_report(tmp_path / "one" / "out", tmp_path / "one.html")
    second = write_report(tmp_path / "two" / "out", tmp_path / "two.html")
    assert first.read_bytes() == second.read_bytes()
    write_report(tmp_path / "one" / "out", first)
    assert first.read_bytes() == second.read_bytes()
    assert str(tmp_path) not in first.read_text()


def test_a_card_tells_a_failed_network_from_its_precision(tmp_path: Path) -> None:
    """The precision's cost may be fine where the network is another one."""
    checks = [asked("same network", 0.3, "failed", "too far"), asked("precision cost", 1e-3)]
    put(tmp_path, manifest("a.onnx") | {"checks": checks})
    text = Seen(page(collect(tmp_path))).text
    assert "same network 3.0e-01, failed" in text


def test_nothing_was_executed(tmp_path: Path) -> None:
    missing = {**asked("precision cost", 0.0, "not verified", "no runtime"), "comparisons": []}
    put(tmp_path, manifest("a.onnx") | {"checks": [missing]})
    seen = Seen(page(collect(tmp_path)))
    assert "Not verified Of 1 artefact: 1 not verified." in seen.text
    assert "not executed" in seen.text
    assert "Size, latency, accuracy" not in seen.text


def test_answers_that_are_no_number(tmp_path: Path) -> None:
    broken = asked("precision cost", 1.0, "failed", "NaN")
    broken["comparisons"][0] |= {"relative_rms": "inf", "max_abs": "inf", "sqnr_db": "-inf", "top1": None}
    put(tmp_path, manifest("a.onnx") | {"checks": [broken]})
    assert "no finite answer" in Seen(page(collect(tmp_path))).text


def ran(*arguments: str | Path) -> tuple[int, str, str]:
    """Status, stdout and stderr of the command alone."""
    app = typer.Typer()
    app.command()(report)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command(tmp_path: Path) -> None:
    whole(tmp_path)
    assert ran(tmp_path) == (0, f"written: {tmp_path / 'report.html'}\n", "")
    assert ran(tmp_path, "--output", tmp_path / "sub" / "other.html", "--quiet") == (0, "", "")
    assert (tmp_path / "sub" / "other.html").read_bytes() == (tmp_path / "report.html").read_bytes()
    checked(tmp_path)
    assert ran(tmp_path, "--quiet") == (0, "", "")  # a page is no verdict


def test_what_went_wrong_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeployError, match="holds no manifest"):
        write_report(tmp_path, tmp_path / "report.html")
    whole(tmp_path)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputNotWritten, match="is a folder"):
        write_report(tmp_path, tmp_path / "report.html")
    status, out, err = ran(tmp_path / "absent")
    assert (status, out) == (1, "")
    assert err.endswith("absent is not a folder; name the one that the artefacts were written to\n")
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    line = "nextvit-export: a report needs an optional package; run: pip install 'nextvit-deploy[report]'\n"
    assert ran(tmp_path, "--output", tmp_path / "r.html") == (1, "", line)
    assert not (tmp_path / "r.html").exists()


def test_only_a_check_and_no_files(tmp_path: Path) -> None:
    """What CI keeps of a check may be its JSON alone."""
    checked(tmp_path / "full")
    write(tmp_path / "alone" / "check.json", json.loads((tmp_path / "full" / "check.json").read_text()))
    shutil.rmtree(tmp_path / "full")
    text = Seen(page(collect(tmp_path / "alone"))).text
    assert "Of 4 artefacts" in text
    assert "file not in this folder" in text
