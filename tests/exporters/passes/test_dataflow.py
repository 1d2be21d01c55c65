"""Labels: where channels go, told by execution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes.dataflow import Reach, holds, labels, pointwise, reach, spread
from tests.exporters.toys import Wiring, feature_map, wired


def follow(wiring: Wiring, *, through_average: bool = True) -> Reach:
    """The reach of a norm's channels through ``wiring``, which starts with ``m.norm(x)``."""
    layers = {
        "norm": nn.BatchNorm2d(8),
        "fc": nn.Linear(8, 8),
        "row": nn.Linear(10, 8),
        "conv": nn.Conv2d(8, 8, 1),
        "pool": nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
        "counted": nn.AvgPool2d(3, padding=1),
        "ceil": nn.AvgPool2d(4, ceil_mode=True),
        "line": nn.AvgPool1d(4, 4),
        "flat": nn.Flatten(2),
        "unflat": nn.Unflatten(1, (2, 4)),
    }
    graph = g.trace(wired(wiring, **layers))
    g.measure(graph, feature_map())
    (norm,) = (node for node in graph.graph.nodes if node.target == "norm")
    return reach(graph, norm, through_average=through_average)


@pytest.mark.parametrize(
    "wiring",
    [
        lambda m, x: m.conv(m.norm(x)),
        lambda m, x: m.fc(m.norm(x).flatten(2).transpose(1, 2)),
        lambda m, x: m.fc(m.flat(m.norm(x)).permute(0, 2, 1)),
        lambda m, x: m.fc(m.norm(x).reshape(x.shape[0], x.shape[1], -1).transpose(-1, -2)),
        lambda m, x: m.fc(m.norm(x).permute(0, 2, 3, 1).flatten(1, 2)),
        lambda m, x: m.fc(m.norm(x).permute(2, 3, 0, 1)),
        lambda m, x: m.fc(m.norm(x).view(2, 2, 4, 6, 10).permute(0, 3, 4, 1, 2).flatten(3)),
        lambda m, x: m.fc(m.unflat(m.norm(x)).flatten(1, 2).flatten(2).transpose(1, 2).contiguous()),
        lambda m, x: m.conv(m.pool(m.norm(x))),
        lambda m, x: m.fc(m.line(m.norm(x).flatten(2)).transpose(1, 2)),
        lambda m, x: m.fc(m.norm(x).mean((2, 3))),
        lambda m, x: m.fc(m.norm(x).mean((0, 2, 3))),
    ],
)
def test_channels_arrive_in_their_order(wiring: Wiring) -> None:
    found = follow(wiring)
    assert found.reason is None
    assert [node.target for node in found.sinks] in (["conv"], ["fc"])


MIXED = " does not read the channels in their order"


@pytest.mark.parametrize(
    ("wiring", "reason"),
    [
        (lambda m, x: m.fc(m.norm(x).reshape(x.shape[0], -1, 8)), f"fc{MIXED}"),
        (lambda m, x: m.fc(m.norm(x).flatten(2).reshape(2, 60, 8)), f"fc{MIXED}"),
        (lambda m, x: m.row(m.norm(x)), f"row{MIXED}"),
        (lambda m, x: m.fc(m.norm(x).transpose(1, 2).reshape(2, -1, 8)), f"fc{MIXED}"),
        (lambda m, x: m.conv(m.norm(x).view(2, 2, 4, 6, 10).transpose(1, 2).flatten(1, 2)), f"conv{MIXED}"),
        (lambda m, x: m.fc(m.norm(x).view(2, 2, 4, 6, 10).permute(0, 3, 4, 2, 1).flatten(3)), f"fc{MIXED}"),
        (lambda m, x: m.conv(m.norm(x).transpose(0, 1).reshape(2, 8, 6, 10)), f"conv{MIXED}"),
        (lambda m, x: m.conv(m.counted(m.norm(x))), f"conv{MIXED}"),
        (
            lambda m, x: m.fc(m.norm(x).mean((1, 2)).reshape(-1, 1).mean(1).unflatten(0, (2, 10))[:, :8]),
            "getitem also reads it",
        ),
        (lambda m, x: m.conv(m.norm(x) + 1.0), "add also reads it"),
        (lambda m, x: m.conv(torch.cat([m.norm(x), x])), "cat also reads it"),
        (lambda m, x: m.conv(m.norm(x).flip(1)), "flip also reads it"),
        (lambda m, x: m.conv(m.norm(x)[:, [7, 6, 5, 4, 3, 2, 1, 0]]), "getitem also reads it"),
        (lambda m, x: m.norm(x), "the graph's output also reads it"),
        (lambda m, x: m.conv(x) * m.norm(x).shape[0], "nothing reads it"),
    ],
)
def test_a_channel_out_of_place_is_seen(wiring: Wiring, reason: str) -> None:
    assert follow(wiring) == Reach((), reason)


def test_a_partial_window_that_counts_only_pixels_is_an_average() -> None:
    """ceil_mode without padding divides by what is there, whatever count_include_pad says."""
    assert follow(lambda m, x: m.conv(m.ceil(m.norm(x)))).reason is None


def test_averages_are_followed_only_where_allowed() -> None:
    assert follow(lambda m, x: m.conv(m.pool(m.norm(x))), through_average=False).reason == "pool also reads it"


def test_sizes_may_be_read() -> None:
    assert follow(lambda m, x: m.conv((y := m.norm(x)).reshape(y.size(0), y.shape[1], *(6, 10)))).reason is None


def test_a_size_that_is_not_known_is_not_guessed() -> None:
    """The divisor of an average comes from another tensor's numbers."""
    found = follow(lambda m, x: m.conv(torch.nn.functional.avg_pool2d(m.norm(x), 2) / x.sum()))
    assert found.reason == "truediv also reads it"


@pytest.mark.parametrize(
    ("module", "answer"),
    [
        (nn.Linear(8, 4), True),
        (nn.Conv2d(8, 4, 1), True),
        (nn.Conv1d(8, 4, 1, stride=2), True),
        (nn.Conv2d(8, 4, 3), False),
        (nn.Conv2d(8, 4, (1, 3)), False),
        (nn.Conv2d(8, 4, 1, padding=1), False),
        (nn.Conv2d(8, 4, 1, padding="same"), False),
        (nn.Conv2d(8, 4, 1, groups=2), False),
        (nn.ConvTranspose2d(8, 4, 1), False),
        (nn.ReLU(), False),
        (None, False),
    ],
)
def test_pointwise(module: nn.Module | None, *, answer: bool) -> None:
    assert (pointwise(module) is module and module is not None) == answer


def test_labels_tell_channels_apart() -> None:
    values = labels(6)
    assert len(set(values.tolist())) == 6
    assert bool((values > 0).all())
    laid = spread(values, (2, 6, 3), 1)
    assert holds(laid, values, 1)
    assert not holds(laid.flip(1), values, 1)
    assert not holds(laid, values, -1)
    assert not holds(laid * (1.0 + 1e-9), values, 1)
    one_wrong: Tensor = laid.clone()
    one_wrong[1, 3, 2] += 1e-6
    assert not holds(one_wrong, values, 1)


def test_reach_needs_no_gradient_and_leaves_the_graph_alone() -> None:
    graph = g.trace(wired(lambda m, x: m.conv(m.norm(x)), norm=nn.BatchNorm2d(8), conv=nn.Conv2d(8, 8, 1)))
    g.measure(graph, feature_map())
    before = g.fingerprint(graph)
    (norm,) = (node for node in graph.graph.nodes if node.target == "norm")
    assert isinstance(norm, fx.Node)
    reach(graph, norm, through_average=True)
    assert g.fingerprint(graph) == before
