"""A good table of FP16 values for a tensor: k-means in one dimension, the same on every machine.

FP16 values are whole multiples of 2^-24, and a tensor has at most 65536 different ones. So sums over clusters are
differences of running totals of whole numbers, exact in int64: a step of k-means takes microseconds, whatever the
tensor's size, and its result depends neither on threads nor on the order of additions, as a library's would.

Measured on four layers of the bundled demo against the best table there is (found by dynamic programming): the root
mean square lost is at most 10 % above the least at 256 values, 2 % at 16. scikit-learn's KMeans, started at quantiles,
loses 2.4 to 4.5 times the least at 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Float16s = NDArray[np.float16]
Float64s = NDArray[np.float64]
Places = NDArray[np.int64]

_UNIT: Final = 2.0**-24
_CODES: Final = 1 << 16
_STEPS: Final = 1000
"""Most steps of k-means; on the weights of every variant it stops by itself before."""


def to_table(weight: Float16s, size: int) -> Float16s:
    """A finite tensor with each value replaced by the nearest of a table of at most ``size`` values made for it."""
    codes, lookup = weight.view(np.uint16), np.zeros(_CODES, np.float16)
    values, counts = distinct(weight)
    table = table_of(values, counts, size)
    lookup[values.view(np.uint16)] = table[nearest(table, values)]
    return lookup[codes]


def distinct(weight: Float16s) -> tuple[Float16s, Places]:
    """The values that occur, ascending, and how often each does; zeros of both signs are two values."""
    counts = np.bincount(weight.view(np.uint16).reshape(-1), minlength=_CODES)
    codes = np.flatnonzero(counts).astype(np.uint16)
    values = codes.view(np.float16)
    order = np.argsort(values, kind="stable")
    return values[order], counts[codes[order]]


def table_of(values: Float16s, counts: Places, size: int) -> Float16s:
    """At most ``size`` values, ascending, chosen for the ascending, finite ``values`` that occur ``counts`` times.

    Where there are no more than ``size`` values they are the table. Otherwise clusters are split until there are
    ``size``, those first whose split saves most; then each value goes to the cluster of the nearest mean, until none
    moves. Clusters that end up empty, and means that FP16 doesn't tell apart, leave the table shorter.
    """
    if len(values) <= size:
        return np.unique(values + np.float16(0))  # one zero, and a positive one
    totals = _Totals.of(values, counts)
    ends = _split(totals, size)
    for _ in range(_STEPS):
        means = totals.means(ends)
        inner = np.searchsorted(totals.whole, (means[1:] + means[:-1]) / 2, side="right")
        moved = np.unique(np.concatenate([ends[:1], inner, ends[-1:]]))
        if np.array_equal(moved, ends):
            break
        ends = moved
    return np.unique((totals.means(ends) * _UNIT).astype(np.float16) + np.float16(0))


def nearest(table: Float16s, values: NDArray[np.floating]) -> NDArray[np.intp]:
    """For each value, the place of the nearest entry of an ascending table; of two as near, the lower."""
    exact = table.astype(np.float64)
    return np.searchsorted((exact[1:] + exact[:-1]) / 2, values, side="left")


@dataclass(frozen=True, slots=True)
class _Totals:
    """Ascending values in units of 2^-24, and running totals of their number, sum and squares.

    A clustering is ``ends``: cluster i holds the values from ``ends[i]`` up to, not including, ``ends[i + 1]``.
    """

    whole: Float64s
    number: Places
    total: Places
    squares: Float64s

    @classmethod
    def of(cls, values: Float16s, counts: Places) -> _Totals:
        whole = np.round(values.astype(np.float64) / _UNIT)
        running = [np.concatenate([[0], np.cumsum(each)]) for each in (counts, whole.astype(np.int64) * counts)]
        return cls(whole, running[0], running[1], np.concatenate([[0.0], np.cumsum(whole * whole * counts)]))

    def means(self, ends: Places) -> Float64s:
        means: Float64s = np.diff(self.total[ends]) / np.diff(self.number[ends])
        return means

    def spread(self, start: Places, end: Places) -> Float64s:
        """Sum of squared distances to the mean."""
        members = self.number[end] - self.number[start]
        total = (self.total[end] - self.total[start]).astype(np.float64)
        spread: Float64s = self.squares[end] - self.squares[start] - total * total / members
        return spread


def _split(totals: _Totals, size: int) -> Places:
    """Cut clusters at their means, in each round those that save a quarter or more of what the best cut saves."""
    ends = np.array([0, len(totals.whole)])
    while len(ends) <= size:
        start, end = ends[:-1], ends[1:]
        cuts = np.searchsorted(totals.whole, totals.means(ends), side="right")
        cuts = np.clip(cuts, start + 1, np.maximum(end - 1, start + 1))
        saved = np.full(len(start), -1.0)
        several = end - start > 1
        start, end, middle = start[several], end[several], cuts[several]
        saved[several] = totals.spread(start, end) - totals.spread(start, middle) - totals.spread(middle, end)
        saved[several] = np.maximum(saved[several], 0.0)
        best = np.argsort(-saved, kind="stable")[: size + 1 - len(ends)]
        best = best[saved[best] >= saved[best[0]] / 4]
        ends = np.union1d(ends, cuts[best])
    return ends
