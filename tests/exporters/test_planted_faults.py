"""Faults planted into finished files, past certification: executing the file must show each of them.

The reference carries the constants that the checkpoint, the passes and the rounding give, never the file's own; so
whatever happens to a file afterwards, or happened in the exporter, is a difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor

from nextvit_exporters import to_onnx
from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.spec import ExportSpec, Precision
from tests.exporters.exports import NANO, Export, Exported, Floats, probe, relative_rms
from tests.exporters.passes_harness import make

SMALL = replace(NANO, model="small", num_classes=100, batch=2)


@dataclass(frozen=True, slots=True)
class Names:
    """One attention with token averaging, and one MLP, of each model."""

    attention: str
    mlp: str


NAMES = {"nano": Names("features.4.e_mhsa", "features.4.mlp"), "small": Names("features.11.e_mhsa", "features.11.mlp")}
Fault = Callable[[onnx.ModelProto, Names], None]


def array(model: onnx.ModelProto, name: str) -> NDArray[np.float32]:
    (tensor,) = [each for each in model.graph.initializer if each.name == name]
    return numpy_helper.to_array(tensor).astype(np.float32)


def put(model: onnx.ModelProto, name: str, values: NDArray[np.float32]) -> None:
    (tensor,) = [each for each in model.graph.initializer if each.name == name]
    kept = numpy_helper.to_array(tensor)
    assert values.shape == kept.shape
    assert not np.array_equal(values.astype(kept.dtype), kept), "the fault changes nothing"
    tensor.CopyFrom(numpy_helper.from_array(values.astype(kept.dtype), name))


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    found: onnx.NodeProto
    (found,) = [each for each in model.graph.node if each.name == name]
    return found


def bypass(model: onnx.ModelProto, name: str) -> None:
    """Let everyone read the node's first input in its place."""
    gone = node(model, name)
    for each in model.graph.node:
        each.input[:] = [gone.input[0] if entry == gone.output[0] else entry for entry in each.input]
    model.graph.node.remove(gone)


def attribute(model: onnx.ModelProto, name: str, key: str, value: object) -> None:
    found = node(model, name)
    kept = [each for each in found.attribute if each.name != key]
    del found.attribute[:]
    found.attribute.extend([*kept, helper.make_attribute(key, value)])


def scaled_weight(model: onnx.ModelProto, names: Names) -> None:
    weight = f"{names.mlp}.conv1.weight"
    put(model, weight, array(model, weight) * np.float32(1.001))


def one_number(model: onnx.ModelProto, names: Names) -> None:
    """A single weight of the first convolution has the other sign."""
    del names
    values = array(model, "stem.0.conv.weight")
    values.flat[np.abs(values).argmax()] *= -1
    put(model, "stem.0.conv.weight", values)


def dropped_bias(model: onnx.ModelProto, names: Names) -> None:
    bias = f"{names.mlp}.conv1.bias"
    put(model, bias, np.zeros_like(array(model, bias)))


def swapped_key_value(model: onnx.ModelProto, names: Names) -> None:
    k, v = (f"{names.attention}.{part}.weight" for part in "kv")
    keys, values = array(model, k), array(model, v)
    put(model, k, values)
    put(model, v, keys)


def dropped_norm(model: onnx.ModelProto, names: Names) -> None:
    """The first convolution as it was before its norm was folded."""
    del names
    (stem,) = [m for name, m in make(model.graph.name).named_modules() if name == "stem.0.conv"]
    put(model, "stem.0.conv.weight", stem.get_parameter("weight").detach().numpy())
    put(model, "stem.0.conv.bias", np.zeros_like(array(model, "stem.0.conv.bias")))


def missed_shift(model: onnx.ModelProto, names: Names) -> None:
    """The MLP's bias as it was: the fold of the norm before it lost W t."""
    before = make(model.graph.name).get_parameter(f"{names.mlp}.conv1.bias").detach().numpy()
    put(model, f"{names.mlp}.conv1.bias", before)


def scale_missing(model: onnx.ModelProto, names: Names) -> None:
    for part in ("weight", "bias"):
        name = f"{names.attention}.q.{part}"
        put(model, name, array(model, name) * np.float32(32**0.5))


def scale_twice(model: onnx.ModelProto, names: Names) -> None:
    for part in ("weight", "bias"):
        name = f"{names.attention}.q.{part}"
        put(model, name, array(model, name) / np.float32(32**0.5))


def value_bias_lost(model: onnx.ModelProto, names: Names) -> None:
    before = make(model.graph.name).get_parameter(f"{names.attention}.proj.bias").detach().numpy()
    put(model, f"{names.attention}.proj.bias", before)


def transposed_weight(model: onnx.ModelProto, names: Names) -> None:
    weight = f"{names.attention}.proj.weight"
    put(model, weight, np.swapaxes(array(model, weight), 0, 1))


def swapped_classes(model: onnx.ModelProto, names: Names) -> None:
    del names
    values = array(model, "proj_head.0.weight")
    values[[0, 1]] = values[[1, 0]]
    put(model, "proj_head.0.weight", values)


def bypassed_relu(model: onnx.ModelProto, names: Names) -> None:
    bypass(model, f"{names.mlp}.act/Relu")


def lost_residual(model: onnx.ModelProto, names: Names) -> None:
    bypass(model, f"{names.attention.rpartition('.')[0]}/Add")


def shifted_pad(model: onnx.ModelProto, names: Names) -> None:
    del names
    attribute(model, "stem.0.conv/Conv", "pads", [2, 2, 0, 0])


def other_softmax_axis(model: onnx.ModelProto, names: Names) -> None:
    attribute(model, f"{names.attention}/Softmax", "axis", 2)


def maximum_for_mean(model: onnx.ModelProto, names: Names) -> None:
    del names
    node(model, "avgpool/ReduceMean").op_type = "ReduceMax"


FAULTS: tuple[Fault, ...] = (
    scaled_weight,
    one_number,
    dropped_bias,
    swapped_key_value,
    dropped_norm,
    missed_shift,
    scale_missing,
    scale_twice,
    value_bias_lost,
    transposed_weight,
    swapped_classes,
    bypassed_relu,
    lost_residual,
    shifted_pad,
    other_softmax_axis,
    maximum_for_mean,
)
AT_FULL_SIZE: tuple[Fault, ...] = (
    scaled_weight,
    dropped_bias,
    swapped_key_value,
    missed_shift,
    scale_twice,
    value_bias_lost,
    bypassed_relu,
    shifted_pad,
)
BOTH = pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16], ids=str)


def damaged(file: Exported, fault: Fault, folder: Path) -> Path:
    model = file.proto
    fault(model, NAMES[file.spec.model])
    path = folder / "damaged.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def judge(file: Exported, path: Path, images: Tensor, expected: Floats) -> float:
    """Relative root mean square, infinite where the file can't be executed any more."""
    try:
        return relative_rms(file.run(images, "exact", path), expected)
    except BuildFailed:
        return float("inf")


def assert_found(file: Exported, fault: Fault, folder: Path, spec: ExportSpec) -> None:
    images = probe(spec)
    expected = file.expected(images)
    tolerance = to_onnx.SAME_NETWORK[spec.precision].relative_rms
    assert judge(file, file.path, images, expected) <= tolerance / 2
    assert judge(file, damaged(file, fault, folder), images, expected) > 2 * tolerance


@BOTH
@pytest.mark.parametrize("fault", FAULTS)
def test_executing_the_file_shows_the_fault(
    exported: Export, tmp_path: Path, fault: Fault, precision: Precision
) -> None:
    spec = replace(NANO, precision=precision)
    assert_found(exported(spec), fault, tmp_path, spec)


@BOTH
@pytest.mark.parametrize("fault", AT_FULL_SIZE)
def test_at_full_size_too(exported: Export, tmp_path: Path, fault: Fault, precision: Precision) -> None:
    spec = replace(SMALL, precision=precision)
    assert_found(exported(spec), fault, tmp_path, spec)


def test_fp16_s_own_error_would_hide_a_fault(exported: Export, tmp_path: Path) -> None:
    """Why two questions are asked: next to the rounding of FP16 a weight off by a thousandth is nothing."""
    spec = replace(NANO, precision=Precision.FP16)
    file, images = exported(spec), probe(spec)
    path, expected = damaged(file, scaled_weight, tmp_path), file.expected(images)
    whole, hurt = (relative_rms(file.run(images, "emulated", each), expected) for each in (file.path, path))
    assert hurt < 1.5 * whole
    assert hurt <= to_onnx.PRECISION_COST[Precision.FP16].relative_rms
