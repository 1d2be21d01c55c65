"""Remove what only training needs: dropout, stochastic depth, and identities.

Before::

    y = dropout(x)          # or drop_path(x), identity(x), contiguous(x)

After::

    y = x

In eval mode each of these is the identity. Not applied to a functional dropout whose ``training`` argument is
not a literal False.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes.base import PassResult, Refusal, Rewrite
from nextvit_exporters.passes.dataflow import bypass
from nextvit_models.blocks import DropPath

_MODULES: Final = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, DropPath)


@dataclass(frozen=True, slots=True)
class StripTrainOnly(Rewrite):
    """Dropout, stochastic depth and identities, removed."""

    name: str = "strip-train-only"

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Bypass every train-only node."""
        rewrites, refused = 0, []
        for node in list(graph.graph.nodes):
            if isinstance(g.module_of(graph, node), _MODULES) or g.is_op(node, "contiguous"):
                bypass(node)
                rewrites += 1
            elif g.is_op(node, "dropout", "dropout1d", "dropout2d"):
                if node.kwargs.get("training") is False:
                    bypass(node)
                    rewrites += 1
                else:
                    refused.append(Refusal(node.name, "its training argument is not a literal False"))
        return PassResult(rewrites, tuple(refused))
