"""Average runs of consecutive tokens where they lie, without turning them to channels first and back.

Before, with T the transpose of the last two axes::

    m = T(average(T(t)))                 # (B, N, C) -> (B, C, N) -> (B, C, N / k) -> (B, N / k, C)

After::

    m = mean(unflatten(t, N -> N / k, k))    # (B, N, C) -> (B, N / k, k, C) -> (B, N / k, C)

The same k numbers are averaged. For any N that k divides; a remainder, which the pooling drops, is refused, so this
holds for a fixed size only. Whether the pooling averages each k tokens, none twice and none with padding, is found
by execution. Where it is not between transposes, a transpose is put on either side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes.base import PassResult, Refusal, Rewrite
from nextvit_exporters.passes.dataflow import describe, push
from nextvit_exporters.passes.layout import transposes


@dataclass(frozen=True, slots=True)
class AverageTokens(Rewrite):
    """Averages of consecutive tokens, as a mean on (B, N, C)."""

    name: str = "average-tokens"

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Rewrite every one-dimensional pooling that averages runs of consecutive tokens."""
        rewrites, refused = 0, []
        for pool in list(graph.graph.nodes):
            if not _pools_tokens(graph, pool):
                continue
            if reason := _why_not(graph, pool):
                refused.append(Refusal(describe(pool), reason))
                continue
            _rewrite(graph, pool)
            rewrites += 1
        return PassResult(rewrites, tuple(refused))


def _pools_tokens(graph: fx.GraphModule, node: fx.Node) -> bool:
    kind = isinstance(g.module_of(graph, node), nn.AvgPool1d) or g.is_op(node, "avg_pool1d")
    return kind and len(node.meta["shape"]) == 3


def _why_not(graph: fx.GraphModule, pool: fx.Node) -> str | None:
    source = pool.all_input_nodes[0]
    tokens, runs = source.meta["shape"][2], pool.meta["shape"][2]
    if tokens % runs:
        return f"its {tokens} tokens do not fall into {runs} runs of one length, so some are left over or taken twice"
    numbers = torch.randn(source.meta["shape"], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = numbers.unflatten(2, (runs, tokens // runs)).mean(3)  # type: ignore[no-untyped-call]  # torch's own gap
    found = push(graph, pool, source, numbers)
    if found is None or not torch.allclose(found, wanted, rtol=0.0, atol=1e-12):
        return f"it is not the average of each {tokens // runs} of its {tokens} tokens"
    return None


def _rewrite(graph: fx.GraphModule, pool: fx.Node) -> None:
    new, source = graph.graph, pool.all_input_nodes[0]
    run = source.meta["shape"][2] // pool.meta["shape"][2]
    with new.inserting_before(pool):
        turned = transposes(graph, source)
        tokens = source.all_input_nodes[0] if turned else new.call_method("transpose", (source, 1, 2))
        runs = new.call_method("unflatten", (tokens, 1, (-1, run)))
        averaged = new.call_method("mean", (runs, 2))
        back = new.call_method("transpose", (averaged, 1, 2))
    batch, channels, count = pool.meta["shape"]
    averaged.meta["shape"], back.meta["shape"] = (batch, count, channels), pool.meta["shape"]
    for user in list(pool.users):
        if transposes(graph, user):
            user.replace_all_uses_with(averaged)
    pool.replace_all_uses_with(back)
    new.eliminate_dead_code()
