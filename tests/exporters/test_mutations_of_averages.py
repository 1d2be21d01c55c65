"""The rewrites for TensorRT broken on purpose; see ``test_mutations`` for the folds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes import (
    algebra,
    average_tokens,
    convolve_projection,
    flatten_channels_last,
    merge_average_conv,
    sets,
)
from nextvit_exporters.passes.base import run_passes
from tests.exporters.tensorrt_passes import assert_rolled_back, on_its_way
from tests.exporters.toys import feature_map, wired

MERGED, TURNED = merge_average_conv._merged, flatten_channels_last._rewrite
TOKENS, AS_CONV = average_tokens._rewrite, algebra.as_convolution
MISTAKE = 1e-6
"""A mistake that moves the outputs by less would be near the bound, and seen by luck."""

Change = Callable[[nn.Conv2d], None]


def weights(conv: nn.Conv2d, weight: Tensor) -> None:
    conv.weight = nn.Parameter(weight.contiguous(), requires_grad=False)


def biases(conv: nn.Conv2d, bias: Tensor | None) -> None:
    conv.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)


def one_corner(conv: nn.Conv2d) -> None:
    corner = torch.zeros_like(conv.weight)
    corner[:, :, 0, 0] = conv.weight[:, :, 0, 0] * 4.0
    weights(conv, corner)


def one_quarter_left_out(conv: nn.Conv2d) -> None:
    missing = conv.weight.detach().clone()
    missing[:, :, 1, 1] = 0.0
    weights(conv, missing)


MERGE_MISTAKES: dict[str, Change] = {
    "summed": lambda conv: weights(conv, conv.weight.detach() * 4.0),
    "halves": lambda conv: weights(conv, conv.weight.detach() * 2.0),
    "one corner": one_corner,
    "one quarter left out": one_quarter_left_out,
    "channels backwards": lambda conv: weights(conv, conv.weight.detach().flip(1)),
    "bias dropped": lambda conv: biases(conv, None),
    "bias in quarters": lambda conv: biases(conv, conv.bias.detach() / 4.0 if conv.bias is not None else None),
}


@pytest.mark.parametrize("change", MERGE_MISTAKES.values(), ids=MERGE_MISTAKES)
def test_a_wrong_merge_is_rolled_back(change: Change) -> None:
    def merged(conv: nn.Conv2d) -> nn.Conv2d:
        result = MERGED(conv)
        change(result)
        return result

    error = assert_rolled_back("merge-average-conv", lambda patch: patch.setattr(merge_average_conv, "_merged", merged))
    assert error > MISTAKE


def test_a_merge_at_odd_sizes_is_rolled_back() -> None:
    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(merge_average_conv, "_why_not", lambda *_: None)

    assert assert_rolled_back("merge-average-conv", plant, size=(75, 97)) > MISTAKE


def test_a_merge_of_another_average_is_rolled_back() -> None:
    pool = nn.AvgPool2d(3, 2, padding=1)
    graph = g.trace(wired(lambda m, x: m.conv(m.pool(x)), pool=pool, conv=nn.Conv2d(8, 4, 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_average_conv, "_is_quarters", lambda *_: True)
        _, (record,) = run_passes(graph, [merge_average_conv.MergeAverageConv()], [feature_map()])
    assert (record.certified, record.rewrites) == (False, 1)


def every_so_many(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if g.is_op(node, "mean") and g.is_op(node.args[0], "unflatten"):
            runs = node.args[0]
            runs.args = (*runs.args[:2], tuple(reversed(runs.args[2])))
            node.args = (runs, 1)


def summed(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if g.is_op(node, "mean") and g.is_op(node.args[0], "unflatten"):
            node.target = "sum"


def first_of_each(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if g.is_op(node, "mean") and g.is_op(node.args[0], "unflatten"):
            node.target, node.args = "select", (node.args[0], 2, 0)


@pytest.mark.parametrize("change", [every_so_many, summed, first_of_each])
def test_a_wrong_token_average_is_rolled_back(change: Callable[[fx.GraphModule], None]) -> None:
    def rewritten(graph: fx.GraphModule, pool: fx.Node) -> None:
        TOKENS(graph, pool)
        change(graph)

    error = assert_rolled_back("average-tokens", lambda patch: patch.setattr(average_tokens, "_rewrite", rewritten))
    assert error > MISTAKE


def test_a_token_average_that_overlaps_is_rolled_back() -> None:
    graph = g.trace(wired(lambda m, x: m.pool(x.flatten(2)), pool=nn.AvgPool1d(3, 2, padding=1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(average_tokens, "_why_not", lambda *_: None)
        _, (record,) = run_passes(graph, [average_tokens.AverageTokens()], [feature_map()])
    assert (record.certified, record.rewrites) == (False, 1)


@pytest.mark.parametrize("axes", [(0, 3, 2, 1), (0, 1, 2, 3)], ids=["columns first", "not moved"])
def test_wrong_axes_are_rolled_back(axes: tuple[int, ...]) -> None:
    def turned(new: fx.Graph, tokens: fx.Node, source: fx.Node) -> None:
        shape = tokens.meta["shape"]
        with new.inserting_before(tokens):
            flat = new.call_method("reshape", (new.call_method("permute", (source, *axes)), *shape))
        tokens.replace_all_uses_with(flat)
        new.erase_node(tokens)

    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(flatten_channels_last, "_rewrite", turned)

    assert assert_rolled_back("flatten-channels-last", plant) > MISTAKE


CONV_MISTAKES: dict[str, Change] = {
    "bias dropped": lambda conv: biases(conv, None),
    "transposed": lambda conv: weights(conv, conv.weight.detach().transpose(0, 1)),
    "channels backwards": lambda conv: weights(conv, conv.weight.detach().flip(1)),
}


@pytest.mark.parametrize("change", CONV_MISTAKES.values(), ids=CONV_MISTAKES)
def test_a_wrong_projection_is_rolled_back(change: Change) -> None:
    def as_conv(linear: nn.Linear, dimensions: int) -> nn.Conv1d | nn.Conv2d:
        result = AS_CONV(linear, dimensions)
        assert isinstance(result, nn.Conv2d)
        change(result)
        return result

    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(algebra, "as_convolution", as_conv)

    assert assert_rolled_back("convolve-projection", plant) > MISTAKE


def test_a_projection_of_mixed_channels_is_rolled_back() -> None:
    graph = g.trace(wired(lambda m, x: m.proj(x.flatten(2).transpose(1, 2)).reshape(x.shape), proj=nn.Linear(8, 8)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolve_projection, "holds", lambda *_: True)
        _, (record,) = run_passes(graph, [convolve_projection.ConvolveProjection()], [feature_map()])
    assert (record.certified, record.rewrites) == (False, 1)


def test_the_sound_list_is_certified() -> None:
    known = on_its_way("nano")
    assert all(known.records[each.name].certified for each in sets.FEWEST_KERNELS)
