"""Rounding with feedback: exact against a slow independent reference, and never worse than the nearest."""

from __future__ import annotations

import numpy as np
import pytest

from nextvit_exporters.errors import InvariantError
from nextvit_exporters.quantize import gptq
from nextvit_exporters.quantize.calibration import Float64s, Int8s
from nextvit_exporters.quantize.gptq import MOST_STEPS, feedback_codes, gram_error
from nextvit_exporters.quantize.weights import nearest_codes, weight_of, weight_steps

DAMPING = 0.01


def correlated(inner: int, seed: int) -> Float64s:
    """Products of inputs that mostly go together: a quarter as many sources as inputs, and some noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(500, inner // 4)) @ rng.normal(size=(inner // 4, inner)) + 0.3 * rng.normal(size=(500, inner))
    return x.T @ x


def case(outside: int, inner: int, seed: int = 0) -> tuple[Float64s, Float64s, Float64s]:
    weight = np.random.default_rng(seed).normal(size=(outside, inner))
    return weight, weight_steps(weight * 8.0, "fp16"), correlated(inner, seed + 1)


def reference(weight: Float64s, steps: Float64s, gram: Float64s, *, sign: float = 1.0) -> Int8s:
    """Optimal brain quantization by its definition: after each column the inverse of what is left, from scratch."""
    inner = len(gram)
    damped = gram + DAMPING * np.diag(gram).mean() * np.eye(inner)
    left = list(np.argsort(-np.diag(gram), kind="stable"))
    moving, codes = weight.copy(), np.zeros(weight.shape)
    while left:
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        column = left[0]
        codes[:, column] = np.clip(np.rint(moving[:, column] / steps), -127, 127)
        error = moving[:, column] - codes[:, column] * steps
        moving[:, left] -= sign * np.outer(error / inverse[0, 0], inverse[0])
        left = left[1:]
    return codes.astype(np.int8)


def errors(codes: Int8s, weight: Float64s, steps: Float64s, gram: Float64s) -> Float64s:
    difference = weight - weight_of(codes, steps)
    return np.array([row @ gram @ row for row in difference])


@pytest.mark.parametrize(("outside", "inner", "block"), [(5, 24, 128), (7, 40, 16), (3, 33, 8)])
def test_agrees_with_the_definition(monkeypatch: pytest.MonkeyPatch, outside: int, inner: int, block: int) -> None:
    monkeypatch.setattr(gptq, "_BLOCK", block)
    weight, steps, gram = case(outside, inner)
    wanted, nearest = reference(weight, steps, gram), nearest_codes(weight, steps)
    better = errors(wanted, weight, steps, gram) < errors(nearest, weight, steps, gram)
    assert better.mean() > 0.5
    assert np.array_equal(feedback_codes(weight, steps, gram, DAMPING), np.where(better[:, None], wanted, nearest))


def test_the_error_halves_at_least_where_inputs_go_together() -> None:
    weight, steps, gram = case(64, 96)
    found, nearest = feedback_codes(weight, steps, gram), nearest_codes(weight, steps)
    with_feedback, without = (errors(codes, weight, steps, gram).sum() for codes in (found, nearest))
    assert with_feedback < 0.5 * without
    wrong = errors(reference(weight, steps, gram, sign=-1.0), weight, steps, gram).sum()
    assert wrong > without


@pytest.mark.parametrize("seed", range(5))
def test_no_row_is_worse_than_nearest(seed: int) -> None:
    """Few and almost independent inputs: feedback loses as often as it wins."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, 12))
    weight, gram = rng.normal(size=(50, 12)), x.T @ x
    steps = weight_steps(weight, "fp16")
    found, nearest = feedback_codes(weight, steps, gram), nearest_codes(weight, steps)
    assert (errors(found, weight, steps, gram) <= errors(nearest, weight, steps, gram)).all()
    assert (found != nearest).any()


def test_codes_stay_near_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, steps, gram = case(32, 64)
    free = feedback_codes(weight, steps, gram).astype(int) - nearest_codes(weight, steps)
    assert 1 < np.abs(free).max() <= MOST_STEPS
    monkeypatch.setattr(gptq, "MOST_STEPS", 1)
    held = feedback_codes(weight, steps, gram).astype(int) - nearest_codes(weight, steps)
    assert np.abs(held).max() == 1


def test_dead_inputs_are_rounded_to_the_nearest() -> None:
    weight, steps, gram = case(6, 24)
    gram[:, [3, 17]] = gram[[3, 17]] = 0.0
    found, alive = feedback_codes(weight, steps, gram), [i for i in range(24) if i not in {3, 17}]
    assert np.array_equal(found[:, [3, 17]], nearest_codes(weight, steps)[:, [3, 17]])
    alone = feedback_codes(weight[:, alive], steps, gram[np.ix_(alive, alive)])
    assert np.array_equal(found[:, alive], alone)
    assert np.array_equal(feedback_codes(weight, steps, np.zeros((24, 24))), nearest_codes(weight, steps))


def test_one_image_is_enough_to_round() -> None:
    """A singular product of rank one, made regular by the damping."""
    weight, steps, _ = case(4, 24)
    x = np.random.default_rng(3).normal(size=24)
    gram = np.outer(x, x)
    assert feedback_codes(weight, steps, gram).dtype == np.int8


def test_products_that_are_not_finite_are_refused() -> None:
    weight, steps, gram = case(4, 24)
    gram[0, 1] = np.inf
    with pytest.raises(InvariantError, match="the products of a map's inputs"):
        feedback_codes(weight, steps, gram)


def test_gram_error_is_what_outputs_move_by() -> None:
    rng = np.random.default_rng(0)
    x, difference = rng.normal(size=(30, 8)), rng.normal(size=(5, 8))
    assert np.allclose(gram_error(difference, x.T @ x), ((x @ difference.T) ** 2).sum(axis=0), rtol=1e-13)
