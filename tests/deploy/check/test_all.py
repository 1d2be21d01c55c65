"""``all`` says what it leaves out, and what can't be written is told before anything is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.deploy.check.support_check import acting
from tests.deploy.support import call, one_line


@pytest.mark.parametrize("calibrated", [False, True])
def test_int8_of_an_own_checkpoint_needs_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, calibrated: bool
) -> None:
    acting(monkeypatch, tmp_path)
    checkpoint = tmp_path / "own.pth"
    checkpoint.write_bytes(b"opened by the cells alone, which don't here")
    more = ("--calibration", tmp_path) if calibrated else ()
    ran = call("all", checkpoint, "--output", tmp_path / "out", "--json", "--no-report", *more)
    assert ran.status == 0, ran
    found = json.loads(ran.out)
    assert {"onnx"} <= {row["cell"]["lane"] for row in found["rows"]}
    assert any(row["cell"]["precision"] == "int8" for row in found["rows"]) is calibrated
    assert any(note.startswith("no int8: ") for note in found["notes"]) is not calibrated


@pytest.mark.parametrize("option", ["--junit", "--sarif", "--summary"])
def test_a_place_that_takes_nothing_is_told_first(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = acting(monkeypatch, tmp_path)
    (tmp_path / "file").write_text("no folder")
    done = call("all", "--output", tmp_path / "out", option, tmp_path / "file" / "x", "--no-report")
    assert (done.status, done.out) == (1, "")
    assert "can't be written" in one_line(done.err)
    assert not list(ran.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gone.pth",), "gone.pth'; give the checkpoint's file, a hub id, or none at all"),
        (("folder",), "'folder' is a folder; give the checkpoint's file"),
        (("--images", "gone"), "gone isn't there; name a folder of pictures, or leave --images out"),
        (("--calibration", "file"), "file is a file; name a folder of pictures, or leave --calibration out"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_made(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = acting(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("no pictures")
    done = call("all", *arguments)
    assert (done.status, done.out) == (1, "")
    assert one_line(done.err).endswith(said)
    assert not list(ran.iterdir())
    assert not (tmp_path / "exports").exists()
