"""Fold the BatchNorm behind a convolution into the convolution.

Before::

    y = conv(x, W, b)
    z = batch_norm(y)        # s = gamma / sqrt(var + eps), t = beta - mean * s

After::

    z = conv(x, W * s, s * b + t)        # s per output channel

Also for a Linear on (B, C). Exact at any padding, stride and grouping, since the norm comes after the sum. Not
applied when something else reads y, when the convolution is called twice, or to a norm without statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes import algebra
from nextvit_exporters.passes.base import PassResult, Refusal, Rewrite
from nextvit_exporters.passes.dataflow import bypass, replace_module

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True, slots=True)
class FoldConvNorm(Rewrite):
    """Conv (or Linear) followed by BatchNorm, as one."""

    name: str = "fold-conv-norm"

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Fold every BatchNorm that directly follows a linear map."""
        rewrites, refused = 0, []
        for node in list(graph.graph.nodes):
            norm = g.module_of(graph, node)
            linear = g.module_of(graph, node.args[0]) if node.args else None
            if type(norm) not in NORMS or not isinstance(linear, nn.Conv1d | nn.Conv2d | nn.Linear):
                continue
            if reason := _why_not(graph, node):
                refused.append(Refusal(str(node.target), reason))
                continue
            affine = algebra.affine_of_norm(norm)  # type: ignore[arg-type]  # one of NORMS, tested above
            replace_module(graph, node.args[0], algebra.fold_behind(linear, affine))
            bypass(node)
            rewrites += 1
        return PassResult(rewrites, tuple(refused))


def _why_not(graph: fx.GraphModule, node: fx.Node) -> str | None:
    maker = node.all_input_nodes[0]
    if graph.get_submodule(str(node.target)).running_var is None:
        return "the norm keeps no running statistics"
    if len(maker.users) != 1:
        return f"{maker.target} is also read by something else"
    if not g.calls_once(graph, maker):
        return f"{maker.target} is used, or its weight is shared, elsewhere"
    if isinstance(graph.get_submodule(str(maker.target)), nn.Linear) and len(maker.meta["shape"]) != 2:
        return f"the norm does not run over the outputs of {maker.target}"
    return None
