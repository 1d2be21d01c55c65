"""Read an ONNX file's dtypes back: asked for FP16 must mean FP16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import onnx
from onnx import TensorProto

from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.executors.onnx_float import tensor_types
from nextvit_exporters.spec import Precision

_FLOATS: Final[Mapping[int, str]] = MappingProxyType(
    {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.DOUBLE: "fp64"}
)


@dataclass(frozen=True, slots=True)
class Dtypes:
    """Operations by the floating type they write, casts left out; and the names of those in each type."""

    nodes: dict[str, tuple[str, ...]]

    def count(self, precision: Precision) -> tuple[int, int]:
        """Operations in ``precision``, and operations on floating numbers at all."""
        return len(self.nodes.get(str(precision), ())), sum(map(len, self.nodes.values()))

    def __str__(self) -> str:
        total = sum(map(len, self.nodes.values()))
        return ", ".join(f"{len(names)} of {total} operations in {kind}" for kind, names in self.nodes.items())


def read_dtypes(model: onnx.ModelProto) -> Dtypes:
    """Types of everything the file computes, by ONNX's own inference from inputs and constants."""
    types = tensor_types(model)
    found: dict[str, list[str]] = {}
    for node in model.graph.node:
        kind = _FLOATS.get(types.get(node.output[0], TensorProto.UNDEFINED))
        if kind is not None and node.op_type != "Cast":
            found.setdefault(kind, []).append(node.name)
    return Dtypes({kind: tuple(names) for kind, names in sorted(found.items())})


def check_precision(model: onnx.ModelProto, precision: Precision) -> Dtypes:
    """Raise BuildFailed unless every operation computes in ``precision``.

    One exception: the subtraction of the input's mean stays in float32 in an FP16 file.
    """
    dtypes = read_dtypes(model)
    centred = {n.name for n in model.graph.node if n.op_type == "Sub" and _reads_input(n, model)}
    wrong = [
        f"{name} is {kind}"
        for kind, names in dtypes.nodes.items()
        if kind != str(precision)
        for name in names
        if name not in centred
    ]
    if wrong:
        msg = f"asked for {precision}, but {len(wrong)} operations are not, first {wrong[0]}"
        raise BuildFailed(msg)
    return dtypes


def _reads_input(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    """Whether the node reads the graph's input, directly or through a cast."""
    inputs = {value.name for value in model.graph.input}
    inputs |= {n.output[0] for n in model.graph.node if n.op_type == "Cast" and n.input[0] in inputs}
    return any(name in inputs for name in node.input)
