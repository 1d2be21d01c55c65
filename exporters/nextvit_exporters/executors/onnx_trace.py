"""Every tensor of an ONNX file, as ONNX Runtime computes it with all optimisations off."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
from onnx import helper

from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.executors.base import Array, Arrays, See, Step
from nextvit_exporters.executors.onnx_float import tensor_types

Load = Callable[[onnx.ModelProto], onnx.ModelProto]
"""Makes of a model the one that is run in its place."""
Execute = Callable[[onnx.ModelProto, Arrays, tuple[str, ...]], Mapping[str, Array]]
"""Outputs of a model by name; raises BuildFailed where it can't be run."""
_CONSTANTS = frozenset({"Constant", "ConstantOfShape"})


def steps_of(model: onnx.ModelProto) -> tuple[Step, ...]:
    """Every node but constants, named by its first output where it has no name."""
    try:
        types = tensor_types(model)
    except BuildFailed:  # the trace says where it breaks
        types = {}
    return tuple(_step(node, types) for node in model.graph.node if node.op_type not in _CONSTANTS)


def _step(node: onnx.NodeProto, types: Mapping[str, int]) -> Step:
    outputs = tuple(name for name in node.output if name)
    return Step(
        operation=node.name or (outputs[0] if outputs else node.op_type),
        kind=node.op_type,
        module=node.name.rpartition("/")[0],
        inputs=tuple(dict.fromkeys(name for name in node.input if name)),
        outputs=outputs,
        stored=tuple(_numpy_name(types.get(name, 0)) for name in outputs),
    )


def _numpy_name(kind: int) -> str:
    try:
        return str(helper.tensor_dtype_to_np_dtype(kind).name)
    except KeyError:
        return "float32"


def trace_model(model: onnx.ModelProto, inputs: Arrays, load: Load, execute: Execute, see: See) -> None:
    """Call ``see`` with every input and every tensor that a node writes.

    Where the model can't be run, as many nodes are as can, and the error of the next is raised.
    """
    for name, values in inputs.items():
        see(name, values)
    count = len(model.graph.node)
    try:
        found = _values(_front(model, count), inputs, load, execute)
    except BuildFailed as error:
        runs, fails, failure = 0, count, error
        while fails - runs > 1:
            middle = (runs + fails) // 2
            try:
                _values(_front(model, middle), inputs, load, execute)
                runs = middle
            except BuildFailed as earlier:
                fails, failure = middle, earlier
        _show(model, _values(_front(model, runs), inputs, load, execute) if runs else {}, see)
        raise failure from error
    _show(model, found, see)


def _show(model: onnx.ModelProto, found: Mapping[str, Array], see: See) -> None:
    for node in model.graph.node:
        for name in node.output:
            if name in found and node.op_type not in _CONSTANTS:
                see(name, found[name])


def _front(model: onnx.ModelProto, count: int) -> onnx.ModelProto:
    """The first ``count`` nodes alone, without outputs."""
    front = onnx.ModelProto()
    front.CopyFrom(model)
    del front.graph.node[count:]
    del front.graph.output[:]
    return front


def _values(front: onnx.ModelProto, inputs: Arrays, load: Load, execute: Execute) -> dict[str, Array]:
    """What every node of a model without outputs writes, by the model's own names."""
    written = [name for node in front.graph.node for name in node.output if name]
    running = load(front)
    there = {name for node in running.graph.node for name in node.output}
    # where a tensor is stored in FP16, what is read of it is what was rounded
    called = {name: f"{name}/rounded" if f"{name}/rounded" in there else name for name in written}
    running.graph.output.extend(onnx.ValueInfoProto(name=name) for name in called.values())
    values = execute(running, inputs, tuple(called.values()))
    return {name: values[each] for name, each in called.items()}
