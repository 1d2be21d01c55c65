"""Which of PyTorch's tensors has the numbers of one of the artefact's."""

from __future__ import annotations

import math

import numpy as np

from nextvit_deploy.bisect.match import apart, match, rms
from tests.deploy.bisect.networks import TOLERANCE, known, node, numbers, step, traced

RIGHT = known(node("x", (), numbers(0)), node("a", ["x"], numbers(1)), node("b", ["a"], numbers(2)))
STEPS = (step("a", ["x"], "t"), step("b", ["t"], "u"))


def test_names_and_shapes_don_t_count() -> None:
    found = match(traced(STEPS, {"x": numbers(0), "t": numbers(2).reshape(3, 2, 4), "u": numbers(1)}), RIGHT, TOLERANCE)
    assert {name: each.nodes for name, each in found.items()} == {"x": ("x",), "t": ("b",), "u": ("a",)}


def test_the_order_of_the_numbers_does() -> None:
    found = match(traced(STEPS, {"x": numbers(0), "t": numbers(1)[:, :, ::-1]}), RIGHT, TOLERANCE)
    assert found.keys() == {"x"}


def test_what_is_just_within_the_tolerance_is_found_from_both_sides() -> None:
    for factor, there in ((1 + 0.99e-5, True), (1 - 0.99e-5, True), (1 + 1.02e-5, False), (1 - 1.02e-5, False)):
        found = match(traced(STEPS, {"x": numbers(0), "t": numbers(1) * factor}), RIGHT, TOLERANCE)
        assert ("t" in found) is there, factor


def test_as_large_is_not_enough() -> None:
    right, across = numbers(1), numbers(5)
    across -= right * (across * right).sum() / (right * right).sum()
    values = right + across * (5 * TOLERANCE * rms(right) / rms(across))
    assert abs(rms(values) / rms(right) - 1) < TOLERANCE / 100
    assert match(traced(STEPS, {"x": numbers(0), "t": values}), RIGHT, TOLERANCE).keys() == {"x"}


def test_the_nearest_is_first_and_what_is_much_further_off_is_left_out() -> None:
    near, far = numbers(1) * (1 + 1e-9), numbers(1) * (1 - 5e-6)  # which is found first
    right = known(node("x", (), numbers(0)), node("far", ["x"], far), node("near", ["x"], near))
    found = match(traced(STEPS, {"x": numbers(0), "t": numbers(1)}), right, TOLERANCE)
    assert found["t"].nodes == ("near",)
    assert found["t"].error < 2e-9


def test_what_has_the_same_numbers_as_several_is_each_of_them() -> None:
    right = known(node("x", (), numbers(0)), node("a", ["x"], numbers(1)), node("a.act", ["a"], numbers(1)))
    found = match(traced(STEPS, {"x": numbers(0), "t": numbers(1)}), right, TOLERANCE)
    assert found["t"].nodes == ("a", "a.act")


def test_constants_whole_numbers_and_what_is_no_number_match_nothing() -> None:
    broken = numbers(1)
    broken[1, 0, 0] = np.nan
    whole = np.ones((3, 1, 8), np.int64)
    right = known(node("x", (), numbers(0)), node("a", ["x"], whole.astype(np.float64)))
    values = {"x": numbers(0), "t": whole, "u": broken, "constant": numbers(0)}
    assert match(traced(STEPS, values), right, TOLERANCE).keys() == {"x"}


def test_zeros_are_zeros() -> None:
    zeros = np.zeros((3, 1, 8))
    right = known(node("x", (), numbers(0)), node("a", ["x"], zeros))
    assert match(traced(STEPS, {"x": numbers(0), "t": zeros}), right, TOLERANCE)["t"].error == 0
    assert "t" not in match(traced(STEPS, {"x": numbers(0), "t": zeros + 1e-30}), right, TOLERANCE)


def test_how_far_apart() -> None:
    assert rms(np.array([3.0, 4.0])) == math.sqrt(12.5)
    assert apart(np.array([1.0, 2.0]), np.array([2.0, 4.0])) == 0.5
    assert apart(np.array([1.0]), np.array([1.0, 1.0])) == math.inf
    assert apart(np.array([math.inf]), np.array([1.0])) == math.inf
    assert apart(np.array([1.0]), np.array([0.0])) == math.inf
