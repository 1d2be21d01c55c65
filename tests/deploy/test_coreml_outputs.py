"""A package, its log and its manifest come whole or not at all, and in silence; what can't be is refused in a line."""

from __future__ import annotations

import gc
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from nextvit_deploy.manifest import manifest_path
from nextvit_exporters import to_coreml
from nextvit_exporters.coreml.loading import part
from nextvit_exporters.coreml.program import MANIFEST_JSON, MODEL, WEIGHTS
from nextvit_exporters.files import atomic_path, atomic_write, sha256_of
from nextvit_exporters.spec import Artifact
from nextvit_exporters.to_coreml import log_of
from tests.deploy.support import Exported, Ran, call, contents, refusal, run
from tests.deploy.support_coreml import STEM, needs_coremltools
from tests.deploy.test_outputs import (
    Trap,
    below_a_file,
    full,
    interrupted,
    largest_file,
    name_too_long,
    unnamed,
    where_the_system_refuses,
)

pytestmark = [needs_coremltools, pytest.mark.usefixtures("quick")]
NAME: Final = f"{STEM}.mlpackage"
TWO: Final = ("--count", "2")


class PackageAsBefore:
    """Stands in for the build: copies a package and its log, so that only the rest of an export takes time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def build(self, spec: object, module: object, path: Path, *_: object) -> Artifact:
        del spec, module
        with atomic_path(path) as sibling:
            shutil.copytree(self.path, sibling)
        atomic_write(log_of(path), log_of(self.path).read_bytes())
        return Artifact.of(path)


@pytest.fixture
def as_before(package: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the demo that leave out coremltools: all the rest of them is real."""
    monkeypatch.setattr(to_coreml, "build", PackageAsBefore(package.path).build)


@pytest.fixture
def earlier(package: Exported, tmp_path: Path) -> dict[str, bytes]:
    """A folder ``out`` that holds an older package with what is beside it, and something of the user's own."""
    out = tmp_path / "out"
    shutil.copytree(package.path.parent, out)
    (out / NAME / MODEL).write_bytes(b"an older model")
    log_of(out / NAME).write_bytes(b"an older log")
    manifest_path(out / NAME).write_bytes(b"{}")
    (out / "notes.txt").write_bytes(b"mine")
    return contents(tmp_path)


def test_another_process_and_folder_give_the_same_bytes_in_silence(package: Exported, tmp_path: Path) -> None:
    """As the installed program runs it; what coremltools says goes to the log alone."""
    assert run("coreml", "-o", tmp_path / "else" / "where", "-q", *TWO) == Ran(0, "", "")
    path = tmp_path / "else" / "where" / NAME
    assert contents(path) == contents(package.path)
    log = log_of(path).read_text(encoding="utf-8")
    assert "has not been tested with coremltools" in log
    for place in (str(tmp_path), str(Path.home()), str(Path(__file__).parents[2])):
        assert place not in log
        assert place.encode() not in b"".join(contents(path).values())


def test_an_export_replaces_an_earlier_one_and_nothing_else(
    package: Exported, tmp_path: Path, earlier: dict[str, bytes]
) -> None:
    """Built once more in this process, whatever coremltools numbered in it: the same bytes again."""
    part("converters.mil.mil.builder").Builder.name_count["linear"] += 7
    ran = call("coreml", "-o", tmp_path / "out", "--json")
    assert (ran.status, ran.err) == (0, "")
    after = contents(tmp_path)
    assert after.keys() == earlier.keys()
    assert after["out/notes.txt"] == b"mine"
    assert contents(tmp_path / "out" / NAME) == contents(package.path)
    assert ran.json["artifact"]["sha256"] == sha256_of(package.path) == sha256_of(tmp_path / "out" / NAME)
    assert b"older" not in b"".join(after.values())


def foreign(place: Path, package: Path) -> None:
    del package
    place.mkdir()
    (place / "notes.txt").write_text("mine")


def beside_a_package(place: Path, package: Path) -> None:
    shutil.copytree(package, place)
    (place / "Data" / "notes.txt").write_text("mine")


def a_file(place: Path, package: Path) -> None:
    del package
    place.write_text("mine")


def a_link(place: Path, package: Path) -> None:
    place.symlink_to(package, target_is_directory=True)


@pytest.mark.parametrize(
    ("way", "says"),
    [
        (foreign, " is there and is no Core ML package of this program; empty it or choose another"),
        (beside_a_package, " holds Data/notes.txt besides the Core ML package; move it away or choose another folder"),
        (a_file, " is there and is no folder; choose another for the Core ML package"),
        (a_link, " is there and is no folder; choose another for the Core ML package"),
    ],
)
def test_what_is_not_ours_is_left_alone(
    package: Exported, tmp_path: Path, way: Callable[[Path, Path], None], says: str
) -> None:
    way(tmp_path / NAME, package.path)
    before = contents(tmp_path), sorted(tmp_path.iterdir())
    assert refusal("coreml", "-o", tmp_path) == f"{tmp_path / NAME}{says}"
    assert (contents(tmp_path), sorted(tmp_path.iterdir())) == before


@pytest.mark.parametrize("suffix", [".json", ".log"])
def test_a_folder_in_the_way(tmp_path: Path, as_before: None, suffix: str) -> None:
    del as_before
    way = tmp_path / f"{NAME}{suffix}"
    way.mkdir()
    (way / "kept").write_text("kept")
    line = refusal("coreml", "-o", tmp_path, *TWO)
    assert line.startswith(str(way))
    assert "folder" in line
    assert contents(tmp_path) == {f"{way.name}/kept": b"kept"}


def test_an_empty_folder_may_be_filled(tmp_path: Path, as_before: None, package: Exported) -> None:
    del as_before
    (tmp_path / NAME).mkdir()
    assert call("coreml", "-o", tmp_path, "-q", *TWO) == Ran(0, "", "")
    assert contents(tmp_path / NAME) == contents(package.path)


@pytest.mark.parametrize("place", [below_a_file, where_the_system_refuses, name_too_long])
def test_a_folder_that_cannot_be_written(tmp_path: Path, place: Callable[[Path], Path]) -> None:
    folder = place(tmp_path)
    before = contents(tmp_path)
    line = refusal("coreml", "-o", folder)
    assert line.startswith(str(folder))
    assert "; choose another" in line
    assert contents(tmp_path) == before


def trapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: Callable[[Path], BaseException], status: int
) -> tuple[int, str]:
    """An export whose ``number``-th renaming fails: how many there were, and what it said."""
    trap = Trap("replace", tmp_path / "out", number, error)
    with monkeypatch.context() as patched:
        trap.into(patched, "replace")
        ran = call("coreml", "-o", tmp_path / "out", "-q", *TWO)
    assert (ran.status, ran.out) == (status, "")
    return trap.calls, ran.err


RENAMINGS: Final = 8
"""Three files as they are made, an earlier folder out of the way, three to their places, and one of spare."""


@pytest.mark.parametrize("error", [full, unnamed, interrupted])
@pytest.mark.parametrize("number", range(1, RENAMINGS))
def test_a_failure_at_any_renaming_leaves_everything_as_it_was(
    tmp_path: Path,
    earlier: dict[str, bytes],
    as_before: None,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    error: Callable[[Path], BaseException],
) -> None:
    del as_before
    calls, line = trapped(tmp_path, monkeypatch, number, error, 130 if error is interrupted else 1)
    assert calls >= number
    assert contents(tmp_path) == earlier
    assert ("interrupted; nothing was written" if error is interrupted else " was not written: no space left") in line


def test_the_failures_above_are_all_there_are(
    tmp_path: Path, earlier: dict[str, bytes], as_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    del as_before
    calls, line = trapped(tmp_path, monkeypatch, 0, full, 0)
    assert (calls, line) == (RENAMINGS - 1, "")
    assert contents(tmp_path).keys() == earlier.keys()


def test_a_full_disk(tmp_path: Path) -> None:
    """A real one, of one MiB, where this system lets a test mount it: it fills up as coremltools copies weights."""
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    disk = tmp_path / "disk"
    disk.mkdir()
    if mount is None or unmount is None:
        pytest.skip("this system has no mount")
    command = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs more rights")
    try:
        (disk / "kept").write_text("kept")
        line = refusal("coreml", "-o", disk, *TWO)
        assert line == f"{disk / NAME} was not written: no space left on the disk; free some or choose another output"
        assert contents(disk) == {"kept": b"kept"}
    finally:
        subprocess.run([unmount, str(disk)], check=True)


@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
def test_a_temporary_folder_without_room(tmp_path: Path, earlier: dict[str, bytes]) -> None:
    """The kernel itself cuts the write short, of the weights that coremltools writes as it converts."""
    with largest_file(1 << 20):
        line = refusal("coreml", "-o", tmp_path / "out", *TWO)
    gc.collect()  # what coremltools leaves half-written, while the warning of it is ignored
    assert line.startswith("coremltools can't write to ")
    assert line.endswith("; free some space, or set TMPDIR to another folder")
    assert contents(tmp_path) == earlier


# Signals as a terminal's shell leaves them: a test run in the background, or under nohup, passes on ignored ones.
_AS_FROM_A_SHELL = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("nextvit_deploy", run_name="__main__")
"""


def test_interrupted_while_coremltools_converts(tmp_path: Path, earlier: dict[str, bytes]) -> None:
    """A real process on a real terminal; what coremltools keeps in the temporary folder goes as well."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _AS_FROM_A_SHELL, "coreml", "-o", str(tmp_path / "out"), *TWO],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env=os.environ | {"TERM": "xterm", "TMPDIR": str(temporary)},
    )
    os.close(terminal)
    shown = b""
    while b"coremltools: convert" not in shown:
        shown += os.read(screen, 4096)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=600)
    try:
        while more := os.read(screen, 4096):
            shown += more
    except OSError:  # what Linux says when nobody holds the other end any more
        pass
    os.close(screen)
    assert (process.returncode, out) == (130, b"")
    assert shown.rstrip().endswith(b"nextvit-export: interrupted; nothing was written")
    assert b"Traceback" not in shown
    left = [each.name for each in temporary.iterdir() if each.name != ".ses"]  # which ONNX Runtime writes
    assert left == []
    shutil.rmtree(temporary)
    assert contents(tmp_path) == earlier


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (("--logits", "--features"), 2, "Invalid value for the output: --logits and --features exclude each other"),
        (("--enumerated-sizes", "64,96", "--flexible", "64:96"), 1, "enumerated sizes and a range of sizes exclude"),
        (("--enumerated-sizes", "64", "--flexible", "64:96"), 1, "enumerated sizes and a range of sizes exclude"),
        (("--enumerated-sizes", "64"), 1, "one size alone is no choice; enumerate more, or give it as --size"),
        (("--enumerated-sizes", "64,16"), 1, "every size must be 32 or more"),
        (("--enumerated-sizes", "64,,96"), 2, "'' is not a size"),
        (("--flexible", "96:64"), 1, "96:64 is no range of sizes; write MIN:MAX"),
        (("--flexible", "96:128"), 1, "64x64 lies outside 96:128; give a --size within, or another range"),
        (("--flexible", "64"), 2, "'64' is no range of sides; write MIN:MAX such as 128:384"),
        (("--flexible", "64:20000"), 2, "'64:20000' is larger than 16384 pixels a side"),
        (("--size", "31"), 1, "31x31 is too small"),
        (("--sweep", "--weights", "int8"), 1, "--sweep builds every compression of the FP16 package; ask for none"),
        (("--sweep", "--precision", "fp32"), 1, "--sweep builds every compression of the FP16 package"),
        (("--sweep", "--swift", "app"), 1, "--swift goes with one package; ask for it with the compression that"),
        (("--swift", "app", "--features"), 1, "feature"),
        (("--ios", "14"), 1, "there is no target iOS 14; choose one of 15, 16, 17, 18, 26"),
        (("--ios", "new"), 2, "Invalid value for '--ios'"),
        (("--ios", "15", "--weights", "lut8"), 1, "lut8 weights need iOS 16; ask for --ios 16 or more"),
        (("--activations", "int8"), 1, "int8 activations need iOS 17; ask for --ios 17 or more"),
        (("--ios", "17", "--activations", "int8", "--weights", "lut4"), 1, "int8 activations go with int8 weights"),
        (("--weights", "int4"), 2, "Invalid value for '--weights'"),
        (("--precision", "fp32", "--weights", "int8"), 1, "int8 decompresses to FP16; ask for --precision fp16"),
        (("--precision", "int8"), 2, "Invalid value for '--precision'"),
        (("--batch", "2"), 1, "Core ML reads pictures one at a time; ask for --batch 1 or --input tensor"),
        (("--batch", "2", "--input", "tensor"), 1, "Core ML classifies one picture at a time"),
        (("--skip-pass", "fold-norm"), 1, "no pass is called 'fold-norm'; did you mean "),
        (("--images", "absent"), 1, "absent is not a folder"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], status: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refusal("coreml", *options, "-o", tmp_path / "out", status=status)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"a\nb\n", "2 labels for 10 classes; give one label per class"),
        (b"\n \n", "labels.txt holds no label; give a text file, one label a line"),
        (b"\n".join(b"%d" % number for number in range(11)), "11 labels for 10 classes; give one label per class"),
        (b"a\nb\nc\nd\ne\nf\ng\nh\ni\na\n", "the label 'a' is there twice, and Core ML returns one probability for"),
        (b"\xff\xfe\x00\x01", "labels.txt is not text in UTF-8; give a text file, one label a line"),
        (None, "labels.txt can't be read: No such file or directory; give a text file, one label a line"),
    ],
)
def test_labels_that_do_not_fit(tmp_path: Path, data: bytes | None, says: str) -> None:
    labels = tmp_path / "labels.txt"
    if data is not None:
        labels.write_bytes(data)
    before = contents(tmp_path)
    assert says in refusal("coreml", "--labels", labels, "-o", tmp_path / "out")
    assert contents(tmp_path) == before


def test_labels_that_are_a_folder(tmp_path: Path) -> None:
    assert "can't be read: Is a directory" in refusal("coreml", "--labels", tmp_path, "-o", tmp_path / "out")


def test_a_package_is_judged_by_itself(package: Exported, tmp_path: Path) -> None:
    """Without the manifest beside it, and without the log."""
    path = Path(shutil.copytree(package.path, tmp_path / NAME))
    ran = call("verify", path, "--json", *TWO)
    assert (ran.status, ran.err, ran.json["verdict"]) == (0, "", "verified")
    assert not any("has changed" in note for note in ran.json["notes"])
    assert sorted(contents(path)) == sorted([MANIFEST_JSON, MODEL, WEIGHTS])


def test_what_has_changed_since_is_noted(package: Exported, tmp_path: Path) -> None:
    path = Path(shutil.copytree(package.path, tmp_path / NAME))
    manifest_path(path).write_text('{"artifact": {"sha256": "of another"}}')
    notes = call("verify", path, "--json", *TWO).json["notes"]
    assert f"{NAME} has changed since {NAME}.json was written" in notes
