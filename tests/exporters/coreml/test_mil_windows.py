"""Convolutions and poolings by themselves: against PyTorch in float64, and against what macOS was seen to compute."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nextvit_exporters.coreml.program import TensorType
from nextvit_exporters.errors import NotExecutable, VerificationFailed
from tests.exporters.coreml.small_programs import EMULATED, PESSIMISTIC, Array, execute, normal, one, program

MAP, LINE, CUBE = normal(2, 4, 9, 12), normal(2, 4, 13), normal(1, 2, 5, 6, 7)


def double(values: Array) -> Tensor:
    return torch.from_numpy(np.array(values)).double()


def padded(x: Array, *pad: int, value: float = 0.0) -> Tensor:
    """Axis by axis in front and behind, as MIL counts."""
    pairs = [pad[place : place + 2] for place in range(0, len(pad), 2)]
    return functional.pad(double(x), [each for pair in reversed(pairs) for each in pair], value=value)


def convolved(x: Array, weight: Array, pad: tuple[int, ...] = (), bias: Array | None = None, **more: Any) -> Tensor:
    convolve = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[x.ndim]
    return convolve(padded(x, *pad), double(weight), None if bias is None else double(bias), **more)


SQUARE, BIAS = normal(6, 4, 3, 3, seed=1), normal(6, seed=2)
CONVOLUTIONS: dict[str, tuple[Array, Array, dict[str, Any], Tensor]] = {
    "valid unless told": (MAP, SQUARE, {}, convolved(MAP, SQUARE)),
    "valid": (MAP, SQUARE, {"pad_type": "valid", "pad": [0] * 4}, convolved(MAP, SQUARE)),
    "with bias": (MAP, SQUARE, {"bias": BIAS}, convolved(MAP, SQUARE, bias=BIAS)),
    "padded": (MAP, SQUARE, {"pad_type": "custom", "pad": [1] * 4}, convolved(MAP, SQUARE, (1, 1, 1, 1))),
    "padded unevenly": (
        MAP,
        SQUARE,
        {"pad_type": "custom", "pad": [2, 0, 1, 3], "strides": [2, 3], "bias": BIAS},
        convolved(MAP, SQUARE, (2, 0, 1, 3), BIAS, stride=(2, 3)),
    ),
    "dilated": (
        MAP,
        SQUARE,
        {"pad_type": "custom", "pad": [1, 1, 2, 2], "dilations": [2, 3]},
        convolved(MAP, SQUARE, (1, 1, 2, 2), dilation=(2, 3)),
    ),
    "in groups": (
        MAP,
        normal(6, 2, 3, 3),
        {"groups": 2, "strides": [2, 2], "bias": BIAS},
        convolved(MAP, normal(6, 2, 3, 3), bias=BIAS, groups=2, stride=2),
    ),
    "by channel": (MAP, normal(4, 1, 3, 3), {"groups": 4}, convolved(MAP, normal(4, 1, 3, 3), groups=4)),
    "1x1": (MAP, normal(6, 4, 1, 1), {"strides": [2, 1]}, convolved(MAP, normal(6, 4, 1, 1), stride=(2, 1))),
    "of a line": (
        LINE,
        normal(6, 4, 3),
        {"pad_type": "custom", "pad": [2, 1], "strides": [2]},
        convolved(LINE, normal(6, 4, 3), (2, 1), stride=2),
    ),
    "of a volume": (CUBE, normal(3, 2, 2, 3, 1), {}, convolved(CUBE, normal(3, 2, 2, 3, 1))),
    # 9 rows, stride 2: 5 windows of 4 reach over 12 places, so 3 of padding; 12 columns, stride 3: 4 over 13, so 1
    "same": (
        MAP,
        normal(6, 4, 4, 4),
        {"pad_type": "same", "strides": [2, 3]},
        convolved(MAP, normal(6, 4, 4, 4), (1, 2, 0, 1), stride=(2, 3)),
    ),
    "same, more in front": (
        MAP,
        normal(6, 4, 4, 4),
        {"pad_type": "same_lower", "strides": [2, 3]},
        convolved(MAP, normal(6, 4, 4, 4), (2, 1, 1, 0), stride=(2, 3)),
    ),
    "same, dilated": (
        MAP,
        SQUARE,
        {"pad_type": "same", "dilations": [2, 1]},
        convolved(MAP, SQUARE, (2, 2, 1, 1), dilation=(2, 1)),
    ),
    "same, none needed": (
        MAP,
        normal(6, 4, 1, 1),
        {"pad_type": "same", "strides": [2, 2]},
        convolved(MAP, normal(6, 4, 1, 1), stride=2),
    ),
}


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_are_pytorch_s(case: tuple[Array, Array, dict[str, Any], Tensor]) -> None:
    x, weight, parameters, expected = case
    got = one("conv", {"x": x}, expected, weight=weight, **parameters)
    assert np.allclose(got, expected.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_sum_in_pieces_is_the_same_up_to_rounding(case: tuple[Array, Array, dict[str, Any], Tensor]) -> None:
    x, weight, parameters, expected = case
    got = one("conv", {"x": x}, expected, PESSIMISTIC, weight=weight, **parameters)
    assert np.abs(got - expected.numpy()).max() < 2e-3 * np.abs(expected.numpy()).max()


def test_pessimistic_rounds_place_by_place_and_channel_by_channel() -> None:
    """Two groups of 64 channels and a window of 3x3: eighteen roundings, in the order written out here."""
    x = normal(1, 128, 5, 5).astype(np.float16).astype(np.float32)
    weight = (normal(6, 64, 3, 3, seed=1) / 24).astype(np.float16).astype(np.float32)
    total = np.zeros((6, 9))
    for row in range(3):
        for column in range(3):
            seen = x[0, :, row : row + 3, column : column + 3].reshape(128, 9).astype(np.float64)
            for start in (0, 32):
                part, kernel = slice(start, start + 32), weight[:, start : start + 32, row, column].astype(np.float64)
                summands = [kernel[3 * group :][:3] @ seen[64 * group :][:64][part] for group in (0, 1)]
                total = (total + np.concatenate(summands)).astype(np.float16).astype(np.float64)
    made = program("conv", {"x": x}, [TensorType("float16", (1, 6, 3, 3))], weight=weight, groups=2)
    (got,), (emulated,) = execute(made, {"x": x}, PESSIMISTIC), execute(made, {"x": x}, EMULATED)
    expected = total.reshape(1, 6, 3, 3)
    assert np.mean(got == expected) > 0.9  # sums in another order may fall to the other side of a rounding
    assert np.abs(got - expected).max() <= 2 * np.spacing(np.float16(np.abs(expected).max()))
    assert np.mean(emulated == expected) < 0.6


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"pad_type": "mirror"}, NotExecutable, "pad_type mirror"),
        ({"pad_type": "valid", "pad": [1, 1, 1, 1]}, VerificationFailed, "a padding of .* and pad_type valid"),
        ({"pad_type": "custom", "pad": [1, 1]}, VerificationFailed, "2 paddings and 2 strides for 2 axes"),
        ({"strides": [1]}, VerificationFailed, "4 paddings and 1 strides for 2 axes"),
        ({"dilations": [9, 9]}, VerificationFailed, "a window of .* on a map of"),
        ({"groups": 3}, VerificationFailed, "can't be executed"),
        ({"dilation": [1, 1]}, NotExecutable, "parameters dilation"),
    ],
)
def test_convolutions_that_make_no_sense_are_refused(
    parameters: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        one("conv", {"x": MAP}, torch.empty(2, 6, 7, 10), weight=SQUARE, **parameters)


def test_means_that_hang_over_the_end_are_core_ml_s() -> None:
    """apple/coremltools pull request 2844 prints what macOS gives; PyTorch divides by what is inside (9.5 and 30.5)."""
    x = np.arange(49, dtype=np.float32).reshape(1, 1, 7, 7)
    window: dict[str, Any] = {"kernel_sizes": [2, 2], "strides": [3, 3], "pad_type": "valid", "ceil_mode": True}
    got = one("avg_pool", {"x": x}, torch.empty(1, 1, 3, 3), **window)
    assert got.reshape(-1).tolist() == [4, 7, 4.75, 25, 28, 15.25, 21.25, 22.75, 12]
    without = one("avg_pool", {"x": x}, torch.empty(1, 1, 3, 3), **window, exclude_padding_from_average=True)
    assert without.reshape(-1).tolist() == [4, 7, 9.5, 25, 28, 30.5, 42.5, 45.5, 48]


AT: dict[str, Any] = {"kernel_sizes": [3, 3], "strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 1, 1]}


@pytest.mark.parametrize("size", [7, 8, 9, 11])
@pytest.mark.parametrize("ceil", [False, True])
def test_means_without_padding_are_pytorch_s(size: int, *, ceil: bool) -> None:
    x = normal(1, 2, size, size + 1)
    expected = functional.avg_pool2d(double(x), 3, 2, 1, ceil_mode=ceil, count_include_pad=False)
    got = one("avg_pool", {"x": x}, expected, **AT, ceil_mode=ceil, exclude_padding_from_average=True)
    assert np.allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("size", [7, 8, 9, 11])
@pytest.mark.parametrize("told", [False, True])
def test_padding_counts_unless_told(size: int, *, told: bool) -> None:
    x = normal(1, 2, size, size + 1)
    expected = functional.avg_pool2d(double(x), 3, 2, 1)
    more: dict[str, Any] = {"exclude_padding_from_average": False} if told else {}
    got = one("avg_pool", {"x": x}, expected, **AT, **more)
    assert np.allclose(got, expected, rtol=1e-12)


def test_uneven_padding_of_a_mean() -> None:
    x = normal(1, 2, 6, 6)
    expected = functional.avg_pool2d(padded(x, 2, 0, 0, 1), 3, 1)
    parameters: dict[str, Any] = {"kernel_sizes": [3, 3], "pad_type": "custom", "pad": [2, 0, 0, 1]}
    assert np.allclose(one("avg_pool", {"x": x}, expected, **parameters), expected, rtol=1e-12)
    counts = functional.avg_pool2d(padded(np.ones_like(x), 2, 0, 0, 1), 3, 1)
    got = one("avg_pool", {"x": x}, expected, **parameters, exclude_padding_from_average=True)
    assert np.allclose(got, expected / counts, rtol=1e-12)


@pytest.mark.parametrize("exclude", [False, True])
def test_same_padding_of_a_mean(*, exclude: bool) -> None:
    """9 rows and windows of 2 at every second: one row of padding, behind or in front."""
    x = normal(1, 2, 9, 9)
    for kind, pad in (("same", (0, 1, 0, 1)), ("same_lower", (1, 0, 1, 0))):
        expected = functional.avg_pool2d(padded(x, *pad), 2, 2)
        if exclude:
            expected = expected / functional.avg_pool2d(padded(np.ones_like(x), *pad), 2, 2)
        parameters: dict[str, Any] = {"kernel_sizes": [2, 2], "strides": [2, 2], "pad_type": kind}
        got = one("avg_pool", {"x": x}, expected, **parameters, exclude_padding_from_average=exclude)
        assert np.allclose(got, expected, rtol=1e-12)


def test_pools_of_a_line_drop_the_rest() -> None:
    expected = functional.avg_pool1d(double(LINE), 4, 4)
    got = one("avg_pool", {"x": LINE}, expected, kernel_sizes=[4], strides=[4], pad_type="valid")
    assert got.shape == (2, 4, 3)
    assert np.allclose(got, expected, rtol=1e-12)


def test_the_stride_of_a_pool_is_one_unless_told() -> None:
    expected = functional.avg_pool2d(double(MAP), (2, 3), 1)
    got = one("avg_pool", {"x": MAP}, expected, kernel_sizes=[2, 3], pad_type="valid")
    assert np.allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("size", [7, 8])
def test_padding_is_never_the_largest(size: int, *, ceil: bool) -> None:
    x = -np.abs(normal(1, 2, size, size))
    expected = functional.max_pool2d(double(x), 3, 2, 1, ceil_mode=ceil)
    assert np.allclose(one("max_pool", {"x": x}, expected, **AT, ceil_mode=ceil), expected)


def test_no_window_starts_in_the_padding_behind() -> None:
    """5 places and one of padding on each side, windows of 2 at every third: the third would start behind the map."""
    x = normal(1, 2, 5)
    at: dict[str, Any] = {"kernel_sizes": [2], "strides": [3], "pad_type": "custom", "pad": [1, 1], "ceil_mode": True}
    expected = functional.avg_pool1d(double(x), 2, 3, 1, ceil_mode=True, count_include_pad=False)
    assert expected.shape == (1, 2, 2)
    assert np.allclose(one("avg_pool", {"x": x}, expected, **at, exclude_padding_from_average=True), expected)
    expected = functional.max_pool1d(double(x), 2, 3, 1, ceil_mode=True)
    assert np.allclose(one("max_pool", {"x": x}, expected, **at), expected)


def test_same_padding_of_a_maximum() -> None:
    x = -np.abs(normal(1, 2, 9, 9))
    expected = functional.max_pool2d(padded(x, 1, 0, 1, 0, value=-math.inf), 2, 2)
    got = one("max_pool", {"x": x}, expected, kernel_sizes=[2, 2], strides=[2, 2], pad_type="same_lower")
    assert np.allclose(got, expected)


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"pad_type": "same", "ceil_mode": True}, VerificationFailed, "ceil_mode with padding"),
        ({"pad_type": "valid", "kernel_sizes": [2]}, NotExecutable, "an input of 4 axes and a window of 1"),
        ({"pad_type": "valid", "kernel_sizes": [20, 20]}, VerificationFailed, "a window of"),
        ({}, VerificationFailed, "avg_pool it lacks its pad_type"),
    ],
)
def test_pools_that_make_no_sense_are_refused(parameters: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        one("avg_pool", {"x": MAP}, torch.empty(1), **({"kernel_sizes": [2, 2]} | parameters))
