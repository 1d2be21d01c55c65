"""The executor of packages: what it takes, gives out and refuses, on packages of a few operations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextvit_exporters.coreml.program import Binding, Constant, Feature, Operation, Output, Package, Program, TensorType
from nextvit_exporters.errors import BuildFailed, NotExecutable, UnsupportedSpec, VerificationFailed
from nextvit_exporters.executors.mil import MilReference
from nextvit_exporters.executors.mil_program import ProgramReference
from tests.exporters.coreml.small_programs import DOUBLE, Array, constant, floats, held, ints, package

FLOAT = TensorType("float32", (1, 3, 2, 4))
PICTURE = np.random.default_rng(0).integers(0, 256, (1, 2, 4, 3)).astype(np.uint8)


def operation(kind: str, name: str, out: TensorType, **bound: str) -> Operation:
    return Operation(kind, name, {key: (value,) for key, value in bound.items()}, {}, (Output(name, out),))


def doubled(feature: Feature, kind: TensorType = FLOAT, **fields: Any) -> Package:
    """2 * x."""
    factor = held("two", np.int32(2) if kind.dtype == "int32" else np.float32(2))
    program = Program("CoreML6", {"x": kind}, (factor, operation("mul", "y", kind, x="x", y="two")), ("y",))
    return package(program, [feature], **fields)


def image(color: str = "RGB", **fields: Any) -> Feature:
    return Feature("x", "image", "", (1, 1 if color.startswith("GRAY") else 3, 2, 4), color=color, **fields)


def test_it_says_what_it_is() -> None:
    executor = MilReference(Path("nowhere"), "pessimistic")
    assert (executor.name, executor.mode, executor.findings) == ("mil-reference", "pessimistic", {})
    assert executor.labels_of_last_run == ()


def test_a_package_that_is_not_there_is_refused() -> None:
    pytest.importorskip("coremltools")
    with pytest.raises((BuildFailed, NotExecutable)), MilReference(Path("nowhere.mlpackage"), "exact"):
        pass


def test_it_has_to_be_entered() -> None:
    executor = MilReference(doubled(image()), "exact")
    with pytest.raises(RuntimeError, match="closed"):
        executor.run({"x": PICTURE})
    with executor:
        executor.run({"x": PICTURE})
    with pytest.raises(RuntimeError, match="closed"):
        executor.run({"x": PICTURE})


def ran(made: Package, x: Any, **options: Any) -> Array:
    with MilReference(made, "exact", **options) as executor:
        found: Array = executor.run({"x": x})["y"]
        return found


def test_pictures_go_in_by_channel_in_the_package_s_order() -> None:
    by_channel = PICTURE.transpose(0, 3, 1, 2).astype(np.float32)
    assert np.array_equal(ran(doubled(image()), PICTURE), 2 * by_channel)
    assert np.array_equal(ran(doubled(image("BGR")), PICTURE), 2 * by_channel[:, ::-1])
    gray = TensorType("float32", (1, 1, 2, 4))
    assert np.array_equal(ran(doubled(image("GRAYSCALE"), gray), PICTURE[..., 0]), 2 * by_channel[:, :1])


@pytest.mark.parametrize(
    "wrong",
    [
        PICTURE.astype(np.float32),
        PICTURE[0],
        PICTURE.transpose(0, 3, 1, 2),
        np.concatenate([PICTURE, PICTURE]),
        PICTURE[:, :1],
        PICTURE[..., :1],
    ],
)
def test_what_is_no_such_picture_is_refused(wrong: Array) -> None:
    with pytest.raises(UnsupportedSpec, match=r"^it.mlpackage reads x as ") as refusal:
        ran(doubled(image()), wrong)
    assert str(refusal.value).isprintable()


def test_a_gray_picture_has_one_channel_and_half_ones_are_not_known() -> None:
    with pytest.raises(UnsupportedSpec, match=r"uint8 \(1, H, W\), not as uint8 \(1, 2, 4, 3\)"):
        ran(doubled(image("GRAYSCALE"), TensorType("float32", (1, 1, 2, 4))), PICTURE)
    with pytest.raises(NotExecutable, match="a picture in GRAYSCALE_FLOAT16"):
        ran(doubled(image("GRAYSCALE_FLOAT16")), PICTURE)


def test_tensors_have_the_described_shape_and_kind() -> None:
    x = np.ones((1, 3, 2, 4), np.float32)
    feature = Feature("x", "tensor", "", (1, 3, 2, 4), "float32")
    for dtype in (np.float16, np.float32, np.float64):
        got = ran(doubled(feature), x.astype(dtype))
        assert got.dtype == np.float32
        assert (got == 2).all()
    assert ran(doubled(feature), x, double=True).dtype == np.float64
    with pytest.raises(UnsupportedSpec, match="reads x as 1 x 3 x 2 x 4, not as 1 x 3 x 4 x 2"):
        ran(doubled(feature), x.swapaxes(2, 3))
    with pytest.raises(UnsupportedSpec, match="reads x as float32, not as int32"):
        ran(doubled(feature), x.astype(np.int32))
    whole, kind = Feature("x", "tensor", "", (2,), "int32"), TensorType("int32", (2,))
    assert ran(doubled(whole, kind), ints([3, -4])).tolist() == [6, -8]
    with pytest.raises(UnsupportedSpec, match="reads x as int32, not as int64"):
        ran(doubled(whole, kind), ints([3, -4]).astype(np.int64))


def test_sizes_are_those_of_the_description() -> None:
    """The program takes any: only the description knows."""
    kind = TensorType("float32", (1, 3, None, None))
    listed = Feature("x", "tensor", "", (1, 3, 2, 4), "float32", allowed=((1, 3, 2, 4), (1, 3, 4, 4)))
    assert ran(doubled(listed, kind), np.ones((1, 3, 4, 4), np.float32)).shape == (1, 3, 4, 4)
    with pytest.raises(UnsupportedSpec, match="reads x as 1 x 3 x 2 x 4 or 1 x 3 x 4 x 4, not as 1 x 3 x 4 x 2"):
        ran(doubled(listed, kind), np.ones((1, 3, 4, 2), np.float32))
    ranged = Feature("x", "tensor", "", (1, 3, 2, 4), "float32", ranges=((1, 1), (3, 3), (2, 8), (2, 8)))
    assert ran(doubled(ranged, kind), np.ones((1, 3, 8, 2), np.float32)).shape == (1, 3, 8, 2)
    with pytest.raises(UnsupportedSpec, match=r"reads x as 1 x 3 x 2\.\.8 x 2\.\.8, not as 1 x 3 x 9 x 2"):
        ran(doubled(ranged, kind), np.ones((1, 3, 9, 2), np.float32))


def test_the_program_s_own_inputs_are_held_against_too() -> None:
    feature = Feature("x", "tensor", "", (1, 3, 2, 4), "float32")
    with pytest.raises(VerificationFailed, match=r"input x is declared \(1, 3, 4, 4\), and \(1, 3, 2, 4\)"):
        ran(doubled(feature, TensorType("float32", (1, 3, 4, 4))), np.ones((1, 3, 2, 4), np.float32))


def test_other_inputs_are_refused() -> None:
    with (
        MilReference(doubled(image()), "exact") as executor,
        pytest.raises(UnsupportedSpec, match=r"it.mlpackage reads x, not picture, x"),
    ):
        executor.run({"x": PICTURE, "picture": PICTURE})


def test_what_is_given_out_is_nobody_else_s() -> None:
    """An output may be the input, or a view of it."""
    kind = TensorType("float32", (2,))
    program = Program("CoreML6", {"x": kind}, (operation("identity", "y", kind, x="x"),), ("y",))
    given = floats([1, 2])
    got = ran(package(program, [Feature("x", "tensor", "", (2,), "float32")]), given)
    given[:] = 7
    assert got.tolist() == [1, 2]


def test_an_output_may_be_a_constant() -> None:
    kind = TensorType("float32", (2,))
    program = Program("CoreML6", {"x": kind}, (held("y", floats([3, 4])),), ("y",))
    assert ran(package(program, [Feature("x", "tensor", "", (2,), "float32")]), floats([1, 2])).tolist() == [3, 4]


def test_constants_are_emulated_as_they_are_saved() -> None:
    """float32 arithmetic on a float16 input: the input is rounded, float32 is not."""
    half, wide = TensorType("float16", (2,)), TensorType("float32", (2,))
    operations = (held("to", "fp32"), operation("cast", "y", wide, x="x", dtype="to"))
    made = package(Program("CoreML6", {"x": half}, operations, ("y",)), [Feature("x", "tensor", "", (2,), "float16")])
    x = floats([1 + 2**-12, 3e-8])
    assert np.array_equal(ran(made, x), x)
    with MilReference(made, "emulated") as executor:
        assert np.array_equal(executor.run({"x": x})["y"], x.astype(np.float16).astype(np.float32))


def test_unrounded_leaves_the_steps_of_activations_out() -> None:
    """A number between two steps, and one beyond the last."""
    kind, whole = TensorType("float16", (3,)), TensorType("int8", (3,))
    step = (held("scale", np.float16(0.5)), held("zero", np.int8(3)), held("to", "int8"))
    bound = {"scale": "scale", "zero_point": "zero"}
    operations = (
        *step,
        operation("quantize", "q", whole, input="x", output_dtype="to", **bound),
        operation("dequantize", "y", kind, input="q", **bound),
    )
    made = package(Program("CoreML7", {"x": kind}, operations, ("y",)), [Feature("x", "tensor", "", (3,), "float16")])
    x, found = floats([0.125, -0.375, 100.0]), {}
    for mode in ("exact", "emulated", "pessimistic", "unrounded"):
        with MilReference(made, mode) as executor:
            found[mode] = executor.run({"x": x})["y"].tolist()
    assert found["unrounded"] == x.tolist()
    assert found["exact"] == found["emulated"] == found["pessimistic"] == [0.0, -0.5, 62.0]


LABELS = ["cat", "dog", "owl", "fox"]
VECTOR = TensorType("float32", (1, 4))


def classifier(
    *, softmax: bool = True, labels: Any = None, through: tuple[Operation, ...] = (), last: str = "soft", **fields: Any
) -> Package:
    """Logits x (1, 4) to a label, by way of a softmax and what is asked for behind it."""
    classes: Binding = constant(np.array(LABELS if labels is None else labels, object))
    if labels is not None and not isinstance(labels[0], str):
        classes = Constant(TensorType("int64", (len(labels),)), np.array(labels, np.int64))
    outputs = (Output("label", TensorType("string", ())), Output("probs", TensorType("dictionary", ())))
    soft = (operation("softmax", "soft", VECTOR, x="x"),) if softmax else ()
    classify = Operation("classify", "it", {"probabilities": (last,), "classes": (classes,)}, {}, outputs)
    operations = (*soft, *through, classify)
    program = Program("CoreML6", {"x": VECTOR}, operations, ("label", "probs"))
    return package(program, [Feature("x", "tensor", "", (1, 4), "float32")], **fields)


X = floats([[0.5, 3.0, -1.0, 2.0]])
SOFT = np.exp(X) / np.exp(X).sum()


def test_a_classifier_gives_probabilities_logits_and_a_label() -> None:
    with MilReference(classifier(), "exact") as executor:
        got = executor.run({"x": X})
        assert executor.labels_of_last_run == ("dog",)
        executor.run({"x": -X})
        assert executor.labels_of_last_run == ("owl",)
    assert sorted(got) == ["logits", "probabilities"]
    assert np.array_equal(got["logits"], X)
    assert np.allclose(got["probabilities"], SOFT, rtol=1e-6)


def test_logits_are_found_through_casts_and_views() -> None:
    through = (
        held("shape", [4]),
        operation("reshape", "flat", TensorType("float32", (4,)), x="soft", shape="shape"),
        held("to", "fp32"),
        operation("cast", "wide", TensorType("float32", (4,)), x="flat", dtype="to"),
    )
    with MilReference(classifier(through=through, last="wide"), "exact") as executor:
        got = executor.run({"x": X})
    assert got["probabilities"].shape == (1, 4)
    assert np.array_equal(got["logits"], X)


def test_classify_adds_no_softmax() -> None:
    with MilReference(classifier(softmax=False, last="x"), "exact") as executor:
        got = executor.run({"x": X})
    assert sorted(got) == ["probabilities"]
    assert np.array_equal(got["probabilities"], X)


def test_what_is_behind_the_softmax_is_no_logit() -> None:
    through = (held("two", np.float32(2)), operation("mul", "more", VECTOR, x="soft", y="two"))
    with MilReference(classifier(through=through, last="more"), "exact") as executor:
        assert sorted(executor.run({"x": X})) == ["probabilities"]


def test_labels_may_be_numbers() -> None:
    with MilReference(classifier(labels=[7, 8, 9, 10]), "exact") as executor:
        executor.run({"x": X})
        assert executor.labels_of_last_run == ("8",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ["cat", "dog", "owl", "dog"]}, "classify it has the label 'dog' more than once"),
        ({"labels": LABELS[:3]}, "classify it has 3 labels for 4 probabilities"),
        ({"labels": [*LABELS[:3], "elk"]}, "classify it has other labels than the package is described with"),
    ],
)
def test_labels_are_one_for_each(fields: dict[str, Any], message: str) -> None:
    made = classifier(**fields)
    made = replace(made, labels=tuple(LABELS)) if "elk" in fields["labels"] else made
    with pytest.raises(VerificationFailed, match=message), MilReference(made, "exact") as executor:
        executor.run({"x": X})


def test_operations_that_are_not_known_are_refused_on_entering() -> None:
    made = doubled(image())
    spoilt = replace(made.program.operations[1], kind="topk")
    program = replace(made.program, operations=(made.program.operations[0], spoilt))
    named = replace(made, program=program, metadata={"nextvit_deploy.modules": '{"y": "stem.0"}'})
    executor = MilReference(named, "exact")
    with pytest.raises(NotExecutable, match=r"^topk y \(of stem.0\) is of a kind"), executor:
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": ("z",)}, "the program gives z, which is never written"),
        ({"operations": ()}, "the program gives y, which is never written"),
        ({"inputs": {"x": FLOAT, "more": FLOAT}}, "the program reads more, which was not given"),
        ({"inputs": {}}, "mul y reads x, which is not there"),
    ],
)
def test_a_program_without_what_it_reads_is_refused(change: dict[str, Any], message: str) -> None:
    made = doubled(image())
    spoilt = replace(made, program=replace(made.program, **change))
    with pytest.raises(VerificationFailed, match=message), MilReference(spoilt, "exact") as executor:
        executor.run({"x": PICTURE})


def test_an_unknown_opset_is_refused() -> None:
    made = doubled(image())
    executor = MilReference(replace(made, program=replace(made.program, opset="Fancy1")), "exact")
    with pytest.raises(NotExecutable, match="opset Fancy1"), executor:
        pass


def test_whatever_is_read_no_more_is_let_go() -> None:
    kind = TensorType("float32", (2,))
    operations = (
        operation("relu", "a", kind, x="x"),
        operation("abs", "b", kind, x="a"),
        operation("add", "c", kind, x="a", y="b"),
        operation("exp", "unused", kind, x="c"),
        operation("tanh", "y", kind, x="c"),
    )
    steps = ProgramReference(Program("CoreML6", {"x": kind}, operations, ("y", "b")), DOUBLE)._steps
    assert [step.done for step in steps] == [("x",), (), ("a",), ("unused",), ("c",)]
