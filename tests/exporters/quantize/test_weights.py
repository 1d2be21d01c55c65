"""Steps that the file's type holds, and codes that anyone who reads the file finds again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nextvit_exporters.errors import InvariantError
from nextvit_exporters.quantize.calibration import Float64s
from nextvit_exporters.quantize.weights import LEVELS, nearest_codes, weight_of, weight_steps

TYPES = {"fp16": np.float16, "fp32": np.float32}


@st.composite
def weights(draw: st.DrawFn) -> Float64s:
    """Rows of very different sizes, down to where FP16 has subnormal steps only."""
    rows = draw(arrays.arrays(np.float64, (3, 7), elements=st.floats(-1.0, 1.0)))
    sizes = draw(arrays.arrays(np.float64, 3, elements=st.floats(-24.0, 14.0)))
    found: Float64s = rows * 2.0 ** sizes[:, None]
    return found


@pytest.mark.parametrize("rest", TYPES)
@given(weight=weights())
@settings(max_examples=60, deadline=None)
def test_steps_and_codes(rest: str, weight: Float64s) -> None:
    steps = weight_steps(weight, rest)
    assert (steps > 0.0).all()
    assert np.array_equal(steps.astype(TYPES[rest]).astype(np.float64), steps)
    assert (np.rint(np.abs(weight).max(axis=1) / steps) <= LEVELS).all()
    codes = nearest_codes(weight, steps)
    off = np.abs(weight - weight_of(codes, steps))
    assert (off <= 0.5 * steps[:, None] * (1.0 + 1e-12)).all()
    assert np.array_equal(nearest_codes(-weight, steps), -codes)


@pytest.mark.parametrize("rest", TYPES)
@given(weight=weights())
@settings(max_examples=60, deadline=None)
def test_codes_come_back_from_the_rounded_product(rest: str, weight: Float64s) -> None:
    steps = weight_steps(weight, rest)
    codes = nearest_codes(weight, steps)
    written = weight_of(codes, steps).astype(TYPES[rest]).astype(np.float64)
    assert np.array_equal(nearest_codes(written, steps), codes)


def test_the_step_is_no_larger_than_it_must_be() -> None:
    weight = np.random.default_rng(0).normal(size=(200, 9))
    wanted = np.abs(weight).max(axis=1) / LEVELS
    assert np.abs(weight_steps(weight, "fp16") / wanted - 1.0).max() < 2.0**-10
    assert np.abs(weight_steps(weight, "fp32") / wanted - 1.0).max() < 2.0**-23


def test_the_next_step_up_where_the_nearest_would_clip() -> None:
    """127.5 / 127 subnormal steps: the nearest is one step, and the largest weight would be 128 of it."""
    tiny = float(np.finfo(np.float16).smallest_subnormal)
    weight = np.array([[1.2 * LEVELS * tiny]])
    steps = weight_steps(weight, "fp16")
    assert steps.tolist() == [2.0 * tiny]
    assert nearest_codes(weight, steps).tolist() == [[76]]


def test_zeros_have_a_step() -> None:
    steps = weight_steps(np.zeros((2, 3)), "fp16")
    assert steps.tolist() == [2.0**-24] * 2
    assert not nearest_codes(np.zeros((2, 3)), steps).any()


def test_codes_are_half_to_even_and_clipped() -> None:
    codes = nearest_codes(np.array([[0.5, 1.5, -2.5, 127.4, 200.0, -200.0]]), np.ones(1))
    assert codes.dtype == np.int8
    assert codes.tolist() == [[0, 2, -2, 127, 127, -127]]


def test_a_kernel_keeps_its_shape() -> None:
    weight = np.random.default_rng(1).normal(size=(4, 3, 3, 3))
    steps = weight_steps(weight, "fp16")
    found = weight_of(nearest_codes(weight, steps), steps)
    assert found.shape == weight.shape
    assert np.abs(found - weight).max() <= steps.max()


def test_weights_beyond_the_type_are_refused() -> None:
    weight = np.array([[1e7]])
    with pytest.raises(InvariantError, match="which fp16 can't hold; keep the map in floating point"):
        weight_steps(weight, "fp16")
    assert weight_steps(weight, "fp32")[0] == pytest.approx(1e7 / LEVELS)
    with pytest.raises(InvariantError, match="NaN or infinity"):
        weight_steps(np.array([[np.nan]]), "fp32")
