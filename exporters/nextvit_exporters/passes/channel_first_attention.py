"""Compute attention on (B, C, N) as it arrives, without turning the map into tokens and back.

Before, with T the transpose of the last two axes::

    t = T(flatten(x))                    # (B, C, H, W) -> (B, N, C)
    q, k, v = Q t, K T(average(T(t))), V T(average(T(t)))
    y = reshape(T(P (softmax(q kᵀ) v)))  # (B, N, C) -> (B, C, H, W)

After, every Linear a 1x1 convolution with the same weights::

    q, k, v = Q * x, K * average(flatten(x)), V * average(flatten(x))
    y = P * reshape(v softmax(qᵀ k)ᵀ)    # heads are (B, h, d, N)

The same products in another order of axes. Not applied when the attention does not start from a map of
(B, C, H, W) and return to one. On ONNX Runtime's CPU kernels it takes 3-4 % off the latency; it keeps TensorRT
from recognising fused attention, so that target leaves it out.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes import algebra, attention
from nextvit_exporters.passes.base import PassResult, Rewrite
from nextvit_exporters.passes.dataflow import reads_shape, replace_module


@dataclass(frozen=True, slots=True)
class ChannelFirstAttention(Rewrite):
    """Attention on (B, C, N) with 1x1 convolutions."""

    name: str = "channel-first-attention"

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Rewrite every attention that lies between two maps."""

        def turn(match: attention.Attention) -> bool | str:
            ends = _ends(graph, match)
            if isinstance(ends, str):
                return ends
            _rewrite(graph, match, ends)
            return True

        return attention.rewrite_each(graph, turn)


@dataclass(frozen=True, slots=True)
class _Ends:
    """The map the attention starts from and the node that returns its result as a map, both (B, C, H, W)."""

    source: fx.Node
    result: fx.Node


def _ends(graph: fx.GraphModule, match: attention.Attention) -> _Ends | str:
    if match.scales:
        return "its scale is not folded yet"
    if not attention.heads_first(graph, match):
        return "its heads are not laid out as (B, h, N, d)"
    tokens = match.q.all_input_nodes[0]
    flat = tokens.all_input_nodes[0] if _is_transpose(tokens) else None
    source = flat.all_input_nodes[0] if flat is not None and flat.all_input_nodes else None
    if flat is None or source is None or not _flattens(source, flat):
        return "its tokens are not a flattened map"
    turned = _only_reader(match.proj)
    result = _only_reader(turned) if turned is not None and _is_transpose(turned) else None
    if result is None or result.meta.get("shape") != source.meta["shape"] or not _reshapes(result):
        return "its result is not returned to a map of the same shape"
    if match.k.all_input_nodes != match.v.all_input_nodes:
        return "keys and values read different tokens"
    return _Ends(source, result)


def _rewrite(graph: fx.GraphModule, match: attention.Attention, ends: _Ends) -> None:
    heads = match.product.meta["shape"][1]
    new = graph.graph
    with new.inserting_before(match.scores):
        q = _split_heads(new, _convolve(graph, match.q, ends.source), heads)
        memory = match.k.all_input_nodes[0]
        spatial = memory is match.q.all_input_nodes[0]
        context = ends.source if spatial else _channel_first(new, memory)
        k = _split_heads(new, _convolve(graph, match.k, context), heads)
        v = _split_heads(new, _convolve(graph, match.v, context), heads)
        scores = new.call_function(operator.matmul, (new.call_method("transpose", (q, -2, -1)), k))
        weights = new.call_function(torch.softmax, (scores, -1))
        mixed = new.call_function(operator.matmul, (v, new.call_method("transpose", (weights, -2, -1))))
    with new.inserting_before(ends.result):
        shape = new.call_function(getattr, (ends.source, "shape"))
        as_map = new.call_method("reshape", (mixed, shape))
        as_map.meta["shape"] = ends.source.meta["shape"]
        result = _convolve(graph, match.proj, as_map)
    ends.result.replace_all_uses_with(result)
    new.eliminate_dead_code()


def _channel_first(new: fx.Graph, tokens: fx.Node) -> fx.Node:
    """(B, N, C) as (B, C, N), undoing transposes rather than adding to them."""
    if not _is_transpose(tokens):
        result = new.call_method("transpose", (tokens, 1, 2))
        batch, positions, channels = tokens.meta["shape"]
        result.meta["shape"] = (batch, channels, positions)
        return result
    averaged = tokens.all_input_nodes[0]
    for turned in averaged.all_input_nodes[:1]:
        if _is_transpose(turned) and _is_transpose(turned.all_input_nodes[0]):
            averaged.replace_input_with(turned, turned.all_input_nodes[0].all_input_nodes[0])
    return averaged


def _convolve(graph: fx.GraphModule, node: fx.Node, source: fx.Node) -> fx.Node:
    """Call the Linear of ``node`` as a 1x1 convolution on ``source``, (B, C, N) or (B, C, H, W)."""
    linear = g.module_as(graph, node, nn.Linear)
    dimensions = len(source.meta["shape"]) - 2
    replace_module(graph, node, algebra.as_convolution(linear, dimensions))
    result = graph.graph.call_module(str(node.target), (source,))
    result.meta["shape"] = (source.meta["shape"][0], linear.out_features, *source.meta["shape"][2:])
    return result


def _split_heads(new: fx.Graph, node: fx.Node, heads: int) -> fx.Node:
    """(B, C, ...) -> (B, h, d, N)."""
    shape = new.call_function(getattr, (node, "shape"))
    batch = new.call_function(operator.getitem, (shape, 0))
    return new.call_method("reshape", (node, batch, heads, node.meta["shape"][1] // heads, -1))


def _is_transpose(node: fx.Node) -> bool:
    """Whether the node swaps the last two axes of (B, N, C)."""
    if not g.is_op(node, "transpose", "permute"):
        return False
    axes = tuple(node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:])
    rank = len(node.meta["shape"])
    axes = tuple(a % rank if isinstance(a, int) else a for a in axes)
    return rank == 3 and axes in {(1, 2), (2, 1), (0, 2, 1)}


def _flattens(source: fx.Node, flat: fx.Node) -> bool:
    before, after = source.meta.get("shape", ()), flat.meta.get("shape", ())
    return _reshapes(flat) and len(before) == 4 and after == (*before[:2], before[2] * before[3])


def _reshapes(node: fx.Node) -> bool:
    return g.is_op(node, "reshape", "view", "flatten", "unflatten")


def _only_reader(node: fx.Node) -> fx.Node | None:
    readers = [u for u in node.users if not reads_shape(u)]
    return readers[0] if len(readers) == 1 else None
