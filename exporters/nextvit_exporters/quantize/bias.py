"""A bias that makes up for rounded weights, so that mean outputs over the calibration images are what they were.

Rounding moves an output channel by (W' - W) x, whose mean over all x is (W' - W) E[x]: a number, which the bias can
take back. Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv
1906.04721, section 4.2, with means from images instead of from norms.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from nextvit_exporters.errors import InvariantError
from nextvit_exporters.quantize.calibration import Float64s
from nextvit_exporters.quantize.placement import Map

BOUND: Final = 1e-12
"""How far mean outputs may move, relative to the largest; sound corrections leave about 1e-16."""


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


@torch.no_grad()
def certify_bias(before: Map, after: Map, means: Float64s) -> None:
    """Hold two float64 maps, with W and b and with W' and b', to one mean output on what was calibrated on.

    Both are executed by torch on the mean of their patches, ``means`` (groups, K), which for linear maps gives the mean
    of their outputs. Raises InvariantError where these differ by more than ``BOUND``.
    """
    moved = mean_difference(_mean_output(before, means), _mean_output(after, means))
    if not moved <= BOUND:
        raise InvariantError(f"the corrected bias moves mean outputs by {moved:.1e}; leave it out: --no-correct-bias")


def _mean_output(module: Map, means: Float64s) -> Float64s:
    """What a map gives for its mean patch, (out,)."""
    patch = torch.from_numpy(means)
    if isinstance(module, nn.Linear):
        result: Float64s = module(patch).flatten().numpy()
        return result
    convolve = functional.conv1d if isinstance(module, nn.Conv1d) else functional.conv2d
    inputs = patch.reshape(1, -1, *module.kernel_size)
    result = convolve(inputs, module.weight, module.bias, groups=module.groups).flatten().numpy()
    return result


def mean_difference(before: Float64s, after: Float64s) -> float:
    """How far mean outputs (out,) moved: max|after - before| / max|before|, over finite numbers, else infinite.

    The certificate of a corrected bias.
    """
    if before.shape != after.shape or not (np.isfinite(before).all() and np.isfinite(after).all()):
        return float("inf")
    scale = max(float(np.abs(before).max(initial=0.0)), float(np.finfo(np.float64).tiny))
    return float(np.abs(after - before).max(initial=0.0)) / scale
