from __future__ import annotations

import pytest
from torch import Tensor, nn
from torch.nn import functional

from nextvit_exporters.passes.average_tokens import AverageTokens
from nextvit_exporters.passes.fold_pre_norm import FoldPreNorm
from nextvit_exporters.passes.strip_train_only import StripTrainOnly
from tests.exporters.passes_harness import check_pass, nano, official
from tests.exporters.tensorrt_passes import on_its_way
from tests.exporters.toys import Pooled, Wiring, feature_map, wired
from tests.harness import images, randomise

PASS = AverageTokens()


def layers() -> dict[str, nn.Module]:
    return {
        "narrow": nn.Linear(8, 4),
        "pool": nn.AvgPool1d(4, 4),
        "rounded_up": nn.AvgPool1d(4, 4, ceil_mode=True),
        "seven": nn.AvgPool1d(7),
        "overlapping": nn.AvgPool1d(3, 2, padding=1),
        "long": nn.AvgPool1d(59),
        "adaptive": nn.AdaptiveAvgPool1d(15),
        "max": nn.MaxPool1d(4),
        "plane": nn.AvgPool2d(2),
        "norm": nn.BatchNorm1d(8),
    }


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("wiring", "nodes"),
    [
        (lambda m, x: m.narrow(m.pool(tokens(x).transpose(1, 2)).transpose(1, 2)), -1),
        (lambda m, x: m.narrow(m.pool(tokens(x).permute(0, 2, 1)).transpose(-1, -2)), -1),
        (lambda m, x: m.narrow(functional.avg_pool1d(tokens(x).transpose(1, 2), 4).transpose(1, 2)), -1),
        (lambda m, x: m.narrow(m.rounded_up(tokens(x).transpose(1, 2)).transpose(1, 2)), -1),
        (lambda m, x: m.pool(x.flatten(2)), 3),
        (lambda m, x: m.norm(m.pool(tokens(x).transpose(1, 2))).transpose(1, 2), 1),
        (lambda m, x: ((y := m.pool(tokens(x).transpose(1, 2))).transpose(1, 2), y.exp()), 0),
        (lambda m, x: m.pool(y := tokens(x).transpose(1, 2)) + y[:, :, :15], 2),
        (lambda m, x: m.pool(x.flatten(2)[:, :, :8].reshape(-1, 8, 8)).transpose(1, 2), 1),
    ],
    ids=["ours", "permuted", "functional", "rounded up", "channels", "norm", "two readers", "kept turn", "same shape"],
)
def test_averages_tokens(wiring: Wiring, nodes: int) -> None:
    check_pass(wired(wiring, **layers()), (), PASS, rewrites=1, nodes=nodes, inputs=feature_map())


def test_in_an_attention() -> None:
    checked = check_pass(randomise(Pooled(), 0), (), PASS, rewrites=1, nodes=-1, inputs=feature_map())
    assert not [m for m in checked.graph.modules() if isinstance(m, nn.AvgPool1d)]


@pytest.mark.parametrize(
    "wiring",
    [
        lambda m, x: m.plane(x),
        lambda m, x: m.max(x.flatten(2)),
        lambda m, x: m.adaptive(x.flatten(2)),
        lambda m, x: m.narrow(tokens(x)).mean(1),
        lambda m, x: m.narrow(tokens(x)),
    ],
    ids=["map", "max", "adaptive", "global", "none"],
)
def test_nothing_to_average(wiring: Wiring) -> None:
    check_pass(wired(wiring, **layers()), (), PASS, rewrites=0, nodes=0, inputs=feature_map())


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ("seven", "its 60 tokens do not fall into 8 runs of one length, so some are left over or taken twice"),
        ("overlapping", "it is not the average of each 2 of its 60 tokens"),
        ("long", "it is not the average of each 60 of its 60 tokens"),
    ],
)
def test_refuses(layer: str, reason: str) -> None:
    model = wired(lambda m, x: getattr(m, layer)(x.flatten(2)), **layers())
    check_pass(model, (), PASS, rewrites=0, nodes=0, inputs=feature_map(), refused=[reason])


@pytest.mark.parametrize("model", [nano(), official()], ids=["ours", "official"])
def test_on_the_model(model: nn.Module) -> None:
    inputs, before = images(2, 3, 64, 64, seed=1).double(), (StripTrainOnly(), FoldPreNorm())
    check_pass(model, before, PASS, rewrites=2, nodes=-2, inputs=inputs)


def test_a_remainder_is_refused() -> None:
    inputs, before = images(2, 3, 75, 97, seed=1).double(), (StripTrainOnly(), FoldPreNorm())
    ends = "so some are left over or taken twice"
    reasons = [f"its {count} tokens do not fall into 8 runs of one length, {ends}" for count in (130, 35)]
    check_pass(nano(), before, PASS, rewrites=0, nodes=0, inputs=inputs, refused=reasons)


@pytest.mark.parametrize(
    ("model", "count"),
    [("nano", 2), ("official", 2), ("own head", 2), ("conv head", 2), ("backbone", 2), ("small", 3), ("timm", 3)],
)
def test_counts(model: str, count: int) -> None:
    assert on_its_way(model).counts("average-tokens") == (count, ())
