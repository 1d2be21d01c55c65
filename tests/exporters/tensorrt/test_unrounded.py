"""INT8 graphs in real numbers: steps that round hide what a tight bound would show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.executors.onnx_float import unround
from nextvit_exporters.executors.onnx_runtime import OnnxRuntime
from nextvit_exporters.executors.tensorrt_network import Mode, TensorRTNetwork
from nextvit_exporters.spec import Precision
from tests.exporters.exports import NANO, Export, Floats, relative_rms
from tests.exporters.passes_harness import pixels
from tests.exporters.tensorrt.small_models import FLOAT, RTX, make, model

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed; pip install 'nextvit-deploy[trt-rtx]'")
CLEAN = 1e-6
Fault = Callable[[onnx.ModelProto], None]


class Calibration(CalibrationDataReader):  # type: ignore[misc]  # it ships no types
    def __init__(self, image: Floats) -> None:
        self.left = [{"image": image}]

    def get_next(self) -> dict[str, Floats] | None:
        return self.left.pop() if self.left else None


@pytest.fixture(scope="module")
def images() -> Floats:
    return np.asarray(pixels(2, 3, 64, 64, seed=1).float().numpy(), np.float32)


@pytest.fixture(scope="module")
def quantized(exported: Export, images: Floats, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nano in FP16 with INT8 convolutions and head, as TensorRT wants it."""
    path = tmp_path_factory.mktemp("int8") / "int8.onnx"
    kinds = ["Conv", "Gemm"]
    quantize_static(
        str(exported(replace(NANO, precision=Precision.FP16, opset=20, consumer="tensorrt-10")).path),
        str(path),
        Calibration(images),
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=kinds,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": kinds,
        },
    )
    return path


def network(path: Path, images: Floats, mode: Mode) -> Floats:
    with TensorRTNetwork(path, mode, RTX) as executor:
        return np.asarray(executor.run({"image": images})["logits"], np.float32)


def file(path: Path, images: Floats, mode: str) -> Floats:
    with OnnxRuntime(path, mode) as executor:
        return np.asarray(executor.run({"image": images})["logits"], np.float32)


def test_both_readings_agree_in_real_numbers(quantized: Path, images: Floats) -> None:
    wanted = file(quantized, images, "unrounded")
    assert relative_rms(network(quantized, images, "unrounded"), wanted) <= CLEAN
    rounded = file(quantized, images, "exact")
    assert relative_rms(wanted, rounded) > 1e-3  # steps were really left out
    assert relative_rms(network(quantized, images, "exact"), rounded) <= 5e-2  # and are there otherwise


def test_where_nothing_is_quantized_it_is_exact(exported: Export, images: Floats) -> None:
    path = exported(replace(NANO, precision=Precision.FP16)).path
    assert np.array_equal(file(path, images, "unrounded"), file(path, images, "exact"))
    assert np.array_equal(network(path, images, "unrounded"), network(path, images, "exact"))


def constant(made: onnx.ModelProto, name: str) -> onnx.TensorProto:
    found: onnx.TensorProto = next(each for each in made.graph.initializer if each.name == name)
    return found


def scale(made: onnx.ModelProto, name: str, factor: float) -> None:
    tensor = constant(made, name)
    values = numpy_helper.to_array(tensor)
    changed = (values * factor).astype(values.dtype)
    assert not np.array_equal(changed, values)
    tensor.CopyFrom(numpy_helper.from_array(changed, name))


def node(made: onnx.ModelProto, kind: str, index: int) -> onnx.NodeProto:
    quantized = {each.output[0] for each in made.graph.node if each.op_type == "QuantizeLinear"}
    listed = [
        each
        for each in made.graph.node
        if each.op_type == kind and (kind == "QuantizeLinear" or (each.input[0] in quantized))
    ]
    found: onnx.NodeProto = listed[index]
    return found


def own_step(made: onnx.ModelProto, which: onnx.NodeProto, factor: float) -> None:
    """Give one node a step of its own, for quantizer and dequantizer share one."""
    copied = onnx.TensorProto()
    copied.CopyFrom(constant(made, which.input[1]))
    copied.name = "another/step"
    made.graph.initializer.append(copied)
    which.input[1] = copied.name
    scale(made, copied.name, factor)


def weight_step(made: onnx.ModelProto) -> None:
    scale(made, "features.3.mlp.conv1.weight_scale", 1.01)


def one_weight(made: onnx.ModelProto) -> None:
    tensor = constant(made, "features.3.mlp.conv1.weight_quantized")
    values = numpy_helper.to_array(tensor).copy()
    values.flat[np.abs(values.astype(np.int32)).argmax()] = 0
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def quantizer_step(made: onnx.ModelProto) -> None:
    own_step(made, node(made, "QuantizeLinear", 3), 1.01)


def dequantizer_step(made: onnx.ModelProto) -> None:
    own_step(made, node(made, "DequantizeLinear", 3), 1.01)


def saturated(made: onnx.ModelProto) -> None:
    """A step too small: large values are cut off, small ones are what they were."""
    scale(made, node(made, "QuantizeLinear", 3).input[1], 0.25)


def lost_bias(made: onnx.ModelProto) -> None:
    scale(made, "features.3.mlp.conv1.bias", 0.0)


@pytest.mark.parametrize("fault", [weight_step, one_weight, quantizer_step, dequantizer_step, saturated, lost_bias])
def test_faults_in_a_quantized_file_show(quantized: Path, images: Floats, tmp_path: Path, fault: Fault) -> None:
    damaged = onnx.load(str(quantized))
    fault(damaged)
    path = tmp_path / "damaged.onnx"
    path.write_bytes(damaged.SerializeToString())
    error = relative_rms(network(path, images, "unrounded"), file(quantized, images, "unrounded"))
    assert error > 10 * CLEAN
    assert error > 2e-5


def steps(values: NDArray[np.generic] | np.generic, zero: NDArray[np.generic] | np.generic) -> onnx.ModelProto:
    nodes = [make("QuantizeLinear", ["x", "s", "z"], ["q"], "q"), make("DequantizeLinear", ["q", "s", "z"], ["y"], "d")]
    return model(nodes, (1, 4), {"s": np.asarray(values), "z": np.asarray(zero)}, FLOAT)


def test_it_scales_and_clamps_without_rounding(tmp_path: Path) -> None:
    made = steps(np.float32(0.5), np.int8(0))
    path = tmp_path / "steps.onnx"
    path.write_bytes(made.SerializeToString())
    x = np.array([[0.3, -0.74, 63.4, -100.0]], np.float32)
    for executor in (TensorRTNetwork(path, "unrounded", RTX), OnnxRuntime(path, "unrounded")):
        with executor as running:
            assert np.allclose(running.run({"x": x})["y"], [[0.3, -0.74, 63.4, -64.0]], rtol=1e-6, atol=0)
    with TensorRTNetwork(path, "exact", RTX) as running:
        assert np.array_equal(running.run({"x": x})["y"], [[0.5, -0.5, 63.5, -64.0]])


@pytest.mark.parametrize(
    ("values", "zero", "says"),
    [
        (np.ones(4, np.float32), np.zeros(4, np.int8), "a step that is not one number"),
        (np.float32(0.5), np.uint8(0), "not symmetric int8"),
        (np.float32(0.5), np.int8(1), "not symmetric int8"),
    ],
)
def test_other_quantization_is_refused(values: NDArray[np.generic], zero: NDArray[np.generic], says: str) -> None:
    with pytest.raises(BuildFailed, match=f"QuantizeLinear q .*{says}"):
        unround(steps(values, zero))
