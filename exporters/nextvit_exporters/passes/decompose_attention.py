"""Write fused attention out, so that the folds behind it have something to work on.

Before::

    y = scaled_dot_product_attention(q, k, v)

After::

    y = softmax((q * s) @ kᵀ) @ v        # s = 1 / sqrt(head_dim) unless given

Not applied with a mask, causal attention, grouped queries or dropout.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from nextvit_exporters import graph as g
from nextvit_exporters.passes.base import PassResult, Refusal, Rewrite

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True, slots=True)
class DecomposeAttention(Rewrite):
    """``scaled_dot_product_attention`` as products and a softmax."""

    name: str = "decompose-attention"

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Replace every plain fused attention."""
        rewrites, refused = 0, []
        for node in list(graph.graph.nodes):
            if not g.is_op(node, "scaled_dot_product_attention"):
                continue
            given = dict(zip(_ARGUMENTS, node.args, strict=False)) | node.kwargs
            extras = [a for a in ("attn_mask", "dropout_p", "is_causal", "enable_gqa") if given.get(a)]
            if extras:
                refused.append(Refusal(node.name, f"it uses {', '.join(extras)}"))
                continue
            _write_out(graph, node, given)
            rewrites += 1
        return PassResult(rewrites, tuple(refused))


def _write_out(graph: fx.GraphModule, node: fx.Node, given: dict[str, fx.node.Argument]) -> None:
    q, k, v = given["query"], given["key"], given["value"]
    if not isinstance(q, fx.Node):
        msg = f"{node.name} has no query"
        raise TypeError(msg)
    scale = given.get("scale")
    scale = q.meta["shape"][-1] ** -0.5 if scale is None else scale
    with graph.graph.inserting_before(node):
        scaled = graph.graph.call_function(operator.mul, (q, scale))
        keys = graph.graph.call_method("transpose", (k, -2, -1))
        scores = graph.graph.call_function(operator.matmul, (scaled, keys))
        weights = graph.graph.call_function(torch.softmax, (scores, -1))
        result = graph.graph.call_function(operator.matmul, (weights, v))
    result.meta["shape"] = node.meta["shape"]
    node.replace_all_uses_with(result)
    graph.graph.erase_node(node)
