"""Fold the attention's scale into the query's weights.

Before::

    a = softmax((s * q) kᵀ)              # or softmax(s * (q kᵀ));  q = W x + b, s = 1 / sqrt(head_dim)

After::

    a = softmax(q' kᵀ)                   # q' = (s * W) x + s * b

Not applied when something else reads q.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes import algebra, attention
from nextvit_exporters.passes.base import PassResult, Rewrite
from nextvit_exporters.passes.dataflow import bypass, replace_module


@dataclass(frozen=True, slots=True)
class FoldAttentionScale(Rewrite):
    """1 / sqrt(head_dim) moved into Q."""

    name: str = "fold-attention-scale"

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Fold the scale of every attention that has one."""

        def fold(match: attention.Attention) -> bool:
            factor = math.prod(s for node in match.scales if (s := attention.scale_factor(node)) is not None)
            if match.scales:
                queries = g.module_as(graph, match.q, nn.Linear)
                replace_module(graph, match.q, algebra.scale_output(queries, factor))
            for node in match.scales:
                bypass(node)
            return bool(match.scales)

        return attention.rewrite_each(graph, fold)
