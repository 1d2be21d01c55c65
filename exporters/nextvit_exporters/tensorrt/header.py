"""What an engine file says of itself before anyone loads it: who built it, with what version, for which GPU.

Both TensorRTs open a file alike: a tag of four bytes, the layout's number, and at byte 24 the version (NVIDIA's own
trtexec reads it there). What TensorRT-RTX keeps beside it (size at 16, a bit for each compute capability at 32,
bytes of weights at 56) is not documented; it was read off engines built for one capability at a time, and
holds for layout 0.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.tensorrt.backends import BACKENDS, sm

_LENGTH: Final = 64
_CAPABILITY_BITS: Final = {1: (7, 5), 2: (8, 0), 4: (8, 6), 8: (8, 9), 16: (12, 0)}


@dataclass(frozen=True, slots=True)
class EngineHeader:
    """``capabilities`` and ``weights`` (bytes) are None where the file does not tell."""

    backend: str
    version: str
    size: int
    capabilities: tuple[tuple[int, int], ...] | None
    weights: int | None

    @property
    def gpus(self) -> str:
        """``SM75``, or that the file does not say."""
        return "not in the file" if self.capabilities is None else ", ".join(sm(each) for each in self.capabilities)


def read_header(path: Path) -> EngineHeader:
    """Read the first bytes of an engine; raises BuildFailed when it is missing, cut short or no engine."""
    if not path.is_file():
        raise BuildFailed(f"there is no file {path}; give the path of an engine")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_LENGTH)
    found = next((each for each in BACKENDS.values() if head.startswith(each.magic)), None)
    if found is None or len(head) < _LENGTH:
        raise BuildFailed(f"{path.name} is not a TensorRT engine; give one that nextvit-export trt wrote")
    layout, version = struct.unpack_from("<I", head, 4)[0], ".".join(str(byte) for byte in head[24:28])
    if layout != 0:
        raise BuildFailed(f"{path.name} has the unknown layout {layout}; a newer TensorRT wrote it")
    if not found.tells_gpus:
        return EngineHeader(found.name, version, size, None, None)
    (length,) = struct.unpack_from("<Q", head, 16)
    (weights,) = struct.unpack_from("<Q", head, 56)
    if length != size:
        raise BuildFailed(f"{path.name} should hold {length} bytes and holds {size}; copy or build it again")
    capabilities = tuple(each for bit, each in _CAPABILITY_BITS.items() if head[32] & bit)
    return EngineHeader(found.name, version, size, capabilities, weights)
