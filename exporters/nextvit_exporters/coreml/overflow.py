"""What FP16 can't hold: the parts of a graph to keep in float32, found on real images before anything is built."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, fx

from nextvit_exporters import graph as g
from nextvit_exporters.executors.base import Array

MOST: Final = 32752.0
"""Half of FP16's largest number: other images may reach further than those at hand."""


def overflowing(graph: fx.GraphModule, examples: Array) -> tuple[str, ...]:
    """What to keep in float32, in order: modules, or for what calls none the node's own name; empty as a rule.

    ``graph`` is a float64 graph, ``examples`` are (N, ...) images as it reads them. Kept are operations whose results
    or constants exceed ``MOST``, and those that read such results, which a cast in front would make infinite.
    """
    single = g.cast(graph, torch.float32)
    meter = _Meter(single)
    with torch.no_grad():
        for example in examples:
            meter.run(torch.tensor(example[None]))
    large = {node for node, most in meter.largest.items() if max(most, _constants(single, node)) > MOST}
    kept = [node for node in meter.largest if node in large or large.intersection(node.all_input_nodes)]
    g.release(single)
    return tuple(dict.fromkeys(name_of(node) for node in kept if node.op.startswith("call")))


def name_of(node: fx.Node) -> str:
    """What a node is called in the list: by its module, or by its own name where it calls none."""
    return str(node.target) if node.op == "call_module" else node.name


def _constants(graph: fx.GraphModule, node: fx.Node) -> float:
    module = g.module_of(graph, node)
    found = (p.detach().abs().max().item() for p in (() if module is None else module.parameters()))
    return max(found, default=0.0)


class _Meter(fx.Interpreter):
    """Runs a graph and keeps each node's largest magnitude."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.largest: dict[fx.Node, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point():
            self.largest[n] = max(self.largest.get(n, 0.0), value.abs().max().item())
        return value
