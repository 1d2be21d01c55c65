"""The arithmetics that the MIL reference computes in: what is rounded, to what, and when.

Core ML says of a float16 tensor only that no lower precision is used. What is known of the devices: tensors are stored
in float16, rounded half to even, and sums inside an operation are wider. How much wider is not published, so there
are two: float32 sums, and a running sum that is rounded to float16 every ``PRODUCTS_BETWEEN_ROUNDINGS`` products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

PRODUCTS_BETWEEN_ROUNDINGS: Final = 32
FLOATS: Final = frozenset({"float16", "float32"})
INTEGERS: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {
        "int8": (-(2**7), 2**7 - 1),
        "uint8": (0, 2**8 - 1),
        "int16": (-(2**15), 2**15 - 1),
        "uint16": (0, 2**16 - 1),
        "int32": (-(2**31), 2**31 - 1),
    }
)
"""Smallest and largest number of each type of integers that a tensor can have."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """``dtype`` (float32 or float64) is what real numbers are computed and handed on in.

    With ``rounds`` float16 tensors are rounded where they are stored. Without ``steps`` activations pass a quantize as
    they are. ``chunk`` is after how many products a running sum is rounded to float16, 0 for never.
    """

    dtype: torch.dtype = torch.float32
    rounds: bool = False
    steps: bool = True
    chunk: int = 0

    def half(self, values: Tensor) -> Tensor:
        """Rounded to float16, half to even, beyond 65504 to infinite; ``dtype`` as before."""
        return values.to(torch.float16).to(self.dtype)

    def store(self, values: Tensor, declared: str) -> Tensor:
        """Real numbers as a tensor of the declared type holds them; everything else as it is."""
        return self.half(values) if self.rounds and declared == "float16" and values.is_floating_point() else values

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right``, (..., M, K) by (..., K, N) as NumPy broadcasts them; vectors stand for one row or column.

        The sum is rounded to float16 every ``chunk`` products.
        """
        length = left.shape[-1]
        if not self.chunk or length <= self.chunk or not left.is_floating_point():
            return left @ right
        column = right.ndim == 1
        right = right.unsqueeze(-1) if column else right
        total = None
        for part in self.chunks(length):
            summand = left[..., part] @ right[..., part, :]
            total = self.half(summand if total is None else summand.add_(total))
        return left @ right if total is None else total.squeeze(-1) if column else total

    def chunks(self, length: int) -> Iterator[slice]:
        """The products of one sum, in the pieces between two roundings."""
        for start in range(0, length, self.chunk):
            yield slice(start, min(start + self.chunk, length))
