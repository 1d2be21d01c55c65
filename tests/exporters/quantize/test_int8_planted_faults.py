"""Faults planted into a finished INT8 file: executing it, or reading its steps back, must show each of them.

Executed without rounding, a file is held against the reference at 1e-5. That shows what changes a number; a step that
is too large, or a tensor that was left off its steps, changes none where nothing clips. Those are seen by comparing
what the file holds with what was meant.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nextvit_exporters import to_onnx
from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.executors.onnx_runtime import OnnxRuntime
from nextvit_exporters.quantize.quantized import MapSteps, map_steps
from nextvit_exporters.quantize.read_back import OPERATIONS, check_file, check_steps
from nextvit_exporters.spec import Precision
from tests.exporters.exports import Exported, Floats, probe, relative_rms
from tests.exporters.quantize.int8_files import INT8, Files

MAP: Final = "features.3.mlp.conv1"
PRODUCT: Final = "features.4.e_mhsa.q"
"""Written as a matrix product, whose output channels come last."""
Fault = Callable[[onnx.ModelProto], None]


def node(model: onnx.ModelProto, module: str) -> onnx.NodeProto:
    found: onnx.NodeProto
    (found,) = [each for each in model.graph.node if each.name in {f"{module}/{kind}" for kind in OPERATIONS}]
    return found


def maker(model: onnx.ModelProto, tensor: str) -> onnx.NodeProto:
    """Who made a tensor, but for moves of its numbers."""
    found: onnx.NodeProto
    (found,) = [each for each in model.graph.node if tensor in each.output]
    return maker(model, found.input[0]) if found.op_type in {"Reshape", "Transpose"} else found


def pair(model: onnx.ModelProto, module: str = MAP) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """What brings a map's input onto steps, and back."""
    back = maker(model, node(model, module).input[0])
    return maker(model, back.input[0]), back


def weights(model: onnx.ModelProto, module: str = MAP) -> onnx.NodeProto:
    return maker(model, node(model, module).input[1])


def put(model: onnx.ModelProto, name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    (tensor,) = [each for each in model.graph.initializer if each.name == name]
    kept = numpy_helper.to_array(tensor)
    values = change(kept.copy())
    assert not np.array_equal(values.astype(kept.dtype), kept), "the fault changes nothing"
    tensor.CopyFrom(numpy_helper.from_array(values.astype(kept.dtype), name))


def own_constant(model: onnx.ModelProto, name: str, change: Callable[[NDArray[Any]], NDArray[Any]], new: str) -> str:
    """A changed copy of a constant that others may read as well."""
    (tensor,) = [each for each in model.graph.initializer if each.name == name]
    model.graph.initializer.append(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), new))
    return new


def scaled(factor: float, *, whole: bool = True) -> Fault:
    """A step of an activation, of the whole pair or of the way back alone."""

    def fault(model: onnx.ModelProto) -> None:
        to, back = pair(model)
        new = own_constant(model, to.input[1], lambda step: (step * factor).astype(step.dtype), "fault")
        back.input[1] = new
        if whole:
            to.input[1] = new

    fault.__name__ = f"activation step times {factor}{'' if whole else ' on the way back'}"
    return fault


def one_code(by: int) -> Fault:
    def change(codes: NDArray[Any]) -> NDArray[Any]:
        codes.flat[np.abs(codes).argmin()] += by
        return codes

    def fault(model: onnx.ModelProto) -> None:
        put(model, weights(model).input[0], change)

    fault.__name__ = f"one weight by {by} steps"
    return fault


def weight_step(module: str) -> Fault:
    """One channel's step by a hundredth."""

    def change(steps: NDArray[Any]) -> NDArray[Any]:
        steps[3] *= 1.01
        return steps

    def fault(model: onnx.ModelProto) -> None:
        put(model, weights(model, module).input[1], change)

    fault.__name__ = f"a weight step of {module}"
    return fault


def weight_steps_swapped(model: onnx.ModelProto) -> None:
    put(model, weights(model).input[1], lambda steps: steps[::-1])


def weights_transposed(model: onnx.ModelProto) -> None:
    """Of the square weight of a product, which fits either way."""
    put(model, weights(model, PRODUCT).input[0], lambda codes: codes.T)


def wrong_axis(model: onnx.ModelProto) -> None:
    found = weights(model, PRODUCT)
    (axis,) = [each for each in found.attribute if each.name == "axis"]
    axis.i = 1 - axis.i % 2


def bias_dropped(model: onnx.ModelProto) -> None:
    del node(model, MAP).input[2]


def bias_doubled(model: onnx.ModelProto) -> None:
    put(model, f"{MAP}.bias", lambda bias: 2 * bias)


def residual_off_its_steps(model: onnx.ModelProto) -> None:
    """The sum beside a convolution reads the tensor as it was made."""
    to, back = pair(model, "features.3.mhca.group_conv3x3")
    (add,) = [each for each in model.graph.node if each.op_type == "Add" and back.output[0] in each.input]
    add.input[:] = [to.input[0] if name == back.output[0] else name for name in add.input]


def pair_removed(model: onnx.ModelProto) -> None:
    """Everybody reads the tensor as it was made."""
    to, back = pair(model)
    for each in model.graph.node:
        each.input[:] = [to.input[0] if name == back.output[0] else name for name in each.input]
    model.graph.node.remove(to)
    model.graph.node.remove(back)


def map_left_in_fp16(model: onnx.ModelProto) -> None:
    """A constant in the type beside INT8 in place of the weight's steps."""
    found = weights(model)
    constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    codes, steps = constants[found.input[0]], constants[found.input[1]]
    whole = codes * steps.reshape(-1, *(1,) * (codes.ndim - 1)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(whole.astype(steps.dtype), "fault"))
    node(model, MAP).input[1] = "fault"
    model.graph.node.remove(found)


def another_quantized_too(model: onnx.ModelProto) -> None:
    """The result of a map, in the same steps: a pair that nobody asked for."""
    to, _ = pair(model)
    result = node(model, "features.3.mlp.conv2").output[0]
    for each in model.graph.node:
        each.input[:] = ["fault/back" if name == result else name for name in each.input]
    place = list(model.graph.node).index(node(model, "features.3.mlp.conv2"))
    wide = own_constant(model, to.input[1], lambda step: (step * 64).astype(step.dtype), "fault/step")
    there = helper.make_node("QuantizeLinear", [result, wide, to.input[2]], ["fault/to"], "fault/QuantizeLinear")
    back = helper.make_node("DequantizeLinear", ["fault/to", wide, to.input[2]], ["fault/back"], "fault/Dequantize")
    model.graph.node.insert(place + 1, there)
    model.graph.node.insert(place + 2, back)


def zero_point(model: onnx.ModelProto) -> None:
    to, back = pair(model)
    new = own_constant(model, to.input[2], lambda point: (point + 1).astype(point.dtype), "fault")
    to.input[2] = back.input[2] = new


def zero_point_of_weights(model: onnx.ModelProto) -> None:
    found = weights(model)
    found.input[2] = own_constant(model, found.input[2], lambda point: (point + 1).astype(point.dtype), "fault")


def uint8(model: onnx.ModelProto) -> None:
    """As asymmetric as a ReLU's result would allow: zero point 0, 0 to 255."""
    to, back = pair(model)
    model.graph.initializer.append(helper.make_tensor("fault", TensorProto.UINT8, (), [0]))
    to.input[2] = back.input[2] = "fault"


def steps_of_another_map(model: onnx.ModelProto) -> None:
    """A tensor is brought onto the steps of its neighbour."""
    (to, back), (other, _) = pair(model), pair(model, "features.3.mlp.conv2")
    to.input[1] = back.input[1] = other.input[1]


def returned_off_its_steps(model: onnx.ModelProto) -> None:
    to, _ = pair(model)
    model.graph.output.append(helper.make_tensor_value_info(to.input[0], TensorProto.FLOAT16, None))


def second_pair(model: onnx.ModelProto) -> None:
    """The sum reads the tensor on steps of its own."""
    to, back = pair(model, "features.3.mhca.group_conv3x3")
    (add,) = [each for each in model.graph.node if each.op_type == "Add" and back.output[0] in each.input]
    own = own_constant(model, to.input[1], lambda step: (step * 2).astype(step.dtype), "fault/step")
    there = helper.make_node("QuantizeLinear", [to.input[0], own, to.input[2]], ["fault/to"], "fault/QuantizeLinear")
    again = helper.make_node("DequantizeLinear", ["fault/to", own, to.input[2]], ["fault/back"], "fault/Dequantize")
    add.input[:] = ["fault/back" if name == back.output[0] else name for name in add.input]
    place = list(model.graph.node).index(back)
    model.graph.node.insert(place, there)
    model.graph.node.insert(place + 1, again)


def step_by_channel(model: onnx.ModelProto) -> None:
    """Of an activation, where TensorRT takes one."""
    to, back = pair(model)
    channels = len(
        numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == weights(model).input[0]))[0]
    )
    own = own_constant(model, to.input[1], lambda step: np.full(channels, step), "fault/step")
    zero = own_constant(model, to.input[2], lambda point: np.full(channels, point), "fault/zero")
    for each in (to, back):
        each.input[1], each.input[2] = own, zero


def no_zero_point(model: onnx.ModelProto) -> None:
    """Which makes it uint8."""
    for each in pair(model):
        del each.input[2]


def weights_quantized_on_the_way(model: onnx.ModelProto) -> None:
    """From a constant in the type beside INT8; the numbers are the same."""
    found = weights(model)
    constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    codes, steps = constants[found.input[0]], constants[found.input[1]]
    whole = (codes * steps.reshape(-1, *(1,) * (codes.ndim - 1)).astype(np.float32)).astype(steps.dtype)
    model.graph.initializer.append(numpy_helper.from_array(whole, "fault/weight"))
    to = helper.make_node(
        "QuantizeLinear", ["fault/weight", *found.input[1:]], ["fault/codes"], "fault/QuantizeLinear", axis=0
    )
    model.graph.node.insert(0, to)
    found.input[0] = "fault/codes"


FAULTS: Final[dict[Fault, tuple[bool, bool]]] = {
    # whether executing the file shows it, and whether reading its steps back does
    one_code(16): (True, True),
    one_code(1): (True, True),
    weight_step("features.3.mlp.conv2"): (True, True),
    weight_step(MAP): (False, True),  # of a channel that no image brings through its ReLU
    weight_steps_swapped: (True, True),
    weights_transposed: (True, True),
    wrong_axis: (True, True),
    scaled(0.5): (True, True),
    scaled(0.99): (False, True),
    scaled(1.05): (False, True),
    scaled(2.0): (False, True),
    scaled(1.05, whole=False): (True, True),
    bias_dropped: (True, False),
    bias_doubled: (True, False),
    residual_off_its_steps: (False, True),
    pair_removed: (False, True),
    map_left_in_fp16: (True, True),
    another_quantized_too: (False, True),
    returned_off_its_steps: (False, True),
    second_pair: (False, True),
    step_by_channel: (True, True),
    no_zero_point: (True, True),
    weights_quantized_on_the_way: (True, True),
    zero_point: (True, True),
    zero_point_of_weights: (True, True),
    uint8: (True, True),
    steps_of_another_map: (True, True),
}


def execution_shows(file: Exported, path: Path) -> bool:
    """Whether the file is refused, or further from the reference than its tolerance."""
    images, bound = probe(file.spec), to_onnx.SAME_NETWORK[Precision.INT8].relative_rms
    try:
        with OnnxRuntime(path, "unrounded") as executor:
            result = executor.run({to_onnx.INPUT: file.feed(images).numpy()})[to_onnx.OUTPUT]
    except BuildFailed:
        return True
    return relative_rms(np.asarray(result, np.float32), expected(file)) > bound


@cache
def expected(file: Exported) -> Floats:
    return file.expected(probe(file.spec))


def reading_shows(file: Exported, path: Path) -> str | None:
    try:
        check_file(path, map_steps(file.graph))
    except BuildFailed as error:
        return str(error)
    return None


def test_a_sound_file_shows_none(int8_files: Files) -> None:
    file = int8_files(INT8)
    assert not execution_shows(file, file.path)
    assert reading_shows(file, file.path) is None


@pytest.mark.parametrize(("fault", "shown"), FAULTS.items(), ids=[fault.__name__ for fault in FAULTS])
def test_something_shows_the_fault(int8_files: Files, tmp_path: Path, fault: Fault, shown: tuple[bool, bool]) -> None:
    file, path = int8_files(INT8), tmp_path / "damaged.onnx"
    model = file.proto
    fault(model)
    path.write_bytes(model.SerializeToString())
    told = reading_shows(file, path)
    assert (execution_shows(file, path), told is not None) == shown
    assert any(shown)
    if told is not None:
        assert "\n" not in told
        assert "features." in told or "fault" in told or "the graph's output" in told


def test_a_map_that_was_to_be_kept_is_named(int8_files: Files) -> None:
    file = int8_files(INT8)
    wanted = map_steps(file.graph)
    del wanted[MAP]
    with pytest.raises(BuildFailed, match=rf"^{MAP} is in INT8; export again$"):
        check_steps(file.proto, wanted)
    with pytest.raises(BuildFailed, match=r"^\S+ is in INT8; export again$"):
        check_steps(file.proto, {})


def test_weights_of_another_shape_are_told(int8_files: Files) -> None:
    file = int8_files(INT8)
    wanted = map_steps(file.graph)
    own = wanted[MAP]
    wanted[MAP] = MapSteps(own.activation, own.weights, own.codes[:, :-1])
    with pytest.raises(BuildFailed, match=rf"^{MAP} has weights of \(\d+, \d+\), not \(\d+, \d+\); export again$"):
        check_steps(file.proto, wanted)


@pytest.mark.parametrize("content", [None, b"", b"not ONNX"], ids=["missing", "empty", "another format"])
def test_what_can_not_be_read_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BuildFailed) as refusal:
        check_file(path, {})
    assert "model.onnx" in str(refusal.value)
    assert "\n" not in str(refusal.value)
