"""MIL's convolutions and poolings: everything that moves a window over a padded map.

The semantics are those of ``conv``, ``avg_pool`` and ``max_pool`` in coremltools' documentation of the operations,
and for what a mean counts, of what macOS was seen to compute (apple/coremltools pull request 2844).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from nextvit_exporters.executors.mil_call import Call

_CONVOLUTIONS: Final[Mapping[int, Callable[..., Tensor]]] = MappingProxyType(
    {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
)
_MEANS: Final[Mapping[int, Callable[..., Tensor]]] = MappingProxyType(
    {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
)
_MAXIMA: Final[Mapping[int, Callable[..., Tensor]]] = MappingProxyType(
    {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
)


@dataclass(frozen=True, slots=True)
class _Axis:
    """One spatial axis: its size, the padding, how far and often the window goes, and what it needs beyond the end."""

    size: int
    before: int
    after: int
    reach: int
    stride: int
    steps: int

    @property
    def beyond(self) -> int:
        """By how many places the last window goes over the padded end."""
        return max((self.steps - 1) * self.stride + self.reach - (self.size + self.before + self.after), 0)


def convolution(call: Call) -> Tensor:
    """Correlation in groups; weight (out, in / groups, *window), bias (out,)."""
    image, weight, bias = call.tensor("x"), call.tensor("weight"), call.optional("bias")
    window = tuple(weight.shape[2:])
    ones = (1,) * len(window)
    if len(window) not in _CONVOLUTIONS or image.ndim != len(window) + 2:
        raise call.unknown(f"an input of {image.ndim} axes and a weight of {weight.ndim}")
    strides, dilations = call.integers("strides", ones), call.integers("dilations", ones)
    groups = call.integer("groups", 1)
    reach = tuple(step * (size - 1) + 1 for size, step in zip(window, dilations, strict=True))
    axes = _axes(call, image, reach, strides, call.text("pad_type", "valid"))
    if call.arithmetic.chunk:
        summed = _in_chunks(call, _pad(image, axes, 0.0), weight, axes, dilations, groups)
        return summed if bias is None else summed + bias.reshape(-1, *ones)
    convolve = _CONVOLUTIONS[len(window)]
    if all(axis.before == axis.after for axis in axes):
        return convolve(image, weight, bias, strides, tuple(axis.before for axis in axes), dilations, groups)
    return convolve(_pad(image, axes, 0.0), weight, bias, strides, 0, dilations, groups)


def average(call: Call) -> Tensor:
    """Mean over each window; what lies beyond the map are zeros.

    With ``exclude_padding_from_average`` the sum is divided by the places inside the map. Without, by the whole window,
    and that also where ``ceil_mode`` lets it hang over the padded end (there PyTorch divides by less).
    """
    image, axes = _pooled(call)
    window = tuple(axis.reach for axis in axes)
    mean = _MEANS[len(axes)](_pad(image, axes, 0.0), window, tuple(axis.stride for axis in axes))
    if not call.flag("exclude_padding_from_average", default=False):
        return mean
    counts = torch.ones((), dtype=mean.dtype)
    for axis in axes:
        start = torch.arange(axis.steps) * axis.stride - axis.before
        inside = (start + axis.reach).clamp(max=axis.size) - start.clamp(min=0)
        counts = counts.unsqueeze(-1) * inside.to(mean.dtype)
    whole = math.prod(window)
    return mean if bool((counts == whole).all()) else mean * (whole / counts)


def maximum(call: Call) -> Tensor:
    """Largest of each window; padding is never the largest."""
    image, axes = _pooled(call)
    window, strides = tuple(axis.reach for axis in axes), tuple(axis.stride for axis in axes)
    return _MAXIMA[len(axes)](_pad(image, axes, -math.inf), window, strides)


def _pooled(call: Call) -> tuple[Tensor, tuple[_Axis, ...]]:
    image, window = call.tensor("x"), call.integers("kernel_sizes")
    if len(window) not in _MEANS or image.ndim != len(window) + 2:
        raise call.unknown(f"an input of {image.ndim} axes and a window of {len(window)}")
    strides, kind = call.integers("strides", (1,) * len(window)), call.text("pad_type")
    ceil = call.flag("ceil_mode", default=False)
    if ceil and kind in {"same", "same_lower"}:
        raise call.wrong("has ceil_mode with padding that leaves nothing over")
    return image, _axes(call, image, window, strides, kind, ceil=ceil)


def _axes(
    call: Call, image: Tensor, reach: tuple[int, ...], strides: tuple[int, ...], kind: str, *, ceil: bool = False
) -> tuple[_Axis, ...]:
    """Padding by axis; ``pad`` holds, axis by axis, what comes in front and what comes behind."""
    pad = call.integers("pad", (0,) * (2 * len(reach)))
    if len(pad) != 2 * len(reach) or len(strides) != len(reach):
        raise call.wrong(f"has {len(pad)} paddings and {len(strides)} strides for {len(reach)} axes")
    if kind not in {"valid", "custom", "same", "same_lower"}:
        raise call.unknown(f"pad_type {kind}")
    if kind != "custom" and any(pad):
        raise call.wrong(f"has a padding of {list(pad)} and pad_type {kind}, which has none")
    axes = []
    for axis, (size, length, stride) in enumerate(zip(image.shape[2:], reach, strides, strict=True)):
        before, after = pad[2 * axis], pad[2 * axis + 1]
        if kind in {"same", "same_lower"}:
            total = max((-(-size // stride) - 1) * stride + length - size, 0)
            before = total // 2 if kind == "same" else total - total // 2
            after = total - before
        axes.append(_Axis(size, before, after, length, stride, _steps(size, before + after, length, stride, ceil)))
    if any(axis.steps < 1 for axis in axes):
        raise call.wrong(f"has a window of {list(reach)} on a map of {list(image.shape[2:])}")
    return tuple(axes)


def _steps(size: int, pad: int, length: int, stride: int, ceil: bool) -> int:  # noqa: FBT001 - one of five numbers
    """How many windows there are; rounded up, none that starts in the padding behind the map."""
    room = size + pad - length
    if not ceil:
        return room // stride + 1
    steps = -(-room // stride) + 1
    return steps - 1 if pad and (steps - 1) * stride >= size + pad / 2 else steps


def _pad(image: Tensor, axes: tuple[_Axis, ...], value: float) -> Tensor:
    amounts = [amount for axis in reversed(axes) for amount in (axis.before, axis.after + axis.beyond)]
    return functional.pad(image, amounts, value=value) if any(amounts) else image


def _in_chunks(
    call: Call, padded: Tensor, weight: Tensor, axes: tuple[_Axis, ...], dilations: tuple[int, ...], groups: int
) -> Tensor:
    """The convolution with its running sum rounded: place by place of the window, channel by channel."""
    batch, channels = padded.shape[:2]
    window, steps = tuple(weight.shape[2:]), tuple(axis.steps for axis in axes)
    deep, wide, places = channels // groups, weight.shape[0] // groups, math.prod(window)
    places_of = (range(0, size * step, step) for size, step in zip(window, dilations, strict=True))
    taps = [_tap(padded, offset, axes) for offset in product(*places_of)]
    columns = torch.stack([tap.reshape(batch, groups, deep, -1) for tap in taps], 2) if places > 1 else taps[0]
    columns = columns.reshape(batch, groups, places * deep, -1)
    kernel = weight.reshape(groups, wide, deep, places).transpose(2, 3).reshape(groups, wide, places * deep)
    return call.arithmetic.product(kernel, columns).reshape(batch, groups * wide, *steps)


def _tap(padded: Tensor, offset: tuple[int, ...], axes: tuple[_Axis, ...]) -> Tensor:
    """What one place of the window meets, step by step."""
    cuts = (
        slice(start, start + (axis.steps - 1) * axis.stride + 1, axis.stride)
        for start, axis in zip(offset, axes, strict=True)
    )
    return padded[(slice(None), slice(None), *cuts)]
