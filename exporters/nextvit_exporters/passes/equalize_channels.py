"""Give the channels between two linear maps one range, so that one INT8 step suits them all.

Before::

    y = W2 relu(W1 x + b1) + b2

After, with a number s_c > 0 for every channel c between the maps::

    y = W2' relu(W1' x + b1') + b2       # row c of W1 and b1 divided by s_c, column c of W2 multiplied by it

relu(h / s) = relu(h) / s for s > 0, and so it is for everything linear that mixes no channels: moves of numbers,
averages, zeros padded on, and the products of attention's weights with the values, whose rows are sums over tokens.
A convolution may come first or second, of any size, stride and grouping.

An activation in INT8 has one step for all channels, and a row of W2 one for all its columns, so a channel that is small
before and large behind loses its bits twice. s_c = sqrt(r1_c / r2_c), where r1_c is the Euclidean length of row c of W1
and r2_c that of column c of all maps that read it, makes both lengths sqrt(r1_c r2_c). Balancing one pair moves the
next one in a chain, so pairs are balanced in turn until nothing moves. Source: Nagel et al., "Data-Free Quantization
Through Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.1, which takes the largest magnitude for
the range; lengths do as well on the demo's network, and they leave no choice: each step lowers the sum of squares of
all weights, which has one minimum over all scales (it is convex in their logarithms), so that a network and any
rescaled copy of it end as the same numbers. Biases do not count as range: with them the demo loses 2 dB.

Queries and keys could be rescaled against each other as well. Nothing would be gained: neither is read by a map in
INT8, and a step per output channel follows any scale of a row.

Not applied when anything else reads the channels (a residual addition, a concatenation, the output), when one of the
maps is called twice or shares its weight, or where the channels are already in balance. A channel that is zero on one
side, or so small that it would be moved by more than 2^20, is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes import algebra, attention, dataflow
from nextvit_exporters.passes.algebra import Linear
from nextvit_exporters.passes.base import PassResult, Refusal, Rewrite

IN_BALANCE: Final = 1e-2
"""A pair all of whose scales are this close to 1 is left alone."""
_STILL: Final = 1e-3
"""Balancing ends when no scale moves further than this; below IN_BALANCE, so a second run finds nothing to do."""
_SWEEPS: Final = 1000
"""More than ever seen: chains of four settle within a dozen."""
_FURTHEST: Final = 2.0**20


@dataclass(frozen=True, slots=True)
class Pair:
    """A linear map and all that reads its channels, each a linear map too; as calls."""

    source: fx.Node
    readers: tuple[fx.Node, ...]


@dataclass(frozen=True, slots=True)
class EqualizeChannels(Rewrite):
    """One length for the weights on both sides of each channel between two linear maps."""

    name: str = "equalize-channels"

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Rescale the channels of every pair of linear maps that are out of balance."""
        pairs, refused = find_pairs(graph)
        rewrites = 0
        for pair, scale in zip(pairs, balance(graph, pairs), strict=True):
            if bool(((scale - 1.0).abs() > IN_BALANCE).any()):
                rescale(graph, pair, scale)
                rewrites += 1
        return PassResult(rewrites, refused)


def find_pairs(graph: fx.GraphModule) -> tuple[tuple[Pair, ...], tuple[Refusal, ...]]:
    """Every pair in the order of the graph, and the linear maps that come before another but are not of a pair."""
    pairs: list[Pair] = []
    refused: list[Refusal] = []
    for node in graph.graph.nodes:
        if _linear(graph, node) is None:
            continue
        readers, reason = _readers(graph, node)
        if reason is None and not g.calls_once(graph, node):
            reason = "it is called, or its weight is shared, elsewhere"
        if readers and reason:
            refused.append(Refusal(str(node.target), reason))
        elif readers:
            pairs.append(Pair(node, readers))
    return tuple(pairs), tuple(refused)


def balance(graph: fx.GraphModule, pairs: Sequence[Pair]) -> tuple[Tensor, ...]:
    """By how much each pair's channels are to be divided, (C,) float64 each, for all lengths to be in balance."""
    squares = {node: _squares(graph, node) for pair in pairs for node in (pair.source, *pair.readers)}
    scales = [torch.ones(len(squares[pair.source]), dtype=torch.float64) for pair in pairs]
    for _ in range(_SWEEPS):
        moved = 0.0
        for index, pair in enumerate(pairs):
            step = _step(graph, pair, squares)
            squares[pair.source] = divided(squares[pair.source], step**2)
            for reader in pair.readers:
                squares[reader] = multiplied(squares[reader], step**2, _groups(graph, reader))
            scales[index] = scales[index] * step
            moved = max(moved, float((step - 1.0).abs().max()))
        if moved <= _STILL:
            break
    return tuple(scales)


def rescale(graph: fx.GraphModule, pair: Pair, scale: Tensor) -> None:
    """Divide the source's channels by ``scale``, (C,), and multiply the readers' by it; the outputs stay."""
    source = _map(graph, pair.source)
    bias = divided(algebra.bias_of(source), scale) if algebra.has_bias(source) else None
    weight = divided(source.weight.detach(), scale)
    dataflow.replace_module(graph, pair.source, algebra.with_weights(source, weight, bias))
    for node in pair.readers:
        reader = _map(graph, node)
        weight = multiplied(reader.weight.detach(), scale, _groups(graph, node))
        bias = algebra.bias_of(reader) if algebra.has_bias(reader) else None
        dataflow.replace_module(graph, node, algebra.with_weights(reader, weight, bias))


def divided(weight: Tensor, scale: Tensor) -> Tensor:
    """``weight``, (C, ...), with each row divided by its channel's number."""
    return weight / scale.view(-1, *(1,) * (weight.dim() - 1))


def multiplied(weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    """``weight``, (out, C / groups, ...), with what meets channel c of the input multiplied by ``scale[c]``.

    Rows belong to groups in equal runs, and so do channels: row o of group i meets the i-th run of ``scale``.
    """
    runs = scale.view(groups, 1, -1, *(1,) * (weight.dim() - 2))
    return (weight.view(groups, -1, *weight.shape[1:]) * runs).view_as(weight)


def _step(graph: fx.GraphModule, pair: Pair, squares: Mapping[fx.Node, Tensor]) -> Tensor:
    """sqrt(r1 / r2) per channel, from squared lengths as they are now; 1 where there is nothing to balance."""
    first = squares[pair.source].sum(dim=1)
    second = torch.zeros_like(first)
    for node in pair.readers:
        behind = squares[node]
        second += behind.view(_groups(graph, node), -1, behind.shape[1]).sum(dim=1).flatten()
    step = (first / second) ** 0.25
    moves = (first > 0.0) & (second > 0.0) & (step < _FURTHEST) & (step > 1.0 / _FURTHEST)
    return torch.where(moves, step, 1.0)


def _squares(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """Squared weights by output channel and input channel, (out, in / groups), summed over the kernel."""
    weight = _map(graph, node).weight.detach().double().square()
    return weight.flatten(2).sum(dim=2) if weight.dim() > 2 else weight


def _readers(graph: fx.GraphModule, source: fx.Node) -> tuple[tuple[fx.Node, ...], str | None]:
    """The linear maps that the channels of ``source`` arrive at, and why they may not be rescaled, if so."""
    shape: tuple[int, ...] = source.meta["shape"]
    wanted = dataflow.labels(_map(graph, source).weight.shape[0])
    arrived = {source: dataflow.spread(wanted, shape, dataflow.channel_axis(_map(graph, source)))}
    readers: list[fx.Node] = []
    reasons: list[str] = []
    for node in graph.graph.nodes:
        given = [each for each in node.all_input_nodes if each in arrived]
        if not given or dataflow.reads_shape(node):
            continue
        linear = _linear(graph, node)
        if linear is not None:
            readers.append(node)
            if not g.calls_once(graph, node):
                reasons.append(f"{node.target} is called, or its weight is shared, elsewhere")
            elif not dataflow.holds(arrived[given[0]], wanted, dataflow.channel_axis(linear)):
                reasons.append(f"{node.target} does not read the channels in their order")
            continue
        value = _through(graph, node, given, arrived)
        if value is None:
            reasons.append(f"{dataflow.describe(node)} also reads it")
        else:
            arrived[node] = value
    return tuple(readers), reasons[0] if reasons else None


def _through(
    graph: fx.GraphModule, node: fx.Node, given: Sequence[fx.Node], arrived: Mapping[fx.Node, Tensor]
) -> Tensor | None:
    """The labels behind a node that a positive number per channel passes through; None for any other node."""
    if len(given) != 1:
        return None
    (source,) = given
    if attention.is_matmul(node):
        return _weighed(node, source, arrived[source])
    if _rectifies(graph, node):
        return arrived[source]  # labels are positive; timm's ReLU would write into them
    if dataflow.moves_only(graph, node) or dataflow.averages(graph, node):
        return dataflow.push(graph, node, source, arrived[source])
    return None


def _weighed(node: fx.Node, source: fx.Node, value: Tensor) -> Tensor | None:
    """The labels behind a matrix product with another tensor, which sums over places and not over channels."""
    if len(node.all_input_nodes) != 2 or len(node.args) != 2:
        return None
    left = node.args[0] is source
    axis = -1 if left else -2
    if not bool((value == value.narrow(axis, 0, 1)).all()):
        return None
    other = next(each for each in node.all_input_nodes if each is not source)
    even = torch.full(other.meta["shape"], 1.0 / value.shape[axis], dtype=value.dtype)
    return torch.matmul(value, even) if left else torch.matmul(even, value)


def _rectifies(graph: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(g.module_of(graph, node), nn.ReLU) or g.is_op(node, "relu", "relu_")


def _linear(graph: fx.GraphModule, node: fx.Node) -> Linear | None:
    module = g.module_of(graph, node)
    return module if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) else None


def _map(graph: fx.GraphModule, node: fx.Node) -> Linear:
    module = _linear(graph, node)
    if module is None:
        msg = f"{node.target} is not a linear map"
        raise TypeError(msg)
    return module


def _groups(graph: fx.GraphModule, node: fx.Node) -> int:
    linear = _map(graph, node)
    return 1 if isinstance(linear, nn.Linear) else linear.groups
