"""The constants of a package that are too large for its program: ``weight.bin``, MIL's blob storage, version 2.

A header of 64 bytes (``uint32`` blobs, ``uint32`` version), then for each blob 64 bytes about it, at the offset that
the program names (``uint32`` 0xDEADBEEF, ``uint32`` dtype, ``uint64`` bytes, ``uint64`` where they are, ``uint64``
unused bits at their end), and the bytes themselves, from a multiple of 64. Whole numbers of fewer than eight bits are
packed one after the other, lowest bit first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nextvit_exporters.coreml.program import TensorType
from nextvit_exporters.errors import BuildFailed, NotExecutable

ALIGNMENT: Final = 64
"""Everything in the file starts at a multiple of this, in bytes."""
SENTINEL: Final = 0xDEADBEEF
VERSION: Final = 2
BITS: Final[Mapping[str, int]] = MappingProxyType(
    {"uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "int4": 4, "uint6": 6}
)
"""The whole numbers that are packed, with their width."""
CODES: Final[Mapping[int, str]] = MappingProxyType(
    {
        1: "float16",
        2: "float32",
        3: "uint8",
        4: "int8",
        5: "bfloat16",
        6: "int16",
        7: "uint16",
        8: "int4",
        9: "uint1",
        10: "uint2",
        11: "uint4",
        12: "uint3",
        13: "uint6",
        14: "int32",
        15: "uint32",
        16: "float8e4m3fn",
        17: "float8e5m2",
    }
)
"""dtypes by their number in the file."""
UNREADABLE: Final = ("bfloat16", "float8e4m3fn", "float8e5m2")
"""The dtypes that NumPy lacks."""
_HEADER: Final = struct.Struct("<II")
_ABOUT: Final = struct.Struct("<IIQQQ")
_UNPACKED_AT_A_TIME: Final = 1 << 22
"""Packed numbers, a multiple of eight; each of their bits takes a byte meanwhile."""


def length_of(kind: TensorType) -> tuple[int, int]:
    """Bytes that a tensor of this type takes when stored, and unused bits in the last of them.

    Raises BuildFailed where an axis is open, NotExecutable for a dtype that NumPy lacks.
    """
    count = math.prod(known_shape(kind))
    if kind.dtype in UNREADABLE:
        raise NotExecutable(f"constants of dtype {kind.dtype} can't be read here")
    bits = BITS.get(kind.dtype)
    if bits is None:
        return count * np.dtype(kind.dtype).itemsize, 0
    return -(-count * bits // 8), -count * bits % 8


def known_shape(kind: TensorType) -> tuple[int, ...]:
    """The shape of a constant; raises BuildFailed where an axis of it is open."""
    shape = tuple(size for size in kind.shape if size is not None)
    if len(shape) != len(kind.shape):
        raise BuildFailed("a constant's shape has an open axis; export it again")
    return shape


def array_of(data: bytes | memoryview, kind: TensorType) -> NDArray[Any]:
    """Stored bytes, exactly as many as ``length_of`` says, as a read-only array of ``kind``'s shape.

    A view of ``data``, except for packed numbers: those are unpacked into uint8, ``int4`` into int8.
    """
    shape, bits = known_shape(kind), BITS.get(kind.dtype)
    if bits is None:
        found: NDArray[Any] = np.frombuffer(data, np.dtype(kind.dtype).newbyteorder("<"))
    else:
        found = _unpack(np.frombuffer(data, np.uint8), bits, math.prod(shape))
        if kind.dtype == "int4":
            found = (found ^ 8).view(np.int8) - np.int8(8)
    found = found.reshape(shape)
    found.flags.writeable = False
    return found


def _unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """Whole numbers of ``bits`` bits, lowest first, one to a byte: uint8 of shape (count,)."""
    found = np.empty(count, np.uint8)
    for start in range(0, count, _UNPACKED_AT_A_TIME):
        stop = min(start + _UNPACKED_AT_A_TIME, count)
        part = packed[start * bits // 8 : -(-stop * bits // 8)]
        single = np.unpackbits(part, count=(stop - start) * bits, bitorder="little").reshape(-1, bits)
        found[start:stop] = np.packbits(single, axis=1, bitorder="little")[:, 0]
    return found


class Blobs:
    """A ``weight.bin`` that is read blob by blob; ``name`` is what messages call it, ``data`` None if it is missing.

    Raises BuildFailed where the header is not that of such a file.
    """

    def __init__(self, name: str, data: bytes | None) -> None:
        self._name = name
        self._data = None if data is None else memoryview(data)
        self._ends: dict[int, int] = {}
        self._read: dict[int, NDArray[Any]] = {}
        self._count = 0
        if self._data is None:
            return
        if len(self._data) < ALIGNMENT:
            raise self._damaged(f"holds {len(self._data)} bytes, too few for its header of {ALIGNMENT}")
        self._count, version = _HEADER.unpack_from(self._data)
        if version != VERSION:
            raise self._damaged(f"is of version {version}, not {VERSION}")
        if any(self._data[_HEADER.size : ALIGNMENT]):
            raise self._damaged("has a header that is not zero after the version")

    def read(self, offset: int, kind: TensorType) -> NDArray[Any]:
        """The blob whose description is at ``offset``, as a read-only array of ``kind``'s shape.

        Nothing is allocated before the file is known to hold it. Raises BuildFailed where the two don't agree,
        NotExecutable for a dtype that can't be read.
        """
        if kind.dtype not in CODES.values():
            raise self._damaged(f"can't hold {kind.dtype}, which the program reads from it")
        length, unused = length_of(kind)
        start = self._find(offset, kind.dtype, length, unused)
        known = self._read.get(offset)
        if known is None:
            known = array_of(self._bytes()[start : start + length], kind)
            self._read[offset] = known
            self._ends[offset] = start + length
        return known.reshape(known_shape(kind))

    def finish(self) -> None:
        """To be called when every blob was read: none may be left over, overlap another, or be cut off.

        coremltools writes exactly the blobs that its program reads, one after the other, and nothing behind the last.
        """
        if self._data is None:
            return
        if self._count != len(self._ends):
            raise self._damaged(f"counts {self._count} blobs, of which the program reads {len(self._ends)}")
        places = sorted(self._ends.items())
        for (first, end), (second, _) in pairwise(places):
            if end > second:
                raise self._damaged(f"has a blob at {first} that reaches into the one at {second}")
        end = places[-1][1] if places else ALIGNMENT
        if len(self._data) != end:
            raise self._damaged(f"goes on for {len(self._data) - end} bytes after its last blob")

    def _find(self, offset: int, dtype: str, length: int, unused: int) -> int:
        """Where a blob's bytes start, when what is said of them is what the program says."""
        data = self._bytes()
        if offset % ALIGNMENT or offset < ALIGNMENT:
            raise self._damaged(f"can't have a blob at {offset}, which is no multiple of {ALIGNMENT} behind the header")
        if offset + ALIGNMENT > len(data):
            raise self._damaged(f"holds {len(data)} bytes, and the program reads a blob at {offset}")
        sentinel, code, found, start, spare = _ABOUT.unpack_from(data, offset)
        where = f"the blob at {offset}"
        if sentinel != SENTINEL:
            raise self._damaged(f"has no blob at {offset}: it starts with {sentinel:#010x}, not {SENTINEL:#010x}")
        if CODES.get(code) != dtype:
            raise self._damaged(f"says of {where} that it is {CODES.get(code, f'of dtype {code}')}, not {dtype}")
        if (found, spare) != (length, unused):
            raise self._damaged(f"says of {where} that it takes {found * 8 - spare} bits, not {length * 8 - unused}")
        if start % ALIGNMENT or start < offset + ALIGNMENT:
            raise self._damaged(f"says of {where} that its bytes are at {start}, which can't be")
        if start + length > len(data):
            raise self._damaged(f"holds {len(data)} bytes, and {where} ends at {start + length}")
        return int(start)

    def _bytes(self) -> memoryview:
        if self._data is None:
            raise BuildFailed(f"{self._name} is missing; copy the package whole or export it again")
        return self._data

    def _damaged(self, what: str) -> BuildFailed:
        return BuildFailed(f"{self._name} {what}; copy or export it again")
