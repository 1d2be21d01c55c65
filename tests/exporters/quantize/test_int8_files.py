"""Whole INT8 files: what they hold is what was meant, and everybody who executes them agrees."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from nextvit_exporters import graph as g
from nextvit_exporters import to_onnx
from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.executors.tensorrt_network import Mode, TensorRTNetwork
from nextvit_exporters.precision.read_back import read_dtypes
from nextvit_exporters.quantize.placement import placement
from nextvit_exporters.quantize.quantized import clipped, map_steps
from nextvit_exporters.quantize.read_back import check_file, int8_nodes, steps_of
from nextvit_exporters.spec import ExportSpec, InputKind, Precision
from nextvit_exporters.tensorrt.backends import backend
from tests.exporters.exports import Exported, Floats, probe, relative_rms
from tests.exporters.quantize.int8_files import BESIDE_FP32, INT8, Files, calibrated, export_int8

BOTH = pytest.mark.parametrize("spec", [INT8, BESIDE_FP32], ids=["fp16", "fp32"])
needs_tensorrt = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed; pip install 'nextvit-deploy[trt-rtx]'"
)
Arrays = dict[str, NDArray[Any]]


def constants_of(model: onnx.ModelProto) -> Arrays:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def by_tensorrt(file: Exported, mode: Mode) -> Floats:
    with TensorRTNetwork(file.path, mode, backend("tensorrt-rtx")) as executor:
        result = executor.run({to_onnx.INPUT: file.feed(probe(file.spec)).numpy()})
    return np.asarray(result[to_onnx.OUTPUT], np.float32)


def as_it_is(file: Exported) -> Floats:
    """ONNX Runtime on the saved file itself, nothing optimised and nothing rewritten."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(file.path), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {to_onnx.INPUT: file.feed(probe(file.spec)).numpy()})
    return np.asarray(result, np.float32)


@BOTH
def test_unrounded_the_file_is_the_reference(int8_files: Files, spec: ExportSpec) -> None:
    """Measured: 2.6e-7 beside FP16 as beside float32."""
    file, images = int8_files(spec), probe(spec)
    expected = file.expected(images)
    assert relative_rms(file.run(images, "unrounded"), expected) < 1e-6
    (whole,) = g.execute(file.graph, images)
    assert relative_rms(expected, whole.numpy().astype(np.float32)) > 1e-3, "rounding is a difference"


@needs_tensorrt
@BOTH
def test_tensorrt_understands_the_same(int8_files: Files, spec: ExportSpec) -> None:
    file = int8_files(spec)
    assert relative_rms(by_tensorrt(file, "unrounded"), file.expected(probe(spec))) < 1e-6


@BOTH
def test_every_execution_with_its_rounding_agrees(int8_files: Files, spec: ExportSpec) -> None:
    """Within 2e-2 of each other; measured below 1e-2 beside FP16, and 2.1e-7 where only int8 rounds."""
    file, images = int8_files(spec), probe(spec)
    (whole,) = g.execute(file.graph, images)
    answers = [whole.numpy().astype(np.float32), file.run(images, "emulated"), file.run(images), as_it_is(file)]
    if find_spec("tensorrt_rtx") is not None:
        answers += [by_tensorrt(file, "emulated"), by_tensorrt(file, "exact")]
    bound = 2e-2 if spec is INT8 else 2e-6
    for one in answers:
        assert max(relative_rms(other, one) for other in answers) < bound


@BOTH
def test_int8_costs_little(int8_files: Files, spec: ExportSpec) -> None:
    file, images = int8_files(spec), probe(spec)
    (before,) = g.execute(calibrated(spec)[0], images)
    cost = relative_rms(file.run(images, "emulated"), before.numpy().astype(np.float32))
    assert 1e-3 < cost < to_onnx.PRECISION_COST[spec.precision].relative_rms


@BOTH
def test_every_constant_of_the_reference_is_the_file_s(int8_files: Files, spec: ExportSpec) -> None:
    file = int8_files(spec)
    model, kind = file.proto, np.float16 if spec is INT8 else np.float32
    constants, found = constants_of(model), steps_of(model)
    assert spec.quantize is not None
    reference = clipped(file.graph, spec.quantize.rest)
    assert set(found) == set(map_steps(file.graph)) == set(placement(calibrated(spec)[0]).maps)
    for name, each in found.items():
        module = reference.get_submodule(name)
        weight = module.get_parameter("weight").detach().numpy()
        assert np.array_equal((each.codes * each.weights[:, None]).astype(np.float32), weight.reshape(len(weight), -1))
        quantizer = reference.get_submodule(f"quantize_{placement(calibrated(spec)[0]).maps[name]}")
        assert float(quantizer.get_buffer("step")) == each.activation
        if f"{name}.bias" in constants:
            bias = constants[f"{name}.bias"]
            assert bias.dtype == kind
            assert np.array_equal(bias.astype(np.float32), module.get_parameter("bias").detach().numpy())
    named = [name for name in constants if name.endswith(".bias")]
    assert len(named) == 40
    head = constants["proj_head.0.weight"]
    assert head.dtype == kind
    assert np.array_equal(
        head.astype(np.float32), reference.get_submodule("proj_head.0").get_parameter("weight").detach()
    )
    check_file(file.path, map_steps(file.graph))


@BOTH
def test_tensorrt_s_rules(int8_files: Files, spec: ExportSpec) -> None:
    """Int8 throughout, symmetric; one step for a tensor, one a channel for weights; no bias and no result in INT8."""
    file = int8_files(spec)
    model, kind = file.proto, TensorProto.FLOAT16 if spec is INT8 else TensorProto.FLOAT
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    names, among = int8_nodes(model)
    assert (len(names), among) == (52, 59)
    assert "proj_head.0/Gemm" not in names
    by_kind = Counter(node.op_type for node in model.graph.node)
    tensors = placement(calibrated(spec)[0]).tensors
    assert by_kind["QuantizeLinear"] == len(tensors) == 48
    assert by_kind["DequantizeLinear"] == 48 + 52
    for node in model.graph.node:
        if node.op_type not in {"QuantizeLinear", "DequantizeLinear"}:
            continue
        scale, point = constants[node.input[1]], constants[node.input[2]]
        assert (scale.data_type, point.data_type) == (kind, TensorProto.INT8)
        assert not numpy_helper.to_array(point).any()
        weight = constants.get(node.input[0])
        assert len(scale.dims) == (0 if weight is None else 1)
        assert weight is None or (weight.data_type, node.op_type) == (TensorProto.INT8, "DequantizeLinear")
    for node in model.graph.node:
        if node.op_type in {"Conv", "Gemm"} and len(node.input) == 3:
            assert constants[node.input[2]].data_type == kind
        if node.name in names:
            assert all(makers[name].op_type != "QuantizeLinear" for name in node.output if name in makers)
    assert f"operations in {'fp16' if spec is INT8 else 'fp32'}" in str(read_dtypes(model))


@BOTH
def test_with_and_without_the_simplifier(int8_files: Files, spec: ExportSpec) -> None:
    """It neither joins the maps of a block nor hides them between Reshapes."""
    plain = int8_files(replace(spec, simplify=False))
    whole = int8_files(spec)
    found, without = steps_of(whole.proto), steps_of(plain.proto)
    assert found.keys() == without.keys()
    assert all(np.array_equal(found[name].codes, without[name].codes) for name in found)
    assert len(whole.proto.graph.node) <= len(plain.proto.graph.node)


def test_onnx_runtime_s_own_passes_raw_pixels_and_any_batch(int8_files: Files) -> None:
    spec = replace(BESIDE_FP32, consumer=None, input=InputKind.UINT8_NHWC, dynamic_batch=True)
    file = int8_files(spec)
    assert len(int8_nodes(file.proto)[0]) == 52
    images = probe(file.spec)
    assert relative_rms(file.run(images, "unrounded"), file.expected(images)) < 1e-6


def test_kept_blocks_are_not_in_int8_and_pixels_are_read_raw(int8_files: Files) -> None:
    assert INT8.quantize is not None
    kept = replace(INT8.quantize, keep=("features.2", "features.5"))
    file = int8_files(replace(INT8, quantize=kept, input=InputKind.FLOAT))
    names = int8_nodes(file.proto)[0]
    assert names
    assert not any(name.startswith(("features.2.", "features.5.")) for name in names)
    images = probe(file.spec)
    assert relative_rms(file.run(images, "unrounded"), file.expected(images)) < 1e-6
    check_file(file.path, map_steps(file.graph))


def test_the_same_bytes_each_time(int8_files: Files, tmp_path: Path) -> None:
    assert export_int8(INT8, tmp_path).artifact.sha256 == int8_files(INT8).artifact.sha256


@pytest.mark.parametrize("opset", [17, 18])
def test_an_opset_whose_steps_can_t_be_fp16_is_refused(opset: int) -> None:
    with pytest.raises(UnsupportedSpec, match=rf"^INT8 needs opset 19 or more, not {opset}; drop --opset$"):
        to_onnx.check_spec(replace(INT8, opset=opset))
    to_onnx.check_spec(replace(INT8, opset=19))
    with pytest.raises(UnsupportedSpec, match=r"^INT8 needs a calibration; give images with --calibration DIR$"):
        to_onnx.check_spec(replace(INT8, quantize=None))


def test_the_oldest_opset_any_size_and_fp16_ends(int8_files: Files) -> None:
    file = int8_files(replace(INT8, opset=19, io=Precision.FP16, input=InputKind.UINT8, dynamic_size=True))
    assert file.proto.opset_import[0].version == 19
    images = probe(file.spec)
    assert relative_rms(file.run(images, "unrounded"), file.expected(images)) < 1e-6
