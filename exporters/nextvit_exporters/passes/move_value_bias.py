"""Move the bias of the values into the output projection: softmax rows sum to one.

Before::

    y = P (a (V x + c)) + p              # a: attention weights, each row sums to one

After::

    y = P (a (V x)) + (p + P c)

a (V x + c) = a (V x) + c. Not applied when something else reads the values or the product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes import algebra, attention
from nextvit_exporters.passes.base import PassResult, Rewrite
from nextvit_exporters.passes.dataflow import replace_module


@dataclass(frozen=True, slots=True)
class MoveValueBias(Rewrite):
    """Values without a bias; the projection carries it."""

    name: str = "move-value-bias"

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Move the value bias of every attention that has one."""

        def move(match: attention.Attention) -> bool:
            values, proj = (g.module_as(graph, node, nn.Linear) for node in (match.v, match.proj))
            if not algebra.has_bias(values):
                return False
            bias = algebra.bias_of(values)
            shift = algebra.Affine(torch.ones_like(bias), bias)
            replace_module(graph, match.proj, algebra.fold_before(proj, shift))
            replace_module(graph, match.v, algebra.with_weights(values, values.weight, None))
            return True

        return attention.rewrite_each(graph, move)
