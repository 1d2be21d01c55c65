"""A budget is read as it is written, and counts exactly."""

from __future__ import annotations

import math

import pytest

from nextvit_deploy.precision.budget import Budget, decibels
from nextvit_exporters.errors import UnsupportedSpec


@pytest.mark.parametrize(
    ("text", "amount", "in_db", "said"),
    [
        ("0.5", 0.5, False, "0.5pt"),
        ("0.5pt", 0.5, False, "0.5pt"),
        (" 1 PT ", 1.0, False, "1pt"),
        (".25", 0.25, False, "0.25pt"),
        ("0", 0.0, False, "0pt"),
        ("100", 100.0, False, "100pt"),
        ("30dB", 30.0, True, "30dB"),
        ("30.5 db", 30.5, True, "30.5dB"),
        ("200dB", 200.0, True, "200dB"),
    ],
)
def test_a_budget_is_read_and_said(text: str, amount: float, in_db: bool, said: str) -> None:  # noqa: FBT001 - pytest's
    budget = Budget.parse(text)
    assert budget == Budget(amount, in_db)
    assert str(budget) == said
    assert Budget.parse(said) == budget


@pytest.mark.parametrize("text", ["", "-1", "1e-3", "0.5%", "dB", "nan", "inf", "0,5", "1 2", "٣", "pt", ".", "+1"])
def test_what_is_no_budget_says_what_is(text: str) -> None:
    with pytest.raises(UnsupportedSpec) as refused:
        Budget.parse(text)
    assert str(refused.value) == (
        f"'{text}' is no accuracy budget; write points of top-1 as in 0.5, or decibels of the logits as in 30dB"
    )


@pytest.mark.parametrize("text", ["101", "9" * 400, "9" * 400 + "dB"])
def test_a_budget_beyond_all_there_is_is_refused(text: str) -> None:
    with pytest.raises(UnsupportedSpec, match="beyond all there is"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "lost", "count", "allowed"),
    [
        ("0.5", 0, 64, True),
        ("0.5", 1, 64, False),
        ("0.29", 29, 10_000, True),  # 0.29 * 10000 is 2899.9999999999995 to a computer
        ("0.29", 30, 10_000, False),
        ("0", 0, 10, True),
        ("0", 1, 50_000, False),
        ("1", -3, 10, True),
        ("2", 1, 50, True),
    ],
)
def test_points_allow_so_many_lost_answers(text: str, lost: int, count: int, allowed: bool) -> None:  # noqa: FBT001
    assert Budget.parse(text).allows(0.0, lost, count) is allowed


def test_decibels_ask_for_the_logits_alone() -> None:
    budget = Budget.parse("30dB")
    assert budget.allows(30.0, 5, 10)
    assert budget.allows(math.inf, None, 10)
    assert not budget.allows(29.999, 0, 10)
    with pytest.raises(ValueError, match="labelled"):
        Budget.parse("1pt").allows(99.0, None, 10)


@pytest.mark.parametrize(("text", "count", "told"), [("0.5", 199, 1), ("0.5", 200, 0), ("0", 10**6, 1), ("30dB", 1, 0)])
def test_a_budget_finer_than_one_image_is_said_to_be(text: str, count: int, told: int) -> None:
    assert len(Budget.parse(text).notes(count)) == told


def test_decibels_of_no_noise_are_infinite() -> None:
    assert decibels(4.0, 0.0) == math.inf
    assert decibels(100.0, 1.0) == pytest.approx(20.0)
