"""Where an engine's tensors lie in memory and which profile serves a shape: numbers alone, no CUDA.

All tensors share one block of memory, on the GPU and page-locked on the host alike, each at its largest size, so that
memory is taken once and every shape of every profile fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from nextvit_exporters.errors import UnsupportedSpec

Shape = tuple[int, ...]

ALIGNMENT: Final = 256
"""Bytes; what cudaMalloc itself aligns to, and TensorRT asks of addresses."""

_DTYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "FLOAT": "float32",
        "HALF": "float16",
        "INT8": "int8",
        "UINT8": "uint8",
        "INT32": "int32",
        "INT64": "int64",
        "BOOL": "bool",
    }
)
_COLOURS: Final = 3


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or an output of an engine and its largest shape."""

    name: str
    dtype: np.dtype[Any]
    is_input: bool
    largest: Shape

    @property
    def size(self) -> int:
        """Bytes at the largest shape."""
        return math.prod(self.largest) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor's place in the block, in bytes."""

    tensor: Tensor
    offset: int


@dataclass(frozen=True, slots=True)
class BufferPlan:
    """Every tensor's place by name, and the size of the block in bytes."""

    slots: Mapping[str, Slot]
    size: int


@dataclass(frozen=True, slots=True)
class Profile:
    """The smallest, the best and the largest shape of each input that one optimisation profile takes."""

    index: int
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]

    def takes(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether every input's shape lies within the profile's."""
        return all(_within(shapes[name], low, high) for name, (low, _, high) in self.shapes.items())

    def distance(self, shapes: Mapping[str, Shape]) -> float:
        """How far the shapes are from those it is best at: the sum of the logarithms of the axes' ratios."""
        pairs = [
            (size, best)
            for name, (_, opt, _) in self.shapes.items()
            for size, best in zip(shapes[name], opt, strict=True)
        ]
        return sum(abs(math.log(size / best)) for size, best in pairs)

    def __str__(self) -> str:
        return ", ".join(f"{name} {_text(low)} to {_text(high)}" for name, (low, _, high) in self.shapes.items())


def dtype_of(name: str, kind: str) -> np.dtype[Any]:
    """The numpy type for TensorRT's ``kind`` (``HALF``); raises UnsupportedSpec for one that numpy has not."""
    if kind not in _DTYPES:
        raise UnsupportedSpec(f"'{name}' is {kind}, which can't be filled here; choose one of {', '.join(_DTYPES)}")
    return np.dtype(_DTYPES[kind])


def plan_buffers(tensors: Iterable[Tensor], alignment: int = ALIGNMENT) -> BufferPlan:
    """Lay the tensors out one behind the other, each at a multiple of ``alignment`` bytes.

    Raises UnsupportedSpec for a tensor whose largest shape is not known.
    """
    slots: dict[str, Slot] = {}
    end = 0
    for tensor in tensors:
        if min(tensor.largest, default=1) < 0:
            raise UnsupportedSpec(f"the size of '{tensor.name}' depends on what is in the input; it can't be run here")
        slots[tensor.name] = Slot(tensor, end)
        end += -(-max(tensor.size, 1) // alignment) * alignment
    return BufferPlan(MappingProxyType(slots), end)


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> Profile:
    """The profile that takes the shapes and is best at the nearest ones; the first of several equally near.

    Raises UnsupportedSpec where none takes them, with what they take.
    """
    able = [each for each in profiles if each.takes(shapes)]
    if not able:
        asked = ", ".join(f"{name} {_text(shape)}" for name, shape in shapes.items())
        raise UnsupportedSpec(f"the engine doesn't take {asked}; it takes {' or '.join(map(str, profiles))}")
    return min(able, key=lambda each: (each.distance(shapes), each.index))


def image_shape(best: Shape, batch: int | None, size: tuple[int, int] | None) -> Shape:
    """An image input's shape with another batch and another size (height, width) in pixels; None keeps ``best``'s.

    (B, 3, H, W) and (B, H, W, 3) are told apart by where the three colours are. Raises UnsupportedSpec for neither.
    """
    if len(best) != 4 or _COLOURS not in (best[1], best[3]):
        raise UnsupportedSpec(f"the input is {_text(best)}, no batch of images; drop --batch and --size")
    first = best[1] == _COLOURS
    height, width = size or ((best[2], best[3]) if first else (best[1], best[2]))
    count = best[0] if batch is None else batch
    return (count, _COLOURS, height, width) if first else (count, height, width, _COLOURS)


def _within(shape: Shape, low: Shape, high: Shape) -> bool:
    if len(shape) != len(low):
        return False
    return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))
