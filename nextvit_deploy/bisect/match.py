"""Which tensor of an artefact is which of PyTorch's: told by their numbers, whatever they are called."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from nextvit_deploy.bisect.known import Known
from nextvit_deploy.bisect.traced import Traced
from nextvit_exporters.executors.base import Array


@dataclass(frozen=True, slots=True)
class Match:
    """The nodes whose numbers a tensor has, the nearest first, and how far it is from that one."""

    nodes: tuple[str, ...]
    error: float


def match(traced: Traced, known: Known, tolerance: float) -> dict[str, Match]:
    """By tensor, what it is within ``tolerance``; left out is what is nothing of PyTorch's.

    The order of the numbers counts, the shape does not: an artefact may reshape where PyTorch doesn't.
    """
    sizes = _by_size(known)
    found = {}
    for name, values in traced.values.items():
        if name not in traced.moving or values.dtype.kind != "f":
            continue
        candidates = sorted(_candidates(values, sizes.get(values.size, ([], [])), known, tolerance))
        if candidates:
            nearest = candidates[0][0]
            as_near = [node for error, node in candidates if error <= max(2 * nearest, 1e-3 * tolerance)]
            found[name] = Match(tuple(as_near), nearest)
    return found


def _by_size(known: Known) -> Mapping[int, tuple[list[float], list[str]]]:
    """Nodes with real numbers by how many they have: sorted root mean squares, and names in the same order."""
    sizes: dict[int, list[tuple[float, str]]] = {}
    for node in known.nodes.values():
        if node.value.dtype.kind == "f":
            sizes.setdefault(node.value.size, []).append((rms(node.value), node.name))
    return {size: ([m for m, _ in sorted(pairs)], [name for _, name in sorted(pairs)]) for size, pairs in sizes.items()}


def _candidates(
    values: Array, pairs: tuple[list[float], list[str]], known: Known, tolerance: float
) -> Iterator[tuple[float, str]]:
    """Nodes within the tolerance, each with the error: their root mean squares are as near."""
    means, names = pairs
    own = rms(values)
    if not means or not math.isfinite(own):
        return
    for at in range(bisect_left(means, own / (1 + 1.01 * tolerance)), len(means)):
        if means[at] * (1 - 1.01 * tolerance) > own:
            return
        error = apart(values, known.nodes[names[at]].value)
        if error <= tolerance:
            yield error, names[at]


def rms(values: Array) -> float:
    """Root mean square; NaN or infinite where a number is."""
    flat = values.reshape(-1).astype(np.float64)
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.dot(flat, flat) / max(flat.size, 1)))


def apart(got: Array, wanted: Array) -> float:
    """Relative root mean square of the difference; infinite where one is not finite or they have other sizes."""
    if got.size != wanted.size:
        return math.inf
    with np.errstate(all="ignore"):
        difference = rms(got.reshape(-1).astype(np.float64) - wanted.reshape(-1).astype(np.float64))
    scale = rms(wanted)
    if difference == 0:
        return 0.0
    return difference / scale if scale > 0 and math.isfinite(difference) else math.inf
