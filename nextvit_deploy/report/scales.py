"""Places on a chart: decades of an error's axis, and labels that don't lie on each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

FLOOR: Final = 1e-17
"""Errors below it are drawn there: float64 has no smaller."""
CEILING: Final = 1e3
"""Errors above it, and those that are no number, are drawn there."""
_DOT: Final = 6.0
"""Half of a point's mark, in pixels as all that follow."""
_BESIDE: Final = 10.0
"""Between a point's middle and its label."""
_LETTER: Final = 6.6
"""Of a label's letter, on average."""
_HALF: Final = 7.5
"""Half of a label's height."""
_STEPS: Final = 24
"""Half heights that a label may be away from its point."""


def bounded(error: float) -> float:
    """An error that a logarithmic axis can show."""
    return CEILING if math.isnan(error) else min(CEILING, max(FLOOR, error))


def decades(errors: Iterable[float]) -> tuple[float, float]:
    """The powers of ten around these errors, at least two apart; what agrees to the last bit stretches nothing."""
    powers = [math.log10(bounded(each)) for each in errors if each != 0] or [math.log10(FLOOR)]
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


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in a plot, in pixels from its top left."""

    left: float
    top: float
    right: float
    bottom: float

    def covers(self, other: Box) -> bool:
        """Whether the two have anything in common."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a label begins (``right`` of its point) or ends, and the middle of its height; pixels."""

    right: bool
    left: float
    top: float


def place(
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    dots: Sequence[tuple[float, float]],
    area: tuple[float, float],
) -> list[Place]:
    """A place for each point's label near it, over no other label and none of the ``dots``, as far as there is room.

    Points and dots are (left, top), ``area`` is (width, height). The nearest free place is taken, for the points in
    their order.
    """
    taken = [Box(left - _DOT, top - _DOT, left + _DOT, top + _DOT) for left, top in dots]
    found = []
    for (left, top), text in zip(points, texts, strict=True):
        tried = list(_tried(left, top, _LETTER * len(text), area))
        free = ((spot, box) for spot, box in tried if not any(box.covers(other) for other in taken))
        beside = Place(right=True, left=left + _BESIDE, top=top), Box(left, top - _HALF, left + _BESIDE, top + _HALF)
        best, box = next(free, tried[0] if tried else beside)
        found.append(best)
        taken.append(box)
    return found


def _tried(left: float, top: float, long: float, area: tuple[float, float]) -> Iterator[tuple[Place, Box]]:
    """Places beside a point, the nearest first; the one to the right of it comes first of all."""
    width, height = area
    for step in range(_STEPS):
        for down in dict.fromkeys((step * _HALF, -step * _HALF)):
            for right in (True, False):
                start = left + _BESIDE if right else left - _BESIDE - long
                middle = top + down
                fits = start >= -_BESIDE and start + long <= width + _BESIDE and 0 <= middle <= height
                if fits:
                    spot = Place(right, start if right else start + long, middle)
                    yield spot, Box(start, middle - _HALF, start + long, middle + _HALF)
