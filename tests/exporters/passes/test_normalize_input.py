from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes.base import relative_error
from nextvit_exporters.passes.normalize_input import MEAN, NormalizeInput
from tests.exporters import passes_harness
from tests.exporters.passes_harness import certified, check_pass, nano, pixels
from tests.exporters.toys import Wired, Wiring, wired

FLOAT = NormalizeInput(passes_harness.MEAN, passes_harness.STD, uint8=False)
UINT8 = NormalizeInput(passes_harness.MEAN, passes_harness.STD, uint8=True)
INPUTS = pixels(2, 3, 10, 12, seed=1)
BOTH = pytest.mark.parametrize("each", [FLOAT, UINT8], ids=["float", "uint8"])


def layers() -> dict[str, nn.Module]:
    return {
        "conv": nn.Conv2d(3, 4, 3, stride=2, padding=1),
        "same": nn.Conv2d(3, 4, 5, padding="same", bias=False),
        "other": nn.Conv2d(3, 4, 1, stride=2),
        "reflect": nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        "grouped": nn.Conv2d(3, 3, 3, groups=3),
        "wide": nn.Conv2d(6, 4, 3),
    }


@BOTH
@pytest.mark.parametrize(
    ("wiring", "nodes"),
    [
        (lambda m, x: m.conv(x), 2),
        (lambda m, x: m.same(x), 2),
        (lambda m, x: m.conv(x) + m.other(x), 2),
        (lambda m, x: m.conv(x).reshape(x.shape[0], -1), 2),
    ],
    ids=["3x3", "same", "two readers", "size read"],
)
def test_reads_raw_pixels(wiring: Wiring, nodes: int, each: NormalizeInput) -> None:
    check_pass(wired(wiring, **layers()), (), each, rewrites=1, nodes=nodes, inputs=INPUTS)


def test_the_mean_is_not_folded_into_the_bias() -> None:
    """At the border a mean in the bias would be subtracted from padding that never was a pixel."""
    conv = wired(lambda m, x: m.conv(x), **layers())
    checked = check_pass(conv, (), UINT8, rewrites=1, nodes=2, inputs=INPUTS)
    assert torch.equal(checked.graph.get_parameter("conv.bias"), conv.conv.bias.double())
    raw = UINT8.adapt(INPUTS)
    right, wrong = g.execute(checked.graph, raw)[0], folded(conv).double()(raw.double())
    assert relative_error([wrong[:, :, 1:-1, 1:-1]], [right[:, :, 1:-1, 1:-1]]) < 1e-6
    assert relative_error([wrong[:, :, 0]], [right[:, :, 0]]) > 1e-2


def folded(model: Wired) -> nn.Module:
    """What not to do: mean and scale both in the first convolution."""
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1).double()
    mean, std = (torch.tensor(v, dtype=torch.float64) * 255.0 for v in (FLOAT.mean, FLOAT.std))
    weight = model.conv.weight.detach().double() / std.view(1, 3, 1, 1)
    conv.weight = nn.Parameter(weight)
    conv.bias = nn.Parameter(model.conv.bias.detach().double() - (weight.sum((2, 3)) @ mean))
    return conv


def test_uint8_pixels_survive_the_way_there_and_back() -> None:
    raw = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (UINT8.mean, UINT8.std))
    normalised = (raw.double() / 255.0 - mean) / std
    assert torch.equal(UINT8.adapt(normalised), raw)
    assert UINT8.adapt(normalised).dtype == torch.uint8
    assert relative_error([FLOAT.adapt(normalised)], [raw.double()]) <= 1e-15


@BOTH
@pytest.mark.parametrize(
    ("wiring", "reason"),
    [
        (lambda m, x: m.conv(x.relu()), "relu reads the input and is not a convolution"),
        (lambda m, x: m.conv(x) + x.mean(), "mean reads the input and is not a convolution"),
        (
            lambda m, x: m.reflect(x),
            "reflect is not an ungrouped convolution of 3 channels with zero padding",
        ),
        (lambda m, x: m.grouped(x), "grouped is not an ungrouped convolution of 3 channels with zero padding"),
        (lambda m, x: m.conv(x) + m.conv(x.flip(2)), "conv is used, or its weight is shared, elsewhere"),
        (lambda m, x: m.conv(x[:, [2, 1, 0]]), "getitem reads the input and is not a convolution"),
        (lambda m, x: m.wide(torch.cat([x, x], 1)), "cat reads the input and is not a convolution"),
    ],
    ids=["relu", "two kinds of readers", "reflected border", "grouped", "shared weight", "BGR", "doubled"],
)
def test_refuses(wiring: Wiring, reason: str, each: NormalizeInput) -> None:
    checked = check_pass(wired(wiring, **layers()), (), each, rewrites=0, nodes=0, inputs=INPUTS, refused=[reason])
    assert not hasattr(checked.graph, MEAN)


def test_refuses_four_channels() -> None:
    model = wired(lambda m, x: m.conv(x), conv=nn.Conv2d(4, 2, 1))
    inputs: Tensor = torch.cat([INPUTS, INPUTS[:, :1]], 1)
    reason = "conv is not an ungrouped convolution of 3 channels with zero padding"
    check_pass(model, (), FLOAT, rewrites=0, nodes=0, inputs=inputs, refused=[reason])


@BOTH
def test_on_the_model(each: NormalizeInput) -> None:
    check_pass(nano(), (), each, rewrites=1, nodes=2, inputs=pixels(2, 3, 75, 97, seed=1))


@pytest.mark.parametrize("model", passes_harness.MODELS)
def test_counts(model: str) -> None:
    assert certified(model).counts("normalize-input") == (1, ())
