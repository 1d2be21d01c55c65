from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nextvit_exporters.passes.average_early import AverageEarly
from nextvit_exporters.passes.fold_conv_norm import FoldConvNorm
from nextvit_exporters.passes.fold_head_norm import FoldHeadNorm
from nextvit_exporters.passes.fold_pre_norm import FoldPreNorm
from nextvit_exporters.passes.strip_train_only import StripTrainOnly
from tests.exporters.passes_harness import backbone, certified, check_pass, nano
from tests.exporters.toys import Wired, Wiring, feature_map, wired
from tests.harness import images

PASS = AverageEarly()


def layers() -> dict[str, nn.Module]:
    return {
        "conv": nn.Conv2d(8, 8, 1),
        "other": nn.Conv2d(8, 8, 1, bias=False),
        "wide": nn.Conv2d(8, 8, 3, padding=1),
        "strided": nn.Conv2d(8, 8, 1, stride=2),
        "pool": nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
        "gap": nn.AdaptiveAvgPool2d(1),
        "counted": nn.AvgPool2d(3, 2, padding=1),
        "sums": nn.AvgPool2d(2, divisor_override=1),
        "max": nn.MaxPool2d(2),
    }


@pytest.mark.parametrize(
    ("wiring", "nodes"),
    [
        (lambda m, x: m.pool(x + m.conv(x.relu())), 1),
        (lambda m, x: m.pool(m.conv(x.relu()) + x), 1),
        (lambda m, x: m.gap(torch.add(x, m.conv(x.relu()))), 1),
        (lambda m, x: (x + m.other(x.relu())).mean((2, 3), keepdim=True), 1),
        (lambda m, x: functional.adaptive_avg_pool2d(x + m.conv(x.relu()), (3, 4)), 1),
        (lambda m, x: functional.avg_pool2d(x + m.conv(x.relu()), 3, 2, 1, False, False), 1),  # noqa: FBT003 - torch's own order
        (lambda m, x: m.pool(m.conv(x) + m.other(x.relu())), 1),
    ],
    ids=["pool", "other order", "global", "mean", "adaptive", "padding not counted", "two convolutions"],
)
def test_averages_first(wiring: Wiring, nodes: int) -> None:
    checked = check_pass(wired(wiring, **layers()), (), PASS, rewrites=1, nodes=nodes, inputs=feature_map())
    assert checked.record.macs[1] < checked.record.macs[0]


def test_odd_sizes_are_exact() -> None:
    inputs = images(2, 8, 7, 9, seed=1, dtype=torch.float64)
    model = wired(lambda m, x: m.pool(x + m.conv(x.relu())), **layers())
    check_pass(model, (), PASS, rewrites=1, nodes=1, inputs=inputs)


def test_one_average_behind_another() -> None:
    def chain(m: Wired, x: Tensor) -> Tensor:
        y = m.pool(x + m.conv(x.relu()))
        out: Tensor = m.gap(y + m.other(y.relu()))
        return out

    check_pass(wired(chain, **layers()), (), PASS, rewrites=2, nodes=2, inputs=feature_map())


@pytest.mark.parametrize(
    "wiring",
    [
        lambda m, x: m.pool(m.conv(x)),
        lambda m, x: m.pool(x + m.wide(x)),
        lambda m, x: m.pool((x + m.conv(x)).relu()),
        lambda m, x: m.max(x + m.conv(x)),
        lambda m, x: m.pool(x[:, :, ::2, ::2] + m.strided(x)),
        lambda m, x: m.pool(x + m.conv(x) * 2.0),
        lambda m, x: m.pool(torch.add(x, m.conv(x), alpha=2)),
        lambda m, x: m.pool(x * m.conv(x)),
        lambda m, x: m.pool(x + 1.0),
    ],
    ids=["no sum", "3x3", "relu", "max", "strided", "scaled", "alpha", "product", "number"],
)
def test_nothing_to_move(wiring: Wiring) -> None:
    check_pass(wired(wiring, **layers()), (), PASS, rewrites=0, nodes=0, inputs=feature_map())


def test_a_convolution_that_something_else_reads_stays() -> None:
    def tapped(m: Wired, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.conv(x)
        return m.pool(x + y), y

    check_pass(wired(tapped, **layers()), (), PASS, rewrites=0, nodes=0, inputs=feature_map())


def sum_tapped(m: Wired, x: Tensor) -> tuple[Tensor, Tensor]:
    y = x + m.conv(x)
    return m.pool(y), y


WEIGHTS = "the pooling's weights do not sum to one, or it mixes channels"


@pytest.mark.parametrize(
    ("wiring", "reasons"),
    [
        (sum_tapped, ["its output is also read by the graph's output"]),
        (lambda m, x: m.pool(y := x + m.conv(x)).mean() + y, ["its output is also read by add_1"]),
        (
            lambda m, x: (m.pool(y := x + m.conv(x)), m.gap(y)),
            ["its output is also read by gap", "its output is also read by pool"],
        ),
        (lambda m, x: m.counted(x + m.conv(x)), [WEIGHTS]),
        (lambda m, x: m.sums(x + m.conv(x)), [WEIGHTS]),
        (lambda m, x: (x + m.conv(x)).mean(1, keepdim=True), [WEIGHTS]),
        (lambda m, x: (x + m.conv(x)).mean((2, 3)), ["the pooling drops axes"]),
        (lambda m, x: m.pool(m.gap(x) + m.conv(x)), ["one term of the sum is spread over the other"]),
        (lambda m, x: m.pool(x + m.conv(m.gap(x))), ["one term of the sum is spread over the other"]),
    ],
    ids=[
        "tapped",
        "residual",
        "two pools",
        "border counted",
        "sums",
        "channels",
        "axes",
        "broadcast",
        "broadcast conv",
    ],
)
def test_refuses(wiring: Wiring, reasons: list[str]) -> None:
    check_pass(wired(wiring, **layers()), (), PASS, rewrites=0, nodes=0, inputs=feature_map(), refused=reasons)


@pytest.mark.parametrize("size", [(64, 64), (75, 97)])
def test_on_the_model(size: tuple[int, int]) -> None:
    inputs = images(2, 3, *size, seed=1).double()
    before = (StripTrainOnly(), FoldConvNorm(), FoldPreNorm(), FoldHeadNorm())
    checked = check_pass(nano(), before, PASS, rewrites=4, nodes=4, inputs=inputs)
    assert checked.record.macs[1] < 0.95 * checked.record.macs[0]


def test_a_norm_in_between_keeps_the_last_stage() -> None:
    inputs = images(2, 3, 64, 64, seed=1).double()
    check_pass(nano(), (StripTrainOnly(),), PASS, rewrites=3, nodes=3, inputs=inputs)


def test_tapped_stages_are_refused() -> None:
    inputs, before = images(2, 3, 64, 64, seed=1).double(), (StripTrainOnly(),)
    reasons = ["its output is also read by the graph's output"] * 3
    model = backbone(extra_norms=False)
    checked = check_pass(model, before, PASS, rewrites=0, nodes=0, inputs=inputs, refused=reasons)
    assert [r.where for r in checked.record.refused] == [f"features.{i}.mlp.conv2" for i in (0, 2, 4)]
    check_pass(backbone(extra_norms=True), before, PASS, rewrites=0, nodes=0, inputs=inputs)


TAPPED = tuple(f"features.{i}.mlp.conv2" for i in (0, 2, 4))


@pytest.mark.parametrize(
    ("model", "count", "refused"),
    [
        ("nano", 4, ()),
        ("official", 4, ()),
        ("own head", 4, ()),
        ("conv head", 3, ()),
        ("backbone", 0, TAPPED),
        ("backbone with norms", 0, ()),
        ("small", 4, ()),
        ("timm", 4, ()),
    ],
)
def test_counts(model: str, count: int, refused: tuple[str, ...]) -> None:
    assert certified(model).counts("average-early") == (count, refused)
