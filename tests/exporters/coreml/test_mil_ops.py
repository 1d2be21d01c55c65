"""Every operation that computes, by itself, against PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nextvit_exporters.coreml.program import Constant, Operation, Output, Program, TensorType
from nextvit_exporters.errors import NotExecutable, VerificationFailed
from nextvit_exporters.executors.mil_ops import OPERATIONS
from nextvit_exporters.executors.mil_rounding import Arithmetic
from tests.exporters.coreml.small_programs import (
    DOUBLE,
    EMULATED,
    PESSIMISTIC,
    Array,
    execute,
    floats,
    int8s,
    ints,
    normal,
    one,
    program,
)

CUBE = normal(2, 3, 4, 5)
POSITIVE = np.abs(CUBE)
MAP = normal(2, 4, 5, 6, seed=3)


@dataclass(frozen=True, slots=True)
class Case:
    """An operation, what it reads, and what PyTorch makes of that."""

    kind: str
    inputs: Mapping[str, Array]
    expected: Callable[..., Tensor]
    parameters: Mapping[str, Any] = field(default_factory=dict)


def unary(kind: str, expected: Callable[[Tensor], Tensor], x: Array = CUBE, **parameters: Any) -> Case:
    return Case(kind, {"x": x}, expected, parameters)


def binary(kind: str, expected: Callable[[Tensor, Tensor], Tensor], y: Array, x: Array = CUBE) -> Case:
    return Case(kind, {"x": x, "y": y}, expected)


def reduction(kind: str, expected: Callable[[Tensor], Tensor], **parameters: Any) -> Case:
    return Case(kind, {"x": CUBE}, expected, parameters)


def double(values: Array) -> Tensor:
    return torch.from_numpy(np.array(values)).double()


GAMMA, BETA, MEAN, VARIANCE = normal(4, seed=4), normal(4, seed=5), normal(4, seed=6), np.abs(normal(4, seed=7))
STATISTICS = {"mean": MEAN, "variance": VARIANCE}
SCALED = {"gamma": GAMMA, "beta": BETA}
WEIGHT, BIAS = normal(7, 5, seed=8), normal(7, seed=9)
QUERY, KEY, VALUE = normal(2, 3, 4, 8, seed=10), normal(2, 3, 6, 8, seed=11), normal(2, 3, 6, 5, seed=12)
KEPT = np.random.default_rng(1).random((4, 6)) < 0.7
KEPT[:, 0] = True


def normed(x: Tensor, epsilon: float, *, scaled: bool = False) -> Tensor:
    gamma, beta = (double(GAMMA), double(BETA)) if scaled else (None, None)
    return functional.batch_norm(x, double(MEAN), double(VARIANCE), gamma, beta, eps=epsilon)


def attended(mask: Tensor | None = None) -> Callable[..., Tensor]:
    return lambda query, key, value, attn_mask=None: functional.scaled_dot_product_attention(
        query, key, value, attn_mask if mask is None else mask
    )


CASES = {
    "add": binary("add", torch.add, normal(3, 1, 1)),
    "sub": binary("sub", torch.sub, normal(1, 3, 1, 5)),
    "mul": binary("mul", torch.mul, normal(5)),
    "real_div": binary("real_div", torch.div, normal(4, 1)),
    "maximum": binary("maximum", torch.maximum, normal(5)),
    "minimum": binary("minimum", torch.minimum, normal(5)),
    "pow": binary("pow", torch.pow, normal(5), POSITIVE),
    "relu": unary("relu", torch.relu),
    "sigmoid": unary("sigmoid", torch.sigmoid),
    "tanh": unary("tanh", torch.tanh),
    "silu": unary("silu", functional.silu),
    "abs": unary("abs", torch.abs),
    "exp": unary("exp", torch.exp),
    "erf": unary("erf", torch.erf),
    "square": unary("square", torch.square),
    "sqrt": unary("sqrt", torch.sqrt, POSITIVE),
    "clip": unary("clip", lambda x: x.clamp(-0.5, 0.25), alpha=-0.5, beta=0.25),
    "gelu, exact unless told": unary("gelu", functional.gelu),
    "gelu, exact": unary("gelu", functional.gelu, mode="EXACT"),
    "gelu by tanh": unary("gelu", lambda x: functional.gelu(x, approximate="tanh"), mode="TANH_APPROXIMATION"),
    "gelu by sigmoid": unary("gelu", lambda x: x * (1.702 * x).sigmoid(), mode="SIGMOID_APPROXIMATION"),
    "rsqrt": unary("rsqrt", lambda x: (x + 0.25).rsqrt(), POSITIVE, epsilon=0.25),
    "rsqrt, epsilon unless told": unary("rsqrt", lambda x: (x + 1e-12).rsqrt(), POSITIVE * np.float32(1e-12)),
    "inverse": unary("inverse", lambda x: 1 / (x + 0.25), POSITIVE, epsilon=0.25),
    "inverse, epsilon unless told": unary("inverse", lambda x: 1 / (x + 1e-4), POSITIVE),
    "softmax over the last unless told": unary("softmax", lambda x: x.softmax(-1)),
    **{
        f"softmax over {axis}": unary("softmax", partial(torch.softmax, dim=axis), axis=axis) for axis in (0, 1, -2, -1)
    },
    "mean over all": reduction("reduce_mean", torch.mean),
    "mean, dropped": reduction("reduce_mean", lambda x: x.mean((2, 3)), axes=[-1, -2]),
    "mean, kept": reduction("reduce_mean", lambda x: x.mean((2, 3), keepdim=True), axes=[2, 3], keep_dims=True),
    "sum": reduction("reduce_sum", lambda x: x.sum(1), axes=[1], keep_dims=False),
    "sum, kept": reduction("reduce_sum", lambda x: x.sum(3, keepdim=True), axes=[-1], keep_dims=True),
    "largest": reduction("reduce_max", lambda x: x.amax((0, 3)), axes=[-1, 0]),
    "smallest": reduction("reduce_min", lambda x: x.amin(2), axes=[2]),
    "linear": unary("linear", lambda x: functional.linear(x, double(WEIGHT), double(BIAS)), weight=WEIGHT, bias=BIAS),
    "linear without bias": unary("linear", lambda x: x @ double(WEIGHT).T, weight=WEIGHT),
    "norm": unary("batch_norm", lambda x: normed(x, 0.1, scaled=True), MAP, **STATISTICS, **SCALED, epsilon=0.1),
    "norm, epsilon unless told": unary(
        "batch_norm", lambda x: (x - 0.5) / np.sqrt(1.1e-5), MAP, mean=[0.5] * 4, variance=floats([1e-6] * 4)
    ),
    "norm without scale": unary("batch_norm", lambda x: normed(x, 1e-5), MAP, **STATISTICS),
    "norm of a line": unary("batch_norm", lambda x: normed(x, 1e-5), MAP[..., 0], **STATISTICS),
    "layer norm": unary(
        "layer_norm",
        lambda x: functional.layer_norm(x, (4,), double(GAMMA), double(BETA), 1e-5),
        normal(2, 3, 4),
        axes=[-1],
        **SCALED,
    ),
    "layer norm by channel": unary(
        "layer_norm",
        lambda x: functional.layer_norm(x.movedim(1, -1), (4,), double(GAMMA), double(BETA), 0.1).movedim(-1, 1),
        MAP,
        axes=[1],
        epsilon=0.1,
        **SCALED,
    ),
    "layer norm over all": unary("layer_norm", lambda x: functional.layer_norm(x, x.shape), MAP),
    "attention": Case("scaled_dot_product_attention", {"query": QUERY, "key": KEY, "value": VALUE}, attended()),
    "attention, some left out": Case(
        "scaled_dot_product_attention",
        {"query": QUERY, "key": KEY, "value": VALUE},
        attended(torch.from_numpy(KEPT)),
        {"attn_mask": KEPT},
    ),
    "attention, some less": Case(
        "scaled_dot_product_attention",
        {"query": QUERY, "key": KEY, "value": VALUE, "attn_mask": normal(4, 6)},
        attended(),
    ),
    "product": binary("matmul", torch.matmul, normal(5, 7)),
    "product in batches": binary("matmul", torch.matmul, normal(2, 1, 5, 7)),
    "product with a vector": binary("matmul", torch.matmul, normal(5)),
    "product of a vector": binary("matmul", torch.matmul, normal(2, 5, 7), normal(5)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_computes_what_pytorch_does(case: Case) -> None:
    expected = case.expected(*(double(values) for values in case.inputs.values()))
    got = one(case.kind, case.inputs, expected, **case.parameters)
    assert got.shape == tuple(expected.shape)
    assert np.allclose(got, expected.numpy(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("flip_x", [False, True])
@pytest.mark.parametrize("flip_y", [False, True])
def test_products_transpose_what_they_are_told_to(*, flip_x: bool, flip_y: bool) -> None:
    x, y = normal(2, 3, 4, 5), normal(2, 3, 5, 7, seed=1)
    expected = double(x) @ double(y)
    given = {"x": x.swapaxes(2, 3) if flip_x else x, "y": y.swapaxes(2, 3) if flip_y else y}
    got = one("matmul", given, expected, transpose_x=flip_x, transpose_y=flip_y)
    assert np.allclose(got, expected, rtol=1e-12)


def test_a_vector_has_nothing_to_transpose() -> None:
    x, y = normal(5), normal(5, 7)
    expected = double(x) @ double(y)
    assert np.allclose(one("matmul", {"x": x, "y": y}, expected, transpose_x=True), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("equal", [False, True, False]),
        ("not_equal", [True, False, True]),
        ("less", [True, False, False]),
        ("less_equal", [True, True, False]),
        ("greater", [False, False, True]),
        ("greater_equal", [False, True, True]),
    ],
)
def test_comparisons_give_truth(kind: str, expected: list[bool]) -> None:
    given = {"x": floats([1, 2, 3]), "y": floats([2, 2, 2])}
    assert one(kind, given, torch.tensor(expected)).tolist() == expected


@pytest.mark.parametrize(
    ("kind", "expected"), [("logical_and", [True, False, False]), ("logical_or", [True, True, False])]
)
def test_truth_is_combined(kind: str, expected: list[bool]) -> None:
    given = {"x": np.array([True, True, False]), "y": np.array([True, False, False])}
    assert one(kind, given, torch.tensor(expected)).tolist() == expected


def test_truth_is_turned_round() -> None:
    assert one("logical_not", {"x": np.array([True, False])}, torch.tensor([False, True])).tolist() == [False, True]


@pytest.mark.parametrize(("kind", "expected"), [("floor_div", [2, -3]), ("mod", [1, 1]), ("add", [7, -3])])
def test_whole_numbers_stay_whole(kind: str, expected: list[int]) -> None:
    given = {"x": ints([5, -5]), "y": ints([2, 2])}
    assert one(kind, given, torch.tensor(expected, dtype=torch.int32)).tolist() == expected


@pytest.mark.parametrize(
    ("values", "name", "declared", "expected"),
    [
        (floats([1.9, -1.9, 2.5, -0.5]), "int32", torch.int32, [1, -1, 2, 0]),
        (floats([0.5, 0.0, -3.0]), "bool", torch.bool, [True, False, True]),
        (np.array([True, False]), "fp32", torch.float32, [1.0, 0.0]),
        (ints([3, -4]), "fp32", torch.float32, [3.0, -4.0]),
        (np.array([True, False]), "int32", torch.int32, [1, 0]),
    ],
)
def test_casts_drop_fractions(values: Array, name: str, declared: torch.dtype, expected: list[Any]) -> None:
    got = one("cast", {"x": values}, torch.empty(len(expected), dtype=declared), dtype=name)
    assert got.tolist() == expected


def test_a_cast_that_does_not_fit_is_refused() -> None:
    x = floats([3e9])
    with pytest.raises(VerificationFailed, match="cast it casts numbers that int32 does not hold"):
        one("cast", {"x": x}, torch.empty(1, dtype=torch.int32), dtype="int32")
    with pytest.raises(VerificationFailed, match="casts to int32 and is declared float32"):
        one("cast", {"x": x}, torch.empty(1), dtype="int32")
    with pytest.raises(NotExecutable, match="dtype complex64"):
        one("cast", {"x": x}, torch.empty(1), dtype="complex64")


def half(values: Array) -> Array:
    return values.astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("kind", ["add", "real_div", "softmax", "matmul", "linear", "batch_norm"])
def test_emulated_rounds_what_is_stored_and_nothing_else(kind: str) -> None:
    inputs: dict[str, Array] = {"x": half(normal(3, 4, 40))}
    parameters: dict[str, Any] = {}
    if kind in {"add", "real_div"}:
        inputs["y"] = half(normal(40, seed=1))
    elif kind == "matmul":
        inputs["y"] = half(normal(40, 6, seed=1))
    elif kind == "linear":
        parameters["weight"] = normal(6, 40).astype(np.float16)
    elif kind == "batch_norm":
        parameters |= {name: values.astype(np.float16) for name, values in STATISTICS.items()}
    shape = (3, 4, 6) if kind in {"matmul", "linear"} else (3, 4, 40)
    wide, stored = (program(kind, inputs, [TensorType(dtype, shape)], **parameters) for dtype in ("float32", "float16"))
    (unrounded,), (rounded,) = execute(wide, inputs, EMULATED), execute(stored, inputs, EMULATED)
    assert np.array_equal(rounded, half(unrounded))
    assert not np.array_equal(rounded, unrounded)
    assert np.array_equal(execute(stored, inputs, DOUBLE)[0], execute(wide, inputs, DOUBLE)[0])


def running_sum(x: Array, weight: Array) -> Array:
    """``x @ weight.T`` rounded to float16 every 32 products, written out."""
    total = np.zeros((*x.shape[:-1], len(weight)), np.float32)
    for start in range(0, x.shape[-1], 32):
        part = slice(start, start + 32)
        total = half(total + (x[..., part].astype(np.float64) @ weight[:, part].T.astype(np.float64)))
    return total


@pytest.mark.parametrize("kind", ["linear", "matmul"])
def test_pessimistic_rounds_the_running_sum(kind: str) -> None:
    x, weight = half(normal(3, 5, 200)), half(normal(6, 200, seed=1))
    expected = running_sum(x, weight)
    stored = TensorType("float16", (3, 5, 6))
    parameters: dict[str, Any]
    if kind == "linear":
        inputs, parameters = {"x": x}, {"weight": weight, "bias": np.zeros(6, np.float32)}
    else:
        inputs, parameters = {"x": x, "y": weight}, {"transpose_y": True}
    (got,) = execute(program(kind, inputs, [stored], **parameters), inputs, PESSIMISTIC)
    (emulated,) = execute(program(kind, inputs, [stored], **parameters), inputs, EMULATED)
    # A sum in another order may fall to the other side of a rounding.
    assert np.mean(got == expected) > 0.9
    assert np.abs(got - expected).max() <= 2 * np.spacing(np.float16(np.abs(expected).max()))
    assert np.abs(emulated - x @ weight.T).mean() < 0.8 * np.abs(got - x @ weight.T).mean()


def quantized(dtype: str, **parameters: Any) -> tuple[dict[str, Array], Program]:
    inputs = {"input": floats([[-9.0, -0.75, -0.25, 0.25], [0.75, 1.25, 1.75, 9.0]])}
    return inputs, program("quantize", inputs, [TensorType(dtype, (2, 4))], output_dtype=dtype, **parameters)


def test_quantize_rounds_ties_to_even_and_clips() -> None:
    inputs, made = quantized("int8", scale=np.float32(0.5))
    assert execute(made, inputs)[0].tolist() == [[-18, -2, 0, 0], [2, 2, 4, 18]]
    inputs, made = quantized("int8", scale=np.float32(0.05))
    assert execute(made, inputs)[0][[0, 1], [0, 3]].tolist() == [-128, 127]
    inputs, made = quantized("uint8", scale=np.float32(0.5), zero_point=np.uint8(7))
    assert execute(made, inputs)[0].tolist() == [[0, 5, 7, 7], [9, 9, 11, 25]]
    inputs, made = quantized("int8", scale=floats([0.5, 0.25]), zero_point=int8s([0, 1]), axis=0)
    assert execute(made, inputs)[0].tolist() == [[-18, -2, 0, 0], [4, 6, 8, 37]]


def test_without_steps_quantize_neither_rounds_nor_clips() -> None:
    inputs, made = quantized("int8", scale=np.float32(0.05), zero_point=np.int8(3))
    got = execute(made, inputs, Arithmetic(torch.float64, steps=False))[0]
    assert np.allclose(got, inputs["input"].astype(np.float64) / np.float64(np.float32(0.05)) + 3, rtol=1e-12)


def test_dequantize_undoes_it() -> None:
    inputs = {"input": int8s([[-128, 5], [0, 127]])}
    scale, zero = floats([0.5, 0.25]), int8s([1, -2])
    fed = {"input": inputs["input"].astype(np.int32)}
    made = program("dequantize", inputs, [TensorType("float32", (2, 2))], scale=scale, zero_point=zero, axis=1)
    assert execute(made, fed)[0].tolist() == [[-64.5, 1.75], [-0.5, 32.25]]
    made = program("dequantize", inputs, [TensorType("float32", (2, 2))], scale=np.float32(0.5))
    assert execute(made, fed)[0].tolist() == [[-64.0, 2.5], [0.0, 63.5]]


def test_quantize_refuses_what_is_no_number_and_an_axis_for_nothing() -> None:
    inputs = {"input": floats([np.nan])}
    made = program("quantize", inputs, [TensorType("int8", (1,))], output_dtype="int8", scale=np.float32(1))
    with pytest.raises(VerificationFailed, match="quantize it reads NaN"):
        execute(made, inputs)
    inputs, made = quantized("int8", scale=np.float32(0.5), axis=0)
    with pytest.raises(VerificationFailed, match="an axis, and one scale"):
        execute(made, inputs)
    inputs, made = quantized("int4", scale=np.float32(0.5))
    with pytest.raises(NotExecutable, match="output_dtype int4"):
        execute(made, inputs)


@pytest.mark.parametrize(
    ("kind", "parameters", "message"),
    [
        ("gelu", {"mode": "QUICK"}, "gelu it has mode QUICK"),
        ("reduce_sum", {"axes": ints([])}, "reduce_sum it has no axes"),
        ("softmax", {"axis": 1, "beta": 2.0, "alpha": 1.0}, "softmax it has parameters alpha, beta"),
    ],
)
def test_what_is_not_known_is_refused(kind: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(NotExecutable, match=message):
        one(kind, {"x": CUBE}, torch.empty(CUBE.shape), **parameters)


def test_whole_numbers_are_not_divided() -> None:
    given = {"x": ints([4]), "y": ints([2])}
    with pytest.raises(NotExecutable, match="a division of whole numbers"):
        one("real_div", given, torch.empty(1, dtype=torch.int32))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"epsilon": "much"}, "takes epsilon as object"),
        ({"epsilon": [1.0, 2.0]}, r"takes epsilon as float32 \(2,\)"),
        ({"mean": [0.0] * 3}, "can't be executed"),
        ({"variance": None}, "lacks its variance"),
    ],
)
def test_parameters_of_another_kind_are_refused(parameters: dict[str, Any], message: str) -> None:
    wanted = {name: value for name, value in ({**STATISTICS} | parameters).items() if value is not None}
    with pytest.raises(VerificationFailed, match=message):
        one("batch_norm", {"x": MAP}, torch.empty(MAP.shape), **wanted)


def test_attributes_are_parameters_too() -> None:
    made = program("relu", {"x": CUBE}, [TensorType("float32", CUBE.shape)])
    operation = made.operations[0]
    value = Constant(TensorType("float32", ()), np.array(0.5, np.float32))
    spoilt = Operation(operation.kind, operation.name, operation.inputs, {"slope": value}, operation.outputs)
    with pytest.raises(NotExecutable, match="relu it has parameters slope"):
        execute(Program(made.opset, made.inputs, (spoilt,), made.outputs), {"x": CUBE})


def test_constants_may_be_written_in_place() -> None:
    value = Constant(TensorType("float32", ()), np.array(0.5, np.float32))
    output = (Output("out0", TensorType("float32", (2,))),)
    operation = Operation("mul", "it", {"x": ("x",), "y": (value,)}, {}, output)
    made = Program("CoreML6", {"x": TensorType("float32", (2,))}, (operation,), ("out0",))
    assert execute(made, {"x": floats([2, 3])})[0].tolist() == [1.0, 1.5]


def test_every_operation_is_tested_somewhere() -> None:
    here = Path(__file__)
    texts = "".join(here.with_name(f"test_mil_{name}.py").read_text() for name in ("ops", "moves", "windows"))
    assert [kind for kind in OPERATIONS if f'"{kind}"' not in texts] == []
