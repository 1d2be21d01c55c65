"""Operations that no module made are named by their neighbours: toy graphs by hand, and every node of nano."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.scopes import fill_scopes, graph_scopes
from tests.exporters.passes_harness import certified, nano
from tests.exporters.toys import Wired, wired


def chain(*scopes: str) -> list[str]:
    """What becomes of ``scopes`` where each operation reads the one before it."""
    neighbours = [{number - 1, number + 1} & set(range(len(scopes))) for number in range(len(scopes))]
    return fill_scopes(scopes, neighbours)


@pytest.mark.parametrize(
    ("scopes", "filled"),
    [
        (("a.b.c", "", "a.b.d"), "a.b"),
        (("a.b.c", "", "", "a.b.d"), "a.b"),  # each sees both
        (("a.b", "", "c.d"), ""),
        (("a.bc", "", "a.bd"), "a"),  # whole names, not letters
        (("a.b", "", "a.b"), "a.b"),
        (("a.b", "", "a.b.c"), "a.b"),
        (("a.b", ""), "a.b"),  # nothing else is there
        (("", ""), ""),
    ],
)
def test_the_innermost_module_that_the_nearest_share(scopes: Sequence[str], filled: str) -> None:
    found = chain(*scopes)
    assert found[1] == filled
    assert all(after == before for before, after in zip(scopes, found, strict=True) if before)


def test_the_nearest_count_and_not_what_lies_behind_them() -> None:
    assert chain("far.a", "near.x", "", "near.y", "far.b") == ["far.a", "near.x", "near", "near.y", "far.b"]


def test_neither_order_nor_a_circle_matters() -> None:
    scopes = ["", "m.a", "", "m.b"]
    assert fill_scopes(scopes, [{1, 2, 3}, {0}, {0}, {0}]) == ["m", "m.a", "m", "m.b"]
    assert fill_scopes(["", ""], [{1}, {0}]) == ["", ""]
    assert fill_scopes([], []) == []


def scopes_of(model: nn.Module) -> dict[str, str]:
    return graph_scopes(g.trace(model.double()))


class Block(nn.Module):
    """An embedding, and two residual branches behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.first(x)
        out: Tensor = x + self.second(x)
        return out


def test_a_sum_belongs_to_the_block_whose_branches_it_joins() -> None:
    def wiring(model: Wired, x: Tensor) -> Tensor:
        stem: Tensor = model.stem(x)
        out: Tensor = stem + model.blocks(stem)
        return out

    found = scopes_of(wired(wiring, stem=nn.Conv2d(3, 4, 1), blocks=nn.Sequential(Block(), Block())))
    assert found["blocks_1_first"] == "blocks.1.first"
    sums = [found[name] for name in ("add", "add_1", "add_2", "add_3", "add_4")]
    assert sums == ["blocks.0", "blocks.0", "blocks.1", "blocks.1", ""]


def test_a_size_does_not_draw_a_reshape_to_where_it_was_asked_for() -> None:
    """The tensor alone counts: the shape may come from the other end of the model."""

    def wiring(model: Wired, x: Tensor) -> Tensor:
        first = model.body.first(x)
        out: Tensor = model.head.last(first)
        return out.reshape(first.shape)

    model = nn.Module()
    model.first = nn.Conv2d(3, 4, 1)
    head = nn.Module()
    head.last = nn.Conv2d(4, 4, 1)
    found = scopes_of(wired(wiring, body=model, head=head))
    assert found["reshape"] == "head.last"


@pytest.fixture(scope="module")
def traced() -> fx.GraphModule:
    return g.trace(nano())


def test_nano_before_any_pass(traced: fx.GraphModule) -> None:
    found = graph_scopes(traced)
    nodes = {node.name: node for node in traced.graph.nodes}
    assert found.keys() == nodes.keys()
    for name, node in nodes.items():
        if node.op == "call_module":
            assert found[name] == node.target
    attention = {found[name] for name, node in nodes.items() if g.is_op(node, "softmax", "matmul")}
    assert attention == {f"features.{block}.e_mhsa" for block in (2, 4, 6)}


def test_nano_behind_the_passes() -> None:
    """The blocks of the demo, by the names that reports show."""
    graph = certified("nano").graph
    found = graph_scopes(graph)
    softmaxes = [found[node.name] for node in graph.graph.nodes if g.is_op(node, "softmax")]
    assert softmaxes == ["features.2.e_mhsa", "features.4.e_mhsa", "features.6.e_mhsa"]
    sums = [node for node in graph.graph.nodes if node.target is operator.add]
    inside = {found[node.name] for node in sums}
    assert {"features.0", "features.1", "features.3", "features.5"} <= inside
    assert all(name == "" or name.split(".")[0] in {"features", "avgpool"} for name in inside)
    names = dict(graph.named_modules())
    assert all(name in names or name.removesuffix(".e_mhsa") in names for name in found.values())


def test_scopes_leave_the_graph_alone(traced: fx.GraphModule) -> None:
    code = traced.code
    before = g.execute(traced, torch.ones(1, 3, 64, 64, dtype=torch.float64))
    graph_scopes(traced)
    assert traced.code == code
    assert torch.equal(g.execute(traced, torch.ones(1, 3, 64, 64, dtype=torch.float64))[0], before[0])
