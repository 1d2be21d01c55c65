"""Where INT8 goes: TensorRT's rules, on networks small enough to see them."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes.dataflow import chain_back
from nextvit_exporters.quantize.placement import block_of, blocks, placement
from nextvit_exporters.quantize.quantized import Quantizer, quantize_graph
from nextvit_exporters.quantize_spec import QuantizeSpec
from tests.exporters.quantize.int8_files import INT8, Residual, calibrated, observed
from tests.harness import images, randomise


def traced(model: nn.Module) -> fx.GraphModule:
    return g.trace(randomise(model, seed=0))


def test_a_tensor_that_several_read_is_quantized_once() -> None:
    placed = placement(traced(Residual()))
    assert dict(placed.maps) == {
        "stem": "x",
        "grouped": "act",
        "plain": "act",
        "tokens": "add_1",
        "back": "relu",
    }
    assert placed.tensors == ("x", "act", "add_1", "relu")


def test_everybody_reads_the_quantized_one() -> None:
    """So does the sum behind a residual branch, also where the map reads a tensor's numbers in another order."""
    graph = traced(Residual())
    found = observed(graph, images(4, 3, 8, 8, seed=1, dtype=torch.float64))
    quantized = quantize_graph(graph, QuantizeSpec(), found)
    nodes = {node.name: node for node in quantized.graph.nodes}
    for name in placement(graph).tensors:
        assert [user.name for user in nodes[name].users] == [f"quantize_{name}"]
    assert {user.name for user in nodes["quantize_act"].users} == {"grouped", "plain", "add"}
    assert [user.name for user in nodes["quantize_add_1"].users] == ["flatten"]
    assert {user.name for user in nodes["transpose"].users} == {"tokens", "add_2"}


class Moved(nn.Module):
    """Maps behind every way of merely moving numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.same = nn.Conv2d(3, 4, 1), nn.Identity()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        a = self.a(y.permute(0, 2, 3, 1).reshape(-1, 4))
        b = self.b(self.same(y).flatten(2).transpose(1, 2).contiguous().view(-1, 4))
        c = self.c((y * 1.0).flatten(2).transpose(1, 2).reshape(-1, 4))
        d = self.d(torch.cat([a, b]))
        out: Tensor = self.head(torch.cat([c, d]))
        return out


def test_moves_are_walked_back_and_nothing_else_is() -> None:
    """A product makes new numbers; so does a concatenation, whose parts may need different steps."""
    assert dict(placement(traced(Moved())).maps) == {
        "conv": "x",
        "a": "conv",
        "b": "conv",
        "c": "mul",
        "d": "cat",
    }


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.one(x)
        return self.two(x), self.three(x)


def test_the_last_map_stays() -> None:
    assert set(placement(traced(Heads())).maps) == {"one", "two"}
    assert not placement(traced(nn.Sequential(nn.Linear(3, 3)))).maps
    assert not placement(traced(nn.Sequential(nn.ReLU()))).maps


class Twice(nn.Module):
    """One module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.own, self.tied, self.head = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.again(self.first(x)))
        out: Tensor = self.head(self.tied(self.own(x)))
        return out


def call(graph: fx.GraphModule, name: str) -> fx.Node:
    found: fx.Node
    (found,) = [node for node in graph.graph.nodes if node.target == name]
    return found


def test_what_would_need_two_steps_stays() -> None:
    graph = traced(Twice())
    assert set(placement(graph).maps) == {"first", "own", "tied"}
    g.module_as(graph, call(graph, "tied"), nn.Linear).weight = g.module_as(graph, call(graph, "own"), nn.Linear).weight
    assert set(placement(graph).maps) == {"first"}


def test_kept_blocks_stay() -> None:
    """``features.1`` keeps nothing of ``features.10`` or of what is around the blocks."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 4)
            self.features = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(11))
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.features:
                x = block(x)
            out: Tensor = self.head(x)
            return out

    graph = traced(Blocks())
    whole, kept = placement(graph), placement(graph, ("features.1", "stem"))
    assert blocks(whole) == ("stem", *(f"features.{i}" for i in range(11)))
    assert whole.maps.keys() - kept.maps.keys() == {"stem", "features.1.0", "features.1.1"}
    assert blocks(kept) == tuple(name for name in blocks(whole) if name not in {"stem", "features.1"})
    assert [block_of(name) for name in ("features.3.mlp.conv1", "stem.0.conv", "head")] == [
        "features.3",
        "stem.0",
        "head",
    ]


def test_attention_s_products_and_softmax_read_and_give_real_numbers() -> None:
    graph, found = calibrated(INT8)
    assert INT8.quantize is not None
    quantized = quantize_graph(graph, INT8.quantize, found)
    products = [node for node in quantized.graph.nodes if g.is_op(node, "matmul")]
    assert len(products) == 6
    for product in products:
        for read in product.all_input_nodes:
            *_, maker = chain_back(quantized, read)
            assert not isinstance(g.module_of(quantized, maker), Quantizer)
    for node in quantized.graph.nodes:
        if g.is_op(node, "softmax"):
            assert not any(isinstance(g.module_of(quantized, user), Quantizer) for user in node.users)
    maps = placement(graph).maps
    attention = {f"features.{i}.e_mhsa.{part}" for i in (2, 4, 6) for part in ("q", "k", "v", "proj")}
    assert attention <= maps.keys()
    assert len(maps) == 52
    assert "proj_head.0" not in maps
