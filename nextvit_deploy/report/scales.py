"""Places on a chart: decades of an error's axis, and labels that don't lie on each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

FLOOR: Final = 1e-17
"""Errors below it are drawn there: float64 has no smaller."""
CEILING: Final = 1e3
"""Errors above it, and those that are no number, are drawn there."""


def bounded(error: float) -> float:
    """An error that a logarithmic axis can show."""
    return CEILING if math.isnan(error) else min(CEILING, max(FLOOR, error))


def decades(errors: Iterable[float]) -> tuple[float, float]:
    """The powers of ten around these errors, at least two apart."""
    powers = [math.log10(bounded(each)) for each in errors]
    low, high = math.floor(min(powers)), math.ceil(max(powers))
    if high - low < 2:
        low, high = low - 1, low + 1 if high - low < 1 else high
    return 10.0**low, 10.0**high


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten between two of them, evenly many."""
    first, last = round(math.log10(low)), round(math.log10(high))
    step = max(1, math.ceil((last - first) / most))
    return [10.0**power for power in range(first, last + 1, step)]


def height_of(value: float, low: float, high: float, height: float) -> float:
    """Pixels from the top of a logarithmic axis."""
    return height * (math.log10(high) - math.log10(bounded(value))) / (math.log10(high) - math.log10(low))


def value_at(place: float, low: float, high: float, height: float) -> float:
    """The other way around."""
    return float(10 ** (math.log10(high) - place / height * (math.log10(high) - math.log10(low))))


def spread(places: Sequence[float], gap: float, height: float) -> list[float]:
    """``places`` moved apart to at least ``gap``, in their order and within 0 to ``height`` where there is room.

    Neighbours that would touch form a block around the mean of where they want to be.
    """
    order = sorted(range(len(places)), key=lambda index: (places[index], index))
    blocks: list[tuple[list[int], float]] = []
    for index in order:
        members, middle = [index], places[index]
        while blocks and middle - gap * (len(members) - 1) / 2 < blocks[-1][1] + gap * (len(blocks[-1][0]) + 1) / 2:
            earlier, other = blocks.pop()
            total = len(earlier) + len(members)
            middle = (other * len(earlier) + middle * len(members)) / total
            members = [*earlier, *members]
            half = gap * (total - 1) / 2
            middle = max(half, min(height - half, middle)) if 2 * half <= height else height / 2
        blocks.append((members, middle))
    found = [0.0] * len(places)
    for members, middle in blocks:
        for at, index in enumerate(members):
            found[index] = middle + gap * (at - (len(members) - 1) / 2)
    return found
