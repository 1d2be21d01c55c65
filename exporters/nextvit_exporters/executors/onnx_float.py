"""ONNX graphs rewritten so that ONNX Runtime's CPU tells the truth about FP16.

ONNX Runtime computes FP16 graphs on CPU in float32: it hides overflow and rounds where it likes. So the saved
file is rewritten, from its own bytes, into two float32 graphs:

* *exact*: the same constants, widened to float32, and float32 everywhere between. Says whether it is the same
  network.
* *emulated*: the same, with every FP16 tensor rounded to FP16 where it is stored (a cast there and back after each
  operation), the sums inside an operation in float32. Says what the precision costs. Overflow becomes infinite.

Attributes and subgraphs that this module does not know are an error naming the operation, not a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from nextvit_exporters.errors import BuildFailed

_FLOAT: Final = TensorProto.FLOAT
_HALF: Final = TensorProto.FLOAT16
_DTYPE_ATTRIBUTES: Final = frozenset({"dtype", "output_dtype"})


def widen(model: onnx.ModelProto) -> onnx.ModelProto:
    """The exact float32 reading of an FP16 model; the argument is not changed."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.value_info[:]
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == _HALF:
            value.type.tensor_type.elem_type = _FLOAT
    for node in graph.node:
        _widen_node(node)
    return result


def emulate(model: onnx.ModelProto) -> onnx.ModelProto:
    """The float32 graph that rounds to FP16 wherever ``model`` stores FP16."""
    halves = half_tensors(model)
    result = widen(model)
    nodes: list[onnx.NodeProto] = []
    renamed: dict[str, str] = {}
    outputs = {value.name for value in result.graph.output}
    for node in result.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name not in halves:
                continue
            if name in outputs:
                node.output[index] = f"{name}/unrounded"
                nodes += _round(f"{name}/unrounded", name)
            else:
                renamed[name] = f"{name}/rounded"
                nodes += _round(name, renamed[name])
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def unround(model: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 model without the rounding of its QuantizeLinear nodes: they scale and clamp; the argument stays.

    What is dequantized without having been quantized (weights) stays as it is. Raises BuildFailed for a step that is
    not one number, or of another type than int8.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in result.graph.initializer}
    quantized = {node.output[0] for node in result.graph.node if node.op_type == "QuantizeLinear"}
    limits = [("int8/low", -128.0), ("int8/high", 127.0)]
    result.graph.initializer.extend(numpy_helper.from_array(np.array(v, np.float32), name) for name, v in limits)
    nodes: list[onnx.NodeProto] = []
    for node in result.graph.node:
        if node.op_type == "QuantizeLinear":
            _check_step(node, constants)
            source, target = node.input[0], node.output[0]
            nodes.append(helper.make_node("Div", [source, node.input[1]], [f"{target}/steps"], node.name))
            low_high = [name for name, _ in limits]
            nodes.append(helper.make_node("Clip", [f"{target}/steps", *low_high], [target], f"{node.name}/clip"))
        elif node.op_type == "DequantizeLinear" and node.input[0] in quantized:
            nodes.append(helper.make_node("Mul", [node.input[0], node.input[1]], [node.output[0]], node.name))
        else:
            nodes.append(node)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def _check_step(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> None:
    scale, point = (constants.get(name) for name in (*node.input[1:3], "")[:2])
    if scale is None or numpy_helper.to_array(scale).size != 1:
        raise BuildFailed(f"{node.op_type} {node.name} has a step that is not one number; it can't be read exactly")
    if point is None or point.data_type != TensorProto.INT8 or numpy_helper.to_array(point).any():
        raise BuildFailed(f"{node.op_type} {node.name} is not symmetric int8; it can't be read exactly")


def half_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of every FP16 tensor a node writes, by ONNX's own type inference."""
    types = tensor_types(model)
    return {name for node in model.graph.node for name in node.output if types.get(name) == _HALF}


def tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor in the file: inputs, constants, and what each node writes.

    Weights are left out of the inference, so it costs no second copy of them. Raises BuildFailed when the
    types can't be inferred.
    """
    skeleton = onnx.ModelProto()
    skeleton.ir_version = model.ir_version
    skeleton.opset_import.extend(model.opset_import)
    skeleton.graph.name = model.graph.name
    skeleton.graph.node.extend(model.graph.node)
    skeleton.graph.input.extend(model.graph.input)
    skeleton.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        skeleton.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        msg = f"the ONNX file's types can't be inferred: {str(error).splitlines()[0]}"
        raise BuildFailed(msg) from error
    values = (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def _round(source: str, target: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Cast", [source], [f"{target}/fp16"], f"{target}/to_fp16", to=_HALF),
        helper.make_node("Cast", [f"{target}/fp16"], [target], f"{target}/to_fp32", to=_FLOAT),
    ]


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type != _HALF:
        return
    try:
        values = numpy_helper.to_array(tensor)
    except ValueError as error:
        msg = f"the numbers of {tensor.name} do not fill its shape {list(tensor.dims)}: {error}"
        raise BuildFailed(msg) from error
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))


def _widen_node(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.type in {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS}:
            msg = f"{node.op_type} {node.name} holds a subgraph; the FP16 executors don't know what that means"
            raise BuildFailed(msg)
        if attribute.name == "to" and node.op_type == "Cast" and attribute.i == _HALF:
            attribute.i = _FLOAT
        if attribute.name in _DTYPE_ATTRIBUTES and attribute.i == _HALF:
            attribute.i = _FLOAT
        if attribute.type == onnx.AttributeProto.TENSOR:
            _widen_tensor(attribute.t)
