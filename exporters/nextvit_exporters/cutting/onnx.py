"""The operations between named tensors of a saved ONNX file, as an ONNX file of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import onnx
from onnx import external_data_helper, helper

from nextvit_exporters.cutting.piece import Edge, Links, Operation, Piece
from nextvit_exporters.errors import BuildFailed, UnsupportedSpec, first_line
from nextvit_exporters.executors.onnx_float import emulate, half_tensors, unround, widen
from nextvit_exporters.files import atomic_write
from nextvit_exporters.onnx_names import strip_provenance

_GRAPH_NAME: Final = "piece"
_PRODUCER: Final = "nextvit-deploy"
_LARGEST: Final = 2**31 - 1
"""Bytes of a protobuf message."""
_SHAPE_SIZED: Final = 4096
"""Constants of at most so many numbers stay in shape inference, which reads the sizes of a Reshape from them."""
_INLINE: Final = frozenset({"Constant"})


def cut_onnx(path: Path, inputs: Sequence[str], outputs: Sequence[str], out: Path) -> Piece:
    """Write what lies between the tensors ``inputs`` and ``outputs`` of the file at ``path`` to ``out``.

    Opset and IR version stay, as do names; of the constants only those that are read come along, from external files
    too, and nothing of what the file tells about itself. The same bytes each time, whole or not at all.

    Raises UnsupportedSpec where a name is not known, nothing lies between, or more inputs are needed; BuildFailed
    where the file is damaged or the piece is no valid ONNX; OutputNotWritten.
    """
    model = _load(path)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    sparse = {tensor.values.name: tensor for tensor in graph.sparse_initializer}
    held = constants.keys() | sparse.keys()
    nodes = list(graph.node)
    links = Links(
        path.name,
        {name: number for number, node in enumerate(nodes) for name in node.output if name},
        lambda number: _reads(nodes[number]),
        [value.name for value in graph.input if value.name not in held],
        held,
    )
    needed, read = links.between(inputs, outputs)
    kept = [nodes[number] for number in needed]
    names = {name for node in kept for name in _reads(node)}
    types = _types(model, path.name)
    result = onnx.ModelProto(ir_version=model.ir_version, producer_name=_PRODUCER)
    result.opset_import.extend(model.opset_import)
    result.functions.extend(model.functions)
    result.graph.name = _GRAPH_NAME
    result.graph.node.extend(kept)
    result.graph.initializer.extend(_loaded(constants[name], path) for name in sorted(names & constants.keys()))
    result.graph.sparse_initializer.extend(sparse[name] for name in sorted(names & sparse.keys()))
    result.graph.input.extend(_declared(types, name, path.name) for name in inputs if name in read)
    result.graph.output.extend(_declared(types, name, path.name) for name in outputs)
    strip_provenance(result)
    _check(result, path.name)
    atomic_write(out, result.SerializeToString(deterministic=True))
    return Piece(
        tuple(_edge(value) for value in result.graph.input),
        tuple(_edge(value) for value in result.graph.output),
        tuple(_operations(result.graph.node, read)),
    )


def _load(path: Path) -> onnx.ModelProto:
    """The file without what it keeps beside it."""
    try:
        return onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise BuildFailed(f"{path.name} can't be read: {error.strerror}; give the path of an ONNX file") from error
    except Exception as error:  # protobuf's own errors share no public base class
        raise BuildFailed(f"{path.name} can't be read as ONNX: {first_line(error)}") from error


def _reads(node: onnx.NodeProto) -> set[str]:
    """What a node reads, and what its subgraphs read of what is around them."""
    found = {name for name in node.input if name}
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
        for graph in graphs:
            own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
            inner = set[str]().union(*(_reads(each) for each in graph.node))
            found |= (
                (inner | {value.name for value in graph.output})
                - own
                - {name for each in graph.node for name in each.output}
            )
    return found


def _types(model: onnx.ModelProto, name: str) -> Mapping[str, onnx.ValueInfoProto]:
    """What is known of every tensor; large constants are left out of the inference, so it costs no second copy."""
    skeleton = onnx.ModelProto(ir_version=model.ir_version)
    skeleton.opset_import.extend(model.opset_import)
    skeleton.functions.extend(model.functions)
    skeleton.graph.name = model.graph.name or _GRAPH_NAME
    skeleton.graph.node.extend(model.graph.node)
    held = {tensor.name for tensor in model.graph.initializer}
    skeleton.graph.input.extend(value for value in model.graph.input if value.name not in held)
    skeleton.graph.output.extend(model.graph.output)
    skeleton.graph.value_info.extend(model.graph.value_info)
    for tensor in model.graph.initializer:
        outside = tensor.data_location == onnx.TensorProto.EXTERNAL
        if not outside and tensor.ByteSize() <= _SHAPE_SIZED:
            skeleton.graph.initializer.append(tensor)
        else:
            skeleton.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # InferenceError, and what the C++ below it raises
        raise BuildFailed(f"the types in {name} can't be inferred: {first_line(error)}") from error
    values = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    return {value.name: value for value in values}


def _declared(types: Mapping[str, onnx.ValueInfoProto], tensor: str, name: str) -> onnx.ValueInfoProto:
    known = types.get(tensor)
    if known is None or not known.type.tensor_type.elem_type:
        raise UnsupportedSpec(f"the type of {tensor} in {name} can't be inferred; name another tensor")
    return known


def _loaded(tensor: onnx.TensorProto, path: Path) -> onnx.TensorProto:
    """The constant with its numbers in it."""
    found = onnx.TensorProto()
    found.CopyFrom(tensor)
    if found.data_location == onnx.TensorProto.EXTERNAL:
        try:
            external_data_helper.load_external_data_for_tensor(found, str(path.parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise BuildFailed(f"{tensor.name} of {path.name} can't be read from beside it; copy both files") from error
        found.data_location = onnx.TensorProto.DEFAULT
        del found.external_data[:]
    return found


def _check(model: onnx.ModelProto, name: str) -> None:
    if model.ByteSize() > _LARGEST:
        raise UnsupportedSpec(f"this piece of {name} is larger than 2 GiB; cut a smaller one")
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # ValidationError and InferenceError share no base class
        raise BuildFailed(f"the piece of {name} is no valid ONNX: {first_line(error)}") from error


def _edge(value: onnx.ValueInfoProto) -> Edge:
    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    if not tensor.HasField("shape"):
        return Edge(value.name, dtype, None)
    return Edge(value.name, dtype, tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim))


def _operations(nodes: Iterable[onnx.NodeProto], inputs: set[str]) -> Iterator[Operation]:
    """The nodes that depend on an input; weights that are made from constants alone are none."""
    computed = set(inputs)
    for node in nodes:
        reads = tuple(sorted(_reads(node) & computed))
        if reads and node.op_type not in _INLINE:
            writes = tuple(name for name in node.output if name)
            computed |= set(writes)
            yield Operation(node.name or writes[0], node.op_type, reads, writes)


def stand_in(path: Path, mode: str) -> bytes | None:
    """The float32 file that ONNX Runtime executes in place of one with FP16 or int8 in it, in the executor's ``mode``.

    None where the file itself is executed. See ``executors.onnx_float``.
    """
    model = onnx.load(str(path))
    unrounded = mode == "unrounded" and any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if not half_tensors(model) and not unrounded:
        return None
    made = emulate(model) if mode == "emulated" else widen(model)
    made = unround(made) if unrounded else made
    return bytes(made.SerializeToString(deterministic=True))
