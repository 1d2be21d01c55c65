"""Compute keys and values with one matrix product.

Before::

    k = K x + c
    v = V x + e

After::

    k, v = split([K; V] x + [c; e])

The rows of both maps are stacked; nothing is computed differently. Not applied when k and v read different
tokens, or when one of them has a bias and the other has none.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes import algebra, attention
from nextvit_exporters.passes.base import PassResult, Rewrite


@dataclass(frozen=True, slots=True)
class PackKeyValue(Rewrite):
    """K and V as one Linear."""

    name: str = "pack-key-value"

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Pack every attention whose k and v read the same tokens."""

        def pack(match: attention.Attention) -> bool | str:
            if reason := _why_not(graph, match):
                return reason
            _pack(graph, match)
            return True

        return attention.rewrite_each(graph, pack)


def _why_not(graph: fx.GraphModule, match: attention.Attention) -> str | None:
    if match.k.args != match.v.args:
        return "keys and values read different tokens"
    key, value = _maps(graph, match)
    if algebra.has_bias(key) != algebra.has_bias(value):
        return "only one of keys and values has a bias"
    return None


def _maps(graph: fx.GraphModule, match: attention.Attention) -> tuple[nn.Linear, nn.Linear]:
    return g.module_as(graph, match.k, nn.Linear), g.module_as(graph, match.v, nn.Linear)


def _pack(graph: fx.GraphModule, match: attention.Attention) -> None:
    key, value = _maps(graph, match)
    packed = nn.Linear(key.in_features, key.out_features + value.out_features, bias=algebra.has_bias(key))
    packed.weight = nn.Parameter(torch.cat([key.weight.detach(), value.weight.detach()]), requires_grad=False)
    if algebra.has_bias(key):
        both = torch.cat([algebra.bias_of(key), algebra.bias_of(value)])
        packed.bias = nn.Parameter(both, requires_grad=False)
    name = f"{match.k.target}_{str(match.v.target).rpartition('.')[2]}"
    graph.add_submodule(name, packed)
    first = min((match.k, match.v), key=list(graph.graph.nodes).index)
    with graph.graph.inserting_before(first):
        both_nodes = graph.graph.call_module(name, match.k.args)
        halves = graph.graph.call_method("split", (both_nodes, [key.out_features, value.out_features], -1))
        for index, node in enumerate((match.k, match.v)):
            half = graph.graph.call_function(operator.getitem, (halves, index))
            half.meta["shape"] = node.meta["shape"]
            node.replace_all_uses_with(half)
    for node in (match.k, match.v):
        graph.graph.erase_node(node)
