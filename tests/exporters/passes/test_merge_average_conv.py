from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from nextvit_exporters import graph as g
from nextvit_exporters.passes.base import Pass, run_passes
from nextvit_exporters.passes.fold_conv_norm import FoldConvNorm
from nextvit_exporters.passes.merge_average_conv import MergeAverageConv
from nextvit_exporters.passes.strip_train_only import StripTrainOnly
from tests.exporters.passes_harness import check_pass, nano
from tests.exporters.tensorrt_passes import on_its_way
from tests.exporters.toys import Wired, Wiring, feature_map, wired
from tests.harness import images

PASS = MergeAverageConv()
BEFORE = (StripTrainOnly(), FoldConvNorm())


def check_merged(
    model: nn.Module,
    before: Sequence[Pass],
    *,
    rewrites: int,
    inputs: Tensor,
    refused: Sequence[str] = (),
    removed: int | None = None,
) -> fx.GraphModule:
    """As ``check_pass``, for a pass that may add work: four times each merged convolution's."""
    prepared, _ = run_passes(g.trace(model), before, [inputs])
    held, code = g.fingerprint(prepared), prepared.code
    graph, (record,) = run_passes(prepared, [PASS], [inputs])
    assert record.certified, record
    assert (record.rewrites, [refusal.reason for refusal in record.refused]) == (rewrites, list(refused))
    assert record.nodes[1] - record.nodes[0] == -(rewrites if removed is None else removed)
    assert record.macs[1] > record.macs[0]
    assert (g.fingerprint(prepared), prepared.code) == (held, code)
    _, (again,) = run_passes(graph, [PASS], [inputs])
    assert again.rewrites == 0
    return graph


def layers() -> dict[str, nn.Module]:
    return {
        "pool": nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
        "plain": nn.AvgPool2d((2, 2)),
        "conv": nn.Conv2d(8, 6, 1),
        "other": nn.Conv2d(8, 8, 1, bias=False),
        "wide": nn.Conv2d(8, 8, 3, padding=1),
        "grouped": nn.Conv2d(8, 8, 1, groups=2),
        "padded": nn.Conv2d(8, 8, 1, padding=1),
        "strided": nn.Conv2d(8, 8, 1, stride=2),
        "gap": nn.AdaptiveAvgPool2d(1),
        "overlapping": nn.AvgPool2d(3, 2, padding=1),
        "sums": nn.AvgPool2d(2, divisor_override=1),
        "max": nn.MaxPool2d(2),
    }


@pytest.mark.parametrize(
    "wiring",
    [
        lambda m, x: m.conv(m.pool(x)),
        lambda m, x: m.conv(m.plain(x)),
        lambda m, x: m.other(m.pool(x)),
        lambda m, x: m.conv(functional.avg_pool2d(x, 2)),
        lambda m, x: m.conv(m.pool(x)) + x[:, :6, ::2, ::2],
    ],
    ids=["pool", "plain", "without bias", "functional", "map read too"],
)
def test_merges(wiring: Wiring) -> None:
    check_merged(wired(wiring, **layers()), (), rewrites=1, inputs=feature_map())


def test_weights_are_quarters() -> None:
    model = wired(lambda m, x: m.conv(m.pool(x)), **layers())
    merged = check_merged(model, (), rewrites=1, inputs=feature_map()).get_submodule("conv")
    assert isinstance(merged, nn.Conv2d)
    assert (merged.kernel_size, merged.stride, merged.padding, merged.groups) == ((2, 2), (2, 2), (0, 0), 1)
    conv = model.get_submodule("conv")
    assert isinstance(conv, nn.Conv2d)
    quarters = conv.weight.detach().double() / 4.0
    assert torch.equal(merged.weight, quarters.expand(6, 8, 2, 2))


def test_an_average_whose_size_is_read_keeps_it() -> None:
    def resized(m: Wired, x: Tensor) -> Tensor:
        y = m.pool(x)
        out: Tensor = m.conv(y).flatten(2).unflatten(2, (y.shape[2], y.shape[3]))
        return out

    check_merged(wired(resized, **layers()), (), rewrites=1, removed=0, inputs=feature_map())


def test_one_behind_another_stops_where_a_side_is_odd() -> None:
    def chain(m: Wired, x: Tensor) -> Tensor:
        out: Tensor = m.conv(m.plain(m.other(m.pool(x))))
        return out

    reason = "at 3x5 a side is odd, so not every average takes four numbers"
    check_merged(wired(chain, **layers()), (), rewrites=1, inputs=feature_map(), refused=[reason])


@pytest.mark.parametrize(
    "wiring",
    [
        lambda m, x: m.wide(m.pool(x)),
        lambda m, x: m.pool(m.conv(x)),
        lambda m, x: m.conv(m.pool(x).relu()),
        lambda m, x: m.conv(m.max(x)),
        lambda m, x: m.pool(x),
    ],
    ids=["3x3", "other order", "relu", "max", "no convolution"],
)
def test_nothing_to_merge(wiring: Wiring) -> None:
    check_pass(wired(wiring, **layers()), (), PASS, rewrites=0, nodes=0, inputs=feature_map())


KIND = "the convolution is grouped, padded or strided"
SHARED = "the convolution is used, or its weight is shared, elsewhere"
OTHER = "it is not the average of each 2x2"


@pytest.mark.parametrize(
    ("wiring", "reasons"),
    [
        (lambda m, x: m.grouped(m.pool(x)), [KIND]),
        (lambda m, x: m.padded(m.pool(x)), [KIND]),
        (lambda m, x: m.strided(m.pool(x)), [KIND]),
        (lambda m, x: (m.conv(y := m.pool(x)), y), ["the average is also read by the graph's output"]),
        (lambda m, x: (m.conv(y := m.pool(x)), m.other(y)), ["the average is also read by other"]),
        (lambda m, x: (m.conv(m.pool(x)), m.conv(x)), [SHARED]),
        (lambda m, x: m.conv(m.pool(x)) + m.conv.weight.sum(), [SHARED]),
        (lambda m, x: m.conv(m.overlapping(x)), [OTHER]),
        (lambda m, x: m.conv(m.sums(x)), [OTHER]),
        (lambda m, x: m.conv(m.gap(x)), [OTHER]),
        (
            lambda m, x: m.conv(m.pool(x[:, :, 1:])),
            ["at 5x10 a side is odd, so not every average takes four numbers"],
        ),
        (
            lambda m, x: m.conv(m.plain(x[..., 1:])),
            ["at 6x9 a side is odd, so not every average takes four numbers"],
        ),
    ],
    ids=[
        "grouped",
        "padded",
        "strided",
        "tapped",
        "two convolutions",
        "shared",
        "weight read",
        "overlapping",
        "sums",
        "global",
        "odd height",
        "odd width",
    ],
)
def test_refuses(wiring: Wiring, reasons: list[str]) -> None:
    check_pass(wired(wiring, **layers()), (), PASS, rewrites=0, nodes=0, inputs=feature_map(), refused=reasons)


def test_on_the_model() -> None:
    check_merged(nano(), BEFORE, rewrites=3, inputs=images(2, 3, 64, 64, seed=1).double())


def test_only_even_maps_are_merged() -> None:
    inputs = images(2, 3, 75, 96, seed=1).double()
    odd = [f"at {size} a side is odd, so not every average takes four numbers" for size in ("19x24", "5x6")]
    check_merged(nano(), BEFORE, rewrites=1, inputs=inputs, refused=odd)


@pytest.mark.parametrize("model", ["nano", "official", "own head", "conv head", "backbone", "small", "timm"])
def test_counts(model: str) -> None:
    assert on_its_way(model).counts("merge-average-conv") == (3, ())
