"""Whole models as TensorRT reads them, and what the executor promises beside its numbers."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import Tensor

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

from nextvit_exporters import graph as g
from nextvit_exporters import to_onnx
from nextvit_exporters.errors import BuildFailed, NotExecutable
from nextvit_exporters.executors.tensorrt_network import Mode, TensorRTNetwork, schedule
from nextvit_exporters.passes.normalize_input import NormalizeInput
from nextvit_exporters.spec import ExportSpec, InputKind, Precision
from nextvit_exporters.tensorrt.backends import load
from nextvit_exporters.tensorrt.network import Layer, Network, UnknownLayer
from tests.exporters.exports import NANO, Export, Exported, Floats, original, relative_rms
from tests.exporters.passes_harness import pixels
from tests.exporters.tensorrt.small_models import HALF, RTX, execute, make, model, normal, understood

FP16 = replace(NANO, precision=Precision.FP16, consumer="tensorrt")
FP32 = replace(NANO, consumer="tensorrt")
OPEN = replace(FP16, dynamic_batch=True, dynamic_size=True, batch=1)
UNFOLDED = ("fold-pre-norm", "fold-head-norm")  # the rest is folded by the exporter, in FP16
SPECS = {
    "fp32": FP32,
    "fp16": FP16,
    "channel-first attention": replace(NANO, precision=Precision.FP16),
    "open": OPEN,
    "open batch": replace(FP16, dynamic_batch=True),
    "uint8": replace(FP16, input=InputKind.UINT8),
    "uint8, channels last": replace(FP16, input=InputKind.UINT8_NHWC),
    "float pixels": replace(FP32, input=InputKind.FLOAT),
    "half edges": replace(FP16, io=Precision.FP16),
    "norms left": replace(FP32, skip=UNFOLDED, simplify=False),
    "own head": replace(FP16, model="own head", num_classes=7),
    "fused attention": replace(FP16, model="fused"),
    "opset 17": replace(FP16, opset=17, consumer=None),
    "opset 22, not simplified": replace(FP16, opset=22, simplify=False),
}
EVERY = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
FULL = {
    str(precision): replace(FP32, model="small", num_classes=100, height=224, width=224, precision=precision)
    for precision in (Precision.FP32, Precision.FP16)  # INT8 needs a calibration
}
MODES: tuple[Mode, ...] = get_args(Mode)


def feed(file: Exported, images: Tensor) -> Tensor:
    """Normalised float64 images (B, 3, H, W) as the file wants them."""
    if file.spec.input is not InputKind.UINT8_NHWC:
        return file.feed(images)
    mean, std = file.spec.preprocessing.mean, file.spec.preprocessing.std
    return NormalizeInput(mean, std, uint8=True, channels_last=True).adapt(images)


def run(file: Exported, images: Tensor, mode: Mode = "exact") -> Floats:
    with TensorRTNetwork(file.path, mode, RTX) as executor:
        return np.asarray(executor.run({"image": feed(file, images).numpy()})["logits"], np.float32)


def expected(file: Exported, images: Tensor) -> Floats:
    """PyTorch carrying the file's constants."""
    (result,) = g.execute(to_onnx.reference(file.spec, file.graph), feed(file, images))
    return np.asarray(result.numpy(), np.float32)


@EVERY
def test_it_is_the_same_network(exported: Export, spec: ExportSpec) -> None:
    images = pixels(spec.batch, 3, 64, 64, seed=1)
    assert relative_rms(run(exported(spec), images), expected(exported(spec), images)) <= 1e-6


@EVERY
def test_the_precision_costs_what_onnx_emulation_says(exported: Export, spec: ExportSpec) -> None:
    file, images = exported(spec), pixels(spec.batch, 3, 64, 64, seed=1)
    got = run(file, images, "emulated")
    if spec.input is not InputKind.UINT8_NHWC:
        assert relative_rms(got, file.run(images, "emulated")) <= 1e-3
    cost = relative_rms(got, original(spec, images))
    assert cost <= to_onnx.PRECISION_COST[spec.precision].relative_rms
    assert (cost > 1e-5) == (spec.precision is Precision.FP16)  # rounding is there


@pytest.mark.full_size
@pytest.mark.parametrize("spec", FULL.values(), ids=FULL)
def test_at_full_size_too(exported: Export, spec: ExportSpec) -> None:
    file, images = exported(spec), pixels(spec.batch, 3, 224, 224, seed=1)
    assert relative_rms(run(file, images), expected(file, images)) <= 2e-6
    assert relative_rms(run(file, images, "emulated"), file.run(images, "emulated")) <= 1e-3


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 96, 160), (2, 75, 101), (1, 33, 47), (5, 32, 129)])
def test_open_axes_take_every_size(exported: Export, shape: tuple[int, int, int]) -> None:
    batch, height, width = shape
    images = pixels(batch, 3, height, width, seed=2)
    assert relative_rms(run(exported(OPEN), images), expected(exported(OPEN), images)) <= 1e-6


class Calibration(CalibrationDataReader):  # type: ignore[misc]  # a class without types
    """One batch, once."""

    def __init__(self, image: Floats) -> None:
        self.left = [{"image": image}]

    def get_next(self) -> dict[str, Floats] | None:
        return self.left.pop() if self.left else None


@pytest.mark.parametrize(("kinds", "bound"), [(["Gemm"], 1e-4), (["Conv", "MatMul", "Gemm"], 2e-2)])
def test_a_quantized_network_is_the_same_too(exported: Export, tmp_path: Path, kinds: list[str], bound: float) -> None:
    """Signed, symmetric, by channel, as TensorRT wants it.

    Sums in another order now and then round to another step: one in 16384 in the first map where it happens, 9e-3 of
    the logits behind all of them.
    """
    image, path = pixels(2, 3, 64, 64, seed=1).float().numpy(), tmp_path / "int8.onnx"
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    quantize_static(
        str(exported(FP32).path),
        str(path),
        Calibration(image),
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=kinds,
        extra_options={**symmetric, "OpTypesToExcludeOutputQuantization": kinds},
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (wanted,) = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, {"image": image})
    with TensorRTNetwork(path, "exact", RTX) as executor:
        got = np.asarray(executor.run({"image": image})["logits"], np.float32)
    assert any(layer.kind == "QUANTIZE" for layer in understood(onnx.load(str(path))).layers)
    assert relative_rms(got, wanted) <= bound
    assert relative_rms(got, original(FP32, pixels(2, 3, 64, 64, seed=1))) > 1e-3  # it is quantised


def test_norms_in_fp16_are_rounded_once_more_by_the_parser(exported: Export) -> None:
    """It folds gamma, beta, mean and variance into FP16 scale and shift: another network, if by little."""
    spec = replace(FP16, skip=UNFOLDED, simplify=False)
    file, images = exported(spec), pixels(2, 3, 64, 64, seed=1)
    assert sum(layer.kind == "SCALE" for layer in understood(file.proto).layers) > 10
    assert relative_rms(file.run(images), expected(file, images)) <= 1e-6  # the file itself is right
    assert 1e-5 < relative_rms(run(file, images), expected(file, images)) < 1e-2


def test_onnx_runtime_hides_the_overflow_that_emulation_shows(tmp_path: Path) -> None:
    """Convolution, ReLU, convolution: beyond 65504 in the middle, and small again behind it."""
    weights = {"w": np.full((2, 2, 1, 1), 200, np.float16), "v": np.full((2, 2, 1, 1), 2.0**-12, np.float16)}
    nodes = [make("Conv", ["x", "w"], ["c"], "up"), make("Relu", ["c"], ["r"], "relu")]
    made = model([*nodes, make("Conv", ["r", "v"], ["y"], "down")], [1, 2, 3, 3], weights, HALF)
    x = np.full((1, 2, 3, 3), 300, np.float16)
    (naive,) = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    assert np.isfinite(naive).all()
    assert np.allclose(execute(made, x, tmp_path), 300 * 400 * 2.0**-11, rtol=1e-6)
    assert np.isinf(execute(made, x, tmp_path, "emulated")).all()


def test_kinds_it_does_not_know_are_named(tmp_path: Path) -> None:
    made = model(
        [make("Relu", ["x"], ["r"]), make("TopK", ["r", "k"], ["y", "i"], "head/TopK")], [4], {"k": np.array([2])}
    )
    message = r"^TOPK head/TopK is of a kind that can't be executed here$"
    with pytest.raises(UnknownLayer, match=message) as refusal:
        execute(made, normal(4), tmp_path)
    assert isinstance(refusal.value, BuildFailed)
    assert isinstance(refusal.value, NotExecutable)


@pytest.mark.parametrize(
    ("node", "attribute"),
    [
        (make("Selu", ["x"], ["y"], "head/Selu"), "type SELU"),
        (make("Asinh", ["x"], ["y"], "head/Asinh"), "op ASINH"),
        (make("ReduceProd", ["x"], ["y"], "head/Prod", keepdims=0), "op PROD"),
    ],
)
def test_values_it_does_not_know_are_named(tmp_path: Path, node: onnx.NodeProto, attribute: str) -> None:
    message = rf"^[A-Z]+ head/\w+ has {attribute}, which can't be executed here$"
    with pytest.raises(UnknownLayer, match=message):
        execute(model([node], [4, 5]), normal(4, 5), tmp_path)


def test_weights_that_numpy_lacks_are_named() -> None:
    weight = helper.make_tensor("w", TensorProto.BFLOAT16, [4], [1.0, 2.0, 3.0, 4.0])
    made = model([make("Mul", ["x", "w"], ["y"], "scale")], [4], kind=TensorProto.BFLOAT16)
    made.graph.initializer.append(weight)
    with pytest.raises(UnknownLayer, match=r"^weights of CONSTANT w are BF16, a type that can't be executed here$"):
        understood(made)


def test_messages_name_the_onnx_node_where_the_layer_has_another_name() -> None:
    layer = Layer("mul_7", "UNARY", (), (), "[ONNX Layer: head.act/Erf]", {}, {})
    assert layer.where == "UNARY mul_7 [ONNX Layer: head.act/Erf]"
    assert replace(layer, name="head.act/Erf").where == "UNARY head.act/Erf"
    assert replace(layer, metadata=" ").where == "UNARY mul_7"


def test_nothing_of_tensorrt_is_in_the_snapshot(exported: Export) -> None:
    network = understood(exported(FP16).proto)
    gc.collect()
    assert (network.inputs, network.outputs) == (("image",), ("logits",))
    kinds = {type(value) for layer in network.layers for value in layer.attributes.values()}
    assert kinds <= {bool, int, float, str, tuple, type(None)}
    inner = {
        type(each) for layer in network.layers for v in layer.attributes.values() if type(v) is tuple for each in v
    }
    assert inner == {int}
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in exported(FP16).proto.graph.initializer}
    for name in ("stem.0.conv", "features.4.mlp.conv1"):
        (layer,) = [each for each in network.layers if each.name == f"{name}/Conv"]
        assert layer.metadata == f"[ONNX Layer: {name}/Conv]"
        assert layer.weights["kernel"].base is None  # a copy
        assert np.array_equal(layer.weights["kernel"], tensors[f"{name}.weight"].ravel())
        assert np.array_equal(layer.weights["bias"], tensors[f"{name}.bias"])
    assert network.tensors["image"].dtype == network.tensors["logits"].dtype == "FLOAT"
    assert sum(tensor.dtype == "HALF" for tensor in network.tensors.values()) > 100


def test_layers_run_behind_those_they_read(exported: Export) -> None:
    """TensorRT lists them as they were added: some in front of what they read."""
    network = understood(exported(OPEN).proto)
    orders = [network.layers, [step.layer for step in schedule(network)]]
    orders.append([step.layer for step in schedule(replace(network, layers=network.layers[::-1]))])
    sound = []
    for order in orders:
        written = set(network.inputs)
        sound.append(True)
        for layer in order:
            sound[-1] &= {name for name in layer.inputs if name} <= written
            written |= {*layer.outputs}
        assert {layer.name for layer in order} == {layer.name for layer in network.layers}
    assert sound == [False, True, True]


def test_a_tensor_is_kept_as_long_as_it_is_read(exported: Export) -> None:
    network = understood(exported(FP16).proto)
    alive, most, gone = {*network.inputs}, 0, list[str]()
    for step in schedule(network):
        assert {name for name in step.layer.inputs if name} <= alive
        alive |= {*step.layer.outputs}
        most = max(most, len(alive))
        alive -= {*step.done}
        gone += step.done
    assert alive == {*network.outputs}
    assert len(gone) == len({*gone})
    assert most <= 12  # of more than two hundred


def layer_from(read: str, written: str) -> Layer:
    return Layer(f"to {written}", "IDENTITY", (read,), (written,), "", {}, {})


def test_a_circle_is_an_error() -> None:
    layers = (layer_from("x", "a"), layer_from("c", "b"), layer_from("b", "c"))
    with pytest.raises(BuildFailed, match=r"^IDENTITY to b reads what is never written$"):
        schedule(Network(("x",), ("a",), {}, layers))


def test_it_says_what_it_is(exported: Export) -> None:
    for mode in MODES:
        executor = TensorRTNetwork(exported(FP16).path, mode, RTX)
        assert executor.name == f"tensorrt-network-reference (tensorrt_rtx {load(RTX).__version__})"
        assert executor.mode == mode


def test_it_holds_the_network_only_inside_with(exported: Export) -> None:
    executor = TensorRTNetwork(exported(FP16).path, "exact", RTX)
    inputs = {"image": normal(2, 3, 64, 64)}
    with pytest.raises(RuntimeError, match="use it in a with statement"):
        executor.run(inputs)
    with executor as entered:
        assert entered is executor
        first = executor.run(inputs)["logits"]
        assert np.array_equal(executor.run(inputs)["logits"], first)
    assert executor._network is None
    assert executor._steps == ()
    with pytest.raises(RuntimeError, match="use it in a with statement"):
        executor.run(inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixels": normal(2, 3, 64, 64)}, "model.onnx reads image, not pixels"),
        ({"image": normal(3, 3, 64, 64)}, "image as FLOAT (2, 3, 64, 64), not as torch.float32 (3, 3, 64, 64)"),
        ({"image": normal(2, 64, 64)}, "image as FLOAT (2, 3, 64, 64), not as torch.float32 (2, 64, 64)"),
        ({"image": np.zeros((2, 3, 64, 64), np.uint8)}, "image as FLOAT (2, 3, 64, 64), not as torch.uint8"),
    ],
)
def test_other_inputs_are_refused(exported: Export, inputs: Mapping[str, Floats], message: str) -> None:
    with TensorRTNetwork(exported(FP16).path, "exact", RTX) as executor, pytest.raises(BuildFailed) as refusal:
        executor.run(inputs)
    assert message in str(refusal.value)


def test_inputs_are_left_as_they_are(exported: Export) -> None:
    image = normal(2, 3, 64, 64)
    image.setflags(write=False)
    before = image.copy()
    with TensorRTNetwork(exported(FP16).path, "emulated", RTX) as executor:
        executor.run({"image": image})
    assert np.array_equal(image, before)


def test_a_missing_or_damaged_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(BuildFailed, match=r"^model.onnx can't be read: No such file or directory$"):
        TensorRTNetwork(path, "exact", RTX).__enter__()
    path.write_bytes(b"no network")
    with pytest.raises(BuildFailed, match=r"^TensorRT's ONNX parser .*$"):
        TensorRTNetwork(path, "exact", RTX).__enter__()


def test_what_tensorrt_derived_must_be_what_comes_out(exported: Export) -> None:
    """A shape or a type that differs is a layer misunderstood, here or there."""
    inputs = {"image": normal(2, 3, 64, 64)}
    for wrong, message in ({"shape": (2, 24, 31, 32)}, "computed"), ({"dtype": "INT32"}, "writes INT32"):
        with TensorRTNetwork(exported(FP16).path, "exact", RTX) as executor:
            assert executor._network is not None
            tensors = dict(executor._network.tensors)
            tensors["conv2d"] = replace(tensors["conv2d"], **wrong)
            executor._network = replace(executor._network, tensors=tensors)
            with pytest.raises(BuildFailed, match=rf"^CONVOLUTION stem.0.conv/Conv .*{message}"):
                executor.run(inputs)


def test_nan_is_not_quantized_away(tmp_path: Path) -> None:
    nodes = [make("QuantizeLinear", ["x", "s", "z"], ["q"], "q"), make("DequantizeLinear", ["q", "s", "z"], ["y"], "d")]
    made = model(nodes, [2], {"s": np.array(0.25, np.float32), "z": np.array(0, np.int8)})
    with pytest.raises(BuildFailed, match=r"^QUANTIZE q reads NaN"):
        execute(made, np.array([1, np.nan], np.float32), tmp_path)


def test_float64_is_closer_than_float32(exported: Export) -> None:
    file, images = exported(FP16), pixels(2, 3, 64, 64, seed=1)
    results = []
    for dtype in (torch.float32, torch.float64):
        with TensorRTNetwork(file.path, "exact", RTX, dtype) as executor:
            results.append(executor.run({"image": feed(file, images).numpy()})["logits"])
    wide = to_onnx.reference(file.spec, file.graph)
    (truth,) = g.execute(wide.double(), file.feed(images).double())
    errors = [float(np.abs(result - truth.numpy()).max()) for result in results]
    assert errors[1] <= 1e-12 < errors[0]
