"""Drop the bias of the keys: softmax doesn't see it.

Before::

    a = softmax(q (K x + c)ᵀ)            # = softmax(q (K x)ᵀ + q cᵀ)

After::

    a = softmax(q (K x)ᵀ)

q cᵀ is one number per query, the same for every key, and softmax over the keys is unchanged by a constant. Not
applied when something else reads the keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes import algebra, attention
from nextvit_exporters.passes.base import PassResult, Rewrite
from nextvit_exporters.passes.dataflow import replace_module


@dataclass(frozen=True, slots=True)
class DropKeyBias(Rewrite):
    """Keys without a bias."""

    name: str = "drop-key-bias"

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Remove the key bias of every attention that has one."""

        def drop(match: attention.Attention) -> bool:
            keys = g.module_as(graph, match.k, nn.Linear)
            if biased := algebra.has_bias(keys):
                replace_module(graph, match.k, algebra.with_weights(keys, keys.weight, None))
            return biased

        return attention.rewrite_each(graph, drop)
