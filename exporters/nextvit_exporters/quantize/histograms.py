"""How large a tensor's numbers are, counted as they come by, and the step that follows from it.

A histogram of magnitudes over [0, 2^e), where 2^e is the smallest power of two above the largest magnitude so far. When
a larger one comes the range is doubled and neighbouring bins are merged. Scaling by a power of two rounds nothing, so
the bin of a number over the doubled range is half its bin over the other one, rounded down: the counts come out the
same whatever came first, and however it was cut into batches.

The largest magnitude lies in the upper half of the range, so at least 4096 of the 8192 bins are below it. At 127 steps
that is 32 bins a step or more; the magnitude itself is kept as well, exactly. Bins at the fine end of a range that one
outlier stretched are wide: within a bin numbers are taken as spread evenly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nextvit_exporters.errors import InvariantError, UnsupportedSpec
from nextvit_exporters.quantize_spec import METHODS

Counts = NDArray[np.int64]
Numbers = NDArray[np.float64]

BINS: Final = 8192
LOWEST: Final = -100
"""No range is smaller than 2 to this; scaling by its bins stays within float32. What is below counts as zero."""
LEVELS: Final = 127
"""The largest whole number of a symmetric step; -128 is left unused."""
STEP_OF_ZEROS: Final = 2.0**-14
"""The step of a tensor that was zero throughout: the smallest normal number of FP16. Zeros are exact at any step."""
PERCENTILE: Final = 99.99
"""Below it accuracy falls: on a trained nano 99.9 cost 8 dB against it, 99 cost 19 dB."""

_DIVERGENCE_BINS: Final = 4096
"""For the divergence, 2048 to 4096 of which are in use; the method is published with 2048."""
_RATIO: Final = 1.005
"""Between the clips whose divergence is tried."""
_COARSE: Final = 8
"""Clips an octave that are tried for the squared error at first, then as many again in between, twice."""
_OCTAVES: Final = 10


@dataclass(slots=True, eq=False)
class Histogram:
    """Magnitudes of the tensor ``name``: ``counts`` (8192,) int64 over [0, 2^``exponent``), and the largest one."""

    name: str
    counts: Counts = field(default_factory=lambda: np.zeros(BINS, np.int64))
    exponent: int = LOWEST
    largest: float = 0.0

    def add(self, values: Tensor) -> None:
        """Count ``values``, of any shape. Raises InvariantError where one is not finite, or is none at all."""
        if not values.numel():
            raise InvariantError(f"{self.name} holds no numbers; nothing can be calibrated on it")
        values = values.detach()
        magnitudes = (values if values.is_floating_point() else values.float()).abs().flatten()
        largest = float(magnitudes.max())
        if not math.isfinite(largest):
            raise InvariantError(
                f"{self.name} holds NaN or infinity on these images; check the checkpoint, and what it is calibrated on"
            )
        self.largest = max(self.largest, largest)
        if self.largest > 0.0:  # zero has no exponent
            self._grow(math.frexp(self.largest)[1])
        # int32 halves the time of the conversion; a bin's number fits
        bins = magnitudes.mul_(math.ldexp(BINS, -self.exponent)).to(torch.int32)
        self.counts += torch.bincount(bins, minlength=BINS).numpy()

    def _grow(self, exponent: int) -> None:
        """Double the range until it is 2^``exponent``; it never shrinks."""
        merged = 1 << min(max(exponent - self.exponent, 0), BINS.bit_length() - 1)
        if merged > 1:
            self.counts = _pooled(self.counts, merged)
        self.exponent = max(self.exponent, exponent)

    @property
    def width(self) -> float:
        """Of one bin."""
        return math.ldexp(1.0, self.exponent) / BINS


def step(histogram: Histogram, method: str) -> float:
    """The largest magnitude that is kept, divided by 127.

    ``minmax`` keeps all; ``percentile`` 99.99 % of the numbers; ``entropy`` the clip behind which the distribution on
    128 levels diverges least from what was seen; ``mse`` the one with the smallest mean squared error of rounding and
    clipping together. Raises UnsupportedSpec for another method, InvariantError where nothing was counted.
    """
    if method not in METHODS:
        raise UnsupportedSpec(f"there is no calibration method {method}; choose one of {', '.join(METHODS)}")
    if not histogram.counts.any():
        raise InvariantError(f"{histogram.name} was never computed; run the graph on images first")
    if histogram.largest < math.ldexp(1.0, LOWEST):
        return STEP_OF_ZEROS
    clip = {"minmax": _everything, "percentile": _percentile, "entropy": _entropy, "mse": _mse}[method](histogram)
    return min(clip, histogram.largest) / LEVELS


def squared_error(histogram: Histogram, size: float) -> float:
    """The mean squared error of numbers brought onto whole multiples of ``size``, up to 127 of them."""
    return float(_squared_errors(histogram.counts, histogram.width, np.array([size * LEVELS]))[0])


def _everything(histogram: Histogram) -> float:
    return histogram.largest


def _percentile(histogram: Histogram) -> float:
    """Where the counts from below reach the share; between two edges in proportion."""
    wanted = histogram.counts.sum() * (PERCENTILE / 100)
    reached = np.concatenate([[0], np.cumsum(histogram.counts)]).astype(np.float64)
    edge = int(np.searchsorted(reached, wanted))
    share = (wanted - reached[edge - 1]) / (reached[edge] - reached[edge - 1])
    # where the share ends among zeros, half a bin is kept
    return float(max(edge - 1 + share, 0.5) * histogram.width)


def _entropy(histogram: Histogram) -> float:
    """The clip that TensorRT describes as losing the least information.

    S. Migacz, "8-bit Inference with TensorRT", GTC 2017: what is clipped is counted in the last bin that is kept; the
    kept bins are summed into 128 levels, and each level is spread evenly over those of its bins that held anything. The
    clip with the smallest Kullback-Leibler divergence between the two wins. The first bin is left out: ReLU fills it
    with zeros, which are exact at any step.
    """
    pooled = _pooled(histogram.counts, BINS // _DIVERGENCE_BINS)[:_DIVERGENCE_BINS].astype(np.float64)
    width = histogram.width * (BINS // _DIVERGENCE_BINS)
    pooled[0] = 0.0
    used = int(np.flatnonzero(pooled)[-1]) + 1 if pooled.any() else 0
    levels = LEVELS + 1
    if used <= levels:
        return histogram.largest
    sizes = np.unique(np.rint(_geometric(levels, used, _RATIO)).astype(np.int64))
    sizes = sizes[pooled[sizes - 1] > 0]  # an empty last bin that took in outliers would have no match: never the least
    if not sizes.size:
        return histogram.largest
    divergences = [_divergence(pooled[:used], int(size), levels) for size in sizes]
    return float(sizes[int(np.argmin(divergences))] * width)


def _divergence(counts: Numbers, kept: int, levels: int) -> float:
    """Of the first ``kept`` bins on ``levels`` levels from all of ``counts``, in nats."""
    reference = counts[:kept].copy()
    filled = reference > 0
    first = (np.arange(levels) * kept) // levels
    sums, members = np.add.reduceat(reference, first), np.add.reduceat(filled.astype(np.float64), first)
    means = np.divide(sums, members, out=np.zeros(levels), where=members > 0)
    spread = np.repeat(means, np.diff(np.append(first, kept)))[filled]
    reference[-1] += counts[kept:].sum()
    p, q = reference[filled] / reference.sum(), spread / spread.sum()
    return float(np.sum(p * np.log(p / q)))


def _mse(histogram: Histogram) -> float:
    """The clip with the smallest mean squared error, on a grid of clips that is refined twice: to 0.14 %.

    The first two grids only have to find the neighbourhood, and read bins pooled by eight and by two.
    """
    exponents: Numbers = -np.arange(_OCTAVES * _COARSE + 1, dtype=np.float64) / _COARSE
    best = 0.0
    for spacing, together in ((1 / _COARSE, 8), (1 / _COARSE**2, 2), (1 / _COARSE**3, 1)):
        exponents = np.minimum(exponents, 0.0)
        counts = np.trim_zeros(_pooled(histogram.counts, together), "b")
        errors = _squared_errors(counts, histogram.width * together, histogram.largest * np.exp2(exponents))
        best = float(exponents[int(np.argmin(errors))])
        exponents = best + np.arange(-_COARSE, _COARSE + 1, dtype=np.float64) * (spacing / _COARSE)
    return float(histogram.largest * np.exp2(best))


def _squared_errors(counts: Counts, width: float, clips: Numbers) -> Numbers:
    """The mean squared error for each clip, (clips,).

    With numbers spread evenly within bins it is exact: the integral of the squared error from 0 to x, taken at the
    edges, is differenced. Up to the clip c the error runs from -s/2 to s/2 over each step s = c / 127, which gives
    s^3 / 12 a step and r^3 / 3 for the rest r; beyond, (x - c)^3 / 3.
    """
    edges: Numbers = np.arange(len(counts) + 1, dtype=np.float64) * width
    shares = counts / (counts.sum() * width)
    return np.array([float(shares @ np.diff(_integral(edges, float(clip)))) for clip in clips])


def _integral(x: Numbers, clip: float) -> Numbers:
    size = clip / LEVELS
    inside = np.minimum(x, clip)
    whole = np.rint(inside / size)
    rest = inside - whole * size
    beyond = x - inside
    # products, since numpy's power takes ten times as long
    result: Numbers = (whole * (size**3 / 4) + rest * rest * rest + beyond * beyond * beyond) / 3
    return result


def _pooled(counts: Counts, together: int) -> Counts:
    """Sums of ``together`` neighbouring bins, in as many bins as before: the upper ones are empty."""
    result = np.zeros_like(counts)
    result[: len(counts) // together] = counts.reshape(-1, together).sum(1)
    return result


def _geometric(first: float, last: float, ratio: float) -> Numbers:
    """From ``first`` to ``last``, both among them, at most ``ratio`` between two."""
    return np.geomspace(first, last, max(2, math.ceil(math.log(last / first) / math.log(ratio)) + 1))
