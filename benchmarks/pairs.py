"""Interleaved timing: baseline and candidate alternate in one process, in a new random order each round.

The two see the same machine at the same moment, so the median of the per-round ratios says more than a ratio of
two medians taken minutes apart.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pairs:
    """Seconds per round of the baseline and of the candidate, in the order they were run."""

    baseline: tuple[float, ...]
    candidate: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Candidate over baseline, round by round."""
        return tuple(c / b for b, c in zip(self.baseline, self.candidate, strict=True))

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)

    def __str__(self) -> str:
        low, high = (statistics.quantiles(self.ratios, n=4)[i] for i in (0, 2))
        before, after = statistics.median(self.baseline), statistics.median(self.candidate)
        return (
            f"ratio {self.ratio:.3f} (middle half {low:.3f} to {high:.3f}, {len(self.ratios)} pairs; "
            f"medians {1e3 * before:.1f} and {1e3 * after:.1f} ms)"
        )


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(
    baseline: Callable[[], object], candidate: Callable[[], object], rounds: int, warmup: int, best_of: int
) -> Pairs:
    """Time both, alternating, in random order within each round; a time is the best of ``best_of`` calls in a row.

    On a machine shared with others single calls are now and then twice as slow, which pulls every ratio towards
    one; the best of a few is what the code takes.
    """
    order = random.Random(0)
    taken: dict[str, list[float]] = {"baseline": [], "candidate": []}
    calls = {"baseline": baseline, "candidate": candidate}
    for index in range(warmup + rounds):
        for name in order.sample(sorted(calls), 2):
            elapsed = min(seconds(calls[name]) for _ in range(best_of))
            if index >= warmup:
                taken[name].append(elapsed)
    return Pairs(tuple(taken["baseline"]), tuple(taken["candidate"]))
