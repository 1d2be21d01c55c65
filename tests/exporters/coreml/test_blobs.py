"""``weight.bin``: what coremltools' own writer puts there is read, and everything else is refused by name."""

from __future__ import annotations

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nextvit_exporters.coreml.blobs import BITS, CODES, Blobs
from nextvit_exporters.coreml.loading import part
from nextvit_exporters.coreml.program import TensorType
from nextvit_exporters.errors import BuildFailed, NotExecutable

FLOATS = TensorType("float32", (3, 4))
HALVES = TensorType("float16", (5,))
WRITERS = {
    "float16": "fp16",
    "float32": "float",
    **{each: each for each in ("int8", "uint8", "int16", "uint16", "int32", "uint32", *BITS)},
}


def about(code: int, length: int, start: int, unused: int = 0, sentinel: int = 0xDEADBEEF) -> bytes:
    return struct.pack("<IIQQQ", sentinel, code, length, start, unused).ljust(64, b"\0")


def file_of(*blobs: bytes, count: int | None = None, version: int = 2) -> bytes:
    """Two blobs by default: twelve float32 at 64, five float16 at 192."""
    blobs = blobs or (
        about(2, 48, 128) + np.arange(12, dtype="<f4").tobytes().ljust(64, b"\0"),
        about(1, 10, 256) + np.arange(5, dtype="<f2").tobytes(),
    )
    return struct.pack("<II", len(blobs) if count is None else count, version).ljust(64, b"\0") + b"".join(blobs)


def read_both(data: bytes | None) -> tuple[NDArray[Any], NDArray[Any]]:
    blobs = Blobs("weight.bin", data)
    found = blobs.read(64, FLOATS), blobs.read(192, HALVES)
    blobs.finish()
    return found


def test_constants_are_read_only_views() -> None:
    data = file_of()
    floats, halves = read_both(data)
    assert floats.tolist() == np.arange(12).reshape(3, 4).tolist()
    assert halves.tolist() == [0, 1, 2, 3, 4]
    assert np.shares_memory(floats, np.frombuffer(data, np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        floats[0, 0] = 1


@pytest.mark.skipif(find_spec("coremltools") is None, reason="coremltools has no wheel for this platform")
@pytest.mark.parametrize("dtype", WRITERS)
@pytest.mark.parametrize("count", [1, 7, 64, 1001])
def test_coremltools_blobs_come_back(dtype: str, count: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(count)
    bits, first = BITS.get(dtype), generator.normal(size=12).astype(np.float32)
    if bits is not None:
        low, high = (-8, 8) if dtype == "int4" else (0, 2**bits)
        values = generator.integers(low, high, count, dtype=np.int8 if dtype == "int4" else np.uint8)
    elif dtype.startswith("float"):
        values = generator.normal(size=count).astype(dtype)
    else:
        limits = np.iinfo(dtype)
        values = generator.integers(limits.min, limits.max, count, dtype=dtype, endpoint=True)
    path = tmp_path / "weight.bin"
    writer = part("libmilstoragepython")._BlobStorageWriter(str(path))
    offsets = [writer.write_float_data(first), 0, writer.write_float_data(first)]
    written = values.view(np.uint16) if dtype == "float16" else values
    offsets[1] = getattr(writer, f"write_{WRITERS[dtype]}_data")(written)
    del writer

    blobs = Blobs("weight.bin", path.read_bytes())
    found = blobs.read(offsets[1], TensorType(dtype, (count, 1)))
    assert found.dtype == values.dtype
    assert not found.flags.writeable
    np.testing.assert_array_equal(found[:, 0], values)
    for offset in (offsets[0], offsets[2]):
        np.testing.assert_array_equal(blobs.read(offset, TensorType("float32", (12,))), first)
    blobs.finish()


def test_a_blob_may_be_read_twice_with_another_shape() -> None:
    blobs = Blobs("weight.bin", file_of())
    assert blobs.read(64, FLOATS).shape == (3, 4)
    assert blobs.read(64, TensorType("float32", (12,))).shape == (12,)
    blobs.read(192, HALVES)
    blobs.finish()


def test_nothing_is_needed_where_nothing_is_read() -> None:
    Blobs("weight.bin", None).finish()
    Blobs("weight.bin", file_of(b"", count=0)).finish()


DAMAGES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "is missing"),
    "empty": (b"", "holds 0 bytes, too few for its header"),
    "a header alone": (file_of()[:64], "holds 64 bytes, and the program reads a blob at 64"),
    "half": (file_of()[: len(file_of()) // 2], "holds 133 bytes, and the blob at 64 ends at 176"),
    "one byte short": (file_of()[:-1], "holds 265 bytes, and the blob at 192 ends at 266"),
    "one byte more": (file_of() + b"\0", "goes on for 1 bytes after its last blob"),
    "another version": (file_of(version=1), "is of version 1, not 2"),
    "a header with something else": (file_of()[:8] + b"\1" + file_of()[9:], "header that is not zero"),
    "a blob too many": (file_of(count=3), "counts 3 blobs, of which the program reads 2"),
    "a blob too few": (file_of(count=1), "counts 1 blobs, of which the program reads 2"),
    "sentinel": (
        file_of(about(2, 48, 128, sentinel=0xDEADBEEE) + bytes(64)),
        "no blob at 64: it starts with 0xdeadbeee",
    ),
    "dtype": (file_of(about(1, 48, 128) + bytes(64)), "the blob at 64 that it is float16, not float32"),
    "unknown dtype": (file_of(about(99, 48, 128) + bytes(64)), "of dtype 99, not float32"),
    "length": (file_of(about(2, 44, 128) + bytes(64)), "takes 352 bits, not 384"),
    "unused bits": (file_of(about(2, 48, 128, unused=4) + bytes(64)), "takes 380 bits, not 384"),
    "vast length": (file_of(about(2, 2**62, 128) + bytes(64)), "not 384"),
    "place not aligned": (file_of(about(2, 48, 132) + bytes(64)), "its bytes are at 132"),
    "place in the header": (file_of(about(2, 48, 0) + bytes(64)), "its bytes are at 0"),
    "place on its own description": (file_of(about(2, 48, 64) + bytes(64)), "its bytes are at 64"),
    "place far away": (file_of(about(2, 48, 2**63) + bytes(64)), f"ends at {2**63 + 48}"),
    "place in the next blob": (
        file_of(about(2, 48, 256) + bytes(64), about(1, 10, 256) + bytes(64)),
        "a blob at 64 that reaches into the one at 192",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str) -> None:
    data, reason = DAMAGES[damage]
    with pytest.raises(BuildFailed) as refusal:
        read_both(data)
    assert str(refusal.value).startswith("weight.bin ")
    assert reason in str(refusal.value)


@pytest.mark.parametrize("offset", [0, 32, 65, 128, 320, 2**40, 2**63 - 64])
def test_there_is_no_blob_elsewhere(offset: int) -> None:
    with pytest.raises(BuildFailed, match=r"^weight\.bin "):
        Blobs("weight.bin", file_of()).read(offset, FLOATS)


@pytest.mark.parametrize("shape", [(2**31 - 1,), (2**31 - 1,) * 8, (2**62,), (0,), (3, 4, 2)])
@pytest.mark.parametrize("dtype", ["float32", "uint1", "int8"])
def test_a_declared_size_is_never_allocated(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(BuildFailed, match="the blob at 64"):
        Blobs("weight.bin", file_of()).read(64, TensorType(dtype, shape))


def test_types_that_no_blob_has() -> None:
    blobs = Blobs("weight.bin", file_of())
    for dtype in ("string", "bool", "float64", "int64", "dictionary"):
        with pytest.raises(BuildFailed, match=f"can't hold {dtype}"):
            blobs.read(64, TensorType(dtype, (12,)))
    with pytest.raises(BuildFailed, match="open axis"):
        blobs.read(64, TensorType("float32", (None, 4)))
    for dtype in ("bfloat16", "float8e4m3fn", "float8e5m2"):
        with pytest.raises(NotExecutable, match=dtype):
            blobs.read(64, TensorType(dtype, (24,)))


@pytest.mark.parametrize("dtype", ["uint3", "int4"])
def test_many_packed_numbers_are_unpacked_piece_by_piece(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, bits = np.random.default_rng(1), BITS[dtype]
    raw = generator.integers(0, 2**bits, 1000, dtype=np.uint8)
    spread = np.unpackbits(raw[:, None], axis=1, bitorder="little")[:, :bits]
    packed = np.packbits(spread.reshape(-1), bitorder="little").tobytes()
    code = next(key for key, value in CODES.items() if value == dtype)
    data = file_of(about(code, len(packed), 128, len(packed) * 8 - 1000 * bits) + packed)
    monkeypatch.setattr("nextvit_exporters.coreml.blobs._UNPACKED_AT_A_TIME", 24)
    found = Blobs("weight.bin", data).read(64, TensorType(dtype, (1000,)))
    expected = np.where(raw >= 8, raw.astype(np.int16) - 16, raw) if dtype == "int4" else raw
    np.testing.assert_array_equal(found, expected)
