"""Where a graph is quantized: which linear maps compute in INT8, and which tensors are brought onto steps for them.

TensorRT's rules. A convolution or linear map in INT8 reads an activation with one step and weights with one step per
output channel; its bias and its result stay in floating point. A tensor is quantized once, where it is made and before
anything merely moves its numbers, and everybody who reads it reads the quantized one: so does the addition behind a
residual branch, which TensorRT then joins to the convolution. Attention's two products, its softmax and averages
compute in floating point.

The last linear map stays in floating point: nothing weighs its result again, and 255 steps would tie classes that
differ.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes.dataflow import chain_back

Map = nn.Linear | nn.Conv1d | nn.Conv2d


@dataclass(frozen=True, slots=True)
class Placement:
    """What is quantized: by the module name of each INT8 map, the name of the node whose result it reads on steps."""

    maps: Mapping[str, str]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Every node whose result is quantized, each once, in the order of the graph."""
        return tuple(dict.fromkeys(self.maps.values()))


def placement(graph: fx.GraphModule, keep: Collection[str] = ()) -> Placement:
    """Where ``graph`` is quantized when the blocks in ``keep`` stay in floating point.

    A module that is called more than once stays as well: it would need two steps.
    """
    calls = [node for node in graph.graph.nodes if isinstance(g.module_of(graph, node), Map)]
    maps = {
        str(node.target): source(graph, node).name
        for node in calls[:-1]
        if block_of(str(node.target)) not in keep and g.calls_once(graph, node)
    }
    order = {node.name: index for index, node in enumerate(graph.graph.nodes)}
    return Placement(dict(sorted(maps.items(), key=lambda item: order[item[1]])))


def source(graph: fx.GraphModule, call: fx.Node) -> fx.Node:
    """The node that makes the numbers a map reads, before anything moves them about."""
    *_, maker = chain_back(graph, call.all_input_nodes[0])
    return maker


def block_of(module: str) -> str:
    """The block of the network a module belongs to: ``features.3`` of ``features.3.mlp.conv1``."""
    return ".".join(module.split(".")[:2])


def blocks(placed: Placement) -> tuple[str, ...]:
    """The blocks that hold INT8 maps, in the order of the graph."""
    return tuple(dict.fromkeys(block_of(name) for name in placed.maps))
