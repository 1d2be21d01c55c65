"""Find self-attention in a traced graph by its data flow: softmax(q kᵀ) v, whoever wrote it.

Not a pass: the attention passes ask this module for their matches.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes import dataflow
from nextvit_exporters.passes.base import PassResult, Refusal


@dataclass(frozen=True, slots=True)
class Attention:
    """One softmax(q kᵀ) v, as nodes.

    ``q``, ``k``, ``v`` call the linear maps of the tokens, ``proj`` the linear map behind the product; ``scales``
    are multiplications by a number between ``q`` and the softmax. Heads are (B, h, N, d).
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    proj: fx.Node
    scales: tuple[fx.Node, ...]
    scores: fx.Node
    softmax: fx.Node
    product: fx.Node

    @property
    def where(self) -> str:
        """The module the attention lives in, for reports."""
        return str(self.q.target).rpartition(".")[0] or str(self.q.target)


def find(graph: fx.GraphModule) -> Iterator[Attention | Refusal]:
    """Every softmax over products of token maps: the attention, or why it isn't one we can rewrite."""
    for node in list(graph.graph.nodes):
        if softmax_axis(graph, node) is not None:
            found = _match(graph, node)
            yield found if isinstance(found, Attention) else Refusal(node.name, found)


def rewrite_each(graph: fx.GraphModule, rewrite: Callable[[Attention], bool | str]) -> PassResult:
    """Hand every attention to ``rewrite``, which says whether it rewrote it, or why it did not."""
    rewrites, refused = 0, []
    for match in find(graph):
        outcome = match if isinstance(match, Refusal) else rewrite(match)
        if isinstance(outcome, str):
            outcome = Refusal(match.where, outcome)
        if isinstance(outcome, Refusal):
            refused.append(outcome)
        else:
            rewrites += outcome
    return PassResult(rewrites, tuple(refused))


def _match(graph: fx.GraphModule, softmax: fx.Node) -> Attention | str:  # noqa: PLR0911 - one return a reason
    if softmax_axis(graph, softmax) not in (-1, len(softmax.meta["shape"]) - 1):
        return "the softmax does not run over the last axis"
    product = only_user(softmax)
    if product is None or not is_matmul(product) or product.args[0] is not softmax:
        return "the softmax does not weigh values by a matrix product"
    scales: list[fx.Node] = []
    scores = _skip_scales(softmax.all_input_nodes[0], scales)
    if not is_matmul(scores):
        return "the softmax's input is not a matrix product"
    queries, keys = scores.all_input_nodes[:2] if len(scores.all_input_nodes) == 2 else (scores, scores)
    q = _linear_behind(graph, _skip_scales(_unwrap(graph, queries), scales))
    k, v = _linear_behind(graph, keys), _linear_behind(graph, product.all_input_nodes[1])
    if q is None or k is None or v is None or len({q, k, v}) != 3:
        return "q, k and v are not three linear maps of tokens"
    proj = _linear_ahead(graph, product)
    if proj is None:
        return "no single linear map reads the product"
    if any(not g.calls_once(graph, n) for n in (q, k, v, proj)):
        return "one of its weights is used elsewhere"
    match = Attention(q, k, v, proj, tuple(scales), scores, softmax, product)
    return match if _heads_in_order(graph, match) else "its heads are not laid out in the order of the channels"


def _heads_in_order(graph: fx.GraphModule, match: Attention) -> bool:
    """Send channel labels along v, through the product, to proj; and along k: both must arrive in place."""
    values = _labels_at(graph, match.v, match.product.all_input_nodes[1])
    keys = _labels_at(graph, match.k, match.scores.all_input_nodes[1])
    if values is None or keys is None or not bool((keys == keys[..., :1]).all()):
        return False
    if not bool((values == values[..., :1, :]).all()):
        return False
    value, node = values[..., :1, :].expand(match.product.meta["shape"]), match.product
    while node is not match.proj:
        user = next(u for u in node.users if not dataflow.reads_shape(u))
        if user is match.proj:
            break
        pushed = dataflow.push(graph, user, node, value)
        if pushed is None:
            return False
        node, value = user, pushed
    axis = dataflow.channel_axis(graph.get_submodule(str(match.proj.target)))
    return dataflow.holds(value, dataflow.labels(match.v.meta["shape"][-1]), axis)


def heads_first(graph: fx.GraphModule, match: Attention) -> bool:
    """Whether q, k and v arrive as (B, h, N, d), (B, h, d, N) and (B, h, N, d), channel h·d + i as head h's i-th."""
    shape: tuple[int, ...] = match.product.meta["shape"]
    if len(shape) != 4:
        return False
    heads, dim = shape[1], shape[3]
    queries, keys = match.scores.all_input_nodes
    values = match.product.all_input_nodes[1]
    return all(
        _arrives(graph, maker, end, view)
        for maker, end, view in (
            (match.q, queries, (1, heads, 1, dim)),
            (match.k, keys, (1, heads, dim, 1)),
            (match.v, values, (1, heads, 1, dim)),
        )
    )


def _arrives(graph: fx.GraphModule, maker: fx.Node, end: fx.Node, view: tuple[int, ...]) -> bool:
    """Whether the maker's channels arrive at ``end`` in the order that ``view`` gives them."""
    found, wanted = _labels_at(graph, maker, end), dataflow.labels(maker.meta["shape"][-1])
    if found is None or found.dim() != len(view) or wanted.numel() != math.prod(view):
        return False
    if any(size not in {1, actual} for size, actual in zip(view, found.shape, strict=True)):
        return False
    return torch.equal(found, wanted.view(view).expand_as(found))


def _labels_at(graph: fx.GraphModule, maker: fx.Node, end: fx.Node) -> torch.Tensor | None:
    """Labels of the maker's channels as they arrive at ``end``."""
    path = [end]
    while path[-1] is not maker:
        path.append(path[-1].all_input_nodes[0])
    shape: tuple[int, ...] = maker.meta["shape"]
    value: torch.Tensor | None = dataflow.spread(dataflow.labels(shape[-1]), shape, -1)
    for before, node in zip(path[::-1], path[::-1][1:], strict=False):
        value = None if value is None else dataflow.push(graph, node, before, value)
    return value


def softmax_axis(graph: fx.GraphModule, node: fx.Node) -> int | None:
    """The axis a softmax runs over, as it is written; None for any other node."""
    module = g.module_of(graph, node)
    if isinstance(module, nn.Softmax):
        return module.dim
    if g.is_op(node, "softmax"):
        axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        return axis if isinstance(axis, int) else None
    return None


def is_matmul(node: fx.Node) -> bool:
    """Whether the node multiplies two matrices."""
    return node.target in {operator.matmul, torch.matmul, torch.bmm} or g.is_op(node, "matmul", "bmm")


def scale_factor(node: fx.Node) -> float | None:
    """The number a node multiplies a tensor by; None for any other node."""
    if g.is_op(node, "mul") and len(node.args) == 2:
        numbers = [a for a in node.args if isinstance(a, int | float)]
        return float(numbers[0]) if numbers else None
    if g.is_op(node, "truediv", "div") and len(node.args) == 2 and isinstance(node.args[1], int | float):
        return 1.0 / float(node.args[1])
    return None


def _skip_scales(node: fx.Node, scales: list[fx.Node]) -> fx.Node:
    while scale_factor(node) is not None and only_user(node) is not None:
        scales.append(node)
        node = node.all_input_nodes[0]
    return node


def _unwrap(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The maker of a scale, when only moves of numbers lie between."""
    for each in dataflow.chain_back(graph, node):
        if scale_factor(each) is not None:
            return each
    return node


def _linear_behind(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The Linear whose output ``node`` is, moved about only, and read by nothing else."""
    for each in dataflow.chain_back(graph, node):
        if len([u for u in each.users if not dataflow.reads_shape(u)]) != 1:
            return None
        if isinstance(g.module_of(graph, each), nn.Linear):
            return each
    return None


def _linear_ahead(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The Linear that reads ``node``, moved about only, as its only reader."""
    while (user := only_user(node)) is not None:
        if isinstance(g.module_of(graph, user), nn.Linear):
            return user
        if not dataflow.moves_only(graph, user):
            return None
        node = user
    return None


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads the values of ``node``; None when there are several, or none."""
    users = [u for u in node.users if not dataflow.reads_shape(u)]
    return users[0] if len(users) == 1 else None
