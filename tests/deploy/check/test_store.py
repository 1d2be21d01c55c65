"""What is kept is taken again only while nothing has changed that it hangs on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nextvit_deploy.check import store as module
from nextvit_deploy.check.cells import Cell
from nextvit_deploy.check.result import Outcome
from nextvit_deploy.check.store import Store
from nextvit_exporters.files import sha256_of
from nextvit_models.demo import DEMO_CHECKPOINT, DEMO_IMAGES


@pytest.fixture
def cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cell:
    monkeypatch.setenv("NEXTVIT_DEPLOY_CACHE", str(tmp_path / "cache"))
    shutil.copy(DEMO_CHECKPOINT, tmp_path / "weights.safetensors")
    for folder in ("images", "calibration"):
        (tmp_path / folder).mkdir()
        for number, path in enumerate(sorted(DEMO_IMAGES.rglob("*.png"))[:3]):
            shutil.copy(path, tmp_path / folder / f"{number}.png")
    return Cell(
        "a",
        checkpoint=str(tmp_path / "weights.safetensors"),
        lane="onnx",
        precision="int8",
        images=str(tmp_path / "images"),
        count=2,
        calibration=str(tmp_path / "calibration"),
    )


@pytest.fixture
def outcome(tmp_path: Path) -> Outcome:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"an artefact")
    return Outcome(manifest={"artifact": {"sha256": sha256_of(path)}}, artefact=str(path), seconds=2.0)


def again(tmp_path: Path, threads: int = 1) -> Store:
    return Store(tmp_path / "output", threads)


def test_nothing_changed(tmp_path: Path, cell: Cell, outcome: Outcome) -> None:
    assert again(tmp_path).find(cell) is None
    again(tmp_path).add(cell, outcome)
    assert again(tmp_path).find(cell) == outcome
    assert Store(tmp_path / "output", 1, fresh=True).find(cell) is None


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


CHANGES: dict[str, Callable[[Path], object]] = {
    "the checkpoint": lambda folder: _grow(folder / "weights.safetensors"),
    "a picture": lambda folder: _grow(folder / "images" / "1.png"),
    "a picture to calibrate on": lambda folder: _grow(folder / "calibration" / "2.png"),
    "the artefact": lambda folder: (folder / "x.onnx").write_bytes(b"another"),
    "no artefact": lambda folder: (folder / "x.onnx").unlink(),
    "no checkpoint": lambda folder: (folder / "weights.safetensors").unlink(),
    "no pictures": lambda folder: shutil.rmtree(folder / "images"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_changed_is_done_again(
    change: Callable[[Path], object], tmp_path: Path, cell: Cell, outcome: Outcome
) -> None:
    again(tmp_path).add(cell, outcome)
    change(tmp_path)
    assert again(tmp_path).find(cell) is None


def test_a_picture_that_is_not_taken_changes_nothing(tmp_path: Path, cell: Cell, outcome: Outcome) -> None:
    again(tmp_path).add(cell, outcome)
    (tmp_path / "images" / "2.png").unlink()
    assert again(tmp_path).find(cell) == outcome


@pytest.mark.parametrize(
    "other",
    [
        {"precision": "fp16"},
        {"batch": 2},
        {"size": (64, 96)},
        {"passes": "none"},
        {"gpu": "a10"},
        {"count": 3},
        {"calibration_size": 2},
        {"layers": False},
        {"ema": True},
        {"name": "b"},
    ],
)
def test_another_cell_is_another(other: dict[str, object], tmp_path: Path, cell: Cell, outcome: Outcome) -> None:
    again(tmp_path).add(cell, outcome)
    assert again(tmp_path).find(replace(cell, **other)) is None  # type: ignore[arg-type]  # its own fields


def test_another_folder_version_or_number_of_threads(
    tmp_path: Path, cell: Cell, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    again(tmp_path).add(cell, outcome)
    assert again(tmp_path, threads=2).find(cell) is None
    single = replace(cell, precision="fp16")
    again(tmp_path).add(single, outcome)
    assert again(tmp_path, threads=2).find(single) == outcome
    assert Store(tmp_path / "elsewhere", 1).find(cell) is None
    with monkeypatch.context() as patch:
        patch.setattr(module, "installed_versions", lambda: {"torch": "0"})
        assert again(tmp_path).find(cell) is None
    with monkeypatch.context() as patch:
        patch.setattr(module, "_code", lambda: "edited")
        assert again(tmp_path).find(cell) is None
    assert again(tmp_path).find(cell) == outcome


def test_a_file_beside_a_given_artefact_counts(tmp_path: Path, cell: Cell, outcome: Outcome) -> None:
    given = replace(cell, artefact=str(tmp_path / "x.onnx"))
    again(tmp_path).add(given, outcome)
    assert again(tmp_path).find(given) == outcome
    (tmp_path / "x.calibration.safetensors").write_bytes(b"other steps")
    assert again(tmp_path).find(given) is None


@pytest.mark.parametrize(
    "bad",
    [
        {"crash": "killed by SIGSEGV"},
        {"timed_out": True},
        {"error": "no space left"},
        {"manifest": None, "artefact": None},
    ],
)
def test_what_may_end_otherwise_is_not_kept(
    bad: dict[str, object], tmp_path: Path, cell: Cell, outcome: Outcome
) -> None:
    again(tmp_path).add(cell, replace(outcome, **bad))  # type: ignore[arg-type]  # its own fields
    assert not (tmp_path / "cache").exists()


def test_a_damaged_record_counts_for_nothing(tmp_path: Path, cell: Cell, outcome: Outcome) -> None:
    again(tmp_path).add(cell, outcome)
    (record,) = (tmp_path / "cache").rglob("*.json")
    for text in ("", "{", "[]", '{"manifest": 1}', '{"unknown": 1}', "null"):
        record.write_text(text)
        assert again(tmp_path).find(cell) is None


def test_a_cache_that_takes_nothing_is_told(tmp_path: Path, cell: Cell, outcome: Outcome) -> None:
    (tmp_path / "cache").write_text("a file")
    store = again(tmp_path)
    store.add(cell, outcome)
    assert "can't be written" in store.trouble


def test_a_hub_id_is_asked_for_every_time(tmp_path: Path, cell: Cell, outcome: Outcome) -> None:
    hub = replace(cell, checkpoint="timm/nextvit_small.bd_in1k")
    again(tmp_path).add(hub, outcome)
    assert again(tmp_path).find(hub) is None
