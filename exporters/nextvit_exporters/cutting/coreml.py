"""The operations between named values of a saved Core ML package, as a package of its own."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from nextvit_exporters.coreml.blobs import ALIGNMENT, VERSION
from nextvit_exporters.coreml.loading import part
from nextvit_exporters.coreml.package import package_manifest
from nextvit_exporters.coreml.program import (
    MANIFEST_JSON,
    MODEL,
    MODULES,
    SPECIFICATION,
    WEIGHTS,
    WEIGHTS_SHA256,
    Package,
    TensorType,
    modules_of,
)
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.cutting.piece import Edge, Links, Operation, Piece
from nextvit_exporters.errors import NotExecutable, OutputNotWritten, UnsupportedSpec
from nextvit_exporters.files import atomic_path

_HEADER: Final = struct.Struct("<II")
_ABOUT: Final = struct.Struct("<IIQQQ")
_KEPT: Final = ("com.github.apple.coremltools.version", "com.github.apple.coremltools.source_dialect")
"""User-defined entries that say who made the program."""
_FEATURES: Final = {"float32": 65568, "float16": 65552, "int32": 131104}
"""What a package takes and returns as it is, with its number in ``FeatureTypes.proto``."""
_HALF_FROM: Final = SPECIFICATION[16]
"""The first specification whose packages take and return FP16."""
_HALF: Final = 10
_SINGLE: Final = 11
"""The two types' numbers in ``MIL.proto``."""
_STRING: Final = 2
_DEFAULT: Final = 1
"""The size of an open axis that nobody gives one for."""

Shapes = Mapping[str, Sequence[int]]


def cut_coreml(
    package: Path, inputs: Sequence[str], outputs: Sequence[str], out: Path, shapes: Shapes | None = None
) -> Piece:
    """Write what lies between the values ``inputs`` and ``outputs`` of a package to the folder ``out``.

    Names, opset and specification stay, constants come along as far as they are read, and what goes in and out is
    described as tensors. iOS 15 takes no FP16, so there it goes in and out as float32 and is cast, which changes no
    number. ``shapes`` are usual ones, for inputs with open axes. The same bytes each time, whole or not at all.

    Raises UnsupportedSpec where a name is not known, nothing lies between, more inputs are needed, or a value is of a
    type that no package takes; what ``read_package`` raises; OutputNotWritten, also where ``out`` is there already.
    """
    read = read_package(package)
    if not (package / MODEL).is_file():
        raise NotExecutable(f"{package.name} keeps its model elsewhere than coremltools does, and can't be cut")
    if out.exists():
        raise OutputNotWritten(f"{out} is there already; remove it or choose another output")
    operations = read.program.operations
    constants = {each.outputs[0].name for each in operations if each.kind == "const"}
    links = Links(
        package.name,
        {output.name: number for number, each in enumerate(operations) for output in each.outputs},
        lambda number: {
            each for bound in operations[number].inputs.values() for each in bound if isinstance(each, str)
        },
        read.program.inputs,
        constants,
    )
    needed, used = links.between(inputs, outputs)
    types = dict(read.program.inputs) | {each.name: each.type for one in operations for each in one.outputs}
    entering = [name for name in inputs if name in used]
    for name in (*entering, *outputs):
        _check_type(name, types[name], package.name)
    model = part("proto.Model_pb2").Model.FromString((package / MODEL).read_bytes())
    found = _operations(read, needed, used)
    weights = (package / WEIGHTS).read_bytes() if (package / WEIGHTS).is_file() else b""
    packed = _Draft(model, types).narrow(needed, entering, outputs, weights, shapes or {})
    _tell(model, read, found, packed)
    with atomic_path(out) as sibling:
        (sibling / MODEL).parent.mkdir(parents=True)
        (sibling / MODEL).write_bytes(model.SerializeToString(deterministic=True))
        if packed:
            (sibling / WEIGHTS).parent.mkdir()
            (sibling / WEIGHTS).write_bytes(packed)
        (sibling / MANIFEST_JSON).write_text(package_manifest(sibling))
    return Piece(_edges(entering, types), _edges(outputs, types), found)


def _edges(names: Iterable[str], types: Mapping[str, TensorType]) -> tuple[Edge, ...]:
    return tuple(Edge(name, types[name].dtype, types[name].shape) for name in names)


def _check_type(name: str, kind: TensorType, where: str) -> None:
    """Raise UnsupportedSpec for what no package takes or returns."""
    if kind.dtype not in _FEATURES or not kind.shape:
        what = f"a single {kind.dtype}" if kind.dtype in _FEATURES else kind.dtype
        raise UnsupportedSpec(
            f"{name} of {where} is {what}, which no package takes or returns; name a real tensor in front or behind"
        )


def _operations(package: Package, needed: Iterable[int], inputs: set[str]) -> tuple[Operation, ...]:
    """Those that depend on an input; weights that are unpacked from constants alone are none."""
    computed, found = set(inputs), []
    for number in needed:
        each = package.program.operations[number]
        bound = (name for names in each.inputs.values() for name in names if isinstance(name, str))
        reads = tuple(sorted({name for name in bound if name in computed}))
        if reads:
            writes = tuple(output.name for output in each.outputs)
            computed |= set(writes)
            found.append(Operation(each.name, each.kind, reads, writes))
    return tuple(found)


def _tell(model: Any, package: Package, operations: Iterable[Operation], weights: bytes) -> None:
    """What the piece says of itself: who wrote the program, the module of each operation, the hash of its weights."""
    entries = model.description.metadata.userDefined
    entries.update({key: package.metadata[key] for key in _KEPT if key in package.metadata})
    modules = modules_of(package)
    own = {name: modules[name] for each in operations for name in each.writes[:1] if name in modules}
    entries[MODULES] = json.dumps(own, sort_keys=True)
    if weights:
        entries[WEIGHTS_SHA256] = hashlib.sha256(weights).hexdigest()


class _Draft:
    """A package's message, to be narrowed to a piece; ``types`` are those of all its values."""

    def __init__(self, model: Any, types: Mapping[str, TensorType]) -> None:
        self._model, self._types = model, types
        (self._function,) = model.mlProgram.functions.values()
        (self._block,) = self._function.block_specializations.values()
        self._casts = model.specificationVersion < _HALF_FROM

    def narrow(
        self, needed: Sequence[int], inputs: Sequence[str], outputs: Sequence[str], weights: bytes, shapes: Shapes
    ) -> bytes:
        """Keep these operations alone, behind these inputs; what is left of ``weights`` is returned."""
        written = {each.name: each.type for each in self._function.inputs}
        written |= {output.name: output.type for each in self._block.operations for output in each.outputs}
        declared = {name: _copy(written[name]) for name in (*inputs, *outputs)}
        operations = [_copy(self._block.operations[number]) for number in needed]
        packed = _packed(operations, weights)
        half = [name for name in (*inputs, *outputs) if self._casts and self._types[name].dtype == "float16"]
        _rename({name: f"{name}__half" for name in half}, operations)
        entering = [each for name in inputs if name in half for each in self._cast(name, declared[name], _HALF)]
        leaving = [each for name in outputs if name in half for each in self._cast(name, declared[name], _SINGLE)]
        del self._block.operations[:]
        self._block.operations.extend([*entering, *operations, *leaving])
        self._block.outputs[:] = outputs
        del self._function.inputs[:]
        for name in inputs:
            given = self._function.inputs.add(name=name, type=declared[name])
            if name in half:
                given.type.tensorType.dataType = _SINGLE
        self._model.mlProgram.docString = ""
        self._model.description.Clear()
        for features, names in ((self._model.description.input, inputs), (self._model.description.output, outputs)):
            for name in names:
                usual = shapes.get(name, ()) if features is self._model.description.input else None
                self._describe(features.add(name=name), name, usual)
        return packed

    def _describe(self, feature: Any, name: str, usual: Sequence[int] | None) -> None:
        """A tensor; of an output with open axes no shape, as coremltools does; ``usual`` is None for outputs."""
        kind, array = self._types[name], feature.type.multiArrayType
        single = self._casts and kind.dtype == "float16"
        array.dataType = _FEATURES["float32" if single else kind.dtype]
        if None not in kind.shape:
            array.shape[:] = [size or 0 for size in kind.shape]
        elif usual is not None:
            given = usual if len(usual) == len(kind.shape) else [_DEFAULT] * len(kind.shape)
            array.shape[:] = [own or size for own, size in zip(kind.shape, given, strict=True)]
            for own in kind.shape:
                array.shapeRange.sizeRanges.add(lowerBound=own or 1, upperBound=own or -1)

    def _cast(self, name: str, kind: Any, to: int) -> list[Any]:
        """A cast between ``name`` and its half, with the constant that says to what."""
        messages = part("proto.MIL_pb2")
        source, target = (name, f"{name}__half") if to == _HALF else (f"{name}__half", name)
        word = messages.Operation(type="const")
        text = messages.Value()
        text.type.tensorType.dataType = _STRING
        text.immediateValue.tensor.strings.values.append("fp16" if to == _HALF else "fp32")
        word.attributes["val"].CopyFrom(text)
        word.attributes["name"].CopyFrom(_text(f"{target}_dtype"))
        word.outputs.add(name=f"{target}_dtype", type=text.type)
        cast = messages.Operation(type="cast")
        cast.inputs["x"].arguments.add(name=source)
        cast.inputs["dtype"].arguments.add(name=f"{target}_dtype")
        cast.attributes["name"].CopyFrom(_text(target))
        output = cast.outputs.add(name=target, type=kind)
        output.type.tensorType.dataType = to
        return [word, cast]


def _copy(message: Any) -> Any:
    made = type(message)()
    made.CopyFrom(message)
    return made


def _text(words: str) -> Any:
    value = part("proto.MIL_pb2").Value()
    value.type.tensorType.dataType = _STRING
    value.immediateValue.tensor.strings.values.append(words)
    return value


def _rename(names: Mapping[str, str], operations: Iterable[Any]) -> None:
    for each in operations:
        for argument in each.inputs.values():
            for bound in argument.arguments:
                if bound.WhichOneof("binding") == "name" and bound.name in names:
                    bound.name = names[bound.name]
        for output in each.outputs:
            output.name = names.get(output.name, output.name)


def _packed(operations: Iterable[Any], weights: bytes) -> bytes:
    """A ``weight.bin`` of the blobs that the operations read, which read them from there afterwards."""
    moved: dict[int, int] = {}
    found = bytearray(ALIGNMENT)
    for value in _values(operations):
        if value.WhichOneof("value") != "blobFileValue":
            continue
        old = value.blobFileValue.offset
        if old not in moved:
            sentinel, code, length, start, spare = _ABOUT.unpack_from(weights, old)
            found += bytes(-len(found) % ALIGNMENT)
            moved[old] = len(found)
            about = _ABOUT.pack(sentinel, code, length, len(found) + ALIGNMENT, spare)
            found += about.ljust(ALIGNMENT, b"\0") + weights[start : start + length]
        value.blobFileValue.offset = moved[old]
    _HEADER.pack_into(found, 0, len(moved), VERSION)
    return bytes(found) if moved else b""


def _values(operations: Iterable[Any]) -> Iterator[Any]:
    """Every value that is written in an operation, in an order that does not hang on protobuf's maps."""
    for each in operations:
        for name in sorted(each.attributes):
            yield from _inner(each.attributes[name])
        for name in sorted(each.inputs):
            for bound in each.inputs[name].arguments:
                if bound.WhichOneof("binding") == "value":
                    yield from _inner(bound.value)


def _inner(value: Any) -> Iterator[Any]:
    yield value
    if value.WhichOneof("value") == "immediateValue" and value.immediateValue.WhichOneof("value") == "list":
        for each in value.immediateValue.list.values:
            yield from _inner(each)
