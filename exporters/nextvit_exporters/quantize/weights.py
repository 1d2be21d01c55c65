"""Weights in INT8: one step per output channel, whole numbers from -127 to 127, and the product of the two.

The step is stored in the type that the rest of the graph computes in, so it is chosen among that type's numbers before
anything is divided by it: codes and products then mean the same to whoever reads the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from nextvit_exporters.errors import InvariantError
from nextvit_exporters.quantize.calibration import Float64s, Int8s

LEVELS: Final = 127
"""Largest code; -128 is left out, so that the codes of -W are those of W, negated."""
_TYPES: Final[Mapping[str, type[np.floating]]] = {"fp16": np.float16, "fp32": np.float32}


def weight_steps(weight: Float64s, rest: str) -> Float64s:
    """One step for each output channel of ``weight`` (out, ...): (out,), each a number of the type ``rest``.

    The step is max|W| / 127, rounded to the nearest number of "fp16" or "fp32", and to the next one above where the
    nearest would push the largest weight past 127 steps. It is never zero, not for a channel of zeros either: the
    smallest is the type's smallest positive number. Raises InvariantError when a step would be too large for the type,
    or a weight is not finite.
    """
    kind = _TYPES[rest]
    largest = np.abs(weight.reshape(len(weight), -1)).max(axis=1, initial=0.0)
    if not np.isfinite(largest).all():
        raise InvariantError("weights hold NaN or infinity; train or convert the checkpoint again")
    with np.errstate(over="ignore"):
        stored = (largest / LEVELS).astype(kind)
    stored = np.maximum(stored, np.finfo(kind).smallest_subnormal)
    with np.errstate(over="ignore"):
        clipped = np.rint(largest / stored.astype(np.float64)) > LEVELS
        stored = np.where(clipped, np.nextafter(stored, kind(np.inf)), stored)
    if not np.isfinite(stored).all():
        raise InvariantError(
            f"weights up to {largest.max():.1e} need steps beyond {np.finfo(kind).max:.1e}, which {rest} can't hold; "
            "keep the map in floating point"
        )
    steps: Float64s = stored.astype(np.float64)
    return steps


def nearest_codes(weight: Float64s, steps: Float64s) -> Int8s:
    """The whole number of steps nearest to each weight, (out, ...), half to even, at most 127 in magnitude."""
    return np.clip(np.rint(weight / _by_channel(steps, weight)), -LEVELS, LEVELS).astype(np.int8)


def weight_of(codes: Int8s, steps: Float64s) -> Float64s:
    """What codes (out, ...) stand for: code times step, exact in float64 for steps of ``weight_steps``."""
    return codes.astype(np.float64) * _by_channel(steps, codes)


def _by_channel(steps: Float64s, like: NDArray[np.generic]) -> Float64s:
    return steps.reshape(-1, *(1,) * (like.ndim - 1))
