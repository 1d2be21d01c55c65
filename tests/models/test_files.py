"""Outputs are whole or absent, and a refused one is one clear line."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from nextvit_models.errors import OutputNotWritten
from nextvit_models.files import atomic_path, atomic_write, sha256_of, size_of


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_write_makes_parents_and_leaves_only_the_file(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "model.onnx"
    atomic_write(target, b"\x00weights")
    assert target.read_bytes() == b"\x00weights"
    assert names(target.parent) == ["model.onnx"]


def test_nothing_is_visible_under_the_name_before_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_bytes(b"old")
    with atomic_path(target) as sibling:
        sibling.write_bytes(b"new")
        assert sibling.parent == tmp_path
        assert sibling.name.startswith(".model.onnx.tmp-")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("failure", [ValueError("x"), KeyboardInterrupt(), OSError(errno.EPIPE, "pipe")])
def test_a_failure_keeps_the_old_file_and_removes_the_new_one(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "model.onnx"
    target.write_bytes(b"old")
    with pytest.raises(type(failure)) as caught, atomic_path(target) as sibling:
        sibling.write_bytes(b"half")
        raise failure
    assert caught.value is failure
    assert names(tmp_path) == ["model.onnx"]
    assert target.read_bytes() == b"old"


def test_a_half_written_folder_is_removed_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), atomic_path(tmp_path / "model.package") as sibling:
        sibling.mkdir()
        (sibling / "weights").write_bytes(b"half")
        raise ValueError("broken")
    assert names(tmp_path) == []


def test_a_folder_takes_its_name_whole(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "model.package") as sibling:
        sibling.mkdir()
        (sibling / "weights").write_bytes(b"all")
    assert (tmp_path / "model.package" / "weights").read_bytes() == b"all"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "no space left on the disk; free some or choose another output"),
        (errno.EROFS, "the file system is read-only; choose another output"),
        (errno.EACCES, "no permission to write there; choose another output"),
    ],
)
def test_a_refused_write_is_one_line_with_a_remedy(tmp_path: Path, code: int, says: str) -> None:
    target = tmp_path / "model.onnx"
    with pytest.raises(OutputNotWritten) as caught, atomic_path(target) as sibling:
        sibling.write_bytes(b"half")
        raise OSError(code, os.strerror(code))
    assert str(caught.value) == f"{target} was not written: {says}"
    assert names(tmp_path) == []


def test_the_disk_really_full(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OutputNotWritten, match="no space left"), atomic_path(tmp_path / "model.onnx") as sibling:
        sibling.symlink_to("/dev/full")
        sibling.write_bytes(b"bytes that do not fit")
    assert names(tmp_path) == []


@pytest.mark.parametrize("below", ["model.onnx", "deeper/model.onnx"])
def test_a_file_in_place_of_a_folder(tmp_path: Path, below: str) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(OutputNotWritten, match="a part of the path is a file"):
        atomic_write(tmp_path / "taken" / below, b"data")
    assert (tmp_path / "taken").read_bytes() == b""


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(OutputNotWritten, match="it is a folder; name a file"):
        atomic_write(tmp_path / "model.onnx", b"data")
    assert names(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("path", ["/", "..", "."])
def test_a_path_without_a_name(path: str) -> None:
    with pytest.raises(OutputNotWritten, match="name a file"):
        atomic_write(Path(path), b"data")


def test_a_name_too_long(tmp_path: Path) -> None:
    with pytest.raises(OutputNotWritten, match="the name is too long"):
        atomic_write(tmp_path / ("n" * 300), b"data")


def test_trouble_with_another_file_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    other = tmp_path / "input.bin"
    with pytest.raises(PermissionError), atomic_path(tmp_path / "model.onnx"):
        raise PermissionError(errno.EACCES, "Permission denied", str(other))
    assert names(tmp_path) == []


def test_trouble_inside_a_folder_output_is_about_the_output(tmp_path: Path) -> None:
    with pytest.raises(OutputNotWritten, match="the file is too large"), atomic_path(tmp_path / "out") as sibling:
        sibling.mkdir()
        raise OSError(errno.EFBIG, "File too large", str(sibling / "weights" / "blob.bin"))
    assert names(tmp_path) == []


def test_sha256_reads_beyond_one_chunk(tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192 + b"tail"
    (tmp_path / "f").write_bytes(data)
    assert sha256_of(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_a_folders_hash_sees_bytes_names_and_places(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, bytes]) -> Path:
        for path, data in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_bytes(data)
        return tmp_path / name

    one = folder("one", {"a": b"1", "b/c": b"23"})
    assert sha256_of(one) == sha256_of(folder("same", {"b/c": b"23", "a": b"1"}))
    others = [{"a": b"1", "b/c": b"24"}, {"a": b"1", "b/d": b"23"}, {"a": b"1", "c": b"23"}, {"a": b"1"}, {"a": b"123"}]
    hashes = {sha256_of(folder(f"other{number}", files)) for number, files in enumerate(others)}
    assert len(hashes | {sha256_of(one)}) == 1 + len(others)
    assert size_of(one) == 3
    assert size_of(one / "b" / "c") == 2
