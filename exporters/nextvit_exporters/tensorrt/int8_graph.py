"""A Q/DQ graph as TensorRT divides it: operations, what each reads on INT8 steps, and which of them make one kernel.

QuantizeLinear and DequantizeLinear are no operations here but a property of a reading: the tensor itself, or the tensor
on steps. What only moves numbers (a reshape, a transposition) is left out as well; TensorRT moves the dequantizing past
it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

import onnx
from onnx import TensorProto, helper, inliner, numpy_helper

from nextvit_exporters.errors import BuildFailed, first_line

LAYERS: Final = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "Attention"})
"""What multiplies and adds up: convolutions and matrix products."""
CONVOLUTIONS: Final = frozenset({"Conv", "ConvTranspose"})
MOVES: Final = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Transpose"})
POINTWISE: Final = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Relu", "LeakyRelu", "PRelu", "Elu", "Clip", "Sigmoid", "HardSigmoid"),
        *("HardSwish", "Gelu", "Erf", "Tanh", "Cast", "BatchNormalization", "Sqrt", "Exp", "Pow", "Neg", "Abs"),
    }
)
"""What a kernel does to its result before writing it."""
FLOATS: Final[Mapping[int, int]] = {TensorProto.FLOAT16: 2, TensorProto.BFLOAT16: 2, TensorProto.FLOAT: 4}
"""Bytes of a number, of the types that weights and activations are stored in beside INT8."""
_EIGHT_BITS: Final = frozenset({TensorProto.INT8, TensorProto.UINT8})
_ONNX: Final = frozenset({"", "ai.onnx"})
_OPEN: Final = 224
"""Pixels of an axis that the file leaves open."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A tensor that an operation reads: as it was computed, or on these steps."""

    tensor: str
    steps: str | None = None


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant that an operation reads: how many numbers, and the bytes of one in the file's kernels."""

    count: int
    size: int


@dataclass(frozen=True, slots=True)
class Op:
    """An operation on activations.

    ``macs`` are multiply-accumulates at the file's shapes, ``channels`` how many numbers of one group each result
    weighs at one place. ``int8`` says that both factors are read on steps.
    """

    name: str
    kind: str
    reads: tuple[Reading, ...]
    constants: tuple[Constant, ...]
    writes: tuple[str, ...]
    macs: int = 0
    groups: int = 1
    channels: int = 0
    int8: bool = False


@dataclass(frozen=True, slots=True)
class Kernel:
    """Operations that run as one: the first, and what is done to its result before it is written."""

    ops: tuple[Op, ...]

    @property
    def head(self) -> Op:
        """What the kernel is about."""
        return self.ops[0]

    @property
    def writes(self) -> tuple[str, ...]:
        """What it leaves in memory."""
        return self.ops[-1].writes

    @property
    def reads(self) -> tuple[Reading, ...]:
        """What it fetches from memory, each once."""
        within = {name for op in self.ops[:-1] for name in op.writes}
        return tuple(dict.fromkeys(each for op in self.ops for each in op.reads if each.tensor not in within))


@dataclass(frozen=True, slots=True)
class Graph:
    """Operations in order; the numbers and the type of every tensor; the tensors that leave the network."""

    ops: tuple[Op, ...]
    counts: Mapping[str, int]
    types: Mapping[str, int]
    outputs: frozenset[str]
    opened: tuple[str, ...]
    """Axes that the file leaves open, with the size taken instead: ``height=224``."""

    def in_half(self) -> Graph:
        """The same network in FP16: nothing on steps, and every number FP16 but those that come in and go out."""
        made = {name for op in self.ops for name in op.writes} - self.outputs
        types = {n: TensorProto.FLOAT16 if n in made and kind in FLOATS else kind for n, kind in self.types.items()}
        ops = (
            replace(
                op,
                reads=tuple(dict.fromkeys(Reading(each.tensor) for each in op.reads)),
                constants=tuple(Constant(each.count, 2 if each.size else 0) for each in op.constants),
                int8=False,
            )
            for op in self.ops
        )
        return replace(self, ops=tuple(ops), types=types)

    def readings(self) -> dict[str, list[tuple[int, Reading]]]:
        """By tensor, the index of each operation that reads it, and how."""
        found: dict[str, list[tuple[int, Reading]]] = {}
        for index, op in enumerate(self.ops):
            for each in op.reads:
                found.setdefault(each.tensor, []).append((index, each))
        return found

    def kernels(self) -> tuple[Kernel, ...]:
        """The operations joined to kernels.

        A layer takes what is done to its result, as long as that is the only reader and reads it unquantized. An
        addition of two layers' results goes to the later one: only then both are there.
        """
        readings, taken = self.readings(), set[int]()
        layers = [index for index, op in enumerate(self.ops) if op.kind in LAYERS]
        found: dict[int, Kernel] = {}
        for index in (*reversed(layers), *range(len(self.ops))):
            if index not in taken:
                chain = [index, *self._followers(index, readings, taken)]
                taken.update(chain)
                found[index] = Kernel(tuple(self.ops[each] for each in chain))
        return tuple(found[index] for index in sorted(found))

    def _followers(
        self, index: int, readings: Mapping[str, list[tuple[int, Reading]]], taken: set[int]
    ) -> Iterator[int]:
        while len(self.ops[index].writes) == 1:
            (tensor,) = self.ops[index].writes
            readers = readings.get(tensor, [])
            if tensor in self.outputs or len(readers) != 1:
                return
            index, reading = readers[0]
            if reading.steps is not None or index in taken or self.ops[index].kind not in POINTWISE:
                return
            yield index


@dataclass(slots=True)
class _Reader:
    """A file on its way to a graph."""

    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, int]
    makers: Mapping[str, onnx.NodeProto]
    constants: set[str]
    scales: Mapping[str, str]
    """By the name of a scale that is one number, that number."""
    origins: dict[str, Reading] = field(default_factory=dict)
    """What a name stands for, where that isn't the tensor of this name."""

    def read(self, node: onnx.NodeProto) -> Op | None:
        """The operation; None for what is a property of readings, or computed before the network runs."""
        given = [name for name in node.input if name]
        if all(name in self.constants for name in given):  # weights, sizes; Constant has no inputs at all
            self.constants.update(node.output)
            return None
        if node.op_type in MOVES and node.input[0] not in self.constants:
            self.origins[node.output[0]] = self.reading(node.input[0])
            return None
        if node.op_type == "QuantizeLinear" and node.domain in _ONNX:
            self.origins[node.output[0]] = Reading(self.reading(node.input[0]).tensor, self._steps(node.input[1]))
            return None
        if node.op_type == "DequantizeLinear" and node.domain in _ONNX:
            source, on_steps = self.reading(node.input[0]), self.types.get(node.input[0]) in _EIGHT_BITS
            steps = source.steps or self._steps(node.input[1])
            self.origins[node.output[0]] = Reading(source.tensor, steps if on_steps else None)
            return None
        if node.op_type in {"Shape", "Size"}:
            self.constants.update(node.output)  # known as soon as the input's shape is
            return None
        return self._op(node)

    def reading(self, name: str) -> Reading:
        """What a name stands for."""
        return self.origins.get(name, Reading(name))

    def _steps(self, scale: str) -> str:
        """Steps of one size are the same steps, whatever the scale is called."""
        return self.scales.get(scale, scale)

    def _op(self, node: onnx.NodeProto) -> Op:
        if any(each.type in {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS} for each in node.attribute):
            raise BuildFailed(f"{_name(node)} is {node.op_type}, whose cost can't be estimated: it holds a graph")
        given = [name for name in node.input if name]
        reads = tuple(dict.fromkeys(self.reading(name) for name in given if name not in self.constants))
        constants = tuple(self._constant(name) for name in given if name in self.constants)
        writes = tuple(name for name in node.output if name)
        base = Op(_name(node), node.op_type, reads, constants, writes)
        return self._layer(node, base) if node.op_type in LAYERS else base

    def _layer(self, node: onnx.NodeProto, op: Op) -> Op:
        factors = node.input[: 3 if node.op_type == "Attention" else 2]
        int8 = all(self._on_steps(name) for name in factors)
        attributes = {each.name: each.i for each in node.attribute}
        groups = attributes.get("group", 1)
        macs, channels = self._work(node, attributes)
        return replace(op, macs=macs, groups=groups, channels=channels, int8=int8)

    def _work(self, node: onnx.NodeProto, attributes: Mapping[str, int]) -> tuple[int, int]:
        """Multiply-accumulates, and how many of them make one result at one place of the kernel's window."""
        first, second = (self.shape(name, node) for name in node.input[:2])
        result = self.shape(node.output[0], node)
        if node.op_type == "Conv":
            return math.prod(result) * math.prod(second[1:]), second[1]
        if node.op_type == "ConvTranspose":
            return math.prod(first) * math.prod(second[1:]), first[1] // attributes.get("group", 1)
        if node.op_type == "Attention":
            value = self.shape(node.input[2], node)
            return math.prod(first[:-1]) * second[-2] * (first[-1] + value[-1]), first[-1]
        inner = first[0] if attributes.get("transA") else first[-1]
        return math.prod(result) * inner, inner

    def shape(self, name: str, node: onnx.NodeProto) -> tuple[int, ...]:
        """The shape of a tensor; raises BuildFailed where ONNX can't infer it."""
        try:
            return self.shapes[name]
        except KeyError:
            told = f"the shape of {name} can't be inferred"
            raise BuildFailed(f"the cost of {_name(node)} can't be estimated: {told}") from None

    def _on_steps(self, name: str) -> bool:
        """Whether a layer reads an activation, or a weight, on steps."""
        if name not in self.constants:
            return self.reading(name).steps is not None
        while name in self.makers:  # weights: from the layer back to the file's numbers
            node = self.makers[name]
            if node.op_type == "DequantizeLinear":
                return self.types.get(node.input[0]) in _EIGHT_BITS
            if node.op_type not in MOVES or not node.input:
                return False
            name = node.input[0]
        return False

    def _constant(self, name: str) -> Constant:
        if self._on_steps(name):
            return Constant(math.prod(self.shapes.get(name, ())), 1)
        return Constant(math.prod(self.shapes.get(name, ())), FLOATS.get(self.types.get(name, 0), 0))


def read_graph(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]] | None = None) -> Graph:
    """The file as operations, its open axes as in ``shapes`` of its inputs where they are given.

    Otherwise an axis that the file leaves open counts as 1 where it is the first, and as 224 elsewhere. Raises
    BuildFailed for shapes that aren't the file's or can't be inferred, and for operations that hold graphs.
    """
    skeleton, opened = _skeleton(model, shapes or {})
    try:
        if model.functions:
            skeleton = inliner.inline_local_functions(skeleton)
        inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError, TypeError) as error:
        raise BuildFailed(f"the file's shapes can't be inferred: {first_line(error)}") from error
    values = [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]
    sizes = {each.name: shape for each in values if (shape := _shape(each.type.tensor_type)) is not None}
    sizes |= {each.name: tuple(each.dims) for each in inferred.graph.initializer}
    types = {each.name: each.type.tensor_type.elem_type for each in values}
    types |= {each.name: each.data_type for each in inferred.graph.initializer}
    makers = {name: node for node in inferred.graph.node for name in node.output}
    constants = {each.name for each in model.graph.initializer}
    reader = _Reader(sizes, types, makers, constants, _scales(model))
    ops = tuple(op for node in inferred.graph.node if (op := _read(reader, node)) is not None)
    for op in ops:
        for name in (*(each.tensor for each in op.reads), *op.writes):
            reader.shape(name, makers.get(name, onnx.NodeProto(name=op.name)))
    outputs = frozenset(reader.reading(each.name).tensor for each in model.graph.output)
    counts = {name: math.prod(shape) for name, shape in sizes.items()}
    return Graph(ops, counts, types, outputs, opened)


def _read(reader: _Reader, node: onnx.NodeProto) -> Op | None:
    try:
        return reader.read(node)
    except (IndexError, ValueError, ZeroDivisionError) as error:  # too few inputs, axes or groups
        raise BuildFailed(f"{_name(node)} has inputs that fit no {node.op_type}; check the file") from error


def _skeleton(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The model without its weights and with every axis of its inputs known; what was open is told."""
    skeleton = onnx.ModelProto(ir_version=model.ir_version)
    skeleton.opset_import.extend(model.opset_import)
    skeleton.functions.extend(model.functions)
    skeleton.graph.name = model.graph.name
    skeleton.graph.node.extend(model.graph.node)
    constants = {tensor.name for tensor in model.graph.initializer}
    opened: list[str] = []
    for value in model.graph.input:
        if value.name not in constants:
            sizes = _sizes(value, shapes.get(value.name), opened)
            kind = value.type.tensor_type.elem_type
            skeleton.graph.input.append(helper.make_tensor_value_info(value.name, kind, sizes))
    for value in model.graph.output:
        kind = value.type.tensor_type.elem_type
        skeleton.graph.output.append(helper.make_tensor_value_info(value.name, kind, None))
    for tensor in model.graph.initializer:
        if tensor.data_type in {TensorProto.INT64, TensorProto.INT32} and math.prod(tensor.dims) <= 64:  # sizes, axes
            skeleton.graph.initializer.append(tensor)
        else:
            skeleton.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return skeleton, tuple(dict.fromkeys(opened))


def _scales(model: onnx.ModelProto) -> dict[str, str]:
    names = {node.input[1] for node in model.graph.node if node.op_type in {"QuantizeLinear", "DequantizeLinear"}}
    found = {}
    for tensor in model.graph.initializer:
        if tensor.name in names and math.prod(tensor.dims) == 1 and not tensor.external_data:
            with suppress(ValueError):  # a damaged file's; its name will do
                found[tensor.name] = str(numpy_helper.to_array(tensor).item())
    return found


def _sizes(value: onnx.ValueInfoProto, given: Sequence[int] | None, opened: list[str]) -> list[int]:
    dims = value.type.tensor_type.shape.dim
    if given is not None:
        if len(given) != len(dims):
            raise BuildFailed(f"{value.name} has {len(dims)} axes, and {len(given)} sizes are given for it")
        if any(dim.dim_value not in {0, size} for dim, size in zip(dims, given, strict=True)):
            fixed = [dim.dim_value or dim.dim_param for dim in dims]
            raise BuildFailed(f"{value.name} is {fixed} in the file, and its cost is asked for at {list(given)}")
        return list(given)
    sizes = []
    for axis, dim in enumerate(dims):
        size = dim.dim_value or (1 if axis == 0 else _OPEN)
        if not dim.dim_value:
            opened.append(f"{dim.dim_param or f'axis {axis} of {value.name}'}={size}")
        sizes.append(size)
    return sizes


def _shape(kind: onnx.TypeProto.Tensor) -> tuple[int, ...] | None:
    """A shape that is known whole."""
    if not kind.HasField("shape") or any(not dim.HasField("dim_value") for dim in kind.shape.dim):
        return None
    return tuple(dim.dim_value for dim in kind.shape.dim)


def _name(node: onnx.NodeProto) -> str:
    return node.name or (node.output[0] if node.output else node.op_type)
