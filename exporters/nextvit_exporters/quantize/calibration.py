"""What calibration images tell of a graph: one step per tensor, means, and whole numbers for weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Float64s = NDArray[np.float64]
Int8s = NDArray[np.int8]


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Found on images by running the float64 graph behind the passes, with nothing kept in floating point.

    ``steps`` holds, by node name, the largest magnitude divided by 127 that a tensor is clipped at, before any rounding
    of the step itself. ``means`` holds, by module name, the mean of what each weight of an output channel is multiplied
    with: (groups, K), K = input channels per group times kernel size, in the order of ``weight[0].flatten()``.
    ``codes`` holds, by module name, whole numbers for weights in their shape, where they were not simply rounded to the
    nearest. ``images`` is the fingerprint of the image set, ``count`` how many there were.
    """

    method: str
    images: str
    count: int
    steps: Mapping[str, float]
    means: Mapping[str, Float64s]
    codes: Mapping[str, Int8s] = field(default_factory=dict)
