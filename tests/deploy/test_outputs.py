"""Outputs come whole or not at all: wherever an export fails, what was there before is there, and nothing else."""

from __future__ import annotations

import errno
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from nextvit_deploy import verify as v
from nextvit_deploy.outputs import check_writable, published
from nextvit_exporters import targets, to_onnx
from nextvit_exporters.errors import OutputNotWritten
from nextvit_exporters.files import sha256_of
from nextvit_models.demo import DEMO_CHECKPOINT
from tests.deploy.support import Exported, Replay, call, contents, one_line, refusal, remove_relu, strict_json, tamper

NAME = "nextvit_nano_classify_64_b1_fp32.onnx"


@pytest.fixture
def earlier(tmp_path: Path) -> dict[str, bytes]:
    """A folder ``out`` that holds an older artefact with its manifest, and something of the user's own."""
    out = tmp_path / "out"
    out.mkdir()
    (out / NAME).write_bytes(b"an older artefact")
    (out / f"{NAME}.json").write_bytes(b'{"of": "an older artefact"}')
    (out / "notes.txt").write_bytes(b"mine")
    return contents(tmp_path)


def below_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("a file")
    return tmp_path / "file" / "exports"


def at_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("a file")
    return tmp_path / "file"


def where_the_system_refuses(_: Path) -> Path:
    if not Path("/proc/self").exists():
        pytest.skip("this system has no /proc")
    return Path("/proc/exports")


def name_too_long(tmp_path: Path) -> Path:
    return tmp_path / ("x" * 300)


def deep_below_a_name_too_long(tmp_path: Path) -> Path:
    return tmp_path / "made" / "for" / ("x" * 300)


@pytest.mark.parametrize(
    "place", [below_a_file, at_a_file, where_the_system_refuses, name_too_long, deep_below_a_name_too_long]
)
def test_a_folder_that_cannot_be_written(tmp_path: Path, place: Callable[[Path], Path]) -> None:
    folder = place(tmp_path)
    before = contents(tmp_path), sorted(tmp_path.iterdir())
    for command in (
        ("onnx", "--output", folder),
        ("convert", DEMO_CHECKPOINT, folder / "weights.safetensors"),
    ):
        line = refusal(*command)
        assert line.startswith(f"{folder} can't be written: ")
        assert line.endswith("; choose another output")
    assert (contents(tmp_path), sorted(tmp_path.iterdir())) == before


@pytest.mark.parametrize("name", [NAME, f"{NAME}.json"])
def test_a_folder_in_the_way(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "kept").write_text("kept")
    assert refusal("onnx", "--output", tmp_path).startswith(f"{tmp_path / name} is a folder, where the output goes; ")
    assert contents(tmp_path) == {f"{name}/kept": b"kept"}


def test_a_folder_is_made_and_a_failure_leaves_none(tmp_path: Path, replay: Replay) -> None:
    out = tmp_path / "not" / "yet"
    refusal("onnx", "--output", out, "--images", tmp_path / "absent")
    replay.data = b""
    refusal("onnx", "--output", out)
    assert list(tmp_path.iterdir()) == []
    check_writable(out / NAME)
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_both(tmp_path: Path, earlier: dict[str, bytes], replay: Replay) -> None:
    assert call("onnx", "--output", tmp_path / "out").status == 0
    after = contents(tmp_path)
    assert after.keys() == earlier.keys()
    assert after[f"out/{NAME}"] == replay.data
    assert strict_json(after[f"out/{NAME}.json"].decode())["verdict"] == "verified"
    assert after["out/notes.txt"] == b"mine"


class Trap:
    """Counts calls of a method of Path below a folder, and makes one of them fail."""

    def __init__(self, name: str, folder: Path, fails: int, error: Callable[[Path], BaseException]) -> None:
        self._real = getattr(Path, name)
        self._folder, self._fails, self._error = folder, fails, error
        self.calls = 0

    def into(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        def trapped(path: Path, *arguments: object) -> object:
            if self._folder in path.parents:
                self.calls += 1
                if self.calls == self._fails:
                    raise self._error(path)
            return self._real(path, *arguments)

        monkeypatch.setattr(Path, name, trapped)


def full(path: Path) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def broken(path: Path) -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def unnamed(_: Path) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(_: Path) -> KeyboardInterrupt:
    return KeyboardInterrupt()


WRITES = [("write_bytes", 1), ("write_bytes", 2), *(("replace", number) for number in (1, 2, 3, 4))]


@pytest.mark.parametrize(("method", "number"), WRITES)
@pytest.mark.parametrize("error", [full, broken, unnamed, interrupted])
def test_a_failure_at_any_write_leaves_everything_as_it_was(
    tmp_path: Path,
    earlier: dict[str, bytes],
    replay: Replay,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    number: int,
    error: Callable[[Path], BaseException],
) -> None:
    del replay
    trap = Trap(method, tmp_path / "out", number, error)
    with monkeypatch.context() as patched:
        trap.into(patched, method)
        line = refusal("onnx", "--output", tmp_path / "out", status=130 if error is interrupted else 1)
    assert trap.calls >= number
    assert contents(tmp_path) == earlier
    if error is interrupted:
        assert line == "interrupted; nothing was written"
    else:
        assert line.startswith(str(tmp_path / "out" / NAME))  # by its own name, not the temporary one
        assert " was not written: " in line


def test_the_failures_above_are_all_the_writes_there_are(
    tmp_path: Path, replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    del replay
    for method in ("write_bytes", "replace"):
        trap = Trap(method, tmp_path / method, 0, full)
        with monkeypatch.context() as patched:
            trap.into(patched, method)
            assert call("onnx", "--output", tmp_path / method).status == 0
        assert [(method, number + 1) for number in range(trap.calls)] == [each for each in WRITES if each[0] == method]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_larger_than_the_system_allows(tmp_path: Path, earlier: dict[str, bytes], replay: Replay) -> None:
    """The kernel itself cuts the write short, in the middle of the artefact."""
    assert len(replay.data) > 1 << 20
    with largest_file(1 << 20):
        line = refusal("onnx", "--output", tmp_path / "out")
        convert = refusal("convert", DEMO_CHECKPOINT, tmp_path / "out" / "w.safetensors")
    assert "was not written: the file is too large for this file system" in line
    assert "was not written: the file is too large for this file system" in convert
    assert contents(tmp_path) == earlier


def test_a_full_disk(tmp_path: Path, replay: Replay) -> None:
    """A real one, of one MiB, where this system lets a test mount it."""
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    disk = tmp_path / "disk"
    disk.mkdir()
    if mount is None or unmount is None:
        pytest.skip("this system has no mount")
    tried = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if tried.returncode:
        pytest.skip("mounting a small disk needs more rights")
    try:
        (disk / "kept").write_text("kept")
        line = refusal("onnx", "--output", disk)
        assert line == f"{disk / NAME} was not written: no space left on the disk; free some or choose another output"
        assert contents(disk) == {"kept": b"kept"}
        replay.data = replay.data[:1000]
        assert "not an ONNX file" in refusal("onnx", "--output", disk)
        assert contents(disk) == {"kept": b"kept"}
    finally:
        subprocess.run([unmount, str(disk)], check=True)


def test_interrupted_while_the_file_is_verified(
    tmp_path: Path, earlier: dict[str, bytes], replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artefact exists under its temporary name by then."""
    del replay
    seen: list[str] = []

    def interrupt(_: object, path: Path, *__: object) -> None:
        seen.extend(each.name for each in path.parent.parent.iterdir() if each.name.startswith("."))
        assert path.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(v, "verify", interrupt)
    assert refusal("onnx", "--output", tmp_path / "out", status=130) == "interrupted; nothing was written"
    assert len(seen) == 1
    assert contents(tmp_path) == earlier


# Signals as a terminal's shell leaves them: a test run in the background, or under nohup, passes on ignored ones.
_AS_FROM_A_SHELL = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
runpy.run_module("nextvit_deploy", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("number", "step", "status", "says"),
    [
        (signal.SIGINT, b"torch.onnx export", 130, "interrupted; nothing was written"),
        (signal.SIGTERM, b"certify fold-pre-norm", 143, "stopped; nothing was written"),
        (signal.SIGHUP, b"import PyTorch", 129, "stopped; nothing was written"),
    ],
)
def test_a_signal_in_the_middle(
    tmp_path: Path, earlier: dict[str, bytes], number: signal.Signals, step: bytes, status: int, says: str
) -> None:
    """A real process on a real terminal, stopped while it shows the step."""
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _AS_FROM_A_SHELL, "onnx", "--output", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(terminal)
    shown = b""
    while step not in shown:
        shown += os.read(screen, 4096)
    process.send_signal(number)
    out, _ = process.communicate(timeout=600)
    rest = b""
    try:
        while more := os.read(screen, 4096):
            rest += more
    except OSError:  # what Linux says when nobody holds the other end any more
        pass
    os.close(screen)
    assert (process.returncode, out) == (status, b"")
    assert rest.rstrip().endswith(f"nextvit-export: {says}".encode())
    assert b"Traceback" not in shown + rest
    assert b"\x1b[?25h" in rest  # the cursor is back
    assert contents(tmp_path) == earlier


def test_outside_the_tolerance_is_kept_and_marked(tmp_path: Path, demo: Exported, replay: Replay) -> None:
    """A build that went wrong: its file is kept for study, its manifest says what it is, the status is 3."""
    wrong = tamper(demo.copied(tmp_path), remove_relu).read_bytes()
    replay.data = wrong
    out = tmp_path / "out"
    ran = call("onnx", "--output", out, "--json")
    assert ran.status == 3
    assert one_line(ran.err).startswith(f"{NAME} is failed: same network: FAIL logits: relative rms ")
    assert sorted(each.name for each in out.iterdir()) == [NAME, f"{NAME}.json"]
    assert (out / NAME).read_bytes() == wrong
    manifest = strict_json((out / f"{NAME}.json").read_text(encoding="utf-8"))
    assert manifest == ran.json
    assert manifest["verdict"] == "failed"
    assert {check["verdict"] for check in manifest["checks"]} == {"failed"}
    assert manifest["artifact"]["sha256"] == sha256_of(out / NAME)


def test_outside_a_tighter_tolerance(tmp_path: Path, replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 rounding alone is outside a tolerance below it: the verdict follows the figure, not the file."""
    del replay
    tight = {
        question: {precision: replace(tolerance, relative_rms=1e-12) for precision, tolerance in by_precision.items()}
        for question, by_precision in to_onnx.TOLERANCES.items()
    }
    tight[targets.PRECISION_COST] = dict(to_onnx.TOLERANCES[targets.PRECISION_COST])
    monkeypatch.setattr(to_onnx, "TOLERANCES", tight)
    ran = call("onnx", "--output", tmp_path, "--json")
    assert ran.status == 3
    verdicts = {check["question"]: check["verdict"] for check in ran.json["checks"]}
    assert verdicts == {targets.SAME_NETWORK: "failed", targets.PRECISION_COST: "verified"}
    assert (tmp_path / NAME).exists()


def test_a_build_that_is_no_onnx_writes_nothing(tmp_path: Path, earlier: dict[str, bytes], replay: Replay) -> None:
    replay.data = b"\x00" * 100
    assert refusal("onnx", "--output", tmp_path / "out").startswith(f"{NAME} is not an ONNX file")
    assert contents(tmp_path) == earlier


def test_published_restores_what_it_cannot_finish(tmp_path: Path) -> None:
    """The artefact's place is taken by a folder after the check: what went before it is taken back."""
    artefact, manifest = tmp_path / "a", tmp_path / "a.json"
    for before in (None, b"older"):
        if before is not None:
            manifest.write_bytes(before)
        with pytest.raises(OutputNotWritten, match="a was not written: it is a folder"), published(artefact) as draft:
            draft.write_bytes(b"new")
            draft.with_name("a.json").write_bytes(b"newer")
            artefact.mkdir(exist_ok=True)
        artefact.rmdir()
        assert contents(tmp_path) == ({} if before is None else {"a.json": before})


@pytest.mark.parametrize("links", [True, False])
def test_published_takes_all_or_nothing(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """With the earlier files kept by a second name or, where there is no such thing, as copies."""
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    artefact = tmp_path / "a"
    for name in ("a", "a.log"):
        (tmp_path / name).write_bytes(b"older " + name.encode())
    before = contents(tmp_path)
    trap = Trap("replace", tmp_path, 3, full)
    with monkeypatch.context() as patched, pytest.raises(OutputNotWritten):  # noqa: SIM117 - the trap is set inside
        with published(artefact) as draft:
            for name in ("a", "a.log", "a.onnx"):
                draft.with_name(name).write_bytes(b"newer")
            trap.into(patched, "replace")
    assert contents(tmp_path) == before
    with published(artefact) as draft:
        for name in ("a", "a.log", "a.onnx"):
            draft.with_name(name).write_bytes(b"newer")
    assert contents(tmp_path) == dict.fromkeys(("a", "a.log", "a.onnx"), b"newer")


def test_published_gives_an_earlier_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact = tmp_path / "a.package"
    _fill(artefact)
    (artefact / "old").write_bytes(b"older")
    before = contents(tmp_path)
    for writes in (1, 2, 3):
        trap = Trap("replace", tmp_path, writes, full)
        with monkeypatch.context() as patched, pytest.raises(OutputNotWritten):  # noqa: SIM117 - as above
            with published(artefact) as draft:
                _fill(draft)
                trap.into(patched, "replace")
        assert contents(tmp_path) == before
    with published(artefact) as draft:
        _fill(draft)
    assert contents(tmp_path) == {"a.package/new": b"newer", "a.package.log": b"newer"}


def test_published_does_not_put_a_file_in_a_folders_place(tmp_path: Path) -> None:
    artefact = tmp_path / "a"
    _fill(artefact)
    before = contents(tmp_path)
    with pytest.raises(OutputNotWritten, match="it is a folder"), published(artefact) as draft:
        draft.write_bytes(b"new")
    assert contents(tmp_path) == before


def _fill(draft: Path) -> None:
    draft.mkdir()
    (draft / "new").write_bytes(b"newer")
    draft.with_name(f"{draft.name}.log").write_bytes(b"newer")
