"""The comparison says what it says: on hand-made numbers, and where nothing can be said."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nextvit_deploy.compare import Comparison, compare
from nextvit_exporters.errors import VerificationFailed
from nextvit_exporters.executors.base import Array
from nextvit_exporters.spec import Tolerance

TIGHT = Tolerance(1e-5, "made up here")
WANT = np.array([[3.0, 1.0, 0.0, -2.0], [0.0, 2.0, 1.0, 1.5]])


def one(actual: Array, expected: Array, tolerance: Tolerance = TIGHT) -> Comparison:
    (found,) = compare({"y": actual}, {"y": expected}, tolerance)
    assert found.output == "y"
    assert found.count == len(expected)
    assert found.tolerance is tolerance
    return found


def test_equal_outputs() -> None:
    found = one(WANT.copy(), WANT)
    assert found
    assert found.finite
    assert (found.max_abs, found.relative_max, found.relative_rms) == (0.0, 0.0, 0.0)
    assert (found.top1, found.top5, found.margin, found.can_flip) == (1.0, 1.0, 0.0, 0)
    assert found.cosine == pytest.approx(1.0, abs=1e-15)
    assert found.sqnr_db == math.inf
    assert str(found) == "ok y: relative rms 0.0e+00 <= 1e-05, max|d| 0.0e+00, inf dB, can flip 0 of 2 decisions"


def test_hand_made_numbers() -> None:
    error = np.array([[0.0, 0.2, 0.0, 0.0], [-0.1, 0.0, 0.0, 0.0]])
    found = one(WANT + error, WANT)
    signal, noise = 9 + 1 + 4 + 4 + 1 + 2.25, 0.04 + 0.01
    assert found.max_abs == pytest.approx(0.2)
    assert found.relative_max == pytest.approx(0.2 / 3)
    assert found.relative_rms == pytest.approx(math.sqrt(noise / signal))
    assert found.sqnr_db == pytest.approx(10 * math.log10(signal / noise))
    first = (9 + 1.2 + 4) / math.sqrt((9 + 1.44 + 4) * 14)
    second = (4 + 1 + 2.25) / math.sqrt(7.25 * 7.26)
    assert found.cosine == pytest.approx(min(first, second))
    assert found.margin == pytest.approx(max(2 * 0.2 / 2, 2 * 0.1 / 0.5))
    assert (found.top1, found.can_flip) == (1.0, 0)
    assert not found
    assert str(found) == "FAIL y: relative rms 4.9e-02 > 1e-05, max|d| 2.0e-01, 26 dB, can flip 0 of 2 decisions"


def test_the_tolerance_is_the_last_value_allowed() -> None:
    got = WANT * (1 + 2**-20)
    assert one(got, WANT, Tolerance(2**-20, "exact in binary"))
    assert not one(got, WANT, Tolerance(math.nextafter(2**-20, 0.0), "one step below"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["actual", "expected", "both"])
def test_not_finite_fails_whatever_the_tolerance(bad: float, where: str) -> None:
    broken = WANT.copy()
    broken[1, 2] = bad
    found = one(
        WANT if where == "expected" else broken, WANT if where == "actual" else broken, Tolerance(math.inf, "any")
    )
    assert not found
    assert not found.finite
    assert found.relative_rms == math.inf
    assert (found.top1, found.margin, found.can_flip) == (None, None, None)
    assert str(found) == "FAIL y: NaN or Inf in the output"


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ({"y": WANT}, {"z": WANT}),
        ({"y": WANT, "z": WANT}, {"y": WANT}),
        ({"y": WANT}, {"y": WANT, "z": WANT}),
        ({}, {"y": WANT}),
        ({}, {}),
        ({"y": WANT}, {"y": WANT.T}),
        ({"y": WANT[:1]}, {"y": WANT}),  # broadcasting would compare them
        ({"y": WANT.reshape(2, 4, 1, 1)}, {"y": WANT}),
        ({"y": WANT[:0]}, {"y": WANT[:0]}),
        ({"y": np.zeros_like(WANT)}, {"y": np.zeros_like(WANT)}),
        ({"y": WANT}, {"y": np.zeros_like(WANT)}),
    ],
)
def test_what_cannot_be_compared_raises(actual: dict[str, Array], expected: dict[str, Array]) -> None:
    with pytest.raises(VerificationFailed) as caught:
        compare(actual, expected, TIGHT)
    assert "\n" not in str(caught.value)


def test_the_refusals_name_what_differs() -> None:
    with pytest.raises(VerificationFailed, match=r"outputs differ: \['y'\] against \['z'\]"):
        compare({"y": WANT}, {"z": WANT}, TIGHT)
    with pytest.raises(VerificationFailed, match=r"output 'y' has shape \(1, 4\), PyTorch's has \(2, 4\)"):
        compare({"y": WANT[:1]}, {"y": WANT}, TIGHT)
    with pytest.raises(VerificationFailed, match="nothing but zeros"):
        compare({"y": WANT}, {"y": np.zeros_like(WANT)}, TIGHT)


def test_every_output_is_compared() -> None:
    good, bad = compare({"b": WANT * 2, "a": WANT}, {"a": WANT, "b": WANT}, TIGHT)
    assert (good.output, bool(good)) == ("a", True)
    assert (bad.output, bool(bad)) == ("b", False)
    assert bad.relative_rms == bad.relative_max == pytest.approx(1.0)


def test_an_image_of_zeros_among_others() -> None:
    want = np.array([[1.0, 2.0], [0.0, 0.0]])
    assert one(want.copy(), want).cosine == pytest.approx(1.0)
    assert one(want + np.array([[0.0, 0.0], [0.0, 1e-9]]), want).cosine == 0.0


@pytest.mark.parametrize(
    ("error", "margin", "can_flip"),
    [(0.2, 0.4, 0), (0.49, 0.98, 0), (0.5, 1.0, 1), (5.0, 10.0, 1)],
)
def test_margin_of_a_gap_of_one(error: float, margin: float, can_flip: int) -> None:
    want = np.array([[7.0, 6.0, 0.0]])
    found = one(want + np.array([[0.0, 0.0, error]]), want)  # wherever the difference is, it could have been at the top
    assert found.margin == pytest.approx(margin)
    assert found.can_flip == can_flip


def test_tied_classes_can_always_flip() -> None:
    want = np.array([[1.0, 1.0, 0.0], [9.0, 0.0, 0.0]])
    found = one(want.copy(), want)
    assert (found.margin, found.can_flip) == (math.inf, 1)


def test_the_margin_is_the_worst_images() -> None:
    want = np.array([[10.0, 0.0], [1.0, 0.0], [5.0, 4.9]])
    found = one(want + 0.2, want)
    assert found.margin == pytest.approx(0.4 / 0.1)
    assert found.can_flip == 1


VALUES = st.integers(-64, 64).map(lambda value: value / 16)  # exact in binary, so that borders are borders


@given(
    want=st.lists(VALUES, min_size=2, max_size=4).filter(any),
    error=st.integers(0, 64).map(lambda value: value / 16),
    at=st.integers(0, 3),
)
def test_below_a_margin_of_one_nothing_flips_and_above_it_something_can(
    want: list[float], error: float, at: int
) -> None:
    """Every corner of the box of allowed differences is tried; the first class is unique exactly below 1."""
    expected = np.array([want])
    difference = np.zeros_like(expected)
    difference[0, at % len(want)] = error
    found = one(expected + difference, expected, Tolerance(1e9, "wide"))
    corners = (expected[0] + np.array(signs) * error for signs in itertools.product((-1, 1), repeat=len(want)))
    first = int(expected[0].argmax())
    kept = all((np.delete(corner, first) < corner[first]).all() for corner in corners)
    assert found.margin is not None
    assert kept == (found.margin < 1.0)
    assert found.can_flip == (0 if kept else 1)


def classes(*order: int, count: int = 8) -> NDArray[np.float64]:
    """Logits whose classes come in this order, the rest far below."""
    values = np.linspace(-10, -20, count).astype(np.float64)
    values[list(order)] = np.arange(len(order), 0, -1)
    return values


def test_top_1_and_top_5() -> None:
    want = np.stack([classes(0, 1, 2, 3, 4), classes(5, 4, 3, 2, 1)])
    got = np.stack([classes(1, 0, 2, 3, 7), classes(5, 4, 3, 2, 1)])
    found = one(got, want)
    assert found.top1 == 0.5  # of two images one has another first class
    assert found.top5 == pytest.approx((4 / 5 + 5 / 5) / 2)  # order within the five does not count
    assert found.can_flip == 1


def test_fewer_than_five_classes() -> None:
    found = one(np.array([[1.0, 2.0]]), np.array([[2.0, 1.0]]))
    assert (found.top1, found.top5) == (0.0, 1.0)


@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (2, 8, 4), (2, 1), (2,)])
def test_feature_maps_decide_nothing(shape: tuple[int, ...]) -> None:
    want = np.random.default_rng(0).standard_normal(shape)
    found = one(want + 1e-9, want)
    assert found
    assert (found.top1, found.top5, found.margin, found.can_flip) == (None, None, None, None)
    assert "decisions" not in str(found)


def test_half_precision_is_compared_in_double() -> None:
    want = np.full((1, 4096), 60000, np.float16)  # its squares overflow float16, their sum float32's exactness
    found = one(want, want)
    assert found.finite
    assert found.relative_rms == 0.0
