from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextvit_exporters.coreml import lint as rules
from nextvit_exporters.coreml.lint import Finding, lint
from nextvit_exporters.coreml.program import (
    MODULES,
    Binding,
    Constant,
    Feature,
    Operation,
    Output,
    Package,
    Program,
    TensorType,
)

Shape = tuple[int | None, ...]
IMAGE = Feature("image", "image", "a picture", (1, 3, 32, 32), color="RGB")


def held(values: Any, dtype: str = "int32") -> Constant:
    data = np.asarray(values, dtype)
    return Constant(TensorType(dtype, data.shape), data)


def weight(*shape: int) -> Constant:
    return held(np.full(shape, 0.5), "float16")


def op(
    kind: str, name: str, shape: Shape, *, dtype: str = "float16", **inputs: Binding | Sequence[Binding]
) -> Operation:
    bound = {key: (value,) if isinstance(value, str | Constant) else tuple(value) for key, value in inputs.items()}
    return Operation(kind, name, bound, {}, (Output(name, TensorType(dtype, shape)),))


def const(name: str, value: Constant) -> Operation:
    return Operation("const", name, {}, {"val": value}, (Output(name, value.type),))


CAST = op("cast", "cast_1", (1, 3, 32, 32), x="image")
"""In front of everything."""
CLEAN = (
    const("w", weight(64, 3, 3, 3)),
    op("add", "biased", (1, 3, 32, 32), x="image", y=held([[[[1.0]], [[2.0]], [[3.0]]]], "float32"), dtype="float32"),
    op("cast", "half", (1, 3, 32, 32), x="biased"),
    op("conv", "stem", (1, 64, 16, 16), x="half", weight="w"),
    op("avg_pool", "pooled", (1, 64, 8, 8), x="stem", kernel_sizes=held([2, 2])),
    op("conv", "depthwise", (1, 64, 8, 8), x="pooled", weight=weight(64, 1, 3, 3)),
    op("reshape", "flat", (1, 64, 64), x="depthwise"),
    op("reshape", "heads", (1, 4, 32, 32), x="flat"),
    op("split", "halves", (1, 2, 32, 32), x="heads", axis=held(1)),
    op("softmax", "weights", (1, 2, 32, 32), x="halves"),
    op("reduce_mean", "mean", (1, 64, 1, 1), x="weights"),
    op("reshape", "vector", (1, 64), x="mean"),
    op("linear", "logits", (1, 1000), x="vector", weight=weight(1000, 64)),
    op("cast", "probabilities", (1, 1000), x="logits", dtype="float32"),
    op("classify", "label", (), x="probabilities", dtype="string"),
)


def package(
    *operations: Operation, inputs: tuple[Feature, ...] = (IMAGE,), modules: Mapping[str, str] | None = None
) -> Package:
    types = {each.name: TensorType(each.dtype or "float32", each.shape) for each in inputs}
    program = Program("CoreML6", types, operations, (operations[-1].name,))
    named = "{" + ", ".join(f'"{key}": "{value}"' for key, value in (modules or {}).items()) + "}"
    return Package(Path("x.mlpackage"), 7, program, inputs, (), {MODULES: named}, {})


def found(*operations: Operation, inputs: tuple[Feature, ...] = (IMAGE,)) -> tuple[Finding, ...]:
    return lint(package(*operations, inputs=inputs))


def test_a_clean_package_has_no_findings() -> None:
    assert found(*CLEAN) == ()


TENSOR = Feature("image", "tensor", "", (1, 3, 32, 32), "float32")
WIDE = Feature("image", "image", "", (1, 3, 32, 32), color="RGB", ranges=((1, 1), (3, 3), (32, 64), (32, 64)))
ENUMERATED = replace(IMAGE, allowed=((1, 3, 32, 32), (1, 3, 64, 64)))
TINY = held(np.full((64, 64, 1, 1), 1e-6), "float16")

FIRES: dict[str, tuple[Operation, str]] = {
    "float32": (op("conv", "x", (1, 64, 4, 4), x="image", weight=weight(64, 64, 1, 1), dtype="float32"), "conv in"),
    "rank": (op("expand_dims", "x", (1, 2, 3, 4, 5), x="image"), "1x2x3x4x5 has 5 axes"),
    "whole-numbers": (op("shape", "x", (4,), x="image", dtype="int32"), "shape works on whole numbers"),
    "transpose": (op("transpose", "x", (1, 64, 8), x="image"), "channel-first-attention"),
    "reshape": (op("reshape", "x", (1, 64, 8), x="image"), "1 reshapes, and 0 attentions need 0"),
    "axis-length": (op("relu", "x", (1, 8, 1, 16385), x="image"), "1x8x1x16385 has an axis beyond 16384"),
    "last-axis-slice": (op("slice_by_index", "x", (1, 2), x="image", begin=held([0, 1])), "within the last axis"),
    "pool-window": (op("avg_pool", "x", (1, 64, 4), x="image", kernel_sizes=held([64])), "avg_pool over 64"),
    "kernel-width": (op("conv", "x", (1, 64, 4, 4), x="image", weight=weight(64, 64, 1, 17)), "a kernel 17 wide"),
    "channels": (op("conv", "x", (1, 24, 4, 4), x="image", weight=weight(24, 64, 1, 1)), "64 channels a group to 24"),
    "last-axis-of-one": (op("relu", "x", (1, 64, 49, 1), x="image"), "1x64x49x1 ends in an axis of one"),
    "subnormal-weights": (op("conv", "x", (1, 64, 4, 4), x="image", weight=TINY), "100% of the weights"),
}


@pytest.mark.parametrize("rule", FIRES)
def test_each_rule_fires_alone(rule: str) -> None:
    operation, words = FIRES[rule]
    (finding,) = found(operation) if rule == "reshape" else found(*CLEAN, operation)
    assert (finding.rule, finding.module, finding.operation) == (rule, "", "x")
    assert words in finding.message
    assert "\n" not in finding.message
    assert finding.source


def test_every_rule_is_tested() -> None:
    assert {rule.name for rule in rules._RULES} == {*FIRES, "shape-range", "batch"}
    assert all(rule.source for rule in rules._RULES)


@pytest.mark.parametrize(
    ("feature", "expected"),
    [
        (WIDE, ["shape-range"]),
        (ENUMERATED, []),
        (TENSOR, []),
        (replace(TENSOR, shape=(8, 3, 32, 32)), ["batch"]),
        (replace(TENSOR, ranges=((1, 8), (3, 3), (32, 32), (32, 32))), ["shape-range", "batch"]),
        (replace(TENSOR, ranges=((1, 1), (3, 3), (32, 32), (32, 32))), []),
    ],
)
def test_inputs(feature: Feature, expected: list[str]) -> None:
    assert [each.rule for each in found(CAST, inputs=(feature,))] == expected


@pytest.mark.parametrize(
    "quiet",
    [
        op("slice_by_index", "x", (1, 2), x="image", begin=held([1, 0])),
        op("slice_by_index", "x", (1, 2), x="image", begin=held([0, 1]), begin_mask=held([False, True], "bool")),
        op("slice_by_index", "x", (2,), x="image", begin=held([1]), dtype="string"),
        op("split", "x", (1, 3, 32, 16), x="image", axis=held(2)),
        op("conv", "x", (1, 64, 4, 4), x="image", weight=weight(64, 64, 16, 16)),
        op("avg_pool", "x", (1, 64, 4), x="image", kernel_sizes=held([31])),
        op("conv", "x", (1, 64, 4, 4), x="image", weight="computed"),
        op("conv", "x", (1, 64, 4, 4), x="image", weight=held(np.full((64, 64, 1, 1), 1e-6), "float32")),
        op("linear", "x", (1, 8), x="image", weight=held(np.full((8, 8), 1e-6), "float16")),
        op("add", "x", (), x="image", y="image", dtype="float32"),
        op("quantize", "x", (1, 64, 4, 4), x="image", dtype="int8"),
        op("relu", "x", (1, 64, 1, 16384), x="image"),
    ],
    ids=lambda each: each.kind,
)
def test_near_misses_are_quiet(quiet: Operation) -> None:
    assert found(*CLEAN, quiet) == ()


@pytest.mark.parametrize("axis", [3, -1])
def test_a_split_of_the_last_axis_is_such_a_slice(axis: int) -> None:
    (finding,) = found(op("split", "x", (1, 3, 32, 16), x="image", axis=held(axis)))
    assert finding.rule == "last-axis-slice"


def test_only_a_pictures_mean_may_be_float32() -> None:
    centre = op("sub", "a", (1, 3, 32, 32), x="image", y=held([1.0], "float32"), dtype="float32")
    scaled = op("mul", "b", (1, 3, 32, 32), x="a", y=held([1.0], "float32"), dtype="float32")
    later = op("relu", "c", (1, 3, 32, 32), x="b", dtype="float32")
    doubled = op("add", "d", (1, 3, 32, 32), x="b", y="c", dtype="float32")
    assert [each.operation for each in found(centre, scaled)] == []
    assert [(each.rule, each.operation) for each in found(centre, scaled, later, doubled)] == [("float32", "c")]
    assert [each.operation for each in found(centre, inputs=(TENSOR,))] == ["a"]


def turn(name: str) -> Operation:
    return op("transpose", name, (1, 64, 8), x="image")


def test_a_rule_speaks_once_for_a_module() -> None:
    modules = {"a": "features.1.e_mhsa", "b": "features.1.e_mhsa", "c": "features.0", "d": "features.0"}
    pool = op("avg_pool", "d", (1, 64, 4), x="image", kernel_sizes=held([64]))
    findings = lint(package(pool, turn("a"), turn("c"), turn("b"), modules=modules))
    assert [(each.rule, each.module, each.operation) for each in findings] == [
        ("transpose", "features.1.e_mhsa", "a"),
        ("transpose", "features.0", "c"),
        ("pool-window", "features.0", "d"),
    ]
    assert findings[0].message.endswith(" (2 operations)")
    assert not findings[1].message.endswith("operations)")
    assert str(findings[1]).startswith("heuristic transpose: features.0: transpose copies memory")
    assert str(findings[1]).endswith("(Apple, Deploying Transformers on the Apple Neural Engine, 2022)")


def test_a_rule_that_holds_everywhere_speaks_once() -> None:
    names = [f"t{index}" for index in range(6)]
    (finding,) = lint(package(*map(turn, names), modules={name: f"features.{name}" for name in names}))
    assert (finding.module, finding.operation) == ("features.t0", "t0")
    assert finding.message.endswith("(6 operations in 6 modules, this the first)")


def test_a_module_record_that_is_no_record_is_none() -> None:
    made = package(turn("a"))
    (finding,) = lint(replace(made, metadata={MODULES: "[1"}))
    assert finding.module == ""
