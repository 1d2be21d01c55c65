from __future__ import annotations

import pytest
from torch import Tensor, nn

from nextvit_exporters.passes.fold_conv_norm import FoldConvNorm
from nextvit_exporters.passes.fold_pre_norm import FoldPreNorm
from nextvit_exporters.passes.strip_train_only import StripTrainOnly
from tests.exporters.passes_harness import backbone, certified, check_pass, nano
from tests.exporters.toys import Wired, Wiring, feature_map, wired
from tests.harness import images

PASS = FoldPreNorm()


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def normed(m: Wired, x: Tensor) -> Tensor:
    out: Tensor = m.norm(x)
    return out


@pytest.mark.parametrize(
    "wiring",
    [
        lambda m, x: m.conv(normed(m, x)),
        lambda m, x: m.linear(tokens(normed(m, x))),
        lambda m, x: m.linear(normed(m, x).permute(0, 2, 3, 1)),
        lambda m, x: m.linear(normed(m, x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 8)),
        lambda m, x: m.conv(nn.functional.adaptive_avg_pool2d(normed(m, x), (3, 5))),
        lambda m, x: m.conv(normed(m, x).mean((2, 3), keepdim=True)),
        lambda m, x: m.conv(m.pool(normed(m, x))),
        lambda m, x: (m.conv(normed(m, x)), m.linear(normed(m, x[:, :, :2]).mean((2, 3)))),
    ],
    ids=["1x1", "tokens", "channels last", "reshaped", "adaptive", "mean", "pool", "two calls"],
)
def test_folds_into_what_reads_the_norm(wiring: Wiring) -> None:
    model = wired(
        wiring,
        norm=nn.BatchNorm2d(8),
        conv=nn.Conv2d(8, 4, 1, stride=2, bias=False),
        linear=nn.Linear(8, 4),
        pool=nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
    )
    check_pass(model, (), PASS, rewrites=1, nodes=-1, inputs=feature_map())


def test_folds_into_several_maps_at_once() -> None:
    model = wired(
        lambda m, x: (m.q(tokens(normed(m, x))), m.k(tokens(normed(m, x)))),
        norm=nn.BatchNorm2d(8),
        q=nn.Linear(8, 4),
        k=nn.Linear(8, 4),
    )
    check_pass(model, (), PASS, rewrites=2, nodes=-2, inputs=feature_map())

    def once(m: Wired, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = normed(m, x)
        t = tokens(y)
        return m.q(t), m.k(t), m.conv(y)

    shared = wired(once, norm=nn.BatchNorm2d(8), q=nn.Linear(8, 4), k=nn.Linear(8, 4), conv=nn.Conv2d(8, 3, 1))
    check_pass(shared, (), PASS, rewrites=1, nodes=-1, inputs=feature_map())


def test_two_norms_reach_one_map_through_the_average() -> None:
    def reduced(m: Wired, x: Tensor) -> tuple[Tensor, Tensor]:
        t = tokens(normed(m, x))
        return m.q(t), m.k(m.inner(m.pool(t.transpose(1, 2))).transpose(1, 2))

    layers = {"norm": nn.BatchNorm2d(8), "inner": nn.BatchNorm1d(8), "pool": nn.AvgPool1d(4, 4)}
    model = wired(reduced, **layers, q=nn.Linear(8, 4), k=nn.Linear(8, 4))
    check_pass(model, (), PASS, rewrites=2, nodes=-2, inputs=feature_map())


def test_a_map_and_a_vector_reader_share_a_norm() -> None:
    def both(m: Wired, x: Tensor) -> tuple[Tensor, Tensor]:
        y = normed(m, x)
        return m.conv(y), m.linear(y.mean((2, 3)))

    model = wired(both, norm=nn.BatchNorm2d(8), conv=nn.Conv2d(8, 4, 1), linear=nn.Linear(8, 3))
    check_pass(model, (), PASS, rewrites=1, nodes=-1, inputs=feature_map())


@pytest.mark.parametrize(
    "wiring",
    [lambda m, x: m.conv(x), lambda m, x: m.linear(normed(m, x).mean((2, 3)))],
    ids=["no norm", "only vectors"],
)
def test_nothing_to_fold(wiring: Wiring) -> None:
    model = wired(wiring, norm=nn.BatchNorm2d(8), conv=nn.Conv2d(8, 4, 1), linear=nn.Linear(8, 3))
    check_pass(model, (), PASS, rewrites=0, nodes=0, inputs=feature_map())


@pytest.mark.parametrize(
    ("wiring", "reason"),
    [
        (lambda m, x: m.conv(normed(m, x).relu()), "relu also reads it"),
        (lambda m, x: m.wide(normed(m, x)), "wide also reads it"),
        (lambda m, x: m.padded(normed(m, x)), "padded also reads it"),
        (lambda m, x: m.grouped(normed(m, x)), "grouped also reads it"),
        (lambda m, x: (y := normed(m, x), m.conv(y)), "the graph's output also reads it"),
        (lambda m, x: m.conv(y := normed(m, x)).mean() + y, "add also reads it"),
        (lambda m, x: m.conv(normed(m, x)) + m.conv(x), "conv is used, or its weight is shared, elsewhere"),
        (
            lambda m, x: m.linear(normed(m, x).flatten(2).reshape(x.shape[0], -1, 8)),
            "linear does not read the channels in their order",
        ),
        (
            lambda m, x: m.conv(normed(m, x).view(2, 2, 4, 6, 10).transpose(1, 2).flatten(1, 2)),
            "conv does not read the channels in their order",
        ),
        (lambda m, x: m.across(normed(m, x)), "across does not read the channels in their order"),
        (lambda m, x: m.conv(m.pool(normed(m, x))), "conv does not read the channels in their order"),
        (lambda m, x: m.conv(m.sums(normed(m, x))), "conv does not read the channels in their order"),
        (
            lambda m, x: m.conv(normed(m, x).mean(1, keepdim=True).expand(-1, 8, -1, -1)),
            "expand also reads it",
        ),
    ],
    ids=[
        "relu",
        "3x3",
        "padding",
        "groups",
        "tapped",
        "residual",
        "shared weight",
        "channels mixed",
        "heads interleaved",
        "wrong axis",
        "border counted",
        "sum pooling",
        "channel mean",
    ],
)
def test_refuses(wiring: Wiring, reason: str) -> None:
    model = wired(
        wiring,
        norm=nn.BatchNorm2d(8),
        conv=nn.Conv2d(8, 8, 1),
        wide=nn.Conv2d(8, 8, 3),
        padded=nn.Conv2d(8, 8, 1, padding=1),
        grouped=nn.Conv2d(8, 8, 1, groups=2),
        linear=nn.Linear(8, 4),
        across=nn.Linear(10, 4),
        pool=nn.AvgPool2d(3, 2, padding=1),
        sums=nn.AvgPool2d(2, divisor_override=1),
    )
    check_pass(model, (), PASS, rewrites=0, nodes=0, inputs=feature_map(), refused=[reason])


def test_refuses_a_norm_without_statistics() -> None:
    model = wired(lambda m, x: m.conv(m.norm(x)), norm=nn.Identity(), conv=nn.Conv2d(8, 4, 1))
    model.norm = nn.BatchNorm2d(8, track_running_stats=False).eval()
    reason = "the norm keeps no running statistics"
    check_pass(model, (), PASS, rewrites=0, nodes=0, inputs=feature_map(), refused=[reason])


def test_on_the_model() -> None:
    before = (StripTrainOnly(), FoldConvNorm())
    checked = check_pass(nano(), before, PASS, rewrites=12, nodes=-12, inputs=images(2, 3, 75, 97, seed=1).double())
    left = [m for m in checked.graph.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert left == [checked.graph.get_submodule("norm")]


def test_a_tapped_stage_keeps_its_norm() -> None:
    reasons = ["the graph's output also reads it"] * 4
    inputs = images(2, 3, 64, 64, seed=1).double()
    model, before = backbone(extra_norms=True), (StripTrainOnly(), FoldConvNorm())
    checked = check_pass(model, before, PASS, rewrites=12, nodes=-12, inputs=inputs, refused=reasons)
    assert [r.where for r in checked.record.refused] == ["norm", *(f"extra_norm_list.{i}" for i in (2, 1, 0))]


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("nano", 12),
        ("official", 12),
        ("own head", 12),
        ("conv head", 15),  # nobody taps the stages, so their three norms fold too
        ("backbone", 12),
        ("backbone with norms", 12),
        ("small", 27),  # 16 NCBs, 4 NTBs with two each, 3 behind the token average
        ("timm", 27),
    ],
)
def test_counts(model: str, count: int) -> None:
    assert certified(model).record("fold-pre-norm").rewrites == count
