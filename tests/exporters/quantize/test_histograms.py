"""Steps follow from what was counted, whatever came first, and are the ones that their methods promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nextvit_exporters.errors import InvariantError, UnsupportedSpec
from nextvit_exporters.quantize import histograms
from nextvit_exporters.quantize.histograms import BINS, LEVELS, STEP_OF_ZEROS, Histogram, squared_error, step
from nextvit_exporters.quantize_spec import METHODS

FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
COUNT = 100_000


def counted(values: Tensor, batches: int = 1) -> Histogram:
    result = Histogram("x")
    for some in values.flatten().tensor_split(batches):
        result.add(some)
    return result


def drawn(kind: str, seed: int = 0) -> Tensor:
    """Float32 numbers as activations are spread: with a zero half, with long tails, with nothing of the kind."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(COUNT, generator=generator)
    return {
        "normal": normal,
        "relu": normal.relu(),
        "heavy": normal / torch.randn(COUNT, generator=generator).abs().clamp_min(0.01),
        "uniform": torch.rand(COUNT, generator=generator),
    }[kind]


def raw_error(values: Tensor, size: float) -> float:
    """The mean squared error of rounding and clipping the numbers themselves."""
    x = values.double().abs().numpy()
    return float(np.mean((x - size * np.minimum(np.rint(x / size), LEVELS)) ** 2))


@settings(max_examples=40)
@given(st.lists(FLOATS, min_size=1, max_size=60), st.randoms(use_true_random=False), st.integers(1, 7))
def test_neither_order_nor_batches_change_a_bit(values: list[float], order: object, batches: int) -> None:
    whole = counted(torch.tensor(values))
    order.shuffle(values)  # type: ignore[attr-defined]  # hypothesis hands over a random.Random
    parts = counted(torch.tensor(values), min(batches, len(values)))
    assert (parts.counts == whole.counts).all()
    assert (parts.exponent, parts.largest) == (whole.exponent, whole.largest)
    assert all(step(parts, method) == step(whole, method) for method in METHODS)


@given(st.lists(FLOATS, min_size=1, max_size=60))
def test_every_number_is_in_the_bin_it_belongs_to(values: list[float]) -> None:
    found = counted(torch.tensor(values), len(values))
    bins = [math.floor(abs(float(np.float32(each))) / found.width) for each in values]
    assert (found.counts == np.bincount(bins, minlength=BINS)).all()
    assert found.largest == max(abs(float(np.float32(each))) for each in values)
    assert found.largest >= BINS // 2 * found.width or found.exponent == histograms.LOWEST


@given(st.lists(FLOATS, min_size=1, max_size=60), st.sampled_from(METHODS))
def test_a_step_is_positive_and_keeps_no_more_than_there_is(values: list[float], method: str) -> None:
    found = counted(torch.tensor(values))
    size = step(found, method)
    assert 0 < size < math.inf
    assert size == STEP_OF_ZEROS or size * LEVELS <= found.largest * (1 + 1e-15)


@pytest.mark.parametrize("kind", ["normal", "relu", "heavy", "uniform"])
def test_the_squared_error_is_the_one_of_the_numbers_and_at_its_least(kind: str) -> None:
    values = drawn(kind)
    found = counted(values, 9)
    size = step(found, "mse")
    assert squared_error(found, size) == pytest.approx(raw_error(values, size), rel=0.02)
    clips = found.largest * np.exp2(-np.arange(0, 8 * 64) / 64)
    least = min(raw_error(values, clip / LEVELS) for clip in clips)
    assert raw_error(values, size) <= 1.005 * least
    if kind != "uniform":
        assert raw_error(values, step(found, "minmax")) > 1.1 * least


@pytest.mark.parametrize("fraction", [0.5, 0.8, 1.25, 2.0])
def test_another_step_has_a_larger_squared_error(fraction: float) -> None:
    values = drawn("heavy")
    size = step(counted(values), "mse")
    assert raw_error(values, size * fraction) > 1.02 * raw_error(values, size)


def test_minmax_is_exact() -> None:
    values = torch.tensor([0.1, -3.3, 2.0])
    assert step(counted(values), "minmax") == float(torch.tensor(3.3)) / LEVELS


@pytest.mark.parametrize("kind", ["normal", "relu", "heavy", "uniform"])
def test_the_percentile_is_the_one_of_the_numbers(kind: str) -> None:
    values = drawn(kind)
    found = counted(values)
    wanted = float(np.quantile(values.abs().double().numpy(), 0.9999))
    assert step(found, "percentile") * LEVELS == pytest.approx(wanted, abs=2 * found.width, rel=0.03)


def test_entropy_clips_long_tails_and_leaves_short_ones_alone() -> None:
    heavy, uniform = counted(drawn("heavy")), counted(drawn("uniform"))
    assert step(heavy, "entropy") < 0.6 * step(heavy, "minmax")
    assert step(uniform, "entropy") > 0.99 * step(uniform, "minmax")


def test_entropy_takes_the_clip_of_least_divergence() -> None:
    found = counted(drawn("heavy"))
    pooled = found.counts.reshape(-1, 2).sum(1).astype(float)
    pooled[0] = 0
    pooled = np.trim_zeros(pooled, "b")
    chosen = step(found, "entropy") * LEVELS / (2 * found.width)
    tried = [size for size in range(128, len(pooled) + 1) if pooled[size - 1] > 0]
    divergences = {size: naive_divergence(pooled, size) for size in tried[:: max(1, len(tried) // 60)]}
    assert naive_divergence(pooled, round(chosen)) <= 1.05 * min(divergences.values())


def naive_divergence(counts: np.ndarray[tuple[int], np.dtype[np.float64]], kept: int) -> float:
    """Level by level, as it is described."""
    reference, spread = counts[:kept].copy(), np.zeros(kept)
    for level in range(128):
        bins = [each for each in range(level * kept // 128, (level + 1) * kept // 128) if counts[each] > 0]
        for each in bins:
            spread[each] = sum(counts[one] for one in bins) / len(bins)
    reference[-1] += counts[kept:].sum()
    p, q = reference / reference.sum(), spread / spread.sum()
    return float(sum(one * math.log(one / other) for one, other in zip(p, q, strict=True) if one > 0))


def test_methods_differ_on_long_tails() -> None:
    found = counted(drawn("heavy"))
    assert len({round(step(found, method), 6) for method in METHODS}) == len(METHODS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [torch.zeros(9), torch.full((9,), 1e-38)])
def test_zeros_have_a_small_step(values: Tensor, method: str) -> None:
    assert step(counted(values), method) == STEP_OF_ZEROS


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(wrong: float) -> None:
    with pytest.raises(InvariantError, match=r"conv_3 holds NaN or infinity on these images"):
        Histogram("conv_3").add(torch.tensor([1.0, wrong, 2.0]))


def test_nothing_to_count_and_unknown_methods_are_refused() -> None:
    with pytest.raises(InvariantError, match="conv_3 holds no numbers"):
        Histogram("conv_3").add(torch.zeros(0))
    with pytest.raises(InvariantError, match="conv_3 was never computed"):
        step(Histogram("conv_3"), "mse")
    with pytest.raises(UnsupportedSpec, match="no calibration method median; choose one of minmax"):
        step(counted(torch.ones(1)), "median")


def test_what_was_given_is_left_as_it_was() -> None:
    values = torch.tensor([1.0, -2.0])
    counted(values)
    assert values.tolist() == [1.0, -2.0]
    found = Histogram("x")
    found.add(torch.tensor([3, 250], dtype=torch.uint8))
    assert found.largest == 250


def test_counts_of_many_numbers_stay_exact() -> None:
    found = Histogram("x")
    for _ in range(3):
        found.add(torch.full((1 << 23,), 0.75))  # more than float32 could count to
    assert found.counts.sum() == 3 << 23
