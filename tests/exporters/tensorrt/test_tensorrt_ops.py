"""Every kind of layer by itself: TensorRT's reading of a small ONNX model against ONNX Runtime, PyTorch and by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn import functional

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

from nextvit_exporters.executors import tensorrt_network
from nextvit_exporters.executors.tensorrt_network import Mode
from tests.exporters.tensorrt.small_models import (
    HALF,
    Array,
    Shape,
    execute,
    make,
    model,
    normal,
    onnx_runtime,
    understood,
)


@dataclass(frozen=True, slots=True)
class Case:
    """A model, an x to run it on, and the kind of layer it is about."""

    kind: str
    nodes: Sequence[onnx.NodeProto]
    x: Array
    constants: Mapping[str, Array] = field(default_factory=dict)
    shape: Shape = ()
    out: int | None = None
    opset: int = 18

    @property
    def proto(self) -> onnx.ModelProto:
        kind = helper.np_dtype_to_tensor_dtype(self.x.dtype)
        return model(self.nodes, self.shape or self.x.shape, self.constants, kind, self.out, self.opset)


def conv(x: Array, kernel: tuple[int, ...], *, bias: bool = True, **attributes: object) -> Case:
    constants = {"w": normal(*kernel, seed=1)} | ({"b": normal(kernel[0], seed=2)} if bias else {})
    return Case("CONVOLUTION", [make("Conv", ["x", *constants], ["y"], "conv", **attributes)], x, constants)


def pool(op: str, x: Array, **attributes: object) -> Case:
    return Case("POOLING", [make(op, ["x"], ["y"], "pool", **attributes)], x, opset=19)


def one(kind: str, op: str, x: Array, constants: Mapping[str, Array] | None = None, **attributes: object) -> Case:
    constants = constants or {}
    return Case(kind, [make(op, ["x", *constants], ["y"], "node", **attributes)], x, constants)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


MAP = normal(2, 4, 9, 12)
LINE = normal(2, 4, 13)
CUBE = normal(2, 3, 4, 5)
AT = {"kernel_shape": [3, 3], "strides": [2, 2]}
COUNTED = {"count_include_pad": 1}
CASES = {
    "conv": conv(MAP, (6, 4, 3, 3), pads=[1, 1, 1, 1]),
    "conv without bias": conv(MAP, (6, 4, 1, 1), bias=False),
    "conv in groups": conv(MAP, (6, 2, 3, 3), group=2, strides=[2, 2]),
    "conv by channel": conv(MAP, (4, 1, 3, 3), group=4),
    "conv dilated": conv(MAP, (6, 4, 3, 3), dilations=[2, 3], pads=[1, 2, 1, 2]),
    "conv, uneven pads": conv(MAP, (6, 4, 3, 3), pads=[2, 0, 0, 1], strides=[2, 3]),
    "conv, oblong": conv(MAP, (6, 4, 1, 5), pads=[0, 2, 0, 2]),
    "conv, same upper": conv(MAP, (6, 4, 4, 4), auto_pad="SAME_UPPER", strides=[2, 2]),
    "conv, same lower": conv(MAP, (6, 4, 4, 4), auto_pad="SAME_LOWER", strides=[2, 2]),
    "conv of a line": conv(LINE, (6, 4, 3), pads=[1, 0], strides=[2]),
    "max pool": pool("MaxPool", MAP, **AT),
    "max pool of what is below zero": pool("MaxPool", -np.abs(MAP), pads=[1, 1, 1, 1], **AT),
    "max pool, ceil": pool("MaxPool", MAP, ceil_mode=1, **AT),
    "max pool, ceil and pads": pool("MaxPool", MAP, ceil_mode=1, pads=[0, 1, 1, 1], **AT),
    "max pool, same lower": pool("MaxPool", MAP, auto_pad="SAME_LOWER", **AT),
    "mean pool": pool("AveragePool", MAP, **AT),
    "mean pool, pads left out": pool("AveragePool", MAP, pads=[1, 1, 1, 1], **AT),
    "mean pool, pads counted": pool("AveragePool", MAP, pads=[1, 1, 1, 1], **COUNTED, **AT),
    "mean pool, ceil": pool("AveragePool", MAP, ceil_mode=1, **AT),
    "mean pool, ceil, pads left out": pool("AveragePool", MAP, ceil_mode=1, pads=[1, 1, 1, 1], **AT),
    "mean pool, ceil, pads counted": pool("AveragePool", MAP, ceil_mode=1, pads=[1, 1, 1, 1], **COUNTED, **AT),
    "mean pool, same upper": pool("AveragePool", MAP, auto_pad="SAME_UPPER", **AT),
    "mean pool of a line": pool("AveragePool", LINE, kernel_shape=[4], strides=[4]),
    "global mean": one("REDUCE", "GlobalAveragePool", MAP),
    "mean, axes kept": one("REDUCE", "ReduceMean", CUBE, {"a": ints(1, -1)}, keepdims=1),
    "sum, axes dropped": one("REDUCE", "ReduceSum", CUBE, {"a": ints(2)}, keepdims=0),
    "largest": one("REDUCE", "ReduceMax", CUBE, {"a": ints(0, 2)}, keepdims=0),
    "smallest": one("REDUCE", "ReduceMin", CUBE, {"a": ints(3)}, keepdims=1),
    **{f"softmax over {axis}": one("SOFTMAX", "Softmax", CUBE, axis=axis) for axis in (0, 1, -2, 3)},
    "product": one("MATRIX_MULTIPLY", "MatMul", CUBE, {"w": normal(5, 7)}),
    "product in batches": one("MATRIX_MULTIPLY", "MatMul", CUBE, {"w": normal(2, 1, 5, 7)}),
    "product with a vector": one("MATRIX_MULTIPLY", "MatMul", CUBE, {"w": normal(5)}),
    "gemm": one("MATRIX_MULTIPLY", "Gemm", normal(3, 4), {"w": normal(4, 5), "b": normal(5)}, alpha=0.5, beta=2.0),
    "gemm, first transposed": one("MATRIX_MULTIPLY", "Gemm", normal(3, 4), {"w": normal(3, 5)}, transA=1),
    "gemm, second transposed": one(
        "MATRIX_MULTIPLY", "Gemm", normal(3, 4), {"w": normal(5, 4), "b": normal(1, 5)}, transB=1
    ),
    "transpose": one("SHUFFLE", "Transpose", CUBE, perm=[2, 0, 3, 1]),
    "reshape": one("SHUFFLE", "Reshape", CUBE, {"s": ints(0, -1, 5)}),
    "reshape, two zeros": one("SHUFFLE", "Reshape", CUBE, {"s": ints(0, 0, -1)}),
    "flatten": one("SHUFFLE", "Flatten", CUBE, axis=2),
    "squeeze": one("SQUEEZE", "Squeeze", normal(2, 1, 3, 1), {"a": ints(-1)}),
    "unsqueeze": one("UNSQUEEZE", "Unsqueeze", LINE, {"a": ints(-1, 1)}),
    "slice": one("SLICE", "Slice", MAP, {"s": ints(-3, 1), "e": ints(2**62, -2), "a": ints(2, 3), "t": ints(1, 2)}),
    "slice backwards": one("SLICE", "Slice", LINE, {"s": ints(-1), "e": ints(-(2**62)), "a": ints(2), "t": ints(-3)}),
    "pad": one("SLICE", "Pad", MAP, {"p": ints(0, 0, 1, 0, 0, 0, 0, 2), "v": np.array(0.7, np.float32)}),
    "gather": one("GATHER", "Gather", CUBE, {"i": np.array([[2, 0], [-1, 1]])}, axis=1),
    **{
        op.lower(): one("UNARY", op, np.abs(CUBE) + 0.1)
        for op in ("Exp", "Log", "Reciprocal", "Neg", "Sin", "Cos", "Ceil", "Floor")
    },
    **{op.lower(): one("UNARY", op, CUBE) for op in ("Abs", "Sign")},
    "gelu": replace(one("ACTIVATION", "Gelu", CUBE), opset=20),
    "gelu by tanh": replace(one("ACTIVATION", "Gelu", CUBE, approximate="tanh"), opset=20),
    "sqrt": one("UNARY", "Sqrt", np.abs(CUBE)),
    "erf": one("UNARY", "Erf", CUBE),
    "round": one("UNARY", "Round", np.array([0.5, 1.5, 2.5, -0.5, -1.5, 0.7], np.float32)),
    "sigmoid": one("ACTIVATION", "Sigmoid", CUBE),
    "tanh": one("ACTIVATION", "Tanh", CUBE),
    "leaky relu": one("ACTIVATION", "LeakyRelu", CUBE, alpha=0.3),
    "elu": one("ACTIVATION", "Elu", CUBE, alpha=0.7),
    "hard sigmoid": one("ACTIVATION", "HardSigmoid", CUBE, alpha=0.3, beta=0.4),
    "clip": one("ACTIVATION", "Clip", CUBE, {"a": np.array(-0.5, np.float32), "b": np.array(0.25, np.float32)}),
    "add": one("ELEMENTWISE", "Add", CUBE, {"c": normal(3, 1, 1)}),
    "subtract": one("ELEMENTWISE", "Sub", CUBE, {"c": normal(1, 3, 1, 5)}),
    "divide": one("ELEMENTWISE", "Div", CUBE, {"c": np.array([3.0], np.float32)}),
    "power": one("ELEMENTWISE", "Pow", np.abs(CUBE), {"c": np.array(1.7, np.float32)}),
    "larger": one("ELEMENTWISE", "Max", CUBE, {"c": normal(5)}),
    "norm": one(
        "SCALE",
        "BatchNormalization",
        MAP,
        {"g": normal(4, seed=3), "b": normal(4, seed=4), "m": normal(4, seed=5), "v": np.abs(normal(4, seed=6)) + 0.1},
        epsilon=1e-3,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_computes_what_onnx_runtime_does(tmp_path: Path, case: Case) -> None:
    assert case.kind in {layer.kind for layer in understood(case.proto).layers}
    got, expected = execute(case.proto, case.x, tmp_path), onnx_runtime(case.proto, case.x)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert np.allclose(got, expected, rtol=2e-6, atol=2e-6)


def opened(shape: Sequence[int]) -> Shape:
    return [f"n{axis}" if axis != 1 else size for axis, size in enumerate(shape)]


OPEN = [
    *(name for name in CASES if any(word in name for word in ("conv", "pool", "softmax", "global", "slice", "pad"))),
    *("flatten", "reshape", "transpose", "squeeze", "product in batches", "add"),
]


@pytest.mark.parametrize("case", [CASES[name] for name in OPEN], ids=OPEN)
def test_open_axes_change_nothing(tmp_path: Path, case: Case) -> None:
    """Every axis but the channels' is open: shapes are then computed in the network."""
    made = model(case.nodes, opened(case.x.shape), case.constants, opset=case.opset)
    got, expected = execute(made, case.x, tmp_path), onnx_runtime(case.proto, case.x)
    assert got.shape == expected.shape
    assert np.allclose(got, expected, rtol=2e-6, atol=2e-6)


def test_it_can_compute_in_float64(tmp_path: Path) -> None:
    case = CASES["conv, uneven pads"]
    got = execute(case.proto, case.x, tmp_path, dtype=torch.float64)
    x, w, b = (torch.tensor(np.asarray(values)).double() for values in (case.x, *case.constants.values()))
    expected = functional.conv2d(functional.pad(x, (0, 1, 2, 0)), w, b, stride=(2, 3)).numpy()
    assert got.dtype == np.float64
    assert np.allclose(got, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [7, 8, 9, 11])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("ceil", [False, True])
def test_means_over_odd_sizes_are_pytorch_s(tmp_path: Path, size: int, *, counted: bool, ceil: bool) -> None:
    x = normal(1, 2, size, size + 1)
    case = pool("AveragePool", x, pads=[1, 1, 1, 1], ceil_mode=int(ceil), count_include_pad=int(counted), **AT)
    expected = functional.avg_pool2d(torch.tensor(x), 3, 2, 1, ceil_mode=ceil, count_include_pad=counted)
    assert np.allclose(execute(case.proto, x, tmp_path), expected.numpy(), rtol=1e-6, atol=1e-6)


def test_a_window_over_the_edge_is_a_mean_of_what_is_there(tmp_path: Path) -> None:
    x = np.arange(49, dtype=np.float32).reshape(1, 1, 7, 7)
    case = pool("AveragePool", x, kernel_shape=[2, 2], strides=[3, 3], ceil_mode=1)
    expected = [[4, 7, 9.5], [25, 28, 30.5], [42.5, 45.5, 48]]
    assert execute(case.proto, x, tmp_path)[0, 0].tolist() == expected


ROUNDING: tuple[Mode, ...] = ("exact", "emulated")


def test_quantizing_rounds_half_to_even_and_saturates(tmp_path: Path) -> None:
    steps = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.4, 126.5, 127.5, 1e9, -127.5, -128.5, -1e9], np.float32)
    nodes = [make("QuantizeLinear", ["x", "s", "z"], ["q"], "q"), make("DequantizeLinear", ["q", "s", "z"], ["y"], "d")]
    constants: dict[str, Array] = {"s": np.array(0.25, np.float32), "z": np.array(0, np.int8)}
    expected = np.array([0, 2, 2, 0, -2, 126, 126, 127, 127, -128, -128, -128], np.float32) / 4
    for mode in ROUNDING:
        assert np.array_equal(execute(model(nodes, [12], constants), steps / 4, tmp_path, mode), expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_scales_by_channel_lie_along_their_axis(tmp_path: Path, axis: int) -> None:
    x = normal(3, 3, 3) * 10
    scales = np.array([0.01, 0.1, 1.0], np.float32)
    nodes = [
        make("QuantizeLinear", ["x", "s", "z"], ["q"], "q", axis=axis),
        make("DequantizeLinear", ["q", "s", "z"], ["y"], "d", axis=axis),
    ]
    made = model(nodes, [3, 3, 3], {"s": scales, "z": np.zeros(3, np.int8)})
    along = scales.reshape([-1 if each == axis else 1 for each in range(3)])
    expected = np.clip(np.rint(x / along), -128, 127) * along
    assert np.allclose(execute(made, x, tmp_path), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", ROUNDING)
def test_a_quantized_convolution_reads_its_kernel_from_a_dequantize(tmp_path: Path, mode: Mode) -> None:
    rng = np.random.default_rng(0)
    constants: dict[str, Array] = {
        "s": np.array(0.05, np.float16),
        "z": np.array(0, np.int8),
        "w": rng.integers(-127, 128, (6, 4, 3, 3)).astype(np.int8),
        "ws": np.linspace(0.001, 0.01, 6).astype(np.float16),
        "wz": np.zeros(6, np.int8),
        "b": normal(6).astype(np.float16),
    }
    nodes = [
        make("QuantizeLinear", ["x", "s", "z"], ["q"], "q"),
        make("DequantizeLinear", ["q", "s", "z"], ["d"], "d"),
        make("DequantizeLinear", ["w", "ws", "wz"], ["k"], "k", axis=0),
        make("Conv", ["d", "k", "b"], ["y"], "conv", pads=[1, 1, 1, 1]),
    ]
    made = model(nodes, MAP.shape, constants, HALF)
    (layer,) = [each for each in understood(made).layers if each.kind == "CONVOLUTION"]
    assert len(layer.inputs) == 2
    assert layer.weights["kernel"].size == 0
    wide = {name: torch.tensor(values.astype(np.float64)) for name, values in constants.items()}
    x = torch.tensor(MAP.astype(np.float16).astype(np.float64))
    fake = (x / wide["s"]).round().clamp(-128, 127) * wide["s"]
    expected = functional.conv2d(fake, wide["w"] * wide["ws"].view(6, 1, 1, 1), wide["b"], padding=1).numpy()
    got = execute(made, MAP.astype(np.float16), tmp_path, mode)
    assert np.abs(got - expected).max() <= (1e-5 if mode == "exact" else 1e-2)
    assert mode == "exact" or np.array_equal(got, got.astype(np.float16))


def test_a_computed_kernel_and_bias_are_read_from_inputs(tmp_path: Path) -> None:
    x, kernel, bias = MAP, normal(6, 4, 3, 3), normal(6, seed=2)
    nodes = [
        make("Abs", ["w"], ["k"], "kernel"),
        make("Abs", ["b"], ["c"], "bias"),
        make("Conv", ["x", "k", "c"], ["y"], "conv"),
    ]
    made = model(nodes, x.shape, {"w": kernel, "b": bias})
    (layer,) = [each for each in understood(made).layers if each.kind == "CONVOLUTION"]
    assert len(layer.inputs) == 3
    expected = functional.conv2d(torch.tensor(x), torch.tensor(np.abs(kernel)), torch.tensor(np.abs(bias)))
    assert np.allclose(execute(made, x, tmp_path), expected.numpy(), rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize(("to", "kind"), [(TensorProto.UINT8, np.uint8), (TensorProto.INT32, np.int32)])
def test_casts_to_integers_drop_the_fraction(tmp_path: Path, to: int, kind: type[np.generic]) -> None:
    x = np.array([0.0, 0.9, 1.5, 254.99, 200.0], np.float32)
    got = execute(model([make("Cast", ["x"], ["y"], "cast", to=to)], [5], out=to), x, tmp_path)
    assert got.dtype == kind
    assert got.tolist() == [0, 0, 1, 254, 200]


def test_bytes_are_cast_first(tmp_path: Path) -> None:
    x = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3) + 100
    nodes = [
        make("Cast", ["x"], ["f"], "cast", to=TensorProto.FLOAT),
        make("Transpose", ["f"], ["y"], "t", perm=[0, 3, 1, 2]),
    ]
    made = model(nodes, x.shape, kind=TensorProto.UINT8, out=TensorProto.FLOAT)
    assert np.array_equal(execute(made, x, tmp_path), x.transpose(0, 3, 1, 2).astype(np.float32))


def test_integers_divide_towards_zero_and_shapes_are_computed(tmp_path: Path) -> None:
    nodes = [
        make("Shape", ["x"], ["s"], "shape"),
        make("Add", ["s", "o"], ["a"], "add"),
        make("Div", ["a", "two"], ["y"], "div"),
    ]
    made = model(nodes, ["a", "b", 5], {"o": ints(-9, -2, 4), "two": ints(2, 3, 4)}, out=TensorProto.INT64)
    assert execute(made, normal(2, 9, 5), tmp_path).tolist() == [-3, 2, 2]


def test_a_choice_by_comparison(tmp_path: Path) -> None:
    nodes = [make("Greater", ["x", "c"], ["b"], "greater"), make("Where", ["b", "x", "c"], ["y"], "where")]
    case = Case("SELECT", nodes, CUBE, {"c": np.array([0.2], np.float32)})
    assert np.array_equal(execute(case.proto, CUBE, tmp_path), np.maximum(CUBE, np.float32(0.2)))


def test_pieces_are_split_and_joined(tmp_path: Path) -> None:
    nodes = [
        make("Split", ["x"], ["a", "b"], "split", axis=1, num_outputs=2),
        make("Concat", ["b", "a"], ["y"], "concat", axis=-1),
    ]
    made = model(nodes, ["n", 4, 9, 12])
    assert np.array_equal(execute(made, MAP, tmp_path), np.concatenate([MAP[:, 2:], MAP[:, :2]], -1))


def test_a_repeated_axis_is_a_slice_without_stride(tmp_path: Path) -> None:
    made = model([make("Expand", ["x", "s"], ["y"], "expand")], ["n", 1, 3], {"s": ints(1, 4, 1)})
    x = normal(2, 1, 3)
    assert np.array_equal(execute(made, x, tmp_path), np.broadcast_to(x, (2, 4, 3)))


@pytest.mark.parametrize(
    ("left", "right", "equation"),
    [(2, 3, "bk,bkn->bn"), (3, 2, "bmk,bk->bm"), (2, 2, "bk,bk->b"), (3, 3, "bmk,bkn->bmn")],
)
def test_vectors_in_place_of_matrices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int, right: int, equation: str
) -> None:
    """The ONNX parser never asks for them; TensorRT knows them all the same."""
    a, b = normal(2, *[4, 3][3 - left :], seed=1), normal(2, *[3, 5][: right - 1], seed=2)

    @contextmanager
    def built(module: Any, data: bytes) -> Iterator[Any]:
        del data
        logger = module.Logger(module.Logger.ERROR)
        builder = module.Builder(logger)
        network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        x = network.add_input("x", module.float32, a.shape)
        constant = network.add_constant(b.shape, module.Weights(b)).get_output(0)
        kinds = [module.MatrixOperation.VECTOR if rank == 2 else module.MatrixOperation.NONE for rank in (left, right)]
        y = network.add_matrix_multiply(x, kinds[0], constant, kinds[1]).get_output(0)
        y.name = "y"
        network.mark_output(y)
        yield network

    monkeypatch.setattr(tensorrt_network, "parsed", built)
    got = execute(onnx.ModelProto(), a, tmp_path)
    assert np.allclose(got, np.einsum(equation, a, b), rtol=1e-5, atol=1e-6)


def test_scalars(tmp_path: Path) -> None:
    nodes = [make("Reshape", ["x", "s"], ["r"], "scalar"), make("Neg", ["r"], ["y"], "neg")]
    got = execute(model(nodes, [1, 1], {"s": ints()}), np.array([[2.5]], np.float32), tmp_path)
    assert got.shape == ()
    assert float(got) == -2.5


def test_emulation_rounds_wherever_fp16_is_stored(tmp_path: Path) -> None:
    x, c = np.array([1.0001, 3.14159, 0.3, 300.7], np.float32), np.array([0.1, -0.2, 30.0, 1e-4], np.float16)
    nodes = [
        make("Cast", ["x"], ["h"], "in", to=HALF),
        make("Add", ["h", "c"], ["a"], "add"),
        make("Mul", ["a", "a"], ["p"], "square"),
        make("Cast", ["p"], ["y"], "out", to=TensorProto.FLOAT),
    ]
    made = model(nodes, [4], {"c": c})
    exact = execute(made, x, tmp_path)
    assert np.array_equal(exact, (x + c.astype(np.float32)) ** 2)
    with np.errstate(over="ignore"):
        expected = ((x.astype(np.float16) + c) ** 2).astype(np.float32)
    got = execute(made, x, tmp_path, "emulated")
    assert np.array_equal(got, expected)
    assert np.isinf(got).tolist() == [False, False, False, True]
