"""Which module of the model an operation belongs to, where nothing recorded it: what its neighbours share."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from itertools import takewhile

from torch import fx


def fill_scopes(scopes: Sequence[str], neighbours: Sequence[AbstractSet[int]]) -> list[str]:
    """``scopes`` by operation, the empty ones filled with the innermost module that the nearest named ones share.

    ``neighbours`` holds, for each operation, those that it reads from and those that read it.
    """
    return [scope or _shared(index, scopes, neighbours) for index, scope in enumerate(scopes)]


def graph_scopes(graph: fx.GraphModule) -> dict[str, str]:
    """The module of every node of a traced graph, by the node's name; "" for the model itself.

    What calls no module belongs where what it reads was made: a sum to the block whose branches it joins.
    """
    nodes = list(graph.graph.nodes)
    index = {node: number for number, node in enumerate(nodes)}
    scopes = [str(node.target) if node.op == "call_module" else "" for node in nodes]
    neighbours = [{index[other] for other in _makers(node)} for node in nodes]
    return {node.name: scope for node, scope in zip(nodes, fill_scopes(scopes, neighbours), strict=True)}


def _makers(node: fx.Node) -> list[fx.Node]:
    """What the node reads; of a reshape the tensor alone, for a size comes from anywhere."""
    return node.all_input_nodes[:1] if node.target in {"reshape", "view"} else node.all_input_nodes


def _shared(start: int, scopes: Sequence[str], neighbours: Sequence[AbstractSet[int]]) -> str:
    """The longest common module of the nearest named operations around ``start``."""
    seen, frontier, named = {start}, {start}, set[str]()
    while frontier and len(named) < 2:
        frontier = {n for index in frontier for n in neighbours[index]} - seen
        seen |= frontier
        named |= {scopes[n] for n in frontier if scopes[n]}
        frontier = {n for n in frontier if not scopes[n]}
    parts = zip(*(name.split(".") for name in sorted(named)), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, parts))
