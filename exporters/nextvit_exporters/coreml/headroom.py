"""How much of float16 a program uses: how close each operation comes to its largest number, and to its smallest.

Beyond 65504 a float16 is infinite, below 2^-14 it loses digits. Core ML may store every float16 tensor as such, so a
program that needs more has to keep the module in question in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

LIMIT: Final = 65504.0
"""The largest float16."""
ACCUMULATOR_LIMIT: Final = 32768.0
"""Where the neural engine of an M1 was seen to saturate sums of products (third party; Apple publishes nothing)."""
SMALLEST_NORMAL: Final = 2.0**-14
_BLOCK: Final = 1 << 16  # numbers at a time: two such arrays stay in a core's cache
_REMARK: Final = (
    "sums of products beyond the accumulator limit were seen to saturate on the neural engine of an M1 "
    "(reported by a third party, not by Apple)"
)


@dataclass(frozen=True, slots=True)
class Layer:
    """One operation over everything that ran.

    ``largest`` is the largest magnitude before it was rounded, ``subnormal`` the share of numbers other than zero that
    are too small for a whole float16, ``sums`` whether it adds up products.
    """

    operation: str
    kind: str
    module: str | None
    largest: float
    subnormal: float
    sums: bool = False

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "operation": self.operation,
            "kind": self.kind,
            "module": self.module,
            "largest": self.largest,
            "subnormal": self.subnormal,
        }


@dataclass(frozen=True, slots=True)
class Headroom:
    """What was seen of every operation that stores float16, and of the float16 weights (``weights_subnormal``)."""

    layers: tuple[Layer, ...]
    runs: int = 0
    weights_subnormal: float = 0.0

    @property
    def worst(self) -> Layer | None:
        """The operation that comes closest to the limit; None where nothing stores float16."""
        return max(self.layers, key=lambda layer: layer.largest, default=None)

    def as_dict(self) -> dict[str, object]:
        """JSON-ready: the limits, how many operations came near them, and all operations, the largest first."""
        ordered = sorted(self.layers, key=lambda layer: -layer.largest)
        beyond = [layer for layer in ordered if layer.largest > LIMIT / 4]
        saturating = [layer.operation for layer in ordered if layer.sums and layer.largest > ACCUMULATOR_LIMIT]
        worst = self.worst
        return {
            "limit": LIMIT,
            "accumulator_limit": ACCUMULATOR_LIMIT,
            "remark": _REMARK,
            "runs": self.runs,
            "largest": 0.0 if worst is None else worst.largest,
            "factor": None if worst is None or not worst.largest else LIMIT / worst.largest,
            "operations": len(self.layers),
            "beyond_quarter": len(beyond),
            "beyond_accumulator": saturating,
            "most_subnormal": max((layer.subnormal for layer in self.layers), default=0.0),
            "weights_subnormal": self.weights_subnormal,
            "layers": [layer.as_dict() for layer in ordered],
        }


@dataclass(slots=True)
class Count:
    """Magnitudes added up: the largest finite one, how many are not zero, and how many of those are subnormal."""

    largest: float = 0.0
    nonzero: int = 0
    subnormal: int = 0

    def add(self, values: NDArray[Any]) -> float:
        """Add an array of real numbers of any type; returns its largest magnitude, infinite or NaN where one is."""
        flat = values.astype(np.float32, copy=False).reshape(-1).view(np.uint32)
        smallest = np.float32(SMALLEST_NORMAL).view(np.uint32)
        largest = np.uint32(0)
        for start in range(0, flat.size, _BLOCK):
            bits = flat[start : start + _BLOCK] & np.uint32(0x7FFFFFFF)  # magnitudes, ordered as the numbers are
            largest = max(largest, bits.max())
            nonzero = int(np.count_nonzero(bits))
            self.nonzero += nonzero
            self.subnormal += int(np.count_nonzero(bits < smallest)) - (bits.size - nonzero)
        found = float(np.asarray(largest, np.uint32).view(np.float32))
        if not np.isfinite(found):  # a mask's -inf says nothing of the scores beside it
            finite = values[np.isfinite(values)]
            self.largest = max(self.largest, float(np.abs(finite).max(initial=0.0)))
        else:
            self.largest = max(self.largest, found)
        return found

    @property
    def share(self) -> float:
        """The subnormal share of what is not zero."""
        return self.subnormal / self.nonzero if self.nonzero else 0.0


class Meter:
    """Gathers a ``Headroom`` while a program runs."""

    def __init__(self, modules: Mapping[str, str], sums: frozenset[str] = frozenset()) -> None:
        self.runs = 0
        self._modules, self._sums = modules, sums
        self._counts: dict[tuple[str, str], Count] = {}
        self._weights = Count()

    def see(self, operation: str, kind: str, values: NDArray[Any]) -> float:
        """Add what an operation computed, before it is rounded; returns the largest magnitude of these values."""
        return self._counts.setdefault((operation, kind), Count()).add(values)

    def see_weights(self, _reader: str, values: NDArray[Any]) -> None:
        """Add float16 weights."""
        self._weights.add(values)

    @property
    def headroom(self) -> Headroom:
        """Everything seen so far."""
        layers = (
            Layer(name, kind, self._modules.get(name), count.largest, count.share, kind in self._sums)
            for (name, kind), count in self._counts.items()
        )
        return Headroom(tuple(layers), self.runs, self._weights.share)
