"""Explicit INT8 in an ONNX file: QuantizeLinear and DequantizeLinear, put in by ONNX Runtime's quantizer.

It is told every step, so it calibrates nothing. What it does is TensorRT's rules: signed and symmetric, one step per
output channel of a weight, biases and results left alone, a pair in front of everybody who reads a tensor. One thing is
added: where it quantizes a tensor behind nodes that merely move its numbers, the pair moves in front of those, to where
the tensor was made, so that the addition of a residual branch reads the same pair as the convolution beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx
from onnxruntime.quantization import QDQQuantizer, QuantType, TensorData, TensorsData
from onnxruntime.quantization.calibrate import CalibrationMethod

from nextvit_exporters.errors import BuildFailed, InvariantError
from nextvit_exporters.quantize.quantized import MapSteps
from nextvit_exporters.quantize.read_back import MOVES, OPERATIONS, check_steps, weight_axis

_OPTIONS: Final[Mapping[str, Any]] = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,
    "OpTypesToExcludeOutputQuantization": list(OPERATIONS),
}


def quantize_onnx(model: onnx.ModelProto, maps: Mapping[str, MapSteps]) -> onnx.ModelProto:
    """``model`` with the maps named by module in INT8; the argument is used up.

    Its weights are on their steps already, rounded to the model's own type, so their whole numbers are found again
    exactly. Raises InvariantError where a module's node isn't there, BuildFailed where the quantizer refuses, or where
    what it made is not what it was told.
    """
    nodes = {name: _node_of(model, name) for name in maps}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    overrides: dict[str, list[dict[str, object]]] = {}
    ranges: dict[str, TensorData] = {}
    for name, steps in maps.items():
        node = nodes[name]
        weight = constants.get(node.input[1])
        if weight is None:
            raise InvariantError(f"{node.name} does not read its weights from a constant")
        kind = onnx.helper.tensor_dtype_to_np_dtype(weight.data_type)
        edge = np.array(127 * steps.activation, kind)
        ranges[node.input[0]] = TensorData(lowest=-edge, highest=edge)
        overrides[node.input[0]] = [{"scale": np.array(steps.activation, kind), "zero_point": np.array(0, np.int8)}]
        overrides[weight.name] = _per_channel(steps.weights.astype(kind), weight_axis(node))
    quantized = _insert(model, [node.name for node in nodes.values()], ranges, overrides)
    _to_makers(quantized)
    check_steps(quantized, maps)
    return quantized


def _node_of(model: onnx.ModelProto, module: str) -> onnx.NodeProto:
    """The node that a module became."""
    found: list[onnx.NodeProto] = [
        node for node in model.graph.node if node.name in {f"{module}/{kind}" for kind in OPERATIONS}
    ]
    if len(found) != 1:
        raise InvariantError(f"{module} became {len(found)} nodes of the ONNX graph; it can't be quantized")
    (node,) = found
    return node


def _per_channel(steps: np.ndarray[Any, Any], axis: int) -> list[dict[str, object]]:
    return [{"axis": axis, "scale": step, "zero_point": np.array(0, np.int8)} for step in steps]


def _insert(
    model: onnx.ModelProto, nodes: list[str], ranges: Mapping[str, TensorData], overrides: Mapping[str, object]
) -> onnx.ModelProto:
    typed = onnx.shape_inference.infer_shapes(model)  # the quantizer asks for every tensor's type
    try:
        quantizer = QDQQuantizer(
            typed,
            True,  # noqa: FBT003 - per channel
            False,  # noqa: FBT003 - of the whole range
            QuantType.QInt8,
            QuantType.QInt8,
            TensorsData(CalibrationMethod.MinMax, dict(ranges)),
            nodes,
            [],
            list(OPERATIONS),
            {**_OPTIONS, "TensorQuantOverrides": dict(overrides)},
        )
        quantized: onnx.ModelProto = quantizer.quantize_model()
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise BuildFailed(f"ONNX Runtime's quantizer refused the graph: {str(error).splitlines()[0]}") from error
    del quantized.graph.value_info[:]
    return quantized


def _to_makers(model: onnx.ModelProto) -> None:
    """Move every pair to where its tensor was made; pairs that meet there become one."""
    for quantize in [node for node in model.graph.node if node.op_type == "QuantizeLinear"]:
        tensor, source = quantize.input[0], _source(quantize.input[0], model)
        if source == tensor:
            continue
        (dequantize,) = (node for node in model.graph.node if quantize.output[0] in node.input)
        _read_instead(model, dequantize.output[0], tensor)
        if any(node.op_type == "QuantizeLinear" and node.input[0] == source for node in model.graph.node):
            model.graph.node.remove(quantize)
            model.graph.node.remove(dequantize)
            continue
        _read_instead(model, source, dequantize.output[0])
        quantize.input[0] = source
    _sort(model)


def _source(tensor: str, model: onnx.ModelProto) -> str:
    """The tensor that ``tensor`` is but for moves of its numbers and for steps it is on already."""
    makers = {name: node for node in model.graph.node for name in node.output}
    through = MOVES | {"DequantizeLinear", "QuantizeLinear"}
    while (maker := makers.get(tensor)) is not None and maker.op_type in through:
        tensor = maker.input[0]
    return tensor


def _read_instead(model: onnx.ModelProto, old: str, new: str) -> None:
    """Let every node read ``new`` in place of ``old``."""
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


def _sort(model: onnx.ModelProto) -> None:
    """Every node behind those it reads from, otherwise in the order they have."""
    known = {value.name for value in (*model.graph.input, *model.graph.initializer)} | {""}
    waiting, ordered = list(model.graph.node), list[onnx.NodeProto]()
    while waiting:
        later = []
        for node in waiting:
            if known.issuperset(node.input):
                ordered.append(node)
                known.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise InvariantError(f"{later[0].name} reads what is never written; the quantized graph is broken")
        waiting = later
    del model.graph.node[:]
    model.graph.node.extend(ordered)
