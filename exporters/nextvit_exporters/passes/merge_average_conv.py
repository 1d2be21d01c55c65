"""Merge a 2x2 average and the 1x1 convolution behind it into one 2x2 convolution of stride 2.

Before::

    y = conv(average(x))                 # conv: 1x1, W a + b

After::

    y = conv'(x)                         # conv': 2x2, stride 2, W / 4 at each of its four positions, the same b

An average of four numbers is a sum of quarters. The convolution then multiplies four times as often (2.7 % more
work on Next-ViT-S) and one kernel less is started per stage.

Not applied where a side is odd: with ``ceil_mode`` the last averages take fewer than four numbers, without it the
last row is left out, and both weights differ from a quarter at every position. So it holds for a fixed size only.
Nor where something else reads the average, or the convolution is grouped, padded, strided or used elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes import algebra
from nextvit_exporters.passes.base import PassResult, Refusal, Rewrite
from nextvit_exporters.passes.dataflow import averages, describe, pointwise, push, reads_shape, replace_module


@dataclass(frozen=True, slots=True)
class MergeAverageConv(Rewrite):
    """A 2x2 average and the 1x1 convolution behind it, as one convolution."""

    name: str = "merge-average-conv"

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Merge every 2x2 average that only a 1x1 convolution reads."""
        rewrites, refused = 0, []
        for pool in list(graph.graph.nodes):
            if not averages(graph, pool) or len(pool.meta.get("shape", ())) != 4:
                continue
            conv = next((user for user in pool.users if _is_one_by_one(graph, user)), None)
            if conv is None:
                continue
            if reason := _why_not(graph, pool, conv):
                refused.append(Refusal(describe(conv), reason))
                continue
            old = g.module_as(graph, conv, nn.Conv2d)
            replace_module(graph, conv, _merged(old))
            conv.replace_input_with(pool, pool.all_input_nodes[0])  # what asks for the average's sizes keeps it
            rewrites += 1
        graph.graph.eliminate_dead_code()
        return PassResult(rewrites, tuple(refused))


def _is_one_by_one(graph: fx.GraphModule, node: fx.Node) -> bool:
    module = g.module_of(graph, node)
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)


def _why_not(graph: fx.GraphModule, pool: fx.Node, conv: fx.Node) -> str | None:
    module = g.module_as(graph, conv, nn.Conv2d)
    if pointwise(module) is None or module.stride != (1, 1):
        return "the convolution is grouped, padded or strided"
    others = [user for user in pool.users if user is not conv and not reads_shape(user)]
    if others:
        return f"the average is also read by {describe(others[0])}"
    if not g.calls_once(graph, conv):
        return "the convolution is used, or its weight is shared, elsewhere"
    height, width = pool.all_input_nodes[0].meta["shape"][2:]
    if height % 2 or width % 2:
        return f"at {height}x{width} a side is odd, so not every average takes four numbers"
    return None if _is_quarters(graph, pool) else "it is not the average of each 2x2"


def _is_quarters(graph: fx.GraphModule, pool: fx.Node) -> bool:
    """Whether the node averages each 2x2 without overlap, found by execution on random numbers."""
    source = pool.all_input_nodes[0]
    batch, channels, height, width = source.meta["shape"]
    if pool.meta["shape"] != (batch, channels, height // 2, width // 2):
        return False
    numbers = torch.randn(source.meta["shape"], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = numbers.view(batch, channels, height // 2, 2, width // 2, 2).mean((3, 5))
    found = push(graph, pool, source, numbers)
    return found is not None and torch.allclose(found, wanted, rtol=0.0, atol=1e-12)


def _merged(conv: nn.Conv2d) -> nn.Conv2d:
    """The 1x1 convolution over averages as a 2x2 convolution of stride 2 over what is averaged."""
    bias = algebra.has_bias(conv)
    merged = nn.Conv2d(conv.in_channels, conv.out_channels, 2, stride=2, bias=bias, dtype=conv.weight.dtype)
    quarters = (conv.weight.detach() / 4.0).expand(-1, -1, 2, 2).contiguous()
    merged.weight = nn.Parameter(quarters, requires_grad=False)
    if bias:
        merged.bias = nn.Parameter(algebra.bias_of(conv), requires_grad=False)
    return merged.eval()
