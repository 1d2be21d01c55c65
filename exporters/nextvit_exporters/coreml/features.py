"""What a package tells an app about its inputs and outputs, held against what its program says of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

from nextvit_exporters.coreml.program import Constant, Feature, Operation, Program, TensorType
from nextvit_exporters.coreml.proto import DICTIONARY
from nextvit_exporters.errors import BuildFailed, NotExecutable

UNBOUNDED: Final = 2**31 - 1
"""The largest size of an axis that a description gives no bound for."""
_COLORS: Final[Mapping[int, str]] = MappingProxyType({10: "GRAYSCALE", 20: "RGB", 30: "BGR"})
_DTYPES: Final[Mapping[int, str]] = MappingProxyType(
    {65568: "float32", 65600: "float64", 131104: "int32", 131080: "int8", 65552: "float16"}
)
_LABELS: Final = {"stringType": "string", "int64Type": "int64"}
_KEYS: Final = {"stringKeyType": "string", "int64KeyType": "int64"}


def inputs_of(description: Any, program: Program) -> tuple[Feature, ...]:
    """The inputs that are described: images and tensors; raises BuildFailed where the program takes others."""
    found = tuple(_feature(each) for each in description.input)
    _same_names("inputs", found, program.inputs)
    for each in found:
        if each.kind not in ("image", "tensor"):
            raise NotExecutable(f"the input {each.name} is a {each.kind}, which can't be given here")
        _agrees(each, program.inputs[each.name], "takes")
    return found


def outputs_of(description: Any, program: Program) -> tuple[Feature, ...]:
    """The outputs that are described: tensors, and a classifier's label and probabilities by label."""
    types = dict(program.inputs)
    types.update((each.name, each.type) for operation in program.operations for each in operation.outputs)
    found = tuple(_feature(each) for each in description.output)
    _same_names("outputs", found, program.outputs)
    for each in found:
        if each.kind == "image":
            raise NotExecutable(f"the output {each.name} is an image, which can't be compared here")
        if each.kind == "tensor":
            _agrees(each, types[each.name], "returns")
        elif types[each.name] != TensorType(DICTIONARY if each.kind == DICTIONARY else each.kind, ()):
            raise BuildFailed(f"the output {each.name} is described as a {each.kind} and is none; export it again")
    return found


def labels_of(description: Any, program: Program, outputs: tuple[Feature, ...]) -> tuple[str, ...]:
    """A classifier's labels as strings, in the order of its probabilities; none where it is no classifier.

    Raises BuildFailed where description and ``classify`` don't fit, or a label is there twice.
    """
    found = [each for each in program.operations if each.kind == "classify"]
    named = (description.predictedFeatureName, description.predictedProbabilitiesName)
    special = {each.name for each in outputs if each.kind != "tensor"}
    if not found:
        if special or any(named):
            raise BuildFailed("it is described as a classifier, and its program has no classify; export it again")
        return ()
    written = tuple(each.name for each in found[0].outputs)
    if len(found) > 1 or written != named or special != set(named):
        raise BuildFailed("its description names another label or probabilities than it computes; export it again")
    labels, dtype = _labels(found[0], program)
    label, probabilities = ({each.name: each for each in outputs}[name] for name in named)
    if label.kind != dtype or (probabilities.kind, probabilities.dtype) != (DICTIONARY, dtype):
        raise BuildFailed(f"its labels are {dtype}, and its description says otherwise; export it again")
    count = _probabilities(found[0], program)
    if not labels or count not in (None, len(labels)):
        raise BuildFailed(f"it has {len(labels)} labels for {count} probabilities; export it again")
    return labels


def _labels(operation: Operation, program: Program) -> tuple[tuple[str, ...], str]:
    """The labels, and their dtype."""
    classes = operation.inputs.get("classes", ())
    if len(classes) != 1:
        raise BuildFailed(f"classify {operation.name} has no labels; export it again")
    held = classes[0]
    if not isinstance(held, Constant):
        consts = {each.outputs[0].name: each.attributes["val"] for each in program.operations if each.kind == "const"}
        if held not in consts:
            raise NotExecutable(f"classify {operation.name} computes its labels, which can't be executed here")
        held = consts[held]
    labels = tuple(str(each) for each in held.data.reshape(-1).tolist())
    twice = next((each for each, times in Counter(labels).items() if times > 1), None)
    if twice is not None:
        raise BuildFailed(f"it has the label {twice!r} twice, of which an app gets one; export it with distinct labels")
    return labels, held.type.dtype


def _probabilities(operation: Operation, program: Program) -> int | None:
    """How many probabilities ``classify`` takes; None where that is open or not one tensor."""
    given = operation.inputs.get("probabilities", ())
    types = {output.name: output.type for each in program.operations for output in each.outputs} | dict(program.inputs)
    kinds = [each.type if isinstance(each, Constant) else types[each] for each in given]
    sizes = [math.prod(size for size in each.shape if size is not None) for each in kinds if None not in each.shape]
    return sizes[0] if len(sizes) == len(given) == 1 else None


def _same_names(what: str, described: tuple[Feature, ...], computed: Iterable[str]) -> None:
    names, there = [each.name for each in described], set(computed)
    if set(names) != there or len(names) != len(there):
        raise BuildFailed(
            f"it describes the {what} {', '.join(names) or 'none'}, and its program has "
            f"{', '.join(sorted(there)) or 'none'}; export it again"
        )


def _feature(message: Any) -> Feature:
    which = message.type.WhichOneof("Type")
    name, description = str(message.name), str(message.shortDescription)
    if message.type.isOptional:
        raise NotExecutable(f"{name} is optional, which can't be executed here")
    if which == "imageType":
        return _image(name, description, message.type.imageType)
    if which == "multiArrayType":
        return _tensor(name, description, message.type.multiArrayType)
    if which in _LABELS:
        return Feature(name, _LABELS[which], description)
    if which == "dictionaryType":
        key = message.type.dictionaryType.WhichOneof("KeyType")
        if key not in _KEYS:
            raise BuildFailed(f"{name} is a dictionary without a type of key; export it again")
        return Feature(name, DICTIONARY, description, dtype=_KEYS[key])
    if which is None:
        raise BuildFailed(f"{name} is described without a type; export it again")
    raise NotExecutable(f"{name} is a {which.removesuffix('Type')}, which can't be executed here")


def _image(name: str, description: str, message: Any) -> Feature:
    color = _COLORS.get(message.colorSpace)
    if color is None:
        raise NotExecutable(f"the image {name} has colours other than RGB, BGR or GRAYSCALE, which are not known here")
    head = (1, 1 if color == "GRAYSCALE" else 3)
    flexible = message.WhichOneof("SizeFlexibility")
    allowed: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int], ...] = ()
    if flexible == "enumeratedSizes":
        allowed = tuple((*head, int(each.height), int(each.width)) for each in message.enumeratedSizes.sizes)
    elif flexible == "imageSizeRange":
        sizes = message.imageSizeRange.heightRange, message.imageSizeRange.widthRange
        ranges = (*((each, each) for each in head), *(_range(each) for each in sizes))
    shape = (*head, int(message.height), int(message.width))
    return _checked(Feature(name, "image", description, shape, color=color, allowed=allowed, ranges=ranges), flexible)


def _tensor(name: str, description: str, message: Any) -> Feature:
    dtype = _DTYPES.get(message.dataType)
    if dtype is None:
        raise BuildFailed(f"{name} is described with the unknown dtype {message.dataType}; export it again")
    flexible = message.WhichOneof("ShapeFlexibility")
    allowed: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int], ...] = ()
    if flexible == "enumeratedShapes":
        allowed = tuple(tuple(int(size) for size in each.shape) for each in message.enumeratedShapes.shapes)
    elif flexible == "shapeRange":
        ranges = tuple(_range(each) for each in message.shapeRange.sizeRanges)
    shape = tuple(int(size) for size in message.shape)
    return _checked(Feature(name, "tensor", description, shape, dtype, allowed=allowed, ranges=ranges), flexible)


def _range(message: Any) -> tuple[int, int]:
    return int(message.lowerBound), UNBOUNDED if message.upperBound < 0 else int(message.upperBound)


def _checked(feature: Feature, flexible: str | None) -> Feature:
    """The feature, where its shapes are shapes, the first of them is allowed, and what is ``flexible`` has some."""
    shapes = (feature.shape, *feature.allowed, *feature.ranges)
    sound = all(0 < size <= UNBOUNDED for shape in shapes for size in shape)
    sound = sound and all(low <= high for low, high in feature.ranges)
    if (
        not sound
        or (flexible is not None and not (feature.allowed or feature.ranges))
        or not feature.takes(feature.shape)
    ):
        raise BuildFailed(f"{feature.name} is described with shapes that can't be; export it again")
    return feature


def _agrees(feature: Feature, kind: TensorType, verb: str) -> None:
    """Raises BuildFailed where the program has another dtype, or a shape that the description does not mean."""
    dtypes = ("float32", "float16") if feature.kind == "image" else (feature.dtype,)
    shapes = feature.allowed or (feature.shape,)
    if feature.ranges:
        shapes = tuple(tuple(pair[end] for pair in feature.ranges) for end in (0, 1))
    if not feature.shape and verb == "returns":
        shapes = ()  # coremltools leaves the shape of an output out where an axis of it is open
    if kind.shape == ():
        shapes = tuple(() if each == (1,) else each for each in shapes)
    if kind.dtype in dtypes and all(_fits(each, kind.shape) for each in shapes):
        return
    said = f"{feature.dtype or feature.color} {' or '.join(str(each) for each in shapes[:3])}"
    raise BuildFailed(
        f"{feature.name} is described as {said}, and the program {verb} {kind.dtype} {kind.shape}; export it again"
    )


def _fits(shape: tuple[int, ...], axes: tuple[int | None, ...]) -> bool:
    return len(shape) == len(axes) and all(axis in (None, size) for size, axis in zip(shape, axes, strict=True))
