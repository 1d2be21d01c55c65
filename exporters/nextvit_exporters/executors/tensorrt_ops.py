"""What each kind of TensorRT layer computes, written in PyTorch after TensorRT's documentation.

An operation gets a ``Call`` and returns the one tensor that the layer writes, before it is stored. A value of an
attribute that isn't implemented is an UnknownLayer naming layer and attribute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.executors.tensorrt_call import Call, bits
from nextvit_exporters.executors.tensorrt_windows import convolution, pooling

Operation = Callable[[Call], Tensor]

_UNARY: Final[Mapping[str, Callable[[Tensor], Tensor]]] = MappingProxyType(
    {
        "EXP": torch.exp,
        "LOG": torch.log,
        "SQRT": torch.sqrt,
        "RECIP": torch.reciprocal,
        "ABS": torch.abs,
        "NEG": torch.neg,
        "SIN": torch.sin,
        "COS": torch.cos,
        "CEIL": torch.ceil,
        "FLOOR": torch.floor,
        "ERF": torch.erf,
        "NOT": torch.logical_not,
        "SIGN": torch.sign,
        "ROUND": torch.round,  # ties to even
    }
)
_ELEMENTWISE: Final[Mapping[str, Callable[[Tensor, Tensor], Tensor]]] = MappingProxyType(
    {
        "SUM": torch.add,
        "PROD": torch.mul,
        "MAX": torch.maximum,
        "MIN": torch.minimum,
        "SUB": torch.sub,
        "DIV": lambda a, b: torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc"),
        "POW": torch.pow,
        "FLOOR_DIV": torch.floor_divide,
        "AND": torch.logical_and,
        "OR": torch.logical_or,
        "XOR": torch.logical_xor,
        "EQUAL": torch.eq,
        "GREATER": torch.gt,
        "LESS": torch.lt,
    }
)
_ACTIVATIONS: Final[Mapping[str, Callable[[Tensor, float, float], Tensor]]] = MappingProxyType(
    {
        "RELU": lambda x, _a, _b: functional.relu(x),
        "SIGMOID": lambda x, _a, _b: torch.sigmoid(x),
        "TANH": lambda x, _a, _b: torch.tanh(x),
        "LEAKY_RELU": lambda x, a, _b: functional.leaky_relu(x, a),
        "ELU": lambda x, a, _b: functional.elu(x, a),
        "CLIP": lambda x, a, b: x.clamp(a, b),
        "HARD_SIGMOID": lambda x, a, b: (a * x + b).clamp(0, 1),
        "GELU_ERF": lambda x, _a, _b: functional.gelu(x),
        "GELU_TANH": lambda x, _a, _b: functional.gelu(x, approximate="tanh"),
    }
)
_REDUCTIONS: Final[Mapping[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]]] = MappingProxyType(
    {
        "SUM": lambda x, axes, keep: x.sum(axes, keepdim=keep).to(x.dtype),
        "MAX": lambda x, axes, keep: x.amax(axes, keepdim=keep),
        "MIN": lambda x, axes, keep: x.amin(axes, keepdim=keep),
        "AVG": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    }
)


def activation(call: Call) -> Tensor:
    """One number in, one out; ``alpha`` and ``beta`` are the layer's."""
    layer = call.layer
    if layer.attributes["type"] not in _ACTIVATIONS:
        raise layer.unknown("type")
    return _ACTIVATIONS[str(layer.attributes["type"])](call[0], layer.number("alpha"), layer.number("beta"))


def unary(call: Call) -> Tensor:
    """One number in, one out."""
    if call.layer.attributes["op"] not in _UNARY:
        raise call.layer.unknown("op")
    return _UNARY[str(call.layer.attributes["op"])](call[0])


def elementwise(call: Call) -> Tensor:
    """Two numbers in, one out, axes of size one repeated; integers divide towards zero, FLOOR_DIV downwards."""
    if call.layer.attributes["op"] not in _ELEMENTWISE:
        raise call.layer.unknown("op")
    return _ELEMENTWISE[str(call.layer.attributes["op"])](call[0], call[1])


def matrix_multiply(call: Call) -> Tensor:
    """Batched product; an operand may be transposed, or a vector (the last axis) in place of a matrix."""
    left, right = (_matrix(call, index) for index in (0, 1))
    row, column = (call.layer.attributes[name] == "VECTOR" for name in ("op0", "op1"))
    product = (left.unsqueeze(-2) if row else left) @ (right.unsqueeze(-1) if column else right)
    product = product.squeeze(-1) if column else product
    return product.squeeze(-1 if column else -2) if row else product


def _matrix(call: Call, index: int) -> Tensor:
    if call.layer.attributes[f"op{index}"] not in {"NONE", "TRANSPOSE", "VECTOR"}:
        raise call.layer.unknown(f"op{index}")
    return call[index].mT if call.layer.attributes[f"op{index}"] == "TRANSPOSE" else call[index]


def shuffle(call: Call) -> Tensor:
    """Transpose, reshape, transpose; the shape is an attribute or input 1, and without either stays."""
    layer = call.layer
    tensor = call[0].permute(layer.dims("first_transpose")[: call[0].ndim])
    shape = call.dims("reshape_dims", 1)
    if shape is not None:
        if layer.attributes["zero_is_placeholder"]:
            shape = tuple(tensor.shape[axis] if size == 0 else size for axis, size in enumerate(shape))
        tensor = tensor.reshape(shape)
    return tensor.permute(layer.dims("second_transpose")[: tensor.ndim])


def slice_(call: Call) -> Tensor:
    """Places ``start``, ``start + stride`` and so on of some axes; beyond the tensor, mode FILL puts in input 4."""
    layer, tensor = call.layer, call[0]
    start, size, stride = (call.dims(name, index) for name, index in (("start", 1), ("shape", 2), ("stride", 3)))
    if start is None or size is None or stride is None:
        raise BuildFailed(f"{layer.where} does not say what it cuts out")
    mode = layer.attributes["mode"]
    if mode not in {"STRICT_BOUNDS", "FILL"}:
        raise layer.unknown("mode")
    axes = call.dims("axes", 5) or tuple(range(tensor.ndim))
    outside = torch.zeros((), dtype=torch.bool)
    for axis, first, count, step in zip(axes, start, size, stride, strict=True):
        places = first + step * torch.arange(count)
        beyond = (places < 0) | (places >= tensor.shape[axis])
        outside = outside | beyond.reshape(-1, *([1] * (tensor.ndim - 1 - axis % tensor.ndim)))
        tensor = tensor.index_select(axis, places.clamp(0, max(tensor.shape[axis] - 1, 0)))
    if mode == "STRICT_BOUNDS" and bool(outside.any()):
        raise BuildFailed(f"{layer.where} reads beyond its input of shape {tuple(call[0].shape)}")
    fill = call.optional(4)
    return tensor.masked_fill(outside, 0 if fill is None else fill.item()) if bool(outside.any()) else tensor


def gather(call: Call) -> Tensor:
    """Entries of one axis by their numbers; negative ones count from the end, as in ONNX."""
    layer, tensor, axis = call.layer, call[0], call.layer.integer("axis")
    if layer.attributes["mode"] != "DEFAULT":
        raise layer.unknown("mode")
    if layer.attributes["num_elementwise_dims"] != 0:
        raise layer.unknown("num_elementwise_dims")
    index, size = call[1].long(), tensor.shape[axis]
    if bool(((index < -size) | (index >= size)).any()):
        raise BuildFailed(f"{layer.where} reads beyond the {size} entries of axis {axis}")
    picked = tensor.index_select(axis, index.flatten() % size)
    return picked.reshape(*tensor.shape[:axis], *index.shape, *tensor.shape[axis + 1 :])


def softmax(call: Call) -> Tensor:
    """Softmax over the one axis of the bit mask."""
    axes = bits(call.layer.integer("axes"))
    if len(axes) != 1:
        raise call.layer.unknown("axes")
    return call[0].softmax(axes[0])


def reduce(call: Call) -> Tensor:
    """Sum, mean, largest or smallest over the axes of the bit mask."""
    layer, axes = call.layer, bits(call.layer.integer("axes"))
    if layer.attributes["op"] not in _REDUCTIONS:
        raise layer.unknown("op")
    if not axes:  # to PyTorch no axes would mean every axis
        raise layer.unknown("axes")
    return _REDUCTIONS[str(layer.attributes["op"])](call[0], axes, bool(layer.attributes["keep_dims"]))


def scale(call: Call) -> Tensor:
    """(x * scale + shift) ^ power, with one number of each, or one for each channel or element."""
    layer, result = call.layer, call[0]
    shapes = {
        "UNIFORM": (1,) * result.ndim,
        "CHANNEL": tuple(
            size if axis == layer.integer("channel_axis") else 1 for axis, size in enumerate(result.shape)
        ),
        "ELEMENTWISE": (1, *result.shape[1:]),
    }
    mode = str(layer.attributes["mode"])
    if mode not in shapes:
        raise layer.unknown("mode")
    for name, apply in (("scale", torch.mul), ("shift", torch.add), ("power", torch.pow)):
        factor = call.weights(name)
        result = result if factor is None else apply(result, factor.reshape(shapes[mode]))
    return result


def quantize(call: Call) -> Tensor:
    """clamp(round(x / scale) + zero point) in int8, ties to even; raises BuildFailed for what is no number.

    Where the arithmetic has no steps, without the rounding.
    """
    if call.layer.attributes["to_type"] != "INT8":
        raise call.layer.unknown("to_type")
    steps = call[0] / _along(call, 1)
    steps = steps.round() if call.arithmetic.steps else steps
    if call.optional(2) is not None:
        steps = steps + _along(call, 2)
    if bool(steps.isnan().any()):
        raise BuildFailed(f"{call.layer.where} reads NaN, which no integer stands for")
    steps = steps.clamp(-128, 127)
    return steps.to(torch.int8) if call.arithmetic.steps else steps


def dequantize(call: Call) -> Tensor:
    """(q - zero point) * scale."""
    if call[0].dtype is not torch.int8 and call.arithmetic.steps:
        raise BuildFailed(f"{call.layer.where} reads {call[0].dtype}, and only int8 can be executed here")
    steps = call[0].to(call.arithmetic.dtype)
    if call.optional(2) is not None:
        steps = steps - _along(call, 2)
    return steps * _along(call, 1)


def _along(call: Call, index: int) -> Tensor:
    """A scale or zero point shaped to meet the tensor: one number, or one for each entry of the layer's axis."""
    values = call[index].to(call.arithmetic.dtype)
    if values.numel() == 1:
        return values.reshape(())
    axis = call.layer.integer("axis")
    if values.shape != (call[0].shape[axis],):
        raise BuildFailed(f"{call.layer.where} has a scale of shape {tuple(values.shape)}, one by axis was expected")
    return values.reshape([-1 if each == axis else 1 for each in range(call[0].ndim)])


def squeeze(call: Call) -> Tensor:
    """Without the axes that input 1 names, or without every axis of size one where there is no such input."""
    axes = call.optional(1)
    return call[0].squeeze() if axes is None else call[0].squeeze([int(axis) for axis in axes.flatten()])


def unsqueeze(call: Call) -> Tensor:
    """With new axes of size one where, in the result, input 1 names them."""
    result = call[0]
    rank = result.ndim + call[1].numel()
    for axis in sorted(int(each) % rank for each in call[1].flatten()):
        result = result.unsqueeze(axis)
    return result


def constant(call: Call) -> Tensor:
    """The layer's weights."""
    values = call.weights("weights")
    return torch.zeros(call.layer.dims("shape")) if values is None else values.reshape(call.layer.dims("shape"))


def concatenation(call: Call) -> Tensor:
    """The inputs behind each other along one axis."""
    return torch.cat([call[index] for index in range(len(call.inputs))], call.layer.integer("axis"))


def select(call: Call) -> Tensor:
    """Input 1 where input 0 is true, else input 2."""
    return torch.where(call[0], call[1], call[2])


def shape(call: Call) -> Tensor:
    """The sizes of the axes."""
    return torch.tensor(call[0].shape, dtype=torch.int64)


def unchanged(call: Call) -> Tensor:
    """The input: what a cast does happens where its result is stored."""
    return call[0]


OPERATIONS: Final[Mapping[str, Operation]] = MappingProxyType(
    {
        "ACTIVATION": activation,
        "CAST": unchanged,
        "CONCATENATION": concatenation,
        "CONSTANT": constant,
        "CONVOLUTION": convolution,
        "DEQUANTIZE": dequantize,
        "ELEMENTWISE": elementwise,
        "GATHER": gather,
        "IDENTITY": unchanged,
        "MATRIX_MULTIPLY": matrix_multiply,
        "POOLING": pooling,
        "QUANTIZE": quantize,
        "REDUCE": reduce,
        "SCALE": scale,
        "SELECT": select,
        "SHAPE": shape,
        "SHUFFLE": shuffle,
        "SLICE": slice_,
        "SOFTMAX": softmax,
        "SQUEEZE": squeeze,
        "UNARY": unary,
        "UNSQUEEZE": unsqueeze,
    }
)
