"""A bias that makes up for rounded weights, so that mean outputs over the calibration images are what they were.

Rounding moves an output channel by (W' - W) x, whose mean over all x is (W' - W) E[x]: a number, which the bias can
take back. Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv
1906.04721, section 4.2, with means from images instead of from norms.
"""

from __future__ import annotations

import numpy as np

from nextvit_exporters.errors import InvariantError
from nextvit_exporters.quantize.calibration import Float64s


def corrected_bias(bias: Float64s, weight: Float64s, rounded: Float64s, means: Float64s) -> tuple[Float64s, Float64s]:
    """The new bias b + (W - W') E[x], (out,), and what it takes back, (W' - W) E[x], (out,).

    ``weight`` and ``rounded`` are (out, K) or in the map's own shape, ``means`` (groups, K) what each weight is
    multiplied with on average (``patches.patch_means``). Output channels belong to groups in equal runs. All in
    float64. Raises InvariantError when the shapes don't fit.
    """
    groups = len(means)
    lost = (rounded - weight).reshape(len(weight), -1)
    if weight.shape != rounded.shape or groups == 0 or len(weight) % groups or lost.shape[1:] != means.shape[1:]:
        raise InvariantError(
            f"weights of {weight.shape}, rounded of {rounded.shape} and means of {means.shape} do not fit; "
            "calibrate this map again"
        )
    runs = lost.reshape(groups, -1, lost.shape[1])
    residual = np.einsum("gok,gk->go", runs, means).reshape(-1)
    return bias - residual, residual


def mean_difference(before: Float64s, after: Float64s) -> float:
    """How far mean outputs (out,) moved: max|after - before| / max|before|, over finite numbers, else infinite.

    The certificate of a corrected bias, with both means computed from outputs and not from ``means``.
    """
    if before.shape != after.shape or not (np.isfinite(before).all() and np.isfinite(after).all()):
        return float("inf")
    scale = max(float(np.abs(before).max(initial=0.0)), float(np.finfo(np.float64).tiny))
    return float(np.abs(after - before).max(initial=0.0)) / scale
