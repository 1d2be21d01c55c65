"""What the folds ask of a graph: where does a channel go?

A per-channel affine map commutes with an operation when that operation mixes no channels and, where it averages,
weights that sum to one. Both are checked by execution rather than by reading arguments: a tensor that holds one
label per channel is sent through the operation, and wherever it arrives each position must still hold the label
of its channel. That covers any spelling of reshape, transpose, unflatten and pooling, and a wrong order of axes
is seen as such.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes.algebra import Linear

LAYOUT: Final = frozenset(
    {"reshape", "view", "flatten", "unflatten", "transpose", "permute", "contiguous", "squeeze", "unsqueeze"}
)
"""Tensor operations that only move numbers."""
_LAYOUT_MODULES: Final = (nn.Identity, nn.Flatten, nn.Unflatten)
_AVERAGE_MODULES: Final = (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
_AVERAGE: Final = frozenset({"mean", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"})


def moves_only(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node only moves numbers about."""
    return g.is_op(node, *LAYOUT) or isinstance(g.module_of(graph, node), _LAYOUT_MODULES)


def averages(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node averages, by its kind; that its weights sum to one is for the labels to show."""
    return g.is_op(node, *_AVERAGE) or isinstance(g.module_of(graph, node), _AVERAGE_MODULES)


def reads_shape(node: fx.Node) -> bool:
    """Whether the node asks only for sizes."""
    if g.is_op(node, "size", "dim"):
        return True
    return g.is_op(node, "getattr") and node.args[1] in {"shape", "ndim", "dtype", "device"}


def channel_axis(linear: nn.Module) -> int:
    """The axis a linear map reads its channels from."""
    return -1 if isinstance(linear, nn.Linear) else 1


def pointwise(module: nn.Module | None) -> Linear | None:
    """The module when it is a Linear or an ungrouped, unpadded 1x1 convolution; else None."""
    if isinstance(module, nn.Linear):
        return module
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        one = all(k == 1 for k in module.kernel_size)
        return module if one and module.groups == 1 and not any(_padding(module)) else None
    return None


def _padding(conv: nn.Conv1d | nn.Conv2d) -> tuple[int, ...]:
    return (1,) if isinstance(conv.padding, str) else tuple(conv.padding)


def labels(channels: int) -> Tensor:
    """One distinct positive number per channel, (C,) float64."""
    return torch.arange(1, channels + 1, dtype=torch.float64) + 0.5


def spread(values: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """``values`` (C,) laid along ``axis`` of a tensor of ``shape``, constant along the others."""
    view = [1] * len(shape)
    view[axis] = -1
    return values.view(view).expand(shape)


def push(graph: fx.GraphModule, node: fx.Node, source: fx.Node, value: Tensor) -> Tensor | None:
    """What ``node`` makes of ``value`` given in place of ``source``; None when it reads another tensor too."""
    others = [n for n in node.all_input_nodes if n is not source]
    if any("value" not in n.meta for n in others):
        return None

    def known(n: fx.Node) -> g.Value:
        return value if n is source else n.meta["value"]

    args = fx.node.map_arg(node.args, known)
    kwargs = fx.node.map_arg(node.kwargs, known)
    if node.op == "call_module":
        result = graph.get_submodule(str(node.target))(*args, **kwargs)
    elif node.op == "call_method":
        result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        result = node.target(*args, **kwargs)  # type: ignore[operator]  # call_function targets are callables
    return result if isinstance(result, Tensor) else None


def holds(value: Tensor, expected: Tensor, axis: int) -> bool:
    """Whether ``value`` holds label c at every position of channel c along ``axis``."""
    if value.shape[axis] != expected.numel():
        return False
    return torch.allclose(value, spread(expected, tuple(value.shape), axis), rtol=1e-12, atol=0.0)


@dataclass(frozen=True, slots=True)
class Reach:
    """Where a per-channel map ends up: the linear maps it can move into, or the reason it can't."""

    sinks: tuple[fx.Node, ...]
    reason: str | None


def reach(graph: fx.GraphModule, source: fx.Node, *, through_average: bool) -> Reach:
    """Follow the channels of ``source``, (B, C, ...), to the pointwise linear maps that read them.

    Every reader must be such a map, behind operations that move numbers only (and average, where allowed).
    """
    shape: tuple[int, ...] = source.meta["shape"]
    wanted = labels(shape[1])
    sinks: list[fx.Node] = []
    pending = [(source, spread(wanted, shape, 1))]
    while pending:
        node, value = pending.pop()
        for user in node.users:
            if reads_shape(user):
                continue
            linear = pointwise(g.module_of(graph, user))
            if linear is not None:
                if not g.calls_once(graph, user):
                    return Reach((), f"{user.target} is used, or its weight is shared, elsewhere")
                if not holds(value, wanted, channel_axis(linear)):
                    return Reach((), f"{user.target} does not read the channels in their order")
                sinks.append(user)
                continue
            if not (moves_only(graph, user) or (through_average and averages(graph, user))):
                return Reach((), f"{describe(user)} also reads it")
            moved = push(graph, user, node, value)
            if moved is None:
                return Reach((), f"{describe(user)} mixes it with another tensor")
            pending.append((user, moved))
    return Reach(tuple(sinks), None if sinks else "nothing reads it")


def describe(node: fx.Node) -> str:
    """A node as a person would name it: the module's name, or the operation's."""
    if node.op == "call_module":
        return str(node.target)
    return "the graph's output" if node.op == "output" else node.name


def chain_back(graph: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """``node`` and what it is made of, as long as each step only moves numbers; ends with the maker."""
    while True:
        yield node
        if not moves_only(graph, node):
            return
        node = node.all_input_nodes[0]


def replace_module(graph: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    """Put another module under the name ``node`` calls."""
    graph.set_submodule(str(node.target), module)


def bypass(node: fx.Node) -> None:
    """Let the readers of ``node`` read its first input instead, and remove it."""
    node.replace_all_uses_with(node.all_input_nodes[0])
    node.graph.erase_node(node)
