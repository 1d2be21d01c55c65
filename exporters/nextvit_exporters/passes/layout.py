"""Which axes a move of numbers exchanges, found by execution, so that every spelling of it is seen.

Not a pass: the passes that change how tokens are laid out ask this module.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from nextvit_exporters.passes.dataflow import moves_only, push


def transposes(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node swaps the last two axes of a tensor of rank three."""
    numbers = _numbers(graph, node, rank=3)
    return numbers is not None and _makes(graph, node, numbers, numbers.transpose(1, 2))


def flattens(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node lays a map of (B, C, H, W) out as (B, C, H·W)."""
    numbers = _numbers(graph, node, rank=4)
    return numbers is not None and _makes(graph, node, numbers, numbers.flatten(2))


def _numbers(graph: fx.GraphModule, node: fx.Node, *, rank: int) -> Tensor | None:
    """Distinct numbers of the shape of what the node moves; None when it doesn't, or at another rank."""
    if not moves_only(graph, node):
        return None
    shape: tuple[int, ...] = node.all_input_nodes[0].meta.get("shape", ())
    if len(shape) != rank:
        return None
    return torch.arange(math.prod(shape), dtype=torch.float64).view(shape)


def _makes(graph: fx.GraphModule, node: fx.Node, given: Tensor, wanted: Tensor) -> bool:
    found = push(graph, node, node.all_input_nodes[0], given)
    return found is not None and torch.equal(found, wanted)
