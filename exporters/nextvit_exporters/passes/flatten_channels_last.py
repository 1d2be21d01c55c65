"""Move channels last before flattening a map into tokens, instead of flattening first and transposing.

Before, with T the transpose of the last two axes::

    t = T(flatten(x))                    # (B, C, H, W) -> (B, C, N) -> (B, N, C)

After::

    t = flatten(permute(x))              # (B, C, H, W) -> (B, H, W, C) -> (B, N, C)

The same numbers in the same places. Convolutions on GPUs keep their maps channels last, where the permutation moves
nothing and the flattening is free: TensorRT then starts no kernel for it and takes the queries' bias into their
product. Not applied where a map is flattened and not turned into tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from nextvit_exporters.passes.base import PassResult, Rewrite
from nextvit_exporters.passes.layout import flattens, transposes


@dataclass(frozen=True, slots=True)
class FlattenChannelsLast(Rewrite):
    """Tokens as the flattened map with channels last."""

    name: str = "flatten-channels-last"

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Rewrite every transpose of a flattened map."""
        rewrites = 0
        for node in list(graph.graph.nodes):
            if not transposes(graph, node):
                continue
            flat = node.all_input_nodes[0]
            if not flattens(graph, flat):
                continue
            _rewrite(graph.graph, node, flat.all_input_nodes[0])
            rewrites += 1
        return PassResult(rewrites)


def _rewrite(new: fx.Graph, tokens: fx.Node, source: fx.Node) -> None:
    with new.inserting_before(tokens):
        last = new.call_method("permute", (source, 0, 2, 3, 1))
        flat = new.call_method("flatten", (last, 1, 2))
    batch, channels, height, width = source.meta["shape"]
    last.meta["shape"], flat.meta["shape"] = (batch, height, width, channels), tokens.meta["shape"]
    tokens.replace_all_uses_with(flat)
    new.erase_node(tokens)
