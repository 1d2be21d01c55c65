"""What is told of a parting, and which tensors are cut out around it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nextvit_deploy.bisect.cut import Cut
from nextvit_deploy.bisect.known import Known
from nextvit_deploy.bisect.partings import partings
from nextvit_deploy.bisect.traced import Traced
from nextvit_exporters.errors import BuildFailed
from tests.deploy.bisect.networks import RUNS, TOLERANCE, evidence, known, node, numbers, step, traced

CHAIN = known(
    node("x", (), numbers(0)), node("a", ["x"], numbers(1)), node("b", ["a"], numbers(2)), carried={"b": ("b.norm",)}
)
STEPS = (step("a", ["x"], "t"), step("b", ["t"], "u"))


def cut(found: Traced, right: Known = CHAIN, *, named: bool = True) -> Cut:
    (each,) = partings(evidence(found, right, named=named), TOLERANCE, named=named)
    return each


def changed(at: int, factor: float) -> Traced:
    """``b`` is off on one run."""
    values = numbers(2)
    values[at] *= factor
    return traced(STEPS, {"x": numbers(0), "t": numbers(1), "u": values})


def test_nothing_parts() -> None:
    found = traced(STEPS, {"x": numbers(0), "t": numbers(1), "u": numbers(2)})
    assert partings(evidence(found, CHAIN), TOLERANCE, named=True) == ()


def test_what_is_told() -> None:
    found = cut(traced(STEPS, {"x": numbers(0), "t": numbers(1) * (1 + 1e-7), "u": numbers(2) * 1.5}))
    parting = found.parting
    assert (parting.module, parting.operations, parting.carries) == ("b", ("b/Conv",), ("b.norm",))
    assert parting.error == pytest.approx(0.5)
    assert parting.input_error == pytest.approx(1e-7, rel=1e-3)
    assert parting.why == "1.5 times what PyTorch gives"
    assert (set(found.inputs), set(found.got), set(found.expected)) == ({"t"}, {"u"}, {"u"})


@pytest.mark.parametrize("at", range(RUNS))
def test_the_images_are_those_that_show_it(at: int) -> None:
    found = cut(changed(at, 1.5))
    assert np.array_equal(found.inputs["t"], numbers(1)[at].astype(np.float32))
    assert np.array_equal(found.expected["u"], numbers(2)[at].astype(np.float32))
    assert np.array_equal(found.got["u"], (1.5 * numbers(2)[at]).astype(np.float32))


@pytest.mark.parametrize("at", range(RUNS))
def test_images_that_give_no_number_come_first(at: int) -> None:
    found = cut(changed(at, math.nan))
    assert found.parting.error == math.inf
    assert np.isnan(found.got["u"]).all()
    assert np.array_equal(found.inputs["t"], numbers(1)[at].astype(np.float32))


def test_images_for_which_pytorch_gives_zeros_alone_come_last() -> None:
    """Nothing can be set against zeros, so that the piece could not be told to fail as the whole does."""
    wanted = numbers(2)
    wanted[0] = 0
    right = known(node("x", (), numbers(0)), node("a", ["x"], numbers(1)), node("b", ["a"], wanted))
    values = wanted + 0.01
    values[2] += 0.5
    found = cut(traced(STEPS, {"x": numbers(0), "t": numbers(1), "u": values}), right)
    assert np.array_equal(found.expected["u"], numbers(2)[2].astype(np.float32))


def test_operations_without_a_counterpart_come_along() -> None:
    steps = (STEPS[0], step("b", ["t"], "half", "Mul"), step("b", ["half"], "most", "Pad"), step("b", ["most"], "u"))
    values = {"x": numbers(0), "t": numbers(1), "half": numbers(77, 5), "most": numbers(78, 6), "u": numbers(92)}
    found = cut(traced(steps, values))
    assert found.operations == ("b/Mul", "b/Pad", "b/Conv")
    assert (set(found.inputs), set(found.expected)) == ({"t"}, {"u"})


def test_what_is_expected_has_the_artefact_s_shape() -> None:
    off = 2 * numbers(2).reshape(RUNS, 2, 4)
    found = cut(traced(STEPS, {"x": numbers(0), "t": numbers(1), "u": off}))
    assert found.expected["u"].shape == found.got["u"].shape == (2, 4)


def test_two_branches_are_two_partings() -> None:
    right = known(node("x", (), numbers(0)), node("a", ["x"], numbers(1)), node("b", ["x"], numbers(2)))
    found = traced(
        (step("a", ["x"], "t"), step("b", ["x"], "u")), {"x": numbers(0), "t": numbers(91), "u": numbers(92)}
    )
    cuts = partings(evidence(found, right), TOLERANCE, named=True)
    assert [each.parting.module for each in cuts] == ["a", "b"]


def test_what_breaks_down_on_the_first_image_is_held_against_that() -> None:
    """Of the artefact there is one run, however many PyTorch made."""
    found = traced(STEPS, {"x": numbers(0)[:1], "t": numbers(1)[:1]}, BuildFailed("it breaks down"))
    assert found.runs == 1
    parting = cut(found, CHAIN.of_first(found.runs)).parting
    assert (parting.module, parting.why, parting.error) == ("b", "it breaks down", math.inf)


def test_a_norm_that_a_stranger_folded_is_no_other_input() -> None:
    right = known(
        node("x", (), numbers(0)),
        node("a", ["x"], numbers(1)),
        node("norm", ["a"], numbers(2), kind="BatchNorm2d"),
        node("b", ["norm"], numbers(3)),
    )
    off = numbers(3)
    off[:, :, ::2] += 1
    found = traced(STEPS, {"x": numbers(0), "t": numbers(1), "u": off})
    parting = cut(found, right, named=False).parting
    assert (parting.module, parting.carries) == ("b", ("norm",))
    assert "reads" not in parting.why
