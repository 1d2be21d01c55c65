"""What each kind of MIL operation computes, written in PyTorch after coremltools' documentation of the operations.

An operation gets a ``Call`` and returns what it writes, before that is stored. Defaults are those of the
specification (``coremltools.converters.mil.mil.ops.defs``). A value of a parameter that isn't implemented is a
NotExecutable that names the operation, its module and the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from nextvit_exporters.executors.mil_call import Call
from nextvit_exporters.executors.mil_moves import MOVES, Operation
from nextvit_exporters.executors.mil_rounding import INTEGERS
from nextvit_exporters.executors.mil_windows import average, convolution, maximum

_GELUS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = MappingProxyType(
    {
        "EXACT": functional.gelu,
        "TANH_APPROXIMATION": lambda x: functional.gelu(x, approximate="tanh"),
        "SIGMOID_APPROXIMATION": lambda x: x * torch.sigmoid(1.702 * x),
    }
)
_TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {"fp16": "float16", "fp32": "float32", "bool": "bool"} | {name: name for name in INTEGERS}
)


def _unary(compute: Callable[[Tensor], Tensor]) -> Operation:
    """One number in, one out."""
    return lambda call: compute(call.tensor("x"))


def _binary(compute: Callable[[Tensor, Tensor], Tensor]) -> Operation:
    """Two numbers in, one out, axes of size one repeated."""
    return lambda call: compute(call.tensor("x"), call.tensor("y"))


def _reduction(compute: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Operation:
    """Over ``axes``, by default all of them; ``keep_dims`` leaves them in with size one."""

    def reduce(call: Call) -> Tensor:
        x = call.tensor("x")
        axes = call.integers("axes", tuple(range(x.ndim)))
        if not axes:  # to PyTorch no axes would mean every axis
            raise call.unknown("no axes")
        return compute(x, axes, call.flag("keep_dims", default=False))

    return reduce


def rsqrt(call: Call) -> Tensor:
    """1 / sqrt(x + epsilon)."""
    return (call.tensor("x") + call.number("epsilon", 1e-12)).rsqrt()


def inverse(call: Call) -> Tensor:
    """1 / (x + epsilon)."""
    return (call.tensor("x") + call.number("epsilon", 1e-4)).reciprocal()


def real_div(call: Call) -> Tensor:
    """Quotient x / y of real numbers."""
    x, y = call.tensor("x"), call.tensor("y")
    if not x.is_floating_point():
        raise call.unknown("a division of whole numbers")
    return x / y


def clip(call: Call) -> Tensor:
    """x, not below alpha and not above beta."""
    return call.tensor("x").clamp(call.number("alpha"), call.number("beta"))


def gelu(call: Call) -> Tensor:
    """Gaussian error linear unit in one of three formulas."""
    mode = call.text("mode", "EXACT")
    if mode not in _GELUS:
        raise call.unknown(f"mode {mode}")
    return _GELUS[mode](call.tensor("x"))


def softmax(call: Call) -> Tensor:
    """Over one axis, by default the last."""
    return call.tensor("x").softmax(call.integer("axis", -1))


def linear(call: Call) -> Tensor:
    """X @ weight.T + bias; weight (out, in)."""
    x, weight, bias = call.tensor("x"), call.tensor("weight"), call.optional("bias")
    if not call.arithmetic.chunk:
        return functional.linear(x, weight, bias)
    summed = call.arithmetic.product(x, weight.T)
    return summed if bias is None else summed + bias


def matmul(call: Call) -> Tensor:
    """Batched product of x and y, each of them transposed first if asked; a vector has nothing to transpose."""
    x, y = call.tensor("x"), call.tensor("y")
    flip_x, flip_y = (call.flag(f"transpose_{name}", default=False) for name in "xy")
    return call.arithmetic.product(x.mT if flip_x and x.ndim > 1 else x, y.mT if flip_y and y.ndim > 1 else y)


def attention(call: Call) -> Tensor:
    """softmax(query @ key.T / sqrt(width) + mask) @ value; a mask of truth values keeps what is true."""
    query, key, value = (call.tensor(name) for name in ("query", "key", "value"))
    mask = call.optional("attn_mask")
    scores = call.arithmetic.product(query * query.shape[-1] ** -0.5, key.mT)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    return call.arithmetic.product(scores.softmax(-1), value)


def batch_norm(call: Call) -> Tensor:
    """Gamma * (x - mean) / sqrt(variance + epsilon) + beta by channel, which is axis 1."""
    mean, variance = call.tensor("mean"), call.tensor("variance")
    gamma, beta, epsilon = call.optional("gamma"), call.optional("beta"), call.number("epsilon", 1e-5)
    return functional.batch_norm(call.tensor("x"), mean, variance, gamma, beta, training=False, eps=epsilon)


def layer_norm(call: Call) -> Tensor:
    """Gamma * (x - mean) / sqrt(variance + epsilon) + beta over ``axes``, by default all of them."""
    x = call.tensor("x")
    axes = tuple(axis % x.ndim for axis in call.integers("axes", tuple(range(x.ndim))))
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    result = (x - mean) / (variance + call.number("epsilon", 1e-5)).sqrt()
    gamma, beta = call.optional("gamma"), call.optional("beta")
    result = result if gamma is None else result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


def cast(call: Call) -> Tensor:
    """As another type: real numbers lose their fraction on the way to whole ones; to float16 only where it rounds."""
    x, name = call.tensor("x"), call.text("dtype")
    declared = call.operation.outputs[0].type.dtype
    if name not in _TYPES:
        raise call.unknown(f"dtype {name}")
    if _TYPES[name] != declared:
        raise call.wrong(f"casts to {name} and is declared {declared}")
    if declared == "bool":
        return x != 0
    if declared not in INTEGERS:
        return x.to(call.arithmetic.dtype)
    whole = x.double().trunc()
    low, high = INTEGERS[declared]
    if bool(((whole < low) | (whole > high) | whole.isnan()).any()):
        raise call.wrong(f"casts numbers that {declared} does not hold")
    return whole.to(torch.int32)


def quantize(call: Call) -> Tensor:
    """clip(round(input / scale) + zero point), ties to even; without steps neither rounded nor clipped."""
    x, name = call.tensor("input"), call.text("output_dtype")
    if name not in {"int8", "uint8"}:
        raise call.unknown(f"output_dtype {name}")
    scale, zero = _along(call, x)
    steps = x / scale
    if not call.arithmetic.steps:
        return steps + zero
    if bool(steps.isnan().any()):
        raise call.wrong("reads NaN, which no integer stands for")
    return (steps.round() + zero).clamp(*INTEGERS[name]).to(torch.int32)


def dequantize(call: Call) -> Tensor:
    """(input - zero point) * scale."""
    x = call.tensor("input").to(call.arithmetic.dtype)
    scale, zero = _along(call, x)
    return (x - zero) * scale


def _along(call: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point shaped to meet the tensor: one number, or one for each entry of ``axis``."""
    scale, zero = call.tensor("scale"), call.optional("zero_point")
    zero = torch.zeros_like(scale) if zero is None else zero.to(scale.dtype)
    if scale.ndim == 0:
        if call.has("axis"):
            raise call.wrong("has an axis, and one scale for all of them")
        return scale, zero
    axis = call.integer("axis")
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    return scale.reshape(shape), zero.reshape(shape)


OPERATIONS: Final[Mapping[str, Operation]] = MappingProxyType(
    {
        **MOVES,
        "abs": _unary(torch.abs),
        "add": _binary(torch.add),
        "avg_pool": average,
        "batch_norm": batch_norm,
        "cast": cast,
        "clip": clip,
        "conv": convolution,
        "dequantize": dequantize,
        "equal": _binary(torch.eq),
        "erf": _unary(torch.erf),
        "exp": _unary(torch.exp),
        "floor_div": _binary(torch.floor_divide),
        "gelu": gelu,
        "greater": _binary(torch.gt),
        "greater_equal": _binary(torch.ge),
        "inverse": inverse,
        "layer_norm": layer_norm,
        "less": _binary(torch.lt),
        "less_equal": _binary(torch.le),
        "linear": linear,
        "logical_and": _binary(torch.logical_and),
        "logical_not": _unary(torch.logical_not),
        "logical_or": _binary(torch.logical_or),
        "matmul": matmul,
        "max_pool": maximum,
        "maximum": _binary(torch.maximum),
        "minimum": _binary(torch.minimum),
        "mod": _binary(torch.remainder),
        "mul": _binary(torch.mul),
        "not_equal": _binary(torch.ne),
        "pow": _binary(torch.pow),
        "quantize": quantize,
        "real_div": real_div,
        "reduce_max": _reduction(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
        "reduce_mean": _reduction(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
        "reduce_min": _reduction(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
        "reduce_sum": _reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep).to(x.dtype)),
        "relu": _unary(torch.relu),
        "rsqrt": rsqrt,
        "scaled_dot_product_attention": attention,
        "sigmoid": _unary(torch.sigmoid),
        "silu": _unary(functional.silu),
        "softmax": softmax,
        "sqrt": _unary(torch.sqrt),
        "square": _unary(torch.square),
        "sub": _binary(torch.sub),
        "tanh": _unary(torch.tanh),
    }
)
"""Every kind that can be executed, save constants and ``classify``."""
STORED_BEFORE: Final = frozenset(MOVES) | {"relu", "max_pool", "maximum", "minimum", "reduce_max", "reduce_min"}
"""Kinds whose numbers have all been stored before: nothing is left to round."""
SUMS_OF_PRODUCTS: Final = frozenset({"conv", "linear", "matmul", "scaled_dot_product_attention"})
"""Kinds that run through a device's multiply-accumulate units."""
