"""Compute keys and values with one 1x1 convolution, behind channel-first attention.

Before::

    k = reshape(K * x + c, (B, h, d, N))
    v = reshape(V * x + e, (B, h, d, N))

After::

    k, v = split(reshape([K; V] * x + [c; e], (B, 2h, d, N)), h, axis 1)

The filters of both maps are stacked; nothing is computed differently. A convolution and a reshape less, and a split
along the heads more. Not applied when keys and values are not two 1x1 convolutions of one map, when something else
reads them, when their heads are not laid out as (B, h, d, N), or when only one of them has a bias.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass

import torch
from torch import fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes import algebra, attention, dataflow
from nextvit_exporters.passes.base import PassResult, Refusal, Rewrite

Convolution = nn.Conv1d | nn.Conv2d


@dataclass(frozen=True, slots=True)
class PackKeyValueMaps(Rewrite):
    """K and V as one 1x1 convolution."""

    name: str = "pack-key-value-maps"

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Pack every attention whose k and v are 1x1 convolutions of one map."""
        rewrites, refused = 0, []
        for node in list(graph.graph.nodes):
            if attention.softmax_axis(graph, node) is None:
                continue
            found = _find(graph, node)
            if isinstance(found, _Maps):
                _pack(graph, found)
                rewrites += 1
            else:
                refused.append(Refusal(node.name, found))
        return PassResult(rewrites, tuple(refused))


@dataclass(frozen=True, slots=True)
class _Maps:
    """The convolutions that make keys and values, and what they become: (B, h, d, N) each."""

    key: fx.Node
    value: fx.Node
    keys: fx.Node
    values: fx.Node


def _find(graph: fx.GraphModule, softmax: fx.Node) -> _Maps | str:
    """The maps behind softmax(qᵀ k) and its product with v, or why they are not to be packed."""
    scores = softmax.all_input_nodes[0]
    weights, product = softmax, attention.only_user(softmax)
    while product is not None and dataflow.moves_only(graph, product):
        weights, product = product, attention.only_user(product)
    if not _multiplies_two(scores) or product is None or not _multiplies_two(product):
        return "the softmax is not between two matrix products"
    keys = scores.all_input_nodes[1]
    values = next(node for node in product.all_input_nodes if node is not weights)
    key, value = _maker(graph, keys), _maker(graph, values)
    if key is None or value is None or key is value:
        return "keys and values are not two 1x1 convolutions that nothing else reads"
    found = _Maps(key, value, keys, values)
    return _why_not(graph, found) or found


def _multiplies_two(node: fx.Node) -> bool:
    return attention.is_matmul(node) and len(node.all_input_nodes) == 2


def _maker(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The 1x1 convolution whose result ``node`` is, moved about only, and read by nothing else."""
    for each in dataflow.chain_back(graph, node):
        if attention.only_user(each) is None:
            return None
        module = g.module_of(graph, each)
        if isinstance(module, Convolution) and dataflow.pointwise(module) is not None and _dense(module):
            return each
    return None


def _dense(conv: Convolution) -> bool:
    return all(step == 1 for step in conv.stride)


def _why_not(graph: fx.GraphModule, maps: _Maps) -> str | None:
    if maps.key.args != maps.value.args:
        return "keys and values read different maps"
    if not g.calls_once(graph, maps.key) or not g.calls_once(graph, maps.value):
        return "one of its weights is used elsewhere"
    if maps.keys.meta["shape"] != maps.values.meta["shape"]:
        return "keys and values have heads of different sizes"
    if not all(_channel_first(graph, *ends) for ends in ((maps.key, maps.keys), (maps.value, maps.values))):
        return "its heads are not laid out as (B, h, d, N)"
    key, value = _convolutions(graph, maps)
    if algebra.has_bias(key) != algebra.has_bias(value):
        return "only one of keys and values has a bias"
    return None


def _channel_first(graph: fx.GraphModule, maker: fx.Node, end: fx.Node) -> bool:
    """Whether number p of channel h·d + i arrives as number p of head h's i-th, for every image."""
    shape: tuple[int, ...] = maker.meta["shape"]
    arrived: tuple[int, ...] = end.meta["shape"]
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    value: torch.Tensor | None = numbers
    path = list(dataflow.chain_back(graph, end))[::-1]
    for before, node in itertools.pairwise(path):
        value = None if value is None else dataflow.push(graph, node, before, value)
    if value is None or len(arrived) != 4 or arrived[1] * arrived[2] != shape[1]:
        return False
    return torch.equal(value, numbers.reshape(shape[0], arrived[1], arrived[2], -1))


def _convolutions(graph: fx.GraphModule, maps: _Maps) -> tuple[Convolution, Convolution]:
    kind: type[Convolution] = nn.Conv1d if len(maps.key.meta["shape"]) == 3 else nn.Conv2d
    return g.module_as(graph, maps.key, kind), g.module_as(graph, maps.value, kind)


def _pack(graph: fx.GraphModule, maps: _Maps) -> None:
    name = f"{maps.key.target}_{str(maps.value.target).rpartition('.')[2]}"
    graph.add_submodule(name, _stack(*_convolutions(graph, maps)))
    heads, dim = maps.keys.meta["shape"][1:3]
    first = min((maps.key, maps.value), key=list(graph.graph.nodes).index)
    new = graph.graph
    with new.inserting_before(first):
        both = new.call_module(name, maps.key.args)
        batch = new.call_function(operator.getitem, (new.call_function(getattr, (both, "shape")), 0))
        halves = new.call_method("split", (new.call_method("reshape", (both, batch, 2 * heads, dim, -1)), heads, 1))
        for index, node in enumerate((maps.keys, maps.values)):
            half = new.call_function(operator.getitem, (halves, index))
            half.meta["shape"] = node.meta["shape"]
            node.replace_all_uses_with(half)
    new.eliminate_dead_code()


def _stack(key: Convolution, value: Convolution) -> Convolution:
    """One convolution with the key's filters before the value's."""
    packed = type(key)(key.in_channels, key.out_channels + value.out_channels, 1, bias=algebra.has_bias(key))
    packed.weight = nn.Parameter(torch.cat([key.weight.detach(), value.weight.detach()]), requires_grad=False)
    if algebra.has_bias(key):
        both = torch.cat([algebra.bias_of(key), algebra.bias_of(value)])
        packed.bias = nn.Parameter(both, requires_grad=False)
    return packed.eval()
