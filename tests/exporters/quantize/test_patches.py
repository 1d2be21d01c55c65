"""A map's output is its patches times its weights, whatever the map."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from nextvit_exporters.errors import InvariantError
from nextvit_exporters.quantize.patches import patch_means, patches
from nextvit_exporters.quantize.placement import Map
from tests.harness import randomise, relative_error

MAP = (3, 12, 9, 7)
SIGNAL = (3, 12, 11)
CASES: dict[str, tuple[Map, tuple[int, ...]]] = {
    "linear on tokens": (nn.Linear(12, 5), (3, 7, 12)),
    "linear on vectors": (nn.Linear(12, 5, bias=False), (3, 12)),
    "linear on heads": (nn.Linear(12, 5), (3, 2, 7, 12)),
    "1x1": (nn.Conv2d(12, 8, 1), MAP),
    "1x1, stride": (nn.Conv2d(12, 8, 1, (2, 3)), MAP),
    "1x1, padding": (nn.Conv2d(12, 8, 1, padding=1), MAP),
    "1x1, groups": (nn.Conv2d(12, 8, 1, groups=4), MAP),
    "3x3": (nn.Conv2d(12, 8, 3, padding=1, bias=False), MAP),
    "3x3, groups": (nn.Conv2d(12, 8, 3, padding=1, groups=4), MAP),
    "3x3, depthwise": (nn.Conv2d(12, 24, 3, groups=12), MAP),
    "3x3, stride and groups": (nn.Conv2d(12, 8, 3, 2, padding=1, groups=2), MAP),
    "3x2, all different": (nn.Conv2d(12, 8, (3, 2), (2, 1), (2, 0), (1, 3), groups=2), MAP),
    "same, even kernel": (nn.Conv2d(12, 8, (4, 2), padding="same", dilation=(1, 2)), MAP),
    "valid": (nn.Conv2d(12, 8, 3, padding="valid"), MAP),
    "one axis, 1": (nn.Conv1d(12, 8, 1, groups=2), SIGNAL),
    "one axis, 3": (nn.Conv1d(12, 8, 3, 2, padding=2, dilation=2, groups=2), SIGNAL),
    "one axis, same": (nn.Conv1d(12, 8, 4, padding="same"), SIGNAL),
}


def case(name: str) -> tuple[Map, Tensor]:
    module, shape = CASES[name]
    return randomise(module, seed=0).double(), torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CASES)
def test_patches_times_weights_is_the_output(name: str) -> None:
    module, inputs = case(name)
    found = patches(module, inputs)
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    weight = module.weight.detach().flatten(1)
    assert found.shape[0] == groups
    assert found.shape[2] == weight.shape[1]
    product = torch.cat([rows @ part.T for rows, part in zip(found, weight.chunk(groups), strict=True)], dim=1)
    product = product if module.bias is None else product + module.bias.detach()
    expected = module(inputs).detach()
    channels_last = expected if isinstance(module, nn.Linear) else expected.movedim(1, -1)
    assert relative_error(product, channels_last.reshape(product.shape)) < 1e-13


def test_the_order_is_that_of_the_weights() -> None:
    """Exactly, number by number: the first place of a kernel without padding reads the corner."""
    _, inputs = case("3x2, all different")
    module = nn.Conv2d(12, 8, (3, 2), groups=2).double()
    corner = inputs[0, :, :3, :2]
    assert torch.equal(patches(module, inputs)[:, 0], corner.reshape(2, 36))


def test_padding_counts_as_zeros() -> None:
    ones = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    means = patch_means(nn.Conv2d(1, 1, 3, padding=1), ones)
    assert means.tolist() == [[0.25, 0.5, 0.25, 0.5, 1.0, 0.5, 0.25, 0.5, 0.25]]


def test_means_are_over_images_and_places() -> None:
    module, inputs = case("3x3, stride and groups")
    assert torch.equal(patch_means(module, inputs), patches(module, inputs).mean(dim=1))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_is_refused(mode: Literal["reflect", "replicate", "circular"]) -> None:
    module = nn.Conv2d(12, 8, 3, padding=1, padding_mode=mode)
    with pytest.raises(InvariantError, match=f"pads with '{mode}' has no patches here; pad with zeros"):
        patches(module, torch.ones(MAP))


def test_an_unbatched_input_is_refused() -> None:
    with pytest.raises(InvariantError, match="over 2 axes was given 3 axes; batch it"):
        patches(nn.Conv2d(12, 8, 3), torch.ones(MAP[1:]))
