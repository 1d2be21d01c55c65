"""Mean outputs of a real convolution are what they were, after its weights were rounded coarsely."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nextvit_exporters.errors import InvariantError
from nextvit_exporters.quantize.bias import certify_bias, corrected_bias, mean_difference
from nextvit_exporters.quantize.calibration import Float64s
from nextvit_exporters.quantize.patches import patch_means
from tests.harness import images, randomise

CONV = randomise(nn.Conv2d(12, 8, 3, 2, padding=1, groups=4), seed=0).double()
INPUTS: Tensor = images(5, 12, 9, 7, seed=1, dtype=torch.float64) + 0.5
WEIGHT: Float64s = CONV.weight.detach().numpy()
ROUNDED: Float64s = np.rint(WEIGHT * 4.0) / 4.0
MEANS: Float64s = patch_means(CONV, INPUTS).numpy()


def mean_output(weight: Float64s, bias: Float64s) -> Float64s:
    out = nn.functional.conv2d(INPUTS, torch.from_numpy(weight), torch.from_numpy(bias), 2, 1, 1, 4)
    mean: Float64s = out.mean(dim=(0, 2, 3)).numpy()
    return mean


def bias() -> Float64s:
    assert CONV.bias is not None
    found: Float64s = CONV.bias.detach().numpy()
    return found


def with_numbers(module: nn.Conv2d | nn.Conv1d | nn.Linear, weight: Float64s, added: Float64s) -> nn.Module:
    result = copy.deepcopy(module)
    with torch.no_grad():
        result.weight.copy_(torch.from_numpy(weight))
        assert result.bias is not None
        result.bias.copy_(torch.from_numpy(added))
    return result


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (CONV, (5, 12, 9, 7)),
        (randomise(nn.Conv1d(6, 9, 3, 2, padding=1, groups=3), seed=1).double(), (4, 6, 11)),
        (randomise(nn.Linear(7, 5), seed=2).double(), (3, 8, 7)),
    ],
)
def test_a_certificate_for_each_kind_of_map(module: nn.Conv2d, shape: tuple[int, ...]) -> None:
    """Groups in another order, a sign, and a bias that was forgotten are no sound corrections."""
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    means = patch_means(module, inputs).numpy()
    weight = module.weight.detach().numpy()
    rounded = np.rint(weight * 4.0) / 4.0
    assert module.bias is not None
    own = module.bias.detach().numpy()
    corrected, residual = corrected_bias(own, weight, rounded, means)
    certify_bias(module, with_numbers(module, rounded, corrected), means)  # type: ignore[arg-type]  # a map as before
    for wrong in (own, own + residual, corrected[::-1].copy()):
        with pytest.raises(InvariantError, match="the corrected bias moves mean outputs by"):
            certify_bias(module, with_numbers(module, rounded, wrong), means)  # type: ignore[arg-type]  # as above


def test_mean_outputs_stay() -> None:
    corrected, residual = corrected_bias(bias(), WEIGHT, ROUNDED, MEANS)
    before = mean_output(WEIGHT, bias())
    assert mean_difference(before, mean_output(ROUNDED, corrected)) < 1e-12
    assert mean_difference(before, mean_output(ROUNDED, bias())) > 1e-2
    assert np.allclose(mean_output(ROUNDED, bias()) - before, residual, rtol=0.0, atol=1e-13)


MISTAKES: dict[str, Callable[[], Float64s]] = {
    "sign": lambda: bias() + corrected_bias(bias(), WEIGHT, ROUNDED, MEANS)[1],
    "groups in another order": lambda: corrected_bias(bias(), WEIGHT, ROUNDED, MEANS[::-1].copy())[0],
    "kernel in another order": lambda: corrected_bias(bias(), WEIGHT, ROUNDED, MEANS[:, ::-1].copy())[0],
    "one group for all": lambda: corrected_bias(bias(), WEIGHT, ROUNDED, MEANS[:1])[0],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str) -> None:
    assert mean_difference(mean_output(WEIGHT, bias()), mean_output(ROUNDED, MISTAKES[mistake]())) > 1e-3


@pytest.mark.parametrize("means", [np.zeros((3, 27)), np.zeros((4, 26)), np.zeros((0, 27))])
def test_means_of_another_map_are_refused(means: Float64s) -> None:
    with pytest.raises(InvariantError, match="do not fit; calibrate this map again"):
        corrected_bias(bias(), WEIGHT, ROUNDED, means)


def test_a_mean_that_cannot_be_compared_is_infinitely_far() -> None:
    assert mean_difference(np.ones(3), np.ones(2)) == np.inf
    assert mean_difference(np.ones(2), np.array([1.0, np.nan])) == np.inf
    assert mean_difference(np.array([2.0, 4.0]), np.array([2.0, 5.0])) == 0.25
