"""A package whose parts contradict each other, or that holds what is not executed here, is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nextvit_exporters.coreml.program import MODEL
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.errors import BuildFailed, DeployError, NotExecutable
from tests.exporters.coreml.packages import edit, package, refused, sound

__all__ = ["package", "sound"]


def block(model: Any) -> Any:
    (found,) = model.mlProgram.functions["main"].block_specializations.values()
    return found


def first(model: Any, kind: str) -> Any:
    return next(each for each in block(model).operations if each.type == kind)


def specification(version: int) -> Callable[[Any], None]:
    return lambda model: setattr(model, "specificationVersion", version)


def rename_opset(model: Any) -> None:
    function = model.mlProgram.functions["main"]
    function.block_specializations["CoreML8"].CopyFrom(function.block_specializations.pop(function.opset))
    function.opset = "CoreML8"


def second_opset(model: Any) -> None:
    function = model.mlProgram.functions["main"]
    function.block_specializations["CoreML8"].CopyFrom(function.block_specializations[function.opset])


def stray_blob(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        value = next(e for e in block(model).operations if e.attributes["val"].HasField("blobFileValue"))
        value.attributes["val"].blobFileValue.fileName = name

    return change


def resize(size: int) -> Callable[[Any], None]:
    """Declare the first constant of the weights, value and output, larger than it is."""

    def change(model: Any) -> None:
        found = next(e for e in block(model).operations if e.attributes["val"].HasField("blobFileValue"))
        for each in (found.attributes["val"].type, found.outputs[0].type):
            each.tensorType.dimensions[0].constant.size = size

    return change


def label(index: int, text: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        values = first(model, "classify").inputs["classes"].arguments[0].value.immediateValue.list.values
        values[index].immediateValue.tensor.strings.values[0] = text

    return change


def drop_label(model: Any) -> None:
    value = first(model, "classify").inputs["classes"].arguments[0].value
    del value.immediateValue.list.values[-1]
    value.type.listType.length.constant.size -= 1


def function_called_other(model: Any) -> None:
    model.mlProgram.functions["other"].CopyFrom(model.mlProgram.functions.pop("main"))


def two_functions(model: Any) -> None:
    model.mlProgram.functions["other"].CopyFrom(model.mlProgram.functions["main"])


def control_flow(model: Any) -> None:
    first(model, "relu").blocks.add()


def described_functions(model: Any) -> None:
    for name in ("main", "other"):
        model.description.functions.add(name=name)


def in_place(model: Any) -> Any:
    """The value of a constant of four int32 in place: a convolution's padding."""
    (name,) = (each.name for each in first(model, "conv").inputs["pad"].arguments)
    return next(each for each in block(model).operations if each.outputs[0].name == name).attributes["val"]


def two_sizes(model: Any) -> None:
    sizes = model.description.input[0].type.imageType.enumeratedSizes.sizes
    for size in (16, 32):
        sizes.add(width=size, height=size)


def neural_network(model: Any) -> None:
    model.specificationVersion = 4
    model.neuralNetwork.SetInParent()


def state_type(model: Any) -> None:
    kind = model.mlProgram.functions["main"].inputs[0].type
    kept = type(kind)()
    kept.CopyFrom(kind)
    kind.stateType.wrappedType.CopyFrom(kept)


Edit = tuple[Callable[[Any], object], type[DeployError], str]
EDITS: dict[str, Edit] = {
    **{
        f"specification {version}": (
            specification(version),
            BuildFailed,
            f"its specification is of version {version}; known are 6, 7, 8, 9, 10",
        )
        for version in (0, 5, 11, 99)
    },
    "specification of another opset": (lambda m: setattr(m, "specificationVersion", 8), BuildFailed, "its opset is"),
    "another opset": (rename_opset, BuildFailed, "its opset is CoreML8, and its specification's CoreML6"),
    "two opsets": (second_opset, BuildFailed, "its opset is CoreML6 and CoreML8"),
    "no model": (lambda m: m.ClearField("mlProgram"), BuildFailed, "or no model"),
    "neural network": (neural_network, NotExecutable, "it holds a neuralNetwork"),
    "pipeline": (lambda m: m.pipeline.SetInParent(), NotExecutable, "it holds a pipeline"),
    "updatable": (lambda m: setattr(m, "isUpdatable", True), NotExecutable, "trained on the device"),
    "no functions": (lambda m: m.mlProgram.functions.clear(), NotExecutable, "it has the functions none"),
    "function of another name": (function_called_other, NotExecutable, "it has the functions other"),
    "two functions": (two_functions, NotExecutable, "it has the functions main, other"),
    "two functions described": (described_functions, NotExecutable, "it has the functions main, other"),
    "another default function": (
        lambda m: setattr(m.description, "defaultFunctionName", "other"),
        NotExecutable,
        "only the one function main",
    ),
    "state": (lambda m: m.description.state.add(name="kept"), NotExecutable, "keeps a state"),
    "input a state": (state_type, NotExecutable, "the input image is a state"),
    "control flow": (control_flow, NotExecutable, "relu relu_cast_fp16 has blocks of its own"),
    "program of tomorrow": (lambda m: setattr(m.mlProgram, "version", 2), BuildFailed, "its program is of version 2"),
    "undefined value": (
        lambda m: setattr(first(m, "relu").inputs["x"].arguments[0], "name", "nowhere"),
        BuildFailed,
        "relu relu_cast_fp16 reads 'nowhere' as its x, which is not there",
    ),
    "value of later": (
        lambda m: setattr(first(m, "relu").inputs["x"].arguments[0], "name", "relu_1_cast_fp16"),
        BuildFailed,
        "relu relu_cast_fp16 reads 'relu_1_cast_fp16' as its x, which is not there",
    ),
    "bound to nothing": (
        lambda m: first(m, "relu").inputs["x"].arguments[0].Clear(),
        BuildFailed,
        "x of relu relu_cast_fp16 is bound to nothing",
    ),
    "one name twice": (
        lambda m: setattr(first(m, "relu").outputs[0], "name", "image"),
        BuildFailed,
        "writes 'image', which is there already",
    ),
    "no name": (lambda m: setattr(first(m, "relu").outputs[0], "name", ""), BuildFailed, "writes ''"),
    "no outputs": (lambda m: first(m, "relu").ClearField("outputs"), BuildFailed, "kind relu has no outputs"),
    "no kind": (lambda m: first(m, "relu").ClearField("type"), BuildFailed, "has no kind"),
    "no type": (
        lambda m: first(m, "relu").outputs[0].ClearField("type"),
        BuildFailed,
        "relu relu_cast_fp16 has no type",
    ),
    "unknown dtype": (
        lambda m: setattr(first(m, "relu").outputs[0].type.tensorType, "dataType", 77),
        BuildFailed,
        "relu relu_cast_fp16 has the unknown dtype 77",
    ),
    "wrong rank": (
        lambda m: setattr(first(m, "relu").outputs[0].type.tensorType, "rank", 3),
        BuildFailed,
        "relu relu_cast_fp16 has rank 3 and 4 axes",
    ),
    "vast axis": (
        lambda m: setattr(first(m, "relu").outputs[0].type.tensorType.dimensions[0].constant, "size", 2**62),
        BuildFailed,
        "has an axis of 4611686018427387904",
    ),
    "any rank": (
        lambda m: setattr(first(m, "relu").outputs[0].type.tensorType.dimensions[0].unknown, "variadic", True),
        NotExecutable,
        "has any number of axes",
    ),
    "tuple": (
        lambda m: first(m, "relu").outputs[0].type.tupleType.SetInParent(),
        NotExecutable,
        "of relu relu_cast_fp16 is a tuple",
    ),
    "output from nowhere": (
        lambda m: block(m).outputs.append("nowhere"),
        BuildFailed,
        "returns nowhere, which nothing",
    ),
    "output twice": (lambda m: block(m).outputs.append("classLabel"), BuildFailed, "something twice"),
    "output not described": (
        lambda m: block(m).outputs.append("relu_cast_fp16"),
        BuildFailed,
        "it describes the outputs",
    ),
    "no output": (lambda m: block(m).ClearField("outputs"), BuildFailed, "returns nothing"),
    "block with inputs": (lambda m: block(m).inputs.add(name="x"), BuildFailed, "takes inputs of its own"),
    "input twice": (
        lambda m: m.mlProgram.functions["main"].inputs.append(m.mlProgram.functions["main"].inputs[0]),
        BuildFailed,
        "two inputs of one name",
    ),
    "constant without value": (
        lambda m: (
            first(m, "const").attributes["val"].ClearField("immediateValue")
            or first(m, "const").attributes["val"].ClearField("blobFileValue")
        ),
        BuildFailed,
        "has no value",
    ),
    "constant without anything": (lambda m: first(m, "const").attributes.pop("val"), BuildFailed, "not one value"),
    "constant of another type": (
        lambda m: setattr(first(m, "const").outputs[0].type.tensorType, "dataType", 24),
        BuildFailed,
        "is declared another type than its value has",
    ),
    "a value lost": (
        lambda m: in_place(m).immediateValue.tensor.ints.values.pop(),
        BuildFailed,
        "should hold 4 ints and holds 3",
    ),
    "a value too many": (
        lambda m: in_place(m).immediateValue.tensor.ints.values.append(1),
        BuildFailed,
        "should hold 4 ints and holds 5",
    ),
    "values of another dtype": (
        lambda m: in_place(m).immediateValue.tensor.floats.values.extend([1.0] * 4),
        BuildFailed,
        "is declared int32 and holds floats",
    ),
    "a dtype that NumPy lacks": (
        lambda m: setattr(in_place(m).type.tensorType, "dataType", 13),
        NotExecutable,
        "is of dtype bfloat16, which can't be read here",
    ),
    "an open axis": (
        lambda m: in_place(m).type.tensorType.dimensions[0].unknown.SetInParent(),
        BuildFailed,
        "is a constant with an open axis",
    ),
    "constant elsewhere": (
        stray_blob("@model_path/../../x"),
        BuildFailed,
        "is in '@model_path/../../x', not @model_path",
    ),
    "constant of another size": (resize(33), BuildFailed, "weight.bin says of the blob"),
    "constant of a vast size": (resize(2**31 - 1), BuildFailed, "weight.bin says of the blob"),
    "constant of an impossible size": (resize(2**62), BuildFailed, "has an axis of 4611686018427387904"),
    "label twice": (label(1, "label 0"), BuildFailed, "it has the label 'label 0' twice"),
    "label lost": (drop_label, BuildFailed, "it has 11 labels for 12 probabilities"),
    "labels miscounted": (
        lambda m: setattr(
            first(m, "classify").inputs["classes"].arguments[0].value.type.listType.length.constant, "size", 9
        ),
        BuildFailed,
        "should hold 9 values and holds 12",
    ),
    "no classifier described": (
        lambda m: m.description.ClearField("predictedFeatureName"),
        BuildFailed,
        "names another label or probabilities",
    ),
    "label described as a number": (
        lambda m: m.description.output[0].type.int64Type.SetInParent(),
        BuildFailed,
        "classLabel is described as a int64 and is none",
    ),
    "keys described as numbers": (
        lambda m: m.description.output[1].type.dictionaryType.int64KeyType.SetInParent(),
        BuildFailed,
        "its labels are string",
    ),
    "another input described": (
        lambda m: setattr(m.description.input[0], "name", "picture"),
        BuildFailed,
        "it describes the inputs picture, and its program has image",
    ),
    "another size described": (
        lambda m: setattr(m.description.input[0].type.imageType, "width", 32),
        BuildFailed,
        "image is described as RGB (1, 3, 16, 32), and the program takes float32 (1, 3, 16, 16)",
    ),
    "another colour described": (
        lambda m: setattr(m.description.input[0].type.imageType, "colorSpace", 10),
        BuildFailed,
        "image is described as GRAYSCALE (1, 1, 16, 16)",
    ),
    "unknown colour": (
        lambda m: setattr(m.description.input[0].type.imageType, "colorSpace", 40),
        NotExecutable,
        "colours other than RGB",
    ),
    "negative size": (
        lambda m: setattr(m.description.input[0].type.imageType, "width", -16),
        BuildFailed,
        "shapes that can't be",
    ),
    "no sizes listed": (
        lambda m: m.description.input[0].type.imageType.enumeratedSizes.SetInParent(),
        BuildFailed,
        "shapes that can't be",
    ),
    "flexible where the program is not": (
        two_sizes,
        BuildFailed,
        "RGB (1, 3, 16, 16) or (1, 3, 32, 32), and the program takes",
    ),
    "optional": (
        lambda m: setattr(m.description.input[0].type, "isOptional", True),
        NotExecutable,
        "image is optional",
    ),
    "sequence": (
        lambda m: m.description.input[0].type.sequenceType.stringType.SetInParent(),
        NotExecutable,
        "image is a sequence",
    ),
    "image as output": (
        lambda m: m.description.output[1].type.imageType.CopyFrom(m.description.input[0].type.imageType),
        NotExecutable,
        "the output classLabel_probs is an image",
    ),
    "control characters": (
        lambda m: setattr(m.description.input[0], "name", "\x1b[2J\nimage" + "x" * 9999),
        BuildFailed,
        "it describes the inputs",
    ),
}


@pytest.mark.parametrize("damage", EDITS)
def test_contradictions_are_refused(damage: str, package: Path) -> None:
    change, kind, reason = EDITS[damage]
    edit(package, change)
    assert reason in refused(package, kind)


def test_unknown_fields_are_refused(package: Path) -> None:
    file = package / MODEL
    file.write_bytes(file.read_bytes() + b"\xd2\x3e\x03abc")  # field 1002, three bytes
    assert "holds fields that are not known" in refused(package)


def test_one_function_may_be_described_by_name(package: Path) -> None:
    def change(model: Any) -> None:
        said = model.description
        said.functions.add(
            name="main",
            input=said.input,
            output=said.output,
            predictedFeatureName=said.predictedFeatureName,
            predictedProbabilitiesName=said.predictedProbabilitiesName,
        )
        for field in ("input", "output", "predictedFeatureName", "predictedProbabilitiesName"):
            said.ClearField(field)

    before = read_package(package)
    edit(package, change)
    after = read_package(package)
    assert (after.inputs, after.outputs, after.labels) == (before.inputs, before.outputs, before.labels)
