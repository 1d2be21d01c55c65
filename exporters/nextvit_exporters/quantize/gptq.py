"""Weights on steps with the error of each fed into the next: less error in the output than rounding to the nearest.

With G = XᵀX over the calibration images, what rounding W to W' moves the outputs by is tr((W - W') G (W - W')ᵀ). Taking
the columns in turn, each is rounded and the others, not yet rounded, are moved to where they make up for it best. With
U the upper Cholesky factor of (G + d I)⁻¹, for column i and all j > i::

    e = (w_i - t q_i) / U_ii        W_j -= e U_ij

Frantar et al. 2022 (GPTQ), after Hassibi's optimal brain surgeon. Columns go by falling G_ii, those that weigh most
first. Each row is kept only where its error is less than the nearest one's, so no row is worse off.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nextvit_exporters.errors import InvariantError
from nextvit_exporters.quantize.weights import LEVELS as MOST
from nextvit_exporters.quantize.weights import nearest_codes

Float64s = NDArray[np.float64]
Int8s = NDArray[np.int8]
MOST_STEPS: Final = 8
"""How many steps a whole number may be away from the nearest one; see ``benchmarks.int8_quality`` for what it costs."""
DAMPING: Final = 0.01
"""d as a share of the mean of G's diagonal."""
_BLOCK: Final = 128


@torch.no_grad()
def feedback_codes(weight: Float64s, steps: Float64s, gram: Float64s, damping: float = DAMPING) -> Int8s:
    """Whole numbers (out, K) for a weight (out, K) with steps (out,) and G = ``gram`` (K, K).

    Inputs that are always zero (G_ii = 0) are rounded to the nearest. Raises InvariantError where G is not finite.
    """
    if not np.isfinite(gram).all():
        raise InvariantError("the products of a map's inputs are not finite; its activations overflow")
    nearest = nearest_codes(weight, steps)
    diagonal = np.diag(gram)
    if not (diagonal > 0).any():
        return nearest
    order = np.argsort(-diagonal, kind="stable")
    factor = _factor(torch.from_numpy(gram[np.ix_(order, order)]), damping)
    ordered = _fed_back(weight[:, order], steps, nearest[:, order], factor)
    codes = np.empty_like(nearest)
    codes[:, order] = ordered
    better = gram_error(weight - codes * steps[:, None], gram) < gram_error(weight - nearest * steps[:, None], gram)
    return np.where(better[:, None] & (diagonal > 0), codes, nearest)


def gram_error(difference: Float64s, gram: Float64s) -> Float64s:
    """What a difference of weights (out, K) moves each output by, squared and summed over the images: (out,)."""
    error: Float64s = ((difference @ gram) * difference).sum(axis=1)
    return error


def _factor(gram: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped G; where an input is always zero, of 1."""
    diagonal = gram.diagonal().clone()
    alive = diagonal > 0
    damped = gram.clone()
    damped.diagonal().add_(torch.where(alive, damping * diagonal[alive].mean(), torch.ones_like(diagonal)))
    lower, wrong = torch.linalg.cholesky_ex(damped)
    if bool(wrong):
        raise InvariantError("the products of a map's inputs are not positive definite; calibrate on more pictures")
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return factor


def _fed_back(weight: Float64s, steps: Float64s, nearest: Int8s, factor: Tensor) -> Int8s:
    """Round column by column; a block of them at a time, whose errors reach the columns behind it in one product.

    Weights are counted in steps and lie transposed, so that a column is one run of memory.
    """
    left = torch.from_numpy(weight / steps[:, None]).T.contiguous()
    middle = torch.from_numpy(nearest.astype(np.float64)).T.contiguous()
    low, high = (middle - MOST_STEPS).clamp(-MOST, MOST), (middle + MOST_STEPS).clamp(-MOST, MOST)
    codes = torch.empty_like(left)
    for start in range(0, len(left), _BLOCK):
        stop = min(start + _BLOCK, len(left))
        errors = torch.empty_like(left[start:stop])
        for at in range(start, stop):
            codes[at] = torch.minimum(torch.maximum(torch.round(left[at]), low[at]), high[at])
            error = (left[at] - codes[at]) / factor[at, at]
            left[at + 1 : stop].addr_(factor[at, at + 1 : stop], error, alpha=-1.0)
            errors[at - start] = error
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1.0)
    result: Int8s = codes.T.numpy().astype(np.int8)
    return result
