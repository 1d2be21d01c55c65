"""How large a model is and how much it computes, without computing it.

Two counts of the work for one image:

* ``count_macs``: multiply-accumulates of convolutions, linear maps and matrix products, and nothing else.
* ``count_published_flops``: what the paper's tables call FLOPs. Source: the official training script counts with
  fvcore, which takes a multiply-accumulate as one operation and a BatchNorm in eval mode as two per element.
"""

from __future__ import annotations

import copy
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

_FLOPS_PER_MAC: Final = 2  # in PyTorch's counter
_FLOPS_PER_NORM_ELEMENT: Final = 2  # in fvcore's: scale and shift


def count_parameters(model: nn.Module) -> int:
    """Trained numbers of ``model``; shared parameters count once, BatchNorm's running statistics do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, image_size: int | tuple[int, int]) -> int:
    """Multiply-accumulates for one RGB image of side ``image_size``, or (height, width), in pixels.

    Counted on a copy without weights; ``model`` is not touched and may be on any device.
    """
    return _count(model, image_size)[0]


def count_published_flops(model: nn.Module, image_size: int | tuple[int, int]) -> int:
    """``count_macs`` and two for every element that a BatchNorm puts out: the FLOPs of the paper's tables."""
    macs, norm_elements = _count(model, image_size)
    return macs + _FLOPS_PER_NORM_ELEMENT * norm_elements


def _count(model: nn.Module, image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Multiply-accumulates and BatchNorm elements."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    norm_elements = 0

    def add_elements(_norm: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal norm_elements
        norm_elements += output.numel()

    hollow = _without_weights(model)
    for module in hollow.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.register_forward_hook(add_elements)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hollow(torch.empty(1, 3, height, width, device="meta"))
    return counter.get_total_flops() // _FLOPS_PER_MAC, norm_elements


def _without_weights(model: nn.Module) -> nn.Module:
    """A float32 eval-mode copy of the structure alone: every tensor has its shape but no memory."""
    hollow: dict[int, object] = {}
    for parameter in model.parameters():
        hollow[id(parameter)] = nn.Parameter(parameter.detach().to("meta", torch.float32), requires_grad=False)
    for buffer in model.buffers():
        hollow[id(buffer)] = buffer.to("meta", torch.float32 if buffer.is_floating_point() else buffer.dtype)
    return copy.deepcopy(model, hollow).eval()
