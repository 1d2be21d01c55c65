"""At which operation two sides part, and which module is blamed for it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nextvit_deploy.bisect.known import Known
from nextvit_deploy.bisect.places import places
from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.executors.base import Step
from tests.deploy.bisect.networks import TOLERANCE, evidence, known, node, numbers, step, traced

CHAIN = known(
    node("x", (), numbers(0)),
    node("a", ["x"], numbers(1)),
    node("b", ["a"], numbers(2)),
    node("c", ["b"], numbers(3)),
)
STEPS = (step("a", ["x"], "t"), step("b", ["t"], "u"), step("c", ["u"], "v"))


def blamed(steps: Sequence[Step], seeds: dict[str, int], right: Known = CHAIN, *, failure: bool = False) -> list[str]:
    """Modules by place; ``seeds`` are those of the artefact's tensors."""
    broken = BuildFailed("it breaks down") if failure else None
    found = traced(steps, {name: numbers(seed) for name, seed in seeds.items()}, broken)
    return [each.module for each in places(evidence(found, right), TOLERANCE)]


def test_what_agrees_has_no_place() -> None:
    assert blamed(STEPS, {"x": 0, "t": 1, "u": 2, "v": 3}) == []


def test_only_the_first_of_a_chain_is_blamed() -> None:
    assert blamed(STEPS, {"x": 0, "t": 1, "u": 92, "v": 93}) == ["b"]


def test_what_needs_no_explanation() -> None:
    """PyTorch's ``a`` is in none of the artefact's tensors, and what follows could not be there without it."""
    found = evidence(
        traced((step("b", ["x"], "u"), STEPS[2]), {"x": numbers(0), "u": numbers(2), "v": numbers(3)}), CHAIN
    )
    assert found.sound == {"x", "a", "b", "c"}
    assert not found.unexplained


def test_a_named_layer_that_is_off_needs_one() -> None:
    values = {"x": numbers(0), "t": numbers(1), "u": numbers(92), "v": numbers(3)}
    found = evidence(traced(STEPS, values), CHAIN)
    assert (found.sound, found.agreed) == ({"x", "a", "c"}, {"x", "t", "v"})
    assert not evidence(traced(STEPS, values), CHAIN, named=False).unexplained


@pytest.mark.parametrize(("error", "modules"), [(0.5 * TOLERANCE, ["a", "d"]), (0.01 * TOLERANCE, ["a", "d", "c"])])
def test_behind_a_place_is_none_until_all_is_well_again(error: float, modules: list[str]) -> None:
    right = known(*CHAIN.nodes.values(), node("d", ["x"], numbers(4)))
    steps = (STEPS[0], STEPS[1], step("d", ["x"], "w"), STEPS[2])
    u = numbers(2) * (1 + error)
    values = {"x": numbers(0), "t": numbers(91), "u": u, "w": numbers(94), "v": numbers(93)}
    assert [each.module for each in places(evidence(traced(steps, values), right), TOLERANCE)] == modules


def test_two_branches_have_a_place_each() -> None:
    right = known(
        node("x", (), numbers(0)),
        node("a", ["x"], numbers(1)),
        node("b", ["x"], numbers(2)),
        node("c", ["a", "b"], numbers(3)),
    )
    steps = (step("a", ["x"], "t"), step("b", ["x"], "u"), step("c", ["t", "u"], "v"))
    assert blamed(steps, {"x": 0, "t": 91, "u": 92, "v": 93}, right) == ["a", "b"]


def test_a_step_in_between_that_pytorch_does_not_do_is_no_place() -> None:
    steps = (STEPS[0], step("b", ["t"], "half", "Mul"), step("b", ["half"], "u"), STEPS[2])
    assert blamed(steps, {"x": 0, "t": 1, "half": 77, "u": 2, "v": 3}) == []


def test_a_layer_that_is_off_is_told_where_what_follows_hides_it() -> None:
    assert blamed(STEPS, {"x": 0, "t": 1, "u": 92, "v": 3}) == ["b"]


def test_a_layer_that_is_left_out_is_blamed_and_not_the_one_that_is_there() -> None:
    steps = (STEPS[0], step("c", ["t"], "v"))
    assert blamed(steps, {"x": 0, "t": 1, "v": 93}) == ["b"]


def test_a_layer_that_gives_another_s_numbers_is_blamed() -> None:
    assert blamed(STEPS, {"x": 0, "t": 1, "u": 1, "v": 93}) == ["b"]


def test_an_operation_that_breaks_down_is_the_place() -> None:
    assert blamed(STEPS, {"x": 0, "t": 1}, failure=True) == ["b"]


def test_where_nothing_moving_leads_to_the_breakdown_it_is_found_too() -> None:
    steps = (step("a", ["constant"], "t"), *STEPS[1:])
    assert blamed(steps, {"x": 0}, failure=True) == ["a"]
