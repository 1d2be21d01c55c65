"""Read INT8 back out of an ONNX file, and hold it against what was meant.

Executing a file without rounding doesn't show everything: a step that is too large clips nothing, a tensor that was
left off its steps is merely more exact. So steps and whole numbers are compared as they are, and who reads what too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.quantize.quantized import MapSteps
from nextvit_exporters.tensorrt.onnx_input import read_onnx

OPERATIONS: Final = ("Conv", "Gemm", "MatMul")
"""What an INT8 map may be written as."""
MOVES: Final = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operations that merely move numbers."""
_TO, _FROM = "QuantizeLinear", "DequantizeLinear"


def weight_axis(node: onnx.NodeProto) -> int:
    """Where output channels are in the weight of a map: first, but in a product last, whose weight is (in, out)."""
    if node.op_type == "Conv":
        return 0
    turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if node.op_type == "Gemm" and turned else 1


def int8_nodes(model: onnx.ModelProto) -> tuple[tuple[str, ...], int]:
    """Names of the convolutions and products that read both factors from steps, and how many there are at all."""
    file = _File.of(model)
    maps = [node for node in model.graph.node if node.op_type in OPERATIONS]
    return tuple(node.name for node in maps if file.is_int8(node)), len(maps)


def steps_of(model: onnx.ModelProto) -> dict[str, MapSteps]:
    """The steps and whole numbers of every map in INT8, by the module that its node is named after.

    Raises BuildFailed, naming the module, where they are not TensorRT's kind: symmetric int8, one step for what a map
    reads and one per output channel of its weights, which are constants.
    """
    file = _File.of(model)
    nodes = [node for node in model.graph.node if node.op_type in OPERATIONS and file.is_int8(node)]
    return {_module(node): file.steps(node) for node in nodes}


def check_steps(model: onnx.ModelProto, expected: Mapping[str, MapSteps]) -> None:
    """Raise BuildFailed, naming the module, unless the maps in ``expected`` and no others are in INT8, as it says.

    Steps and whole numbers are compared exactly. Whatever is on steps is read by a map in INT8, and whoever reads such
    a tensor reads it on its steps.
    """
    found = steps_of(model)
    if wrong := sorted(found.keys() ^ expected.keys()):
        raise BuildFailed(f"{wrong[0]} is {'' if wrong[0] in found else 'not '}in INT8; export again")
    for name, wanted in expected.items():
        if what := difference_of(found[name], wanted):
            raise BuildFailed(f"{name} {what}; export again")
    _check_readers(model)


def check_file(path: Path, expected: Mapping[str, MapSteps]) -> None:
    """``check_steps`` of a saved file; raises BuildFailed also where it can't be read."""
    check_steps(read_onnx(path), expected)


@dataclass(frozen=True, slots=True, eq=False)
class _File:
    """Who makes what: nodes by the tensor they write, constants by name."""

    makers: Mapping[str, onnx.NodeProto]
    constants: Mapping[str, onnx.TensorProto]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> _File:
        makers = {name: node for node in model.graph.node for name in node.output}
        return cls(makers, {tensor.name: tensor for tensor in model.graph.initializer})

    def source(self, tensor: str) -> onnx.NodeProto | None:
        """The node that made a tensor, but for moves of its numbers; None where none did."""
        while (maker := self.makers.get(tensor)) is not None and maker.op_type in MOVES:
            tensor = maker.input[0]
        return maker

    def is_int8(self, node: onnx.NodeProto) -> bool:
        """Whether a map reads both factors from steps."""
        makers = (self.source(name) for name in node.input[:2])
        return all(maker is not None and maker.op_type == _FROM for maker in makers)

    def steps(self, node: onnx.NodeProto) -> MapSteps:
        """Of a map that is in INT8."""
        activation, weight = self.source(node.input[0]), self.makers.get(node.input[1])
        codes = None if weight is None or weight.op_type != _FROM else self._array(weight.input[0])
        if activation is None or weight is None or codes is None or codes.dtype != np.int8:
            raise BuildFailed(f"{_module(node)} does not read its weights from int8 constants; export again")
        axis, (steps, along) = weight_axis(node), self._scale(node, weight)
        if codes.ndim <= axis or steps.shape != (codes.shape[axis],) or along % codes.ndim != axis:
            raise BuildFailed(f"{_module(node)} has no step of its own for each output channel; export again")
        rows = np.moveaxis(codes, axis, 0)
        return MapSteps(self._activation(node, activation), steps, rows.reshape(len(rows), -1))

    def _activation(self, node: onnx.NodeProto, dequantize: onnx.NodeProto) -> float:
        """The one step of what a map reads, the same on the way there and back."""
        quantize = self.makers.get(dequantize.input[0])
        if quantize is None or quantize.op_type != _TO:
            raise BuildFailed(f"{_module(node)} reads numbers that nothing brought onto steps; export again")
        (there, _), (back, _) = (self._scale(node, each) for each in (quantize, dequantize))
        if there.ndim or back.ndim or there != back:
            raise BuildFailed(f"{_module(node)} does not read its input in one step; export again")
        return float(there)

    def _scale(self, node: onnx.NodeProto, pair: onnx.NodeProto) -> tuple[NDArray[np.float64], int]:
        """The steps of a pair's half and their axis; its zero points are zeros of int8."""
        scale, point = (self._array(name) for name in (*pair.input[1:3], "", "")[:2])
        if scale is None or point is None or point.dtype != np.int8 or point.shape != scale.shape or point.any():
            raise BuildFailed(f"{_module(node)} is not in symmetric int8: see {pair.name}; export again")
        axis = next((attribute.i for attribute in pair.attribute if attribute.name == "axis"), 1)
        return scale.astype(np.float64), int(axis)

    def _array(self, name: str) -> NDArray[Any] | None:
        """A constant; None where there is none of that name."""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)


def _module(node: onnx.NodeProto) -> str:
    return str(node.name).rpartition("/")[0]


def difference_of(found: MapSteps, wanted: MapSteps) -> str | None:
    """In what a map is not as it was meant; None where it is."""
    if found.activation != wanted.activation:
        return f"reads its input in steps of {found.activation:.6g}, not {wanted.activation:.6g}"
    if found.codes.shape != wanted.codes.shape:
        return f"has weights of {found.codes.shape}, not {wanted.codes.shape}"
    others = np.flatnonzero(found.weights != wanted.weights)
    if others.size:
        channel = int(others[0])
        return f"has steps of {found.weights[channel]:.6g} in channel {channel}, not {wanted.weights[channel]:.6g}"
    moved = np.argwhere(found.codes != wanted.codes)
    return f"has {len(moved)} weights on other steps, the first in channel {moved[0][0]}" if moved.size else None


def _check_readers(model: onnx.ModelProto) -> None:
    """Nothing is on steps but for a map, and whoever reads what is on steps reads it there."""
    needed, stepped = _needed(model), dict[str, str]()
    for node in model.graph.node:
        if node.op_type in {_TO, _FROM} and node.output[0] not in needed:
            raise BuildFailed(f"{node.name} brings a tensor onto steps that no map in INT8 reads; export again")
        if node.op_type == _TO and stepped.setdefault(node.input[0], node.name) != node.name:
            raise BuildFailed(f"{node.name} brings onto steps what {stepped[node.input[0]]} does; export again")
    reads = [(node.name, set(node.input)) for node in model.graph.node if node.op_type != _TO]
    for name, read in (*reads, ("the graph's output", {output.name for output in model.graph.output})):
        if beside := stepped.keys() & read:
            raise BuildFailed(f"{name} reads {min(beside)} off its steps; export again")


def _needed(model: onnx.ModelProto) -> set[str]:
    """What the maps in INT8 read: dequantized tensors, and what those are dequantized from."""
    file, needed = _File.of(model), set[str]()
    for node in model.graph.node:
        if node.op_type in OPERATIONS and file.is_int8(node):
            for maker in map(file.source, node.input[:2]):
                needed |= {maker.output[0], maker.input[0]} if maker is not None else set()
    return needed
