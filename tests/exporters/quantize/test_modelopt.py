"""ModelOpt as a quantizer: what it makes is read by our executors, and it is asked for politely where it is missing."""

from __future__ import annotations

import logging
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nextvit_exporters.errors import BuildFailed, MissingExtra, UnsupportedSpec
from nextvit_exporters.executors.onnx_runtime import OnnxRuntime
from nextvit_exporters.quantize import modelopt
from nextvit_exporters.quantize.modelopt import quantize_with_modelopt

needs_modelopt = pytest.mark.skipif(
    find_spec("modelopt") is None, reason="ModelOpt is not installed; pip install 'nextvit-deploy[modelopt]'"
)
RANDOM: Final = np.random.default_rng(0)
BATCHES: Final = [{"x": RANDOM.normal(size=(1, 16, 8, 8)).astype(np.float32)} for _ in range(4)]


def small(*, half: bool = False) -> onnx.ModelProto:
    """Three convolutions in two blocks, a mean and a linear map, between float32 ends."""
    random, dtype = np.random.default_rng(1), np.float16 if half else np.float32
    shapes = {"a": (32, 16, 3, 3), "b": (32, 32, 1, 1), "c": (32, 32, 3, 3), "m": (32, 10)}
    weights = {name: random.normal(size=shape) / np.sqrt(np.prod(shape[1:])) for name, shape in shapes.items()}
    make, kind = helper.make_node, TensorProto.FLOAT16 if half else TensorProto.FLOAT
    nodes = [
        make("Cast", ["x"], ["h"], "stem/Cast", to=kind),
        make("Conv", ["h", "a"], ["ca"], "features.0.conv/Conv", pads=[1] * 4),
        make("Relu", ["ca"], ["ra"], "features.0.act/Relu"),
        make("Conv", ["ra", "b"], ["cb"], "features.1.conv1/Conv"),
        make("Relu", ["cb"], ["rb"], "features.1.act/Relu"),
        make("Conv", ["rb", "c"], ["cc"], "features.1.conv2/Conv", pads=[1] * 4),
        make("Relu", ["cc"], ["rc"], "features.10.act/Relu"),
        make("ReduceMean", ["rc", "axes"], ["p"], "avgpool/ReduceMean", keepdims=0),
        make("Gemm", ["p", "m"], ["g"], "head/Gemm"),
        make("Cast", ["g"], ["y"], "head/Cast", to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(values.astype(dtype), name) for name, values in weights.items()]
        + [numpy_helper.from_array(np.array([2, 3]), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    helper.set_model_props(model, {"made by": "a test"})
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, folder: Path, mode: str) -> NDArray[np.float64]:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with OnnxRuntime(path, mode) as executor:
        return np.concatenate([executor.run(batch)["y"] for batch in BATCHES]).astype(np.float64)


def decibels(actual: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    return float(10 * np.log10((expected**2).sum() / ((actual - expected) ** 2).sum()))


def int8_layers(model: onnx.ModelProto) -> set[str]:
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return {node.name for node in model.graph.node if len(node.input) > 1 and set(node.input[:2]) <= dequantized}


@needs_modelopt
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("method", ["minmax", "entropy"])
def test_it_quantizes_in_our_form(tmp_path: Path, method: str, *, half: bool) -> None:
    model = small(half=half)
    before = model.SerializeToString()
    made = quantize_with_modelopt(model, BATCHES, method=method)
    assert model.SerializeToString() == before
    assert int8_layers(made) == {"features.0.conv/Conv", "features.1.conv1/Conv", "features.1.conv2/Conv"}
    names = [node.name for node in made.graph.node]
    assert len(set(names)) == len(names)
    assert "features.1/QuantizeLinear" in names, "named after the module it is in"
    assert [each.value for each in made.metadata_props] == ["a test"]
    stored = {tensor.name: tensor.data_type for tensor in made.graph.initializer}
    weights = [node.input[0] for node in made.graph.node if node.op_type == "DequantizeLinear"]
    assert sum(stored.get(name) == TensorProto.INT8 for name in weights) == 3
    assert (TensorProto.FLOAT in stored.values()) != half
    expected = run(small(), tmp_path, "exact")
    emulated, unrounded = run(made, tmp_path, "emulated"), run(made, tmp_path, "unrounded")
    assert decibels(emulated, expected) > 20
    assert decibels(unrounded, expected) > 30
    assert made == quantize_with_modelopt(model, BATCHES, method=method)


@needs_modelopt
@pytest.mark.parametrize(("keep", "left"), [("features.0", 2), ("features.1", 1)])
def test_kept_blocks_stay(keep: str, left: int) -> None:
    """``features.1`` is not the beginning of ``features.10``."""
    made = quantize_with_modelopt(small(), BATCHES, keep=(keep,))
    assert len(int8_layers(made)) == left
    assert not any(name.startswith(f"{keep}.") for name in int8_layers(made))


@needs_modelopt
def test_nothing_is_left_behind_and_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    quantize_with_modelopt(small(), BATCHES)
    with pytest.raises(BuildFailed):
        quantize_with_modelopt(small(), BATCHES, keep=("features.0", "features.1"))
    assert list(tmp_path.iterdir()) == []
    assert tempfile.tempdir == str(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""
    assert logging.getLogger("modelopt").propagate


@needs_modelopt
def test_what_it_refuses_is_one_line() -> None:
    model = small()
    model.graph.node[1].input[1] = "nowhere"
    with pytest.raises(BuildFailed, match=r"^ModelOpt refused the graph: [^\n]+$"):
        quantize_with_modelopt(model, BATCHES)
    with pytest.raises(BuildFailed, match="ModelOpt quantized nothing"):
        quantize_with_modelopt(small(), BATCHES, keep=("features.0", "features.1"))


def test_without_it_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.onnx.quantization", None)
    with pytest.raises(MissingExtra, match=r"quantizing with ModelOpt .* pip install 'nextvit-deploy\[modelopt\]'$"):
        quantize_with_modelopt(small(), BATCHES)


@pytest.mark.parametrize(
    ("batches", "method", "says"),
    [
        (BATCHES, "mse", "ModelOpt does not calibrate by mse; choose one of minmax, entropy"),
        ([], "minmax", "there is nothing to calibrate on"),
        ([{"image": BATCHES[0]["x"]}], "minmax", "the file reads x, not image"),
        (
            [{"x": BATCHES[0]["x"][:, :3]}],
            "minmax",
            r"the file reads x as 1x16x8x8 float32, not \(1, 3, 8, 8\) float32",
        ),
        ([{"x": BATCHES[0]["x"].astype(np.float64)}], "minmax", r"not \(1, 16, 8, 8\) float64"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(batches: Any, method: str, says: str) -> None:
    with pytest.raises(UnsupportedSpec, match=says):
        quantize_with_modelopt(small(), batches, method=method)


def test_weights_are_stored_on_their_own_steps() -> None:
    """The int8 numbers are those that QuantizeLinear would write, along the axis it names; ties go to the even."""
    values = np.array([[0.5, 1.5, -2.5], [40.0, -40.0, 0.1]], np.float32)
    scale = np.array([1.0, 0.25], np.float32)
    make = helper.make_node
    graph = helper.make_graph(
        [
            make("QuantizeLinear", ["w", "s", "z"], ["q"], axis=0),
            make("DequantizeLinear", ["q", "s", "z"], ["d"], axis=0),
            make("MatMul", ["x", "d"], ["y"]),
        ],
        "weights",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [
            numpy_helper.from_array(values, "w"),
            numpy_helper.from_array(scale, "s"),
            numpy_helper.from_array(np.zeros(2, np.int8), "z"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    modelopt._store_weights(model)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert sorted(constants) == ["q", "s", "z"]
    assert constants["q"].dtype == np.int8
    assert constants["q"].tolist() == [[0, 2, -2], [127, -128, 0]]
    assert [node.op_type for node in model.graph.node] == ["DequantizeLinear", "MatMul"]
    onnx.checker.check_model(model, full_check=True)
