"""Whatever is wrong with what TensorRT is given: one line that says so, nothing written, and no crash below Python."""

from __future__ import annotations

import importlib.util
import random
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

from nextvit_exporters import to_onnx, to_tensorrt
from nextvit_exporters.tensorrt import choice
from nextvit_exporters.tensorrt.backends import load
from nextvit_exporters.to_tensorrt import log_of, onnx_of
from tests.deploy.support import Exported, call, contents, one_line, refusal
from tests.deploy.support_trt import STEM, OnnxAsBefore, beside, copied

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed; pip install 'nextvit-deploy[trt-rtx]'")
pytestmark = pytest.mark.usefixtures("quick")
PIP: Final = "pip install 'nextvit-deploy[trt-rtx]'"


@pytest.fixture
def onnx_as_before(engine: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the demo that leave out torch's exporter: all the rest of them is real."""
    monkeypatch.setattr(to_onnx, "build", OnnxAsBefore(onnx_of(engine.path).read_bytes()).build)


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (("--batch", "8:1:32"), 1, "8:1:32 is no range; write MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX"),
        (("--batch", "0"), 1, "is no range; write MIN:OPT:MAX"),
        (("--batch", "1:2"), 1, "'1:2' is no range; write one number, or MIN:OPT:MAX such as 1:8:32"),
        (("--batch", "many"), 1, "'many' is no range; write one number, or "),
        (("--batch", "-1"), 1, "'-1' is no range"),
        (("--size", "128:64:256"), 1, "128:64:256 is no range; write MIN:OPT:MAX"),
        (("--size", "16:64:128"), 1, "16x16 is too small; start the range at 32 or more"),
        (("--size", "64:64:64x32"), 1, "64:64:32 is no range"),
        (("--size", "31"), 1, "31x31 is too small"),
        (("--size", "64:96"), 2, "'64:96' is no range of sizes; write one size, or MIN:OPT:MAX such as 224:256:384"),
        (("--size", "64::96"), 2, "'' is not a size"),
        (("--size", "64:96:99999"), 2, "'99999' is larger than 16384 pixels a side"),
    ],
)
def test_a_range_that_is_none(tmp_path: Path, options: tuple[str, ...], status: int, says: str) -> None:
    assert says in refusal("trt", *options, "--output", tmp_path / "out", status=status)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--batch", "1:2:4"), f"{STEM}.onnx takes 1 images at a time; drop --batch, or export it open"),
        (("--batch", "2"), f"{STEM}.onnx takes 1 images at a time; drop --batch, or export it open"),
        (("--size", "64:64:96"), f"{STEM}.onnx reads 64x64; drop --size, or export it open"),
        (("--size", "96"), f"{STEM}.onnx reads 64x64; drop --size, or export it open"),
    ],
)
def test_a_range_for_a_file_without_one(engine: Exported, tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    assert refusal("trt", "--onnx", onnx_of(engine.path), *options, "--output", tmp_path / "out") == says
    assert list(tmp_path.iterdir()) == []


def no_bytes(_: bytes) -> bytes:
    return b""


def noise(_: bytes) -> bytes:
    return random.Random(0).randbytes(10_000)  # noqa: S311 - any bytes will do


def head_alone(data: bytes) -> bytes:
    return data[:40]


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def longer(data: bytes) -> bytes:
    return data + b"\x00"


def new_layout(data: bytes) -> bytes:
    return data[:4] + struct.pack("<I", 7) + data[8:]


ENGINES: dict[Callable[[bytes], bytes], str] = {
    no_bytes: "x.engine is not a TensorRT engine; give one that nextvit-export trt wrote",
    noise: "x.engine is not a TensorRT engine; give one that nextvit-export trt wrote",
    head_alone: "x.engine is not a TensorRT engine; give one that nextvit-export trt wrote",
    half: "x.engine should hold ",
    longer: "x.engine should hold ",
    new_layout: "x.engine has the unknown layout 7; a newer TensorRT wrote it",
}


@pytest.mark.parametrize("change", ENGINES)
def test_a_file_that_is_no_engine(engine: Exported, tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "x.engine"
    path.write_bytes(change(engine.path.read_bytes()))
    for command in ("inspect", "verify"):
        assert refusal(command, path).startswith(ENGINES[change])


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_an_engine_that_is_not_there(tmp_path: Path, command: str) -> None:
    (tmp_path / "folder.engine").mkdir()
    for name in ("absent.engine", "folder.engine"):
        assert refusal(command, tmp_path / name).startswith("there is no file ")


@pytest.mark.parametrize(
    ("offset", "value", "fact", "says"),
    [
        (32, 8, "for", "SM89"),
        (32, 3, "for", "SM75, SM80"),
        (32, 0, "for", ""),
        (25, 9, "built by", "tensorrt-rtx 1.9."),
        (24, 0, "built by", "tensorrt-rtx 0.7."),
    ],
)
def test_an_engine_for_another_gpu_or_version_is_told_and_not_loaded(
    engine: Exported, tmp_path: Path, offset: int, value: int, fact: str, says: str
) -> None:
    data = bytearray(engine.path.read_bytes())
    data[offset] = value
    path = tmp_path / "x.engine"
    path.write_bytes(data)
    assert str(call("inspect", path, "--json").json[fact]).startswith(says)
    assert call("inspect", path).status == 0


def test_a_log_that_is_damaged(engine: Exported, tmp_path: Path) -> None:
    """Its last line still vouches for the engine: what it lists can't be read, and that is said."""
    path = copied(engine, tmp_path)
    record = log_of(path).read_bytes().splitlines()[-1]
    log_of(path).write_bytes(b"nothing of use\n" + record)
    assert "lists no layers" in refusal("inspect", path)
    log_of(path).write_bytes(b"\xff\xfe\n" + record)
    one_line(call("inspect", path).err)
    log_of(path).write_bytes(b"")
    assert "is not beside it" in " ".join(call("inspect", path).out.split())
    assert refusal("verify", path, status=4).startswith("not verified: ")


def below_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("a file")
    return tmp_path / "file" / "exports"


def name_too_long(tmp_path: Path) -> Path:
    return tmp_path / ("x" * 300)


@pytest.mark.parametrize("place", [below_a_file, name_too_long])
@pytest.mark.parametrize("option", ["--output", "--kit", "--triton"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, place: Callable[[Path], Path], option: str) -> None:
    folder = place(tmp_path)
    before = contents(tmp_path)
    elsewhere = () if option == "--output" else ("--output", tmp_path / "out")
    line = refusal("trt", "--fp16", option, folder, *elsewhere)
    assert line.startswith((f"{folder} can't be ", f"{folder.parent} can't be "))
    assert "; choose another" in line
    assert contents(tmp_path) == before


@pytest.mark.parametrize("number", range(4))
def test_a_folder_in_the_way(tmp_path: Path, onnx_as_before: None, number: int) -> None:
    del onnx_as_before
    way = beside(tmp_path / f"{STEM}.engine")[number]
    way.mkdir()
    (way / "kept").write_text("kept")
    line = refusal("trt", "--fp16", "--output", tmp_path)
    assert line.startswith(str(way))
    assert "folder" in line
    assert contents(tmp_path) == {f"{way.name}/kept": b"kept"}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1 << 20, 1 << 22])
def test_a_file_larger_than_the_system_allows(
    engine: Exported, tmp_path: Path, onnx_as_before: None, size: int
) -> None:
    """The kernel itself cuts the write short, in the ONNX file or in the engine behind it."""
    del onnx_as_before
    assert onnx_of(engine.path).stat().st_size < 1 << 22 < engine.path.stat().st_size
    out = tmp_path / "out"
    out.mkdir()
    for file in beside(out / engine.path.name):
        file.write_bytes(b"older")
    before = contents(tmp_path)
    with largest_file(size):
        line = refusal("trt", "--fp16", "--output", out)
    assert "was not written: the file is too large for this file system" in line
    assert line.startswith(str(out / STEM))
    assert contents(tmp_path) == before


class Silent:
    """A TensorRT, or its builder, that does everything but build."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def Builder(self, listener: object) -> Silent:  # noqa: N802 - TensorRT's name
        return Silent(self._real.Builder(listener))

    def build_serialized_network(self, *_: object) -> None:
        return None


def test_a_builder_that_gives_nothing_and_no_reason(
    tmp_path: Path, onnx_as_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It returns None and never raises."""
    del onnx_as_before
    monkeypatch.setattr(to_tensorrt, "load", lambda which: Silent(load(which)))
    line = refusal("trt", "--fp16", "--output", tmp_path / "out")
    assert line == "tensorrt-rtx built nothing: it gave no reason"
    assert list(tmp_path.iterdir()) == []


def test_without_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(choice, "find_spec", lambda name: None if name.startswith("tensorrt") else find(name))
    assert refusal("trt", "--output", tmp_path / "out").endswith(f"run: {PIP}")
    assert refusal("trt", "--onnx", tmp_path / "x.onnx", "--output", tmp_path / "out").startswith("there is no file")
    assert list(tmp_path.iterdir()) == []


def test_an_engine_is_looked_at_without_tensorrt(engine: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)  # importing it now fails
    assert call("inspect", engine.path, "--json").json["for"] == "SM75"
    ran = call("verify", engine.path)
    assert ran.status == 4, "it says nothing of the engine"
    assert one_line(ran.err).endswith(f"run: {PIP}")


def test_a_tensorrt_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("tensorrt_rtx")
    vars(old).update(__version__="1.2.0.54", __spec__=ModuleSpec("tensorrt_rtx", None))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", old)
    line = refusal("trt", "--output", tmp_path / "out")
    assert line.startswith("tensorrt_rtx 1.2.0.54 is older than 1.4; run: pip install --upgrade ")
