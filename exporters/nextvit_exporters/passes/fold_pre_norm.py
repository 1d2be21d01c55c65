"""Fold a BatchNorm in front of linear maps into those maps.

Before::

    y = batch_norm(x)                    # y_c = s_c * x_c + t_c
    q = linear_q(tokens(y))
    k = linear_k(batch_norm'(average(tokens(y))))

After::

    q = linear_q'(tokens(x))             # W' = W * s, b' = b + W @ t
    k = linear_k'(average(tokens(x)))    # s'' = s * s', t'' = t * s' + t': both norms in one fold

A per-channel map commutes with every move of numbers that keeps channels whole, and with an average (weights
that sum to one). The last norm goes first, so the two norms in front of K and V reach their weights as one.

Not applied when anything but pointwise linear maps reads the norm, when one of those is shared, behind a
convolution with padding (the border would see 0 instead of t), or to a norm without statistics. Norms that only
classifiers read are ``fold-head-norm``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from nextvit_exporters import graph as g
from nextvit_exporters.passes import algebra
from nextvit_exporters.passes.base import PassResult, Refusal, Rewrite
from nextvit_exporters.passes.dataflow import Reach, bypass, pointwise, reach, replace_module
from nextvit_exporters.passes.fold_conv_norm import NORMS


@dataclass(frozen=True, slots=True)
class FoldPreNorm(Rewrite):
    """BatchNorms in front of 1x1 convolutions and Linears, through tokens and their average."""

    name: str = "fold-pre-norm"

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Fold every BatchNorm that only linear maps read, one on tokens or a map among them."""
        return fold_norms(graph, lambda sinks: any(len(s.meta["shape"]) > 2 for s in sinks))


def fold_norms(graph: fx.GraphModule, wanted: Callable[[tuple[fx.Node, ...]], bool]) -> PassResult:
    """Fold the norms whose linear readers ``wanted`` accepts, the last norm first."""
    rewrites, refused = 0, []
    for node in reversed(list(graph.graph.nodes)):
        norm = g.module_of(graph, node)
        if not isinstance(norm, NORMS) or type(norm) not in NORMS:
            continue
        if norm.running_var is None:
            refused.append(Refusal(str(node.target), "the norm keeps no running statistics"))
            continue
        found: Reach = reach(graph, node, through_average=True)
        if found.reason:
            refused.append(Refusal(str(node.target), found.reason))
        elif wanted(found.sinks):
            _fold(graph, node, found, algebra.affine_of_norm(norm))
            rewrites += 1
    return PassResult(rewrites, tuple(refused))


def _fold(graph: fx.GraphModule, node: fx.Node, found: Reach, affine: algebra.Affine) -> None:
    for sink in found.sinks:
        linear = pointwise(g.module_of(graph, sink))
        if linear is None:
            msg = f"{sink.target} is not a pointwise linear map"
            raise TypeError(msg)
        replace_module(graph, sink, algebra.fold_before(linear, affine))
    bypass(node)
