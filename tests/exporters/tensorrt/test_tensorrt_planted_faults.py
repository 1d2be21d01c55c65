"""Faults planted in front of TensorRT's parser and behind it: executing what it understood must show each.

The reference carries the constants that the checkpoint, the passes and the rounding give. Whatever happens to the
file, or in the parser, is a difference; the bound on FP16's own error would let the subtle ones through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import nn

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

from nextvit_exporters import to_onnx
from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.executors import tensorrt_network
from nextvit_exporters.executors.tensorrt_network import Mode, TensorRTNetwork
from nextvit_exporters.spec import ExportSpec, Precision
from nextvit_exporters.tensorrt.backends import load
from nextvit_exporters.tensorrt.builder import parsed
from tests.exporters.exports import NANO, Export, Exported, original, probe, relative_rms
from tests.exporters.passes_harness import make
from tests.exporters.tensorrt.small_models import RTX
from tests.exporters.test_planted_faults import (
    AT_FULL_SIZE,
    BOTH,
    FAULTS,
    SMALL,
    Fault,
    Names,
    array,
    bypassed_relu,
    damaged,
    dropped_bias,
    dropped_norm,
    lost_residual,
    maximum_for_mean,
    missed_shift,
    node,
    one_number,
    other_softmax_axis,
    put,
    scaled_weight,
    shifted_pad,
    swapped_classes,
)

TENSORRT = replace(NANO, consumer="tensorrt")
TENSORRT_SMALL = replace(SMALL, consumer="tensorrt", precision=Precision.FP16, height=224, width=224, batch=1)


def projection(names: Names) -> str:
    """Of the map from attention to convolution; no ReLU in front of it or behind may hide what becomes of it."""
    return f"{names.attention.rpartition('.')[0]}.projection.conv.weight"


def scaled_channel(model: onnx.ModelProto, names: Names) -> None:
    """One channel of one weight by a hundredth."""
    values = array(model, projection(names))
    values[3] *= np.float32(1.01)
    put(model, projection(names), values)


def zeroed_number(model: onnx.ModelProto, names: Names) -> None:
    values = array(model, projection(names))
    values.flat[np.abs(values).argmax()] = 0
    put(model, projection(names), values)


def other_epsilon(model: onnx.ModelProto, names: Names) -> None:
    """The first norm was folded with an epsilon of 1e-3."""
    del names
    (norm,) = [m for name, m in make(model.graph.name).named_modules() if name == "stem.0.norm"]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    variance, beta = norm.running_var.numpy(), norm.bias.detach().numpy()
    factor = np.sqrt((variance + norm.eps) / (variance + 1e-3)).astype(np.float32)
    put(model, "stem.0.conv.weight", array(model, "stem.0.conv.weight") * factor.reshape(-1, 1, 1, 1))
    put(model, "stem.0.conv.bias", (array(model, "stem.0.conv.bias") - beta) * factor + beta)


def rounded_scale(model: onnx.ModelProto, names: Names) -> None:
    """The attention's scale is 0.17 in place of 32 ** -0.5."""
    softmax = node(model, f"{names.attention}/Softmax")
    stored = numpy_helper.to_array(model.graph.initializer[0]).dtype
    factor = np.array([[[[0.17 * 32**0.5]]]], stored)
    model.graph.initializer.append(numpy_helper.from_array(factor, "factor"))
    scaled = helper.make_node("Mul", [softmax.input[0], "factor"], ["scaled"], "rounded scale")
    softmax.input[0] = "scaled"
    model.graph.node.insert([each.name for each in model.graph.node].index(softmax.name), scaled)


def exchanged_branches(model: onnx.ModelProto, names: Names) -> None:
    """Attention and convolution are joined the other way round."""
    found = node(model, f"{names.attention.rpartition('.')[0]}/Concat")
    found.input[:] = found.input[::-1]


OWN: tuple[Fault, ...] = (scaled_channel, zeroed_number, other_epsilon, rounded_scale, exchanged_branches)
SUBTLE: tuple[Fault, ...] = (scaled_weight, scaled_channel, other_epsilon, rounded_scale)
OF_BOTH_FILES: tuple[Fault, ...] = (
    *OWN,
    scaled_weight,
    one_number,
    dropped_bias,
    dropped_norm,
    missed_shift,
    swapped_classes,
    bypassed_relu,
    lost_residual,
    shifted_pad,
    other_softmax_axis,
    maximum_for_mean,
)


def error(file: Exported, path: Path, mode: Mode = "exact") -> float:
    """Relative root mean square against PyTorch with the file's constants; infinite where it can't be executed."""
    images = probe(file.spec)
    try:
        with TensorRTNetwork(path, mode, RTX) as executor:
            logits = executor.run({"image": file.feed(images).numpy()})["logits"]
    except BuildFailed:
        return float("inf")
    return relative_rms(np.asarray(logits, np.float32), file.expected(images))


def assert_found(file: Exported, fault: Fault, folder: Path) -> None:
    tolerance = to_onnx.SAME_NETWORK[file.spec.precision].relative_rms
    clean = error(file, file.path)
    assert clean <= tolerance / 5
    assert error(file, damaged(file, fault, folder)) > max(2 * tolerance, 10 * clean)


@BOTH
@pytest.mark.parametrize("fault", [*FAULTS, *OWN])
def test_what_tensorrt_understood_shows_the_fault(
    exported: Export, tmp_path: Path, fault: Fault, precision: Precision
) -> None:
    assert_found(exported(replace(NANO, precision=precision)), fault, tmp_path)


@pytest.mark.parametrize("fault", OF_BOTH_FILES)
def test_faults_in_the_file_for_tensorrt_show(exported: Export, tmp_path: Path, fault: Fault) -> None:
    assert_found(exported(replace(TENSORRT, precision=Precision.FP16)), fault, tmp_path)


@pytest.mark.parametrize("fault", AT_FULL_SIZE)
def test_at_full_depth_too(exported: Export, tmp_path: Path, fault: Fault) -> None:
    assert_found(exported(replace(SMALL, precision=Precision.FP16)), fault, tmp_path)


@pytest.mark.full_size
@pytest.mark.parametrize("fault", OF_BOTH_FILES)
def test_at_full_size_too(exported: Export, tmp_path: Path, fault: Fault) -> None:
    assert_found(exported(TENSORRT_SMALL), fault, tmp_path)


def assert_hidden(file: Exported, fault: Fault, folder: Path, spec: ExportSpec) -> None:
    """FP16 against float32 PyTorch passes with the fault as it does without."""
    path, images = damaged(file, fault, folder), probe(spec)
    costs = []
    for each in (file.path, path):
        with TensorRTNetwork(each, "emulated", RTX) as executor:
            logits = executor.run({"image": file.feed(images).numpy()})["logits"]
        costs.append(relative_rms(np.asarray(logits, np.float32), original(spec, images)))
    assert max(costs) <= to_onnx.PRECISION_COST[Precision.FP16].relative_rms
    assert error(file, path) > 2 * to_onnx.SAME_NETWORK[Precision.FP16].relative_rms


@pytest.mark.parametrize("fault", SUBTLE)
def test_fp16_s_own_error_would_hide_the_fault(exported: Export, tmp_path: Path, fault: Fault) -> None:
    spec = replace(TENSORRT, precision=Precision.FP16)
    assert_hidden(exported(spec), fault, tmp_path, spec)


def edit_padding(layer: Any, module: Any) -> None:
    del module
    layer.pre_padding, layer.post_padding = (2, 2), (0, 0)


def edit_activation(layer: Any, module: Any) -> None:
    layer.type, layer.alpha = module.ActivationType.LEAKY_RELU, 0.01


def edit_axes(layer: Any, module: Any) -> None:
    del module
    layer.axes = 1 << 2


def edit_reduction(layer: Any, module: Any) -> None:
    layer.op = module.ReduceOperation.MAX


def edit_sum(layer: Any, module: Any) -> None:
    layer.op = module.ElementWiseOperation.MAX


def edit_pooling(layer: Any, module: Any) -> None:
    layer.type = module.PoolingType.MAX


def edit_kernel(layer: Any, module: Any) -> None:
    del module
    KEPT[0] = layer.kernel * np.float16(1.001) + np.float16(1e-3)
    layer.kernel = KEPT[0]


KEPT: dict[int, NDArray[np.float16]] = {}
"""TensorRT does not copy the weights it is given."""
MISREADINGS: dict[str, tuple[str, str, Callable[[Any, Any], None]]] = {
    "padding": ("stem.0.conv/Conv", "IConvolutionLayer", edit_padding),
    "activation": ("features.4.mlp.act/Relu", "IActivationLayer", edit_activation),
    "softmax": ("features.4.e_mhsa/Softmax", "ISoftMaxLayer", edit_axes),
    "mean": ("avgpool/ReduceMean", "IReduceLayer", edit_reduction),
    "sum": ("features.4/Add", "IElementWiseLayer", edit_sum),
    "pooling": ("POOLING", "IPoolingLayer", edit_pooling),
    "kernel": ("features.4.mlp.conv1/Conv", "IConvolutionLayer", edit_kernel),
}


@pytest.mark.parametrize("misreading", MISREADINGS)
def test_what_a_parser_would_misread_shows(exported: Export, monkeypatch: pytest.MonkeyPatch, misreading: str) -> None:
    """The file is right, and TensorRT's network of it is not: no execution of the ONNX file could tell."""
    name, cls, edit = MISREADINGS[misreading]

    @contextmanager
    def misread(module: Any, data: bytes) -> Iterator[Any]:
        with parsed(module, data) as definition:
            layers = (definition.get_layer(index) for index in range(definition.num_layers))
            layer = next(each for each in layers if name in {each.name, module.ILayer.type.fget(each).name})
            layer.__class__ = getattr(module, cls)
            edit(layer, load(RTX))
            yield definition

    file = exported(replace(NANO, precision=Precision.FP16))
    assert error(file, file.path) <= 1e-6
    monkeypatch.setattr(tensorrt_network, "parsed", misread)
    assert error(file, file.path) > 2 * to_onnx.SAME_NETWORK[Precision.FP16].relative_rms
