"""Average before the 1x1 convolution instead of behind it.

Before::

    y = average(x + conv(h))             # conv: 1x1, W h + b

After::

    y = average(x) + conv(average(h))

An average whose weights sum to one commutes with a pointwise linear map: average(W h + b) = W average(h) + b. The
convolution then runs at a quarter of the positions in front of a 2x2 average, and at one position in front of
global pooling. Exact at odd sizes too, where ``ceil_mode`` without padding in the count is still such an average.

Not applied where the sum is read by something else, for example tapped as a feature map.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from nextvit_exporters import graph as g
from nextvit_exporters.passes.base import PassResult, Refusal, Rewrite
from nextvit_exporters.passes.dataflow import averages, describe, holds, labels, pointwise, push, spread


@dataclass(frozen=True, slots=True)
class AverageEarly(Rewrite):
    """A stage's last 1x1 convolution, run behind the average that follows it."""

    name: str = "average-early"

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Rewrite every average of a sum in which a 1x1 convolution ends."""
        rewrites, refused = 0, []
        for node in list(graph.graph.nodes):
            if not averages(graph, node) or not _is_sum(node.all_input_nodes[0]):
                continue
            total = node.all_input_nodes[0]
            convs = [n for n in total.all_input_nodes if _ends_in(graph, n)]
            if not convs:
                continue
            if reason := _why_not(graph, node, total):
                refused.append(Refusal(describe(convs[0]), reason))
                continue
            _rewrite(graph, node, total, convs)
            rewrites += 1
        return PassResult(rewrites, tuple(refused))


def _is_sum(node: fx.Node) -> bool:
    return g.is_op(node, "add") and len(node.all_input_nodes) == 2 and not node.kwargs


def _ends_in(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is a 1x1 convolution of stride 1 that only the sum reads."""
    conv = pointwise(g.module_of(graph, node))
    if conv is None or isinstance(conv, torch.nn.Linear) or len(node.users) != 1:
        return False
    return all(s == 1 for s in conv.stride)


def _why_not(graph: fx.GraphModule, pool: fx.Node, total: fx.Node) -> str | None:
    others = [u for u in total.users if u is not pool]
    if others:
        return f"its output is also read by {describe(others[0])}"
    shape: tuple[int, ...] = total.meta["shape"]
    if any(n.meta["shape"] != shape for n in total.all_input_nodes):
        return "one term of the sum is spread over the other"
    channels = labels(shape[1])
    averaged = push(graph, pool, total, spread(channels, shape, 1))
    if averaged is None or averaged.dim() != len(shape):
        return "the pooling drops axes"
    if not holds(averaged, channels, 1):
        return "the pooling's weights do not sum to one, or it mixes channels"
    return None


def _rewrite(graph: fx.GraphModule, pool: fx.Node, total: fx.Node, convs: list[fx.Node]) -> None:
    terms: list[fx.Node] = []
    for term in total.all_input_nodes:
        source = term.all_input_nodes[0] if term in convs else term
        with graph.graph.inserting_before(pool):
            moved = graph.graph.node_copy(pool, _instead_of(total, source))
            if term in convs:
                moved = graph.graph.call_module(str(term.target), (moved,))
        terms.append(moved)
    with graph.graph.inserting_before(pool):
        result = graph.graph.call_function(operator.add, tuple(terms))
    result.meta["shape"] = pool.meta["shape"]
    pool.replace_all_uses_with(result)
    graph.graph.erase_node(pool)


def _instead_of(old: fx.Node, new: fx.Node) -> Callable[[fx.Node], fx.Node]:
    return lambda node: new if node is old else node
