"""Run the Linear whose tokens become a map as a 1x1 convolution on that map.

Before, with M what lays tokens out as a map, (B, N, C) -> (B, C, H, W)::

    y = M(P t + p)

After::

    y = P * M(t) + p                     # P as a 1x1 convolution

M moves numbers and keeps channels whole, so a map of the channels commutes with it. Behind an attention the
convolution then takes the bias and the residual sum with it, which the product of matrices could not. Heads and
tokens stay as they are, so fused attention is still recognised.

Not applied when something else reads the tokens, when the Linear is used elsewhere, or when it changes the number
of channels, which M's reshape may spell out.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes import algebra
from nextvit_exporters.passes.base import PassResult, Refusal, Rewrite
from nextvit_exporters.passes.dataflow import (
    describe,
    holds,
    labels,
    moves_only,
    push,
    reads_shape,
    replace_module,
    spread,
)


@dataclass(frozen=True, slots=True)
class ConvolveProjection(Rewrite):
    """Linears in front of a map, as 1x1 convolutions on it."""

    name: str = "convolve-projection"

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Rewrite every Linear whose output is laid out as a map."""
        rewrites, refused = 0, []
        for node in list(graph.graph.nodes):
            if not isinstance(g.module_of(graph, node), nn.Linear) or not (moves := _to_map(graph, node)):
                continue
            if reason := _why_not(graph, node, moves):
                refused.append(Refusal(describe(node), reason))
                continue
            _rewrite(graph, node, moves)
            rewrites += 1
        return PassResult(rewrites, tuple(refused))


def _to_map(graph: fx.GraphModule, linear: fx.Node) -> tuple[fx.Node, ...]:
    """The moves from the Linear's output to a map with the same channels; empty where there is no map."""
    shape: tuple[int, ...] = linear.meta["shape"]
    wanted = labels(shape[-1])
    node, value, moves = linear, spread(wanted, shape, len(shape) - 1), list[fx.Node]()
    while (user := next((u for u in node.users if moves_only(graph, u)), None)) is not None:
        moved = push(graph, user, node, value)
        if moved is None:
            break
        moves.append(user)
        if moved.dim() == 4 and holds(moved, wanted, 1):
            return tuple(moves)
        node, value = user, moved
    return ()


def _why_not(graph: fx.GraphModule, linear: fx.Node, moves: tuple[fx.Node, ...]) -> str | None:
    for node in (linear, *moves[:-1]):
        others = [user for user in node.users if user not in moves and not reads_shape(user)]
        if others:
            return f"its tokens are also read by {describe(others[0])}"
    if not g.calls_once(graph, linear):
        return "it is used, or its weight is shared, elsewhere"
    module = g.module_as(graph, linear, nn.Linear)
    if module.in_features != module.out_features:
        return f"it makes {module.out_features} channels of {module.in_features}, and the moves behind it name them"
    return None


def _rewrite(graph: fx.GraphModule, linear: fx.Node, moves: tuple[fx.Node, ...]) -> None:
    replace_module(graph, linear, algebra.as_convolution(g.module_as(graph, linear, nn.Linear), 2))
    old, new = linear, linear.all_input_nodes[0]
    for move in moves:
        for reader in [user for user in old.users if reads_shape(user)]:
            reader.replace_input_with(old, new)  # of one shape: the Linear is square
        with graph.graph.inserting_before(move):
            copy = graph.graph.node_copy(move, lambda node: node)
        copy.replace_input_with(old, new)
        copy.meta["shape"] = move.meta["shape"]
        old, new = move, copy
    with graph.graph.inserting_before(old):
        result = graph.graph.call_module(str(linear.target), (new,))
    result.meta["shape"] = old.meta["shape"]
    old.replace_all_uses_with(result)
    graph.graph.eliminate_dead_code()
