"""The algebra of the folds: what a BatchNorm is, and how an affine map moves into a linear one.

Everything here works on modules in float64 and returns new modules; nothing is changed in place.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Linear = nn.Linear | nn.Conv1d | nn.Conv2d
Norm = nn.BatchNorm1d | nn.BatchNorm2d


@dataclass(frozen=True, slots=True)
class Affine:
    """The map y_c = scale_c * x_c + shift_c per channel; both tensors are (C,)."""

    scale: Tensor
    shift: Tensor


def affine_of_norm(norm: Norm) -> Affine:
    """A BatchNorm in eval mode: scale = gamma / sqrt(var + eps), shift = beta - mean * scale.

    Raises ValueError when the norm keeps no running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        msg = "the norm keeps no running statistics"
        raise ValueError(msg)
    scale = 1.0 / torch.sqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = norm.weight.detach() * scale
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = norm.bias.detach() + shift
    return Affine(scale, shift)


def fold_behind(linear: Linear, affine: Affine) -> Linear:
    """``affine(linear(x))`` as one linear map: W' = scale * W per output, b' = scale * b + shift."""
    weight = linear.weight.detach()
    scale = affine.scale.view(-1, *(1,) * (weight.dim() - 1))
    return with_weights(linear, weight * scale, affine.scale * bias_of(linear) + affine.shift)


def fold_before(linear: Linear, affine: Affine) -> Linear:
    """``linear(affine(x))`` as one linear map: W' = W * scale per input, b' = b + W @ shift.

    ``linear`` is an ``nn.Linear`` or a 1x1 convolution without padding and groups.
    """
    weight = linear.weight.detach()
    matrix = weight.flatten(1)
    return with_weights(linear, (matrix * affine.scale).view_as(weight), bias_of(linear) + matrix @ affine.shift)


def scale_output(linear: Linear, factor: float) -> Linear:
    """``factor * linear(x)`` as one linear map."""
    bias = None if linear.bias is None else linear.bias.detach() * factor
    return with_weights(linear, linear.weight.detach() * factor, bias)


def has_bias(linear: Linear) -> bool:
    """Whether the map adds a bias."""
    return linear.bias is not None


def bias_of(linear: Linear) -> Tensor:
    """The bias, (out,); zeros where there is none."""
    if linear.bias is None:
        return linear.weight.new_zeros(linear.weight.shape[0])
    return linear.bias.detach()


def as_convolution(linear: nn.Linear, dimensions: int) -> nn.Conv1d | nn.Conv2d:
    """A 1x1 convolution with the same weights, over maps of one or two dimensions."""
    kind = nn.Conv2d if dimensions == 2 else nn.Conv1d
    conv = kind(linear.in_features, linear.out_features, 1, bias=has_bias(linear), dtype=linear.weight.dtype)
    weight = linear.weight.detach().view(*linear.weight.shape, *(1,) * dimensions)
    conv.weight = nn.Parameter(weight, requires_grad=False)
    if has_bias(linear):
        conv.bias = nn.Parameter(bias_of(linear), requires_grad=False)
    return conv.eval()


def with_weights(linear: Linear, weight: Tensor, bias: Tensor | None) -> Linear:
    """A module like ``linear`` with other numbers in it."""
    result = copy.copy(linear)
    result._parameters = dict(linear._parameters)  # noqa: SLF001 - a shallow module copy shares this dict
    result.weight = nn.Parameter(weight.detach(), requires_grad=False)
    result.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return result
