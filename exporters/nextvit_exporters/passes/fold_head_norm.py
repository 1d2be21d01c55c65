"""Fold the final BatchNorm through global pooling into the classifier.

Before::

    logits = linear(flatten(global_average(batch_norm(x))))

After::

    logits = linear'(flatten(global_average(x)))        # W' = W * s, b' = b + W @ t

The average of s * x + t is s times the average of x, plus t. Official and timm exports leave this norm in the
graph. Not applied when the normalised map is also an output, as it is in a dense-task backbone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from nextvit_exporters.passes.base import PassResult, Rewrite
from nextvit_exporters.passes.fold_pre_norm import fold_norms


@dataclass(frozen=True, slots=True)
class FoldHeadNorm(Rewrite):
    """The BatchNorm in front of the classifier."""

    name: str = "fold-head-norm"

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Fold every BatchNorm all of whose readers are classifiers on pooled vectors, (B, C)."""
        return fold_norms(graph, lambda sinks: all(len(s.meta["shape"]) == 2 for s in sinks))
