"""Random faults in one layer of an ONNX file, each with the module that has to be named for it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Values = NDArray[np.float64]
Fault = Callable[[onnx.ModelProto, Random], str | None]
"""Plants something and returns the module that is to blame; None where the file has no place for it."""


def module_of(node: onnx.NodeProto) -> str:
    return str(node.name).rpartition("/")[0]


def nodes(model: onnx.ModelProto, *kinds: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type in kinds]


def ints(node: onnx.NodeProto, name: str) -> list[int]:
    return next((list(each.ints) for each in node.attribute if each.name == name), [])


def put(node: onnx.NodeProto, name: str, value: object) -> None:
    kept = [each for each in node.attribute if each.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Real ones, by name."""
    real = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    return {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type in real}


def _numbers(model: onnx.ModelProto, chosen: Random, at: int, how: Callable[[Values], Values]) -> str | None:
    known = constants(model)
    maps = nodes(model, "Conv", "MatMul", "Gemm")
    fitting = [node for node in maps if len(node.input) > at and node.input[at] in known]
    if not fitting:
        return None
    node = chosen.choice(fitting)
    tensor = known[node.input[at]]
    before = numpy_helper.to_array(tensor)
    after = how(before.astype(np.float64)).astype(before.dtype)
    assert not np.array_equal(before, after)
    tensor.CopyFrom(numpy_helper.from_array(after, tensor.name))
    return module_of(node)


def weight_scaled(model: onnx.ModelProto, chosen: Random) -> str | None:
    return _numbers(model, chosen, 1, lambda values: values * 1.05)


def one_channel_scaled(model: onnx.ModelProto, chosen: Random) -> str | None:
    def how(values: Values) -> Values:
        values[chosen.randrange(len(values))] *= 1.05
        return values

    return _numbers(model, chosen, 1, how)


def channels_permuted(model: onnx.ModelProto, chosen: Random) -> str | None:
    return _numbers(model, chosen, 1, lambda values: np.roll(values, 1, axis=0))


def bias_shifted(model: onnx.ModelProto, chosen: Random) -> str | None:
    return _numbers(model, chosen, 2, lambda values: np.roll(values, 1))


def bias_dropped(model: onnx.ModelProto, chosen: Random) -> str | None:
    node = chosen.choice([each for each in nodes(model, "Conv") if len(each.input) > 2])
    del node.input[2]
    return module_of(node)


def activation_idle(model: onnx.ModelProto, chosen: Random) -> str | None:
    node = chosen.choice(nodes(model, "Relu"))
    node.op_type = "Identity"
    return module_of(node)


def activation_left_out(model: onnx.ModelProto, chosen: Random) -> str | None:
    gone = chosen.choice(nodes(model, "Relu"))
    for node in model.graph.node:
        node.input[:] = [gone.input[0] if name == gone.output[0] else name for name in node.input]
    model.graph.node.remove(gone)
    return module_of(gone)


def padding_on_one_side(model: onnx.ModelProto, chosen: Random) -> str | None:
    node = chosen.choice([each for each in nodes(model, "Conv") if ints(each, "pads") == [1, 1, 1, 1]])
    put(node, "pads", [0, 0, 2, 2])
    return module_of(node)


def window_widened(model: onnx.ModelProto, chosen: Random) -> str | None:
    same = [each for each in nodes(model, "Conv") if ints(each, "pads") == [1, 1, 1, 1]]
    node = chosen.choice([each for each in same if ints(each, "strides") == [1, 1]])
    put(node, "dilations", [2, 2])
    put(node, "pads", [2, 2, 2, 2])
    return module_of(node)


def stride_lost(model: onnx.ModelProto, chosen: Random) -> str | None:
    """The shape changes, and somewhere behind it nothing can be computed any more."""
    node = chosen.choice([each for each in nodes(model, "Conv") if 2 in ints(each, "strides")])
    put(node, "strides", [1, 1])
    return module_of(node)


def softmax_axis(model: onnx.ModelProto, chosen: Random) -> str | None:
    node = chosen.choice(nodes(model, "Softmax"))
    put(node, "axis", 2)
    return module_of(node)


def axes_swapped(model: onnx.ModelProto, chosen: Random) -> str | None:
    node = chosen.choice(nodes(model, "Transpose"))
    perm = ints(node, "perm")
    first, second = chosen.sample(range(1, len(perm)), 2)
    perm[first], perm[second] = perm[second], perm[first]
    put(node, "perm", perm)
    return module_of(node)


def mean_is_maximum(model: onnx.ModelProto, chosen: Random) -> str | None:
    node = chosen.choice(nodes(model, "ReduceMean"))
    node.op_type = "ReduceMax"
    return module_of(node)


def sum_is_difference(model: onnx.ModelProto, chosen: Random) -> str | None:
    node = chosen.choice(nodes(model, "Add"))
    node.op_type = "Sub"
    return module_of(node)


def shortcut_lost(model: onnx.ModelProto, chosen: Random) -> str | None:
    known = constants(model)
    node = chosen.choice([each for each in nodes(model, "Add") if not known.keys() & set(each.input)])
    node.input[0] = node.input[1]
    return module_of(node)


def parts_swapped(model: onnx.ModelProto, chosen: Random) -> str | None:
    known = {tensor.name for tensor in model.graph.initializer}
    fitting = [each for each in nodes(model, "Concat") if len(each.input) == 2 and not known & set(each.input)]
    node = chosen.choice(fitting)
    node.input[:] = [node.input[1], node.input[0]]
    return module_of(node)


def read_from_elsewhere(model: onnx.ModelProto, chosen: Random) -> str | None:
    """What a convolution of the same shape reads further in front."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    convolutions = nodes(model, "Conv")
    pairs = [
        (node, other)
        for at, node in enumerate(convolutions)
        for other in convolutions[:at]
        if node.input[0] != other.input[0]
        and node.input[1] in shapes
        and shapes[node.input[1]] == shapes.get(other.input[1])
    ]
    if not pairs:
        return None
    node, other = chosen.choice(pairs)
    node.input[0] = other.input[0]
    return module_of(node)


FAULTS: Final[tuple[Fault, ...]] = (
    weight_scaled,
    one_channel_scaled,
    channels_permuted,
    bias_shifted,
    bias_dropped,
    activation_idle,
    activation_left_out,
    padding_on_one_side,
    window_widened,
    stride_lost,
    softmax_axis,
    axes_swapped,
    mean_is_maximum,
    sum_is_difference,
    shortcut_lost,
    parts_swapped,
    read_from_elsewhere,
)


class RandomFault:
    """One of them, in a random layer: ``module`` says afterwards which, ``kind`` what was done."""

    def __init__(self, seed: int) -> None:
        self._chosen = Random(seed)  # noqa: S311 - faults keep no secret
        self.module, self.kind = "", ""

    def __call__(self, model: onnx.ModelProto) -> None:
        found: str | None = None
        while found is None:
            fault = self._chosen.choice(FAULTS)
            found, self.kind = fault(model, self._chosen), fault.__name__
        self.module = found
