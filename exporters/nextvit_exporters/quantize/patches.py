"""What each weight of a linear map is multiplied with: a convolution written as a matrix product.

Calibration asks about a map's input as its weights see it: means for the bias, products of pairs for the rounding of
weights. Both are plain sums over the rows of one matrix, whatever the map.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from nextvit_exporters.errors import InvariantError
from nextvit_exporters.quantize.placement import Map


def patches(module: Map, inputs: Tensor) -> Tensor:
    """What the weights of one output channel meet at each place of the output: (groups, positions, K).

    ``inputs`` is what the module reads: (..., K) for a Linear, (B, C, L) or (B, C, H, W) for a convolution.
    ``positions`` runs over images, then over places of the output in their order (for a Linear: over all tokens); K is
    input channels per group times kernel size, in the order of ``weight[0].flatten()``. The zeros a convolution pads
    with are there.
    Group i's output is ``patches[i] @ weight_i.flatten(1).T + bias_i``.

    Raises InvariantError for padding with anything but zeros, and for a tensor of another rank.
    """
    if isinstance(module, nn.Linear):
        return inputs.reshape(1, -1, module.in_features)
    if module.padding_mode != "zeros":
        raise InvariantError(
            f"a convolution that pads with '{module.padding_mode}' has no patches here; pad with zeros"
        )
    if inputs.dim() != len(module.kernel_size) + 2:
        raise InvariantError(
            f"a convolution over {len(module.kernel_size)} axes was given {inputs.dim()} axes; batch it"
        )
    padded = functional.pad(inputs, _pads(module))
    columns = _strided(module, padded) if _single(module) else _unfolded(module, padded)  # (B, C·k, positions an image)
    batch, _, places = columns.shape
    grouped = columns.reshape(batch, module.groups, -1, places)
    return grouped.permute(1, 0, 3, 2).reshape(module.groups, batch * places, -1)


def _single(conv: nn.Conv1d | nn.Conv2d) -> bool:
    return all(size == 1 for size in conv.kernel_size)


def _strided(conv: nn.Conv1d | nn.Conv2d, padded: Tensor) -> Tensor:
    """The places a kernel of one number stands at; nothing is copied before the patches are laid out."""
    steps = tuple(slice(None, None, step) for step in conv.stride)
    return padded[(slice(None), slice(None), *steps)].flatten(2)


def _unfolded(conv: nn.Conv1d | nn.Conv2d, padded: Tensor) -> Tensor:
    one = len(conv.kernel_size) == 1
    kernel, dilation, stride = ((1, *each) if one else each for each in (conv.kernel_size, conv.dilation, conv.stride))
    return functional.unfold(padded.unsqueeze(2) if one else padded, kernel, dilation, 0, stride)


def _pads(conv: nn.Conv1d | nn.Conv2d) -> list[int]:
    """Zeros before and behind each axis, the last axis first, as ``torch.nn.functional.pad`` wants them."""
    axes: list[tuple[int, int]] = []
    for axis, (size, step) in enumerate(zip(conv.kernel_size, conv.dilation, strict=True)):
        if isinstance(conv.padding, str):
            total = step * (size - 1) if conv.padding == "same" else 0
            axes.append((total // 2, total - total // 2))
        else:
            axes.append((conv.padding[axis],) * 2)
    return list(itertools.chain.from_iterable(reversed(axes)))


def patch_means(module: Map, inputs: Tensor) -> Tensor:
    """The mean of what each weight is multiplied with, over images and places: (groups, K), in the inputs' dtype."""
    return torch.mean(patches(module, inputs), dim=1)
