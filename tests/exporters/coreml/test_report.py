"""What a package says of itself in manifests and tables, from small packages made by hand and one of nano."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nextvit_exporters.coreml.program import WEIGHTS, Feature, Operation, Output, Package, Program, TensorType
from nextvit_exporters.coreml.report import describe, dtypes_of
from tests.exporters.coreml.built import ABOUT, SPECS
from tests.exporters.coreml.small_programs import held, package

HALF, SINGLE = TensorType("float16", (1, 4)), TensorType("float32", (1, 4))


def operation(kind: str, *types: TensorType) -> Operation:
    return Operation(kind, kind, {}, {}, tuple(Output(f"{kind}{index}", each) for index, each in enumerate(types)))


def holding(*operations: Operation) -> Package:
    return package(Program("CoreML6", {}, operations, ("x",)), [])


def test_types_are_counted_by_operation() -> None:
    made = holding(
        held("constant", np.ones(4, np.float32)),
        operation("constexpr_lut_to_dense", HALF),
        operation("add", SINGLE),
        operation("cast", HALF),
        operation("conv", HALF),
        operation("split", HALF, HALF),
        operation("shape", TensorType("int32", (4,))),
        operation("cast", SINGLE),
        operation("classify", TensorType("string", ())),
    )
    assert dtypes_of(made) == "2 of 3 operations in fp16, 1 of 3 operations in fp32"


@pytest.mark.parametrize(
    ("operations", "says"),
    [
        ((operation("conv", HALF),), "1 of 1 operations in fp16"),
        ((operation("relu", SINGLE),) * 2, "2 of 2 operations in fp32"),
        ((), ""),
    ],
)
def test_one_type_or_none(operations: tuple[Operation, ...], says: str) -> None:
    assert dtypes_of(holding(*operations)) == says


IMAGE = Feature("image", "image", "a picture", (1, 3, 8, 8), color="RGB")


@pytest.mark.parametrize(
    ("feature", "says"),
    [
        (IMAGE, "image RGB 1x3x8x8; a picture"),
        (replace(IMAGE, description=""), "image RGB 1x3x8x8"),
        (
            replace(IMAGE, description="", allowed=((1, 3, 8, 8), (1, 3, 16, 8))),
            "image RGB 1x3x8x8, one of 1x3x8x8, 1x3x16x8",
        ),
        (
            replace(IMAGE, description="", ranges=((1, 1), (3, 3), (8, 16), (8, 32))),
            "image RGB 1x3x8x8, from 1 x 3 x 8:16 x 8:32",
        ),
        (Feature("x", "tensor", "numbers", (2, 3), "float32"), "tensor 2x3 float32; numbers"),
        (Feature("x", "string", "the class"), "string; the class"),
        (Feature("x", "dictionary", ""), "dictionary"),
    ],
)
def test_inputs_and_outputs_take_a_line(feature: Feature, says: str) -> None:
    made = package(Program("CoreML6", {}, (), ()), [feature], [feature])
    facts = describe(made)
    assert facts["inputs"] == facts["outputs"] == {feature.name: says}


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (6, "iOS 15 or newer (specification 6, CoreML6)"),
        (7, "iOS 16 or newer (specification 7, CoreML6)"),
        (10, "iOS 26 or newer (specification 10, CoreML6)"),
    ],
)
def test_the_release(number: int, says: str) -> None:
    made = replace(package(Program("CoreML6", {}, (), ()), []), specification=number)
    assert describe(made)["runs on"] == says


def test_many_labels_are_not_all_listed() -> None:
    made = package(Program("CoreML6", {}, (), ()), [])
    assert "labels" not in describe(made)
    assert describe(replace(made, labels=("a", "b")))["labels"] == "2: a, b"
    many = tuple(map(str, range(1000)))
    assert describe(replace(made, labels=many))["labels"] == "1000: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ..."


@pytest.mark.parametrize("name", SPECS)
def test_a_whole_package(packages: dict[str, Package], name: str) -> None:
    made = packages[name]
    facts = describe(made)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["about"] == dict(made.about)
    assert set(made.about.values()) == {ABOUT.author, ABOUT.licence, ABOUT.version, ABOUT.description}
    assert facts["files"] == dict(made.files)
    assert facts["weights"] == f"{(made.path / WEIGHTS).stat().st_size / 1e6:.1f} MB"
    compressed = {"lut4": {"constexpr_lut_to_dense"}, "w8a8": {"constexpr_affine_dequantize"}}.get(name, set())
    found = facts.get("compressed weights", {})
    assert isinstance(found, dict)
    assert set(found) == compressed
    assert all(number > 30 for number in found.values())
    total = 199 if name == "w8a8" else 124
    assert dtypes_of(made) == f"{total - 1} of {total} operations in fp16, 1 of {total} operations in fp32"


def test_a_package_that_is_gone_has_no_weights(packages: dict[str, Package], tmp_path: Path) -> None:
    assert "weights" not in describe(replace(packages["fp16"], path=tmp_path))
