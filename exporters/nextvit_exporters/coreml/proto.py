"""From the messages of ``MIL.proto`` to plain data, refusing what is damaged or can't be executed here.

Every function takes a message of coremltools' generated classes. BuildFailed means that the program contradicts
itself, NotExecutable that it is sound as far as it was read and has something that is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nextvit_exporters.coreml.blobs import UNREADABLE, Blobs, array_of, known_shape, length_of
from nextvit_exporters.coreml.program import Binding, Constant, Operation, Output, Program, TensorType
from nextvit_exporters.errors import BuildFailed, NotExecutable

WEIGHT_FILE: Final = "@model_path/weights/weight.bin"
"""What every blob's file is called."""
DICTIONARY: Final = "dictionary"
"""The dtype of a classifier's probabilities by label, which are no tensor."""
_DTYPES: Final[Mapping[int, str]] = MappingProxyType(
    {
        1: "bool",
        2: "string",
        10: "float16",
        11: "float32",
        12: "float64",
        13: "bfloat16",
        21: "int8",
        22: "int16",
        23: "int32",
        24: "int64",
        25: "int4",
        31: "uint8",
        32: "uint16",
        33: "uint32",
        34: "uint64",
        35: "uint4",
        36: "uint2",
        37: "uint1",
        38: "uint6",
        39: "uint3",
        40: "float8e4m3fn",
        41: "float8e5m2",
    }
)
_LARGEST: Final = 2**31 - 1
_RANK: Final = 32
_VERSION: Final = 1
_FIELDS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "floats": ("float32",),
        "doubles": ("float64",),
        "ints": ("int32", "int16", "uint16", "int8", "uint8"),
        "longInts": ("int64", "uint64"),
        "bools": ("bool",),
        "strings": ("string",),
        "bytes": (
            *("float16", "int8", "uint8", "int16", "uint16", "uint32"),
            *("int4", "uint1", "uint2", "uint3", "uint4", "uint6"),
        ),
    }
)
"""Which dtypes a value that is written in place can have, by the field it is written in."""


def program_of(message: Any, blobs: Blobs, known: str) -> Program:
    """The one function ``main`` of an ``MILSpec.Program``, whose opset must be ``known``."""
    if message.version != _VERSION:
        raise BuildFailed(f"its program is of version {message.version}, not {_VERSION}; export it again")
    if set(message.functions) != {"main"}:
        names = ", ".join(sorted(message.functions)) or "none"
        raise NotExecutable(f"it has the functions {names}; only packages with the one function main are read here")
    function = message.functions["main"]
    opsets = sorted({function.opset, *function.block_specializations})
    if opsets != [known]:
        raise BuildFailed(f"its opset is {' and '.join(opsets)}, and its specification's {known}; export it again")
    block = function.block_specializations[known]
    if block.inputs:
        raise BuildFailed("its main block takes inputs of its own; export it again")
    inputs = {each.name: type_of(each.type, f"the input {each.name}") for each in function.inputs}
    if len(inputs) != len(function.inputs):
        raise BuildFailed("its main function has two inputs of one name; export it again")
    operations = _operations(block.operations, inputs, blobs)
    outputs = tuple(block.outputs)
    written = {each.name for operation in operations for each in operation.outputs} | inputs.keys()
    missing = sorted(set(outputs) - written)
    if missing or not outputs or len(set(outputs)) != len(outputs):
        what = f"returns {missing[0]}, which nothing computes" if missing else "returns nothing, or something twice"
        raise BuildFailed(f"its main function {what}; export it again")
    return Program(known, MappingProxyType(inputs), operations, outputs)


def type_of(message: Any, where: str) -> TensorType:
    """A ``ValueType`` that is a tensor; raises NotExecutable for lists, tuples and states."""
    which = message.WhichOneof("type")
    if which is None:
        raise BuildFailed(f"{where} has no type; export it again")
    if which == "dictionaryType":
        return TensorType(DICTIONARY, ())
    if which != "tensorType":
        raise NotExecutable(f"{where} is a {which.removesuffix('Type')}, which can't be executed here")
    tensor = message.tensorType
    if tensor.rank != len(tensor.dimensions) or tensor.rank > _RANK:
        raise BuildFailed(f"{where} has rank {tensor.rank} and {len(tensor.dimensions)} axes; export it again")
    if tensor.attributes:
        raise NotExecutable(f"{where} has a type with attributes, which is not known here")
    return TensorType(_dtype(tensor.dataType, where), tuple(_size(each, where) for each in tensor.dimensions))


def _dtype(number: int, where: str) -> str:
    if number not in _DTYPES:
        raise BuildFailed(f"{where} has the unknown dtype {number}; export it again")
    return _DTYPES[number]


def _size(message: Any, where: str) -> int | None:
    """One axis; None where it is open."""
    which = message.WhichOneof("dimension")
    if which is None:
        raise BuildFailed(f"{where} has an axis without a size; export it again")
    if which == "unknown":
        if message.unknown.variadic:
            raise NotExecutable(f"{where} has any number of axes, which can't be executed here")
        return None
    size = int(message.constant.size)
    if size > _LARGEST:
        raise BuildFailed(f"{where} has an axis of {size}; export it again")
    return size


def constant_of(message: Any, blobs: Blobs, where: str) -> Constant:
    """A ``Value``: a tensor in place or in ``weight.bin``, or a list of single values, which becomes a vector."""
    which = message.WhichOneof("value")
    if which is None:
        raise BuildFailed(f"{where} has no value; export it again")
    if message.type.WhichOneof("type") == "listType":
        return _list(message, blobs, where)
    kind = type_of(message.type, where)
    if kind.dtype == DICTIONARY:
        raise NotExecutable(f"{where} is a dictionary, which can't be executed here")
    if kind.dtype in UNREADABLE:
        raise NotExecutable(f"{where} is of dtype {kind.dtype}, which can't be read here")
    if None in kind.shape:
        raise BuildFailed(f"{where} is a constant with an open axis; export it again")
    if which == "blobFileValue":
        if message.blobFileValue.fileName != WEIGHT_FILE:
            raise BuildFailed(f"{where} is in {message.blobFileValue.fileName!r}, not {WEIGHT_FILE}; export it again")
        return Constant(kind, blobs.read(message.blobFileValue.offset, kind))
    value = message.immediateValue
    if value.WhichOneof("value") != "tensor":
        raise BuildFailed(f"{where} is declared a tensor and is none; export it again")
    return Constant(kind, _immediate(value.tensor, kind, where))


def _immediate(message: Any, kind: TensorType, where: str) -> NDArray[Any]:
    """A ``TensorValue``, read-only; exactly as many values as the shape has."""
    which = message.WhichOneof("value")
    if which is None or kind.dtype not in _FIELDS[which]:
        raise BuildFailed(f"{where} is declared {kind.dtype} and holds {which or 'nothing'}; export it again")
    values = getattr(message, which).values
    shape = known_shape(kind)
    wanted = length_of(kind)[0] if which == "bytes" else math.prod(shape)
    if len(values) != wanted:
        raise BuildFailed(f"{where} should hold {wanted} {which} and holds {len(values)}; export it again")
    if which == "bytes":
        return array_of(values, kind)
    found: NDArray[Any]
    if which == "strings":
        found = np.empty(len(values), object)
        found[:] = list(values)
    elif kind.dtype == "uint64":
        found = np.array(values, np.int64).view(np.uint64)
    else:
        found = _whole(values, kind.dtype, where) if which == "ints" else np.array(values, kind.dtype)
    found = found.reshape(shape)
    found.flags.writeable = False
    return found


def _whole(values: Any, dtype: str, where: str) -> NDArray[Any]:
    wide = np.array(values, np.int32)
    found = wide.astype(dtype)
    if not np.array_equal(found, wide):
        raise BuildFailed(f"{where} holds numbers that {dtype} does not; export it again")
    return found


def _list(message: Any, blobs: Blobs, where: str) -> Constant:
    declared = message.type.listType
    element = type_of(declared.type, where)
    length = _size(declared.length, where)
    immediate = message.immediateValue.WhichOneof("value") if message.HasField("immediateValue") else None
    if immediate != "list" or element.shape:
        raise NotExecutable(f"{where} is a list of something else than single values, which can't be executed here")
    if length != len(message.immediateValue.list.values):
        found = len(message.immediateValue.list.values)
        raise BuildFailed(f"{where} should hold {length} values and holds {found}; export it again")
    values = [constant_of(each, blobs, where) for each in message.immediateValue.list.values]
    if any(each.type != element for each in values):
        raise BuildFailed(f"{where} holds something else than {element.dtype}; export it again")
    data = np.empty(len(values), object if element.dtype == "string" else values[0].data.dtype if values else object)
    for index, each in enumerate(values):
        data[index] = each.data[()]
    data.flags.writeable = False
    return Constant(TensorType(element.dtype, (len(values),)), data)


def _operations(messages: Any, inputs: Mapping[str, TensorType], blobs: Blobs) -> tuple[Operation, ...]:
    """All operations; each reads only what was there before it, and writes what was not."""
    there, found = set(inputs), []
    for message in messages:
        operation = _operation(message, blobs)
        where = f"{operation.kind} {operation.name}"
        for parameter, bindings in operation.inputs.items():
            for each in bindings:
                if isinstance(each, str) and each not in there:
                    raise BuildFailed(f"{where} reads {each!r} as its {parameter}, which is not there; export it again")
        for output in operation.outputs:
            if not output.name or output.name in there:
                raise BuildFailed(f"{where} writes {output.name!r}, which is there already; export it again")
            there.add(output.name)
        found.append(operation)
    return tuple(found)


def _operation(message: Any, blobs: Blobs) -> Operation:
    first = message.outputs[0].name if message.outputs else "without outputs"
    where = f"{message.type} {first}"
    if not message.type:
        raise BuildFailed(f"the operation of {first} has no kind; export it again")
    if message.blocks:
        raise NotExecutable(f"{where} has blocks of its own (control flow), which can't be executed here")
    if not message.outputs:
        raise BuildFailed(f"an operation of kind {message.type} has no outputs; export it again")
    attributes = {
        name: constant_of(value, blobs, f"{name} of {where}") for name, value in sorted(message.attributes.items())
    }
    outputs = tuple(Output(each.name, type_of(each.type, f"{each.name} of {where}")) for each in message.outputs)
    inputs = {
        name: tuple(_binding(each, blobs, f"{name} of {where}") for each in argument.arguments)
        for name, argument in sorted(message.inputs.items())
    }
    name = attributes.pop("name", None)
    called = str(name.data[()]) if name is not None and name.type == TensorType("string", ()) else first
    if message.type == "const":
        _check_const(attributes, outputs, where)
    return Operation(message.type, called, MappingProxyType(inputs), MappingProxyType(attributes), outputs)


def _binding(message: Any, blobs: Blobs, where: str) -> Binding:
    if message.WhichOneof("binding") == "name":
        return str(message.name)
    if message.WhichOneof("binding") == "value":
        return constant_of(message.value, blobs, where)
    raise BuildFailed(f"{where} is bound to nothing; export it again")


def _check_const(attributes: Mapping[str, Constant], outputs: tuple[Output, ...], where: str) -> None:
    if set(attributes) != {"val"} or len(outputs) != 1:
        raise BuildFailed(f"{where} has not one value and one output; export it again")
    if attributes["val"].type != outputs[0].type:
        raise BuildFailed(f"{where} is declared another type than its value has; export it again")
