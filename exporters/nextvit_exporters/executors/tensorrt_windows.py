"""TensorRT's convolutions and poolings: everything that moves a window over a padded map."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from nextvit_exporters.executors.tensorrt_call import Call

_CONVOLUTIONS: Final[Mapping[int, Callable[..., Tensor]]] = MappingProxyType(
    {2: functional.conv2d, 3: functional.conv3d}
)
_MEANS: Final[Mapping[int, Callable[..., Tensor]]] = MappingProxyType(
    {2: functional.avg_pool2d, 3: functional.avg_pool3d}
)
_MAXIMA: Final[Mapping[int, Callable[..., Tensor]]] = MappingProxyType(
    {2: functional.max_pool2d, 3: functional.max_pool3d}
)


@dataclass(frozen=True, slots=True)
class _Axis:
    """One spatial axis: its size, the padding that counts, and what the last window needs beyond it."""

    size: int
    before: int
    after: int
    beyond: int


def convolution(call: Call) -> Tensor:
    """Correlation in groups, with the kernel from the layer or, where a dequantize gives it, from input 1."""
    layer, image = call.layer, call[0]
    extent, dilation = layer.dims("kernel_size_nd"), layer.dims("dilation_nd")
    groups = layer.integer("num_groups")
    shape = (layer.integer("num_output_maps"), image.shape[1] // groups, *extent)
    kernel = call.weights("kernel")
    kernel = call[1] if kernel is None else kernel.reshape(shape)
    bias = call.weights("bias")
    bias = call.optional(2) if bias is None else bias
    reach = tuple(step * (size - 1) + 1 for size, step in zip(extent, dilation, strict=True))
    padded = _pad(image, _axes(call, reach), 0.0)
    return _CONVOLUTIONS[len(extent)](padded, kernel, bias, layer.dims("stride_nd"), 0, dilation, groups)


def pooling(call: Call) -> Tensor:
    """Maximum or mean; padding is never a maximum, and counts in a mean only where the layer says so."""
    layer = call.layer
    window, strides = layer.dims("window_size_nd"), layer.dims("stride_nd")
    axes = _axes(call, window)
    if layer.attributes["type"] == "MAX":
        return _MAXIMA[len(window)](_pad(call[0], axes, -math.inf), window, strides)
    if layer.attributes["type"] != "AVERAGE":
        raise layer.unknown("type")
    mean = _MEANS[len(window)](_pad(call[0], axes, 0.0), window, strides)
    counts = torch.ones((), dtype=mean.dtype)
    for axis, size, stride, steps in zip(axes, window, strides, mean.shape[2:], strict=True):
        inside = _counts(axis, size, stride, steps, padding=not layer.attributes["average_count_excludes_padding"])
        counts = counts.unsqueeze(-1) * inside.to(mean.dtype)
    whole = math.prod(window)
    return mean if bool((counts == whole).all()) else mean * (whole / counts)


def _axes(call: Call, reach: tuple[int, ...]) -> tuple[_Axis, ...]:
    """Padding by axis, under the layer's padding mode, for windows that reach over so many places."""
    layer, sizes, mode = call.layer, call[0].shape[2:], call.layer.attributes["padding_mode"]
    strides = layer.dims("stride_nd")
    if mode in {"SAME_UPPER", "SAME_LOWER"}:
        return tuple(_same(*each, upper=mode == "SAME_UPPER") for each in zip(sizes, reach, strides, strict=True))
    if mode not in {"EXPLICIT_ROUND_DOWN", "EXPLICIT_ROUND_UP"}:
        raise layer.unknown("padding_mode")
    axes = []
    padding = zip(layer.dims("pre_padding"), layer.dims("post_padding"), strict=True)
    for size, (before, after), length, stride in zip(sizes, padding, reach, strides, strict=True):
        left_over = (size + before + after - length) % stride
        beyond = (stride - left_over) % stride if mode == "EXPLICIT_ROUND_UP" else 0
        axes.append(_Axis(size, before, after, beyond))
    return tuple(axes)


def _same(size: int, length: int, stride: int, *, upper: bool) -> _Axis:
    """As many windows as strides fit in; the odd place of padding goes behind (upper) or in front (lower)."""
    total = max((-(-size // stride) - 1) * stride + length - size, 0)
    before = total // 2 if upper else total - total // 2
    return _Axis(size, before, total - before, 0)


def _pad(image: Tensor, axes: tuple[_Axis, ...], value: float) -> Tensor:
    amounts = [amount for axis in reversed(axes) for amount in (axis.before, axis.after + axis.beyond)]
    return functional.pad(image, amounts, value=value) if any(amounts) else image


def _counts(axis: _Axis, size: int, stride: int, steps: int, *, padding: bool) -> Tensor:
    """Over how many places each window of one axis takes its mean."""
    start = torch.arange(steps) * stride - axis.before
    first, last = (-axis.before, axis.size + axis.after) if padding else (0, axis.size)
    return (start + size).clamp(max=last) - start.clamp(min=first)
