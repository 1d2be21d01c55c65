from __future__ import annotations

import struct
from pathlib import Path

import pytest

from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.tensorrt.header import EngineHeader, read_header


def engine(magic: bytes = b"vtrt", layout: int = 0, version: bytes = b"\x01\x07\x01\x74", bits: int = 1) -> bytearray:
    data = bytearray(1000)
    data[:4] = magic
    struct.pack_into("<I", data, 4, layout)
    struct.pack_into("<Q", data, 16, len(data))
    data[24:28] = version
    data[32] = bits
    struct.pack_into("<Q", data, 56, 640)
    return data


def header_of(data: bytes | bytearray, folder: Path) -> EngineHeader:
    path = folder / "x.engine"
    path.write_bytes(data)
    return read_header(path)


@pytest.mark.parametrize(
    ("bits", "capabilities", "gpus"),
    [
        (1, ((7, 5),), "SM75"),
        (4, ((8, 6),), "SM86"),
        (5, ((7, 5), (8, 6)), "SM75, SM86"),
        (16, ((12, 0),), "SM120"),
        (0, (), ""),
    ],
)
def test_tensorrt_rtx_tells_its_gpus(tmp_path: Path, bits: int, capabilities: tuple[object, ...], gpus: str) -> None:
    header = header_of(engine(bits=bits), tmp_path)
    assert header == EngineHeader("tensorrt-rtx", "1.7.1.116", 1000, capabilities, 640)  # type: ignore[arg-type]
    assert header.gpus == gpus


def test_tensorrt_tells_its_version_alone(tmp_path: Path) -> None:
    header = header_of(engine(b"ftrt", version=bytes([10, 13, 3, 9])), tmp_path)
    assert header == EngineHeader("tensorrt", "10.13.3.9", 1000, None, None)
    assert header.gpus == "not in the file"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "x.engine is not a TensorRT engine"),
        (b"vtrt", "x.engine is not a TensorRT engine"),
        (bytes(1000), "x.engine is not a TensorRT engine"),
        (b"\x89PNG" * 100, "x.engine is not a TensorRT engine"),
        (bytes(engine()[:-1]), "x.engine should hold 1000 bytes and holds 999; copy or build it again"),
        (bytes(engine(layout=7)), "x.engine has the unknown layout 7; a newer TensorRT wrote it"),
    ],
)
def test_what_is_no_whole_engine_is_one_line(tmp_path: Path, data: bytes, says: str) -> None:
    with pytest.raises(BuildFailed) as refusal:
        header_of(data, tmp_path)
    assert str(refusal.value).startswith(says)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match=r"there is no file .*gone\.engine; give the path of an engine"):
        read_header(tmp_path / "gone.engine")
