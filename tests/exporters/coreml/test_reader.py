"""Packages that coremltools wrote are read as they were meant; damaged ones are refused, each by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextvit_exporters.coreml.program import MANIFEST_JSON, MODEL, WEIGHTS, Package, TensorType
from nextvit_exporters.coreml.reader import read_package
from tests.exporters.coreml.packages import LABELS, classifier, convert, from_mil, image, save, sound, tensor, tiny

__all__ = ["sound"]

TARGETS = {"iOS15": 6, "iOS16": 7, "iOS17": 8, "iOS18": 9, "iOS26": 10}
"""Targets and the specification's version that belongs to each."""


def constants(package: Package, kind: str) -> list[dict[str, np.ndarray[Any, Any]]]:
    """What each operation of a kind is given by constants, in their order."""
    held = {each.outputs[0].name: each.attributes["val"] for each in package.program.operations if each.kind == "const"}
    return [
        {name: held[each[0]].data for name, each in operation.inputs.items() if each[0] in held}
        for operation in package.program.operations
        if operation.kind == kind
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_reads_what_coremltools_writes(target: str, tmp_path: Path) -> None:
    read = read_package(save(classifier(target), tmp_path / "tiny.mlpackage"))
    assert read.path == tmp_path / "tiny.mlpackage"
    assert read.specification == TARGETS[target]
    assert read.program.opset == f"CoreML{TARGETS[target] - 1}"
    assert read.program.inputs == {"image": TensorType("float32", (1, 3, 16, 16))}
    assert read.program.outputs == ("classLabel", "classLabel_probs")
    assert {"conv": 2, "relu": 2, "linear": 1, "classify": 1}.items() <= read.program.count().items()
    assert read.labels == tuple(LABELS)
    assert read.is_classifier
    (given,) = read.inputs
    assert (given.name, given.kind, given.color, given.shape) == ("image", "image", "RGB", (1, 3, 16, 16))
    assert [(each.kind, each.dtype) for each in read.outputs] == [("string", ""), ("dictionary", "string")]
    files = {each.relative_to(read.path).as_posix(): each for each in read.path.rglob("*") if each.is_file()}
    assert {MODEL, WEIGHTS, MANIFEST_JSON} <= files.keys()
    assert read.files == {name: hashlib.sha256(each.read_bytes()).hexdigest() for name, each in files.items()}


def test_constants_are_the_models(sound: Path) -> None:
    read, model = read_package(sound), tiny()
    first, second = constants(read, "conv")
    (head,) = constants(read, "linear")
    for found, module in ((first, model.conv), (second, model.mix), (head, model.head)):
        assert module.bias is not None
        for name, expected in (("weight", module.weight), ("bias", module.bias)):
            assert found[name].dtype == np.float16
            assert not found[name].flags.writeable
            np.testing.assert_array_equal(found[name], expected.detach().numpy().astype(np.float16))
    assert first["pad"].tolist() == [1, 1, 1, 1]
    assert first["pad_type"].item() == "custom"
    assert first["groups"].item() == 1


def test_every_operation_knows_its_types(sound: Path) -> None:
    operations = read_package(sound).program.operations
    types = {output.name: output.type for each in operations for output in each.outputs}
    (conv, _) = (each for each in operations if each.kind == "conv")
    assert types[conv.outputs[0].name] == TensorType("float16", (1, 32, 16, 16))
    assert types["classLabel"] == TensorType("string", ())
    assert types["classLabel_probs"] == TensorType("dictionary", ())
    assert all("name" not in each.attributes and each.name for each in operations)


def test_metadata(tmp_path: Path) -> None:
    model = convert()
    model.author, model.license, model.version, model.short_description = "A", "B", "3", "D"
    model.user_defined_metadata["mine"] = "yes"
    model.input_description["image"] = "what to look at"
    read = read_package(save(model, tmp_path / "tiny.mlpackage"))
    assert read.about == {"author": "A", "licence": "B", "version": "3", "description": "D"}
    assert read.metadata["mine"] == "yes"
    assert read.inputs[0].description == "what to look at"
    assert read.labels == ()
    assert not read.is_classifier


def test_labels_may_be_numbers(tmp_path: Path) -> None:
    read = read_package(save(classifier(labels=list(range(100, 112))), tmp_path / "tiny.mlpackage"))
    assert read.labels == tuple(str(each) for each in range(100, 112))
    assert [(each.kind, each.dtype) for each in read.outputs] == [("int64", ""), ("dictionary", "int64")]


def shapes(*sizes: int) -> Any:
    from nextvit_exporters.coreml.loading import coremltools

    return coremltools().EnumeratedShapes([(1, 3, each, each) for each in sizes])


def span(low: int, high: int) -> Any:
    from nextvit_exporters.coreml.loading import coremltools

    axis = coremltools().RangeDim(low, high, 16)
    return coremltools().Shape((1, 3, axis, coremltools().RangeDim(low, high, 16)))


@pytest.mark.parametrize("given", [image, tensor])
def test_shapes_that_are_listed(given: Callable[..., Any], tmp_path: Path) -> None:
    read = read_package(save(convert(given=given(shape=shapes(16, 24)), open_sizes=True), tmp_path / "t.mlpackage"))
    (feature,) = read.inputs
    assert feature.allowed == ((1, 3, 16, 16), (1, 3, 24, 24))
    assert feature.takes((1, 3, 24, 24))
    assert not feature.takes((1, 3, 20, 20))
    assert read.program.inputs["image"].shape == (1, 3, None, None)


@pytest.mark.parametrize("given", [image, tensor])
def test_shapes_of_a_range(given: Callable[..., Any], tmp_path: Path) -> None:
    read = read_package(save(convert(given=given(shape=span(8, 32)), open_sizes=True), tmp_path / "t.mlpackage"))
    (feature,) = read.inputs
    assert feature.shape == (1, 3, 16, 16)
    assert feature.ranges == ((1, 1), (3, 3), (8, 32), (8, 32))
    assert feature.takes((1, 3, 9, 31))
    assert not feature.takes((1, 3, 9, 33))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32])
def test_tensors(dtype: type[np.generic], tmp_path: Path) -> None:
    read = read_package(save(convert(given=tensor(dtype=dtype)), tmp_path / "tiny.mlpackage"))
    assert [(each.kind, each.dtype, each.shape) for each in read.inputs] == [
        ("tensor", np.dtype(dtype).name, (1, 3, 16, 16))
    ]
    assert [(each.name, each.kind, each.shape) for each in read.outputs] == [("linear", "tensor", (1, 12))]


def test_constants_in_place(tmp_path: Path) -> None:
    written: dict[str, Any] = {
        "integers": np.arange(12, dtype=np.int32).reshape(3, 4),
        "flags": np.array([True, False]),
        "halves": np.array([1.5, -2.0, 6e-8], np.float16),
        "small": np.array([-128, 2, 127], np.int8),
        "bytes": np.array([0, 255], np.uint8),
        "words": np.array([1, 65535], np.uint16),
        "shorts": np.array([-1, -32768], np.int16),
        "nothing": np.zeros((0, 3), np.float32),
        "number": np.float32(2.5),
        "text": "héllo",
    }

    def function(x: Any) -> Any:
        from nextvit_exporters.coreml.loading import part

        builder = part("converters.mil.mil").Builder
        held = {name: builder.const(val=value, name=name) for name, value in written.items()}
        return builder.mul(x=x, y=held["number"], name="y")

    path = save(from_mil(function, (2, 3)), tmp_path / "consts.mlpackage")
    assert not (path / WEIGHTS).exists()
    found = {
        each.name: each.attributes["val"] for each in read_package(path).program.operations if each.kind == "const"
    }
    assert found.keys() == written.keys()
    for name, value in written.items():
        data = found[name].data
        assert found[name].type.dtype == ("string" if name == "text" else np.asarray(value).dtype.name)
        np.testing.assert_array_equal(data, value)
        assert data.shape == np.shape(value) == found[name].type.shape
        assert not data.flags.writeable


def compressed(how: str, target: str) -> Any:
    """The tiny model with compressed weights; the convolutions' alone are large enough."""
    from nextvit_exporters.coreml.loading import heard, part

    optimize, model = part("optimize.coreml"), convert(target)
    config: dict[str, Any] = {"weight_threshold": 512}
    with heard():
        if how == "int8":
            op = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", **config)
            return optimize.linear_quantize_weights(model, optimize.OptimizationConfig(op))
        if how == "int4":
            op = optimize.OpLinearQuantizerConfig(
                mode="linear_symmetric", dtype="int4", granularity="per_channel", **config
            )
            return optimize.linear_quantize_weights(model, optimize.OptimizationConfig(op))
        op = optimize.OpPalettizerConfig(mode="uniform", nbits=int(how.removeprefix("palette")), **config)
        return optimize.palettize_weights(model, optimize.OptimizationConfig(op))


@pytest.mark.parametrize("target", ["iOS16", "iOS17"])
def test_compressed_constants_are_attributes_at_first(target: str, tmp_path: Path) -> None:
    expected = tiny().conv.weight.detach().numpy()
    quantized = read_package(save(compressed("int8", target), tmp_path / "int8.mlpackage"))
    first = next(each for each in quantized.program.operations if each.kind == "constexpr_affine_dequantize")
    data, scale = first.attributes["quantized_data"].data, first.attributes["scale"].data
    assert data.dtype == np.int8
    assert data.shape == (32, 3, 3, 3)
    np.testing.assert_allclose(data * scale[:, None, None, None].astype(np.float32), expected, atol=scale.max() * 0.6)
    palettized = read_package(save(compressed("palette4", target), tmp_path / "palette.mlpackage"))
    first = next(each for each in palettized.program.operations if each.kind == "constexpr_lut_to_dense")
    lut, indices = first.attributes["lut"].data, first.attributes["indices"].data
    assert (lut.shape, indices.shape, first.attributes["shape"].data.tolist()) == ((16,), (432,), [32, 3, 3, 3])


@pytest.mark.parametrize("target", ["iOS18", "iOS26"])
@pytest.mark.parametrize(("how", "dtype"), [("int8", "int8"), ("int4", "int4")])
def test_quantized_constants_are_inputs_later(how: str, dtype: str, target: str, tmp_path: Path) -> None:
    read = read_package(save(compressed(how, target), tmp_path / "tiny.mlpackage"))
    first = next(each for each in read.program.operations if each.kind == "constexpr_blockwise_shift_scale")
    data, scale = first.inputs["data"][0], first.inputs["scale"][0]
    assert not isinstance(data, str)
    assert not isinstance(scale, str)
    assert data.type == TensorType(dtype, (32, 3, 3, 3))
    assert data.data.dtype == np.int8
    expected, step = tiny().conv.weight.detach().numpy(), scale.data.astype(np.float32)
    np.testing.assert_allclose(data.data * step, expected, atol=float(step.max()) * 0.6)


@pytest.mark.parametrize("target", ["iOS18", "iOS26"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_palettes_have_indices_of_few_bits(bits: int, target: str, tmp_path: Path) -> None:
    read = read_package(save(compressed(f"palette{bits}", target), tmp_path / "tiny.mlpackage"))
    first = next(each for each in read.program.operations if each.kind == "constexpr_lut_to_dense")
    indices, lut = first.inputs["indices"][0], first.inputs["lut"][0]
    assert not isinstance(indices, str)
    assert not isinstance(lut, str)
    assert indices.type == TensorType(f"uint{bits}", (32, 3, 3, 3))
    palette = lut.data.reshape(-1).astype(np.float32)
    expected, step = tiny().conv.weight.detach().numpy(), (palette.max() - palette.min()) / (2**bits - 1)
    np.testing.assert_allclose(palette[indices.data], expected, atol=float(step) * 0.6)
