"""What the operations of the TensorRT network reference share: number formats, and one layer with its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from torch import Tensor

from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.tensorrt.network import Array, Layer, UnknownLayer

FLOATS: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}
)
INTEGERS: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {
        "INT64": torch.int64,
        "INT32": torch.int32,
        "INT8": torch.int8,
        "UINT8": torch.uint8,
        "BOOL": torch.bool,
    }
)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """``dtype`` (float32 or float64) is what every real number is computed and handed on in.

    With ``rounds`` a tensor is rounded to the type TensorRT stores it in; without, only integers are what they are.
    Without ``steps`` int8 quantisation scales and clamps but does not round, and int8 tensors hold real numbers.
    """

    dtype: torch.dtype
    rounds: bool
    steps: bool = True

    def store(self, values: Tensor, stored: str) -> Tensor:
        """``values`` as a tensor of TensorRT's type ``stored`` holds them; raises UnknownLayer for a type unknown here.

        Real numbers become integers by dropping the fraction, clamped to what the type holds.
        """
        if stored == "INT8" and not self.steps:
            return values.to(self.dtype) if values.is_floating_point() else values
        if stored in FLOATS:
            wide = values.to(self.dtype)
            return wide.to(FLOATS[stored]).to(self.dtype) if self.rounds and stored != "FLOAT" else wide
        if stored not in INTEGERS:
            raise UnknownLayer(f"tensors of type {stored} can't be executed here")
        target = INTEGERS[stored]
        if not values.is_floating_point() or target is torch.bool:
            return values.to(target)
        limits = torch.iinfo(target)
        return values.double().trunc().clamp(limits.min, limits.max).to(target)

    def constant(self, values: Array) -> Tensor:
        """Weights as they are computed with: real numbers widened, the others as they are."""
        tensor = torch.from_numpy(values)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One layer, the tensors it reads (None where an optional one isn't there), and the arithmetic."""

    layer: Layer
    inputs: tuple[Tensor | None, ...]
    arithmetic: Arithmetic

    def __getitem__(self, index: int) -> Tensor:
        """An input that has to be there; raises BuildFailed when it is not."""
        found = self.optional(index)
        if found is None:
            raise BuildFailed(f"{self.layer.where} lacks its input {index}")
        return found

    def optional(self, index: int) -> Tensor | None:
        """An input, or None where it isn't there."""
        return self.inputs[index] if index < len(self.inputs) else None

    def weights(self, name: str) -> Tensor | None:
        """Constant weights of the layer itself, flat and widened; None where there are none."""
        values = self.layer.weights[name]
        return self.arithmetic.constant(values) if values.size else None

    def dims(self, name: str, index: int) -> tuple[int, ...] | None:
        """Dimensions that input ``index`` gives, or else the attribute; None where neither does."""
        given = self.optional(index)
        if given is not None:
            return tuple(int(each) for each in given.flatten())
        return None if self.layer.attributes[name] is None else self.layer.dims(name)


def as_tensor(values: Array) -> Tensor:
    """A copy of a NumPy array, which may be read-only."""
    return torch.from_numpy(np.array(values))


def bits(mask: int) -> tuple[int, ...]:
    """The axes of a bit mask, in order."""
    return tuple(axis for axis in range(mask.bit_length()) if mask >> axis & 1)
