"""What is found on images is what plain arithmetic finds, and memory doesn't grow with their number."""

from __future__ import annotations

import gc
import warnings
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from nextvit_exporters import graph as g
from nextvit_exporters.errors import DeployError, InvariantError
from nextvit_exporters.quantize import observe
from nextvit_exporters.quantize.histograms import LEVELS
from nextvit_exporters.quantize.identity import graph_hash
from nextvit_exporters.quantize.observe import Observer, convergence
from nextvit_exporters.quantize.placement import Map, Placement, placement
from nextvit_exporters.quantize_spec import METHODS
from nextvit_models.config import VARIANTS
from nextvit_models.nextvit import NextViT
from tests.exporters.toys import Wired, wired
from tests.harness import images, randomise


def every_kind() -> nn.Module:
    """Strides, padding, dilation, groups, tokens that two maps read, and a map that the last one leaves in float."""

    def connect(m: Wired, x: Tensor) -> Tensor:
        x = m.relu(m.spread(m.relu(m.stem(x))))
        tokens = m.grouped(x).flatten(2).transpose(1, 2)
        x = (m.one(tokens) + m.two(tokens)).mean(1)
        return cast("Tensor", m.head(x))

    return wired(
        connect,
        relu=nn.ReLU(),
        stem=nn.Conv2d(3, 8, 3, stride=2, padding=1),
        spread=nn.Conv2d(8, 8, (3, 1), padding=(2, 0), dilation=(2, 1), bias=False),
        grouped=nn.Conv2d(8, 12, 3, groups=4),
        one=nn.Linear(12, 6),
        two=nn.Linear(12, 6, bias=False),
        head=nn.Linear(6, 5),
    )


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    return g.trace(every_kind())


@pytest.fixture(scope="module")
def nano() -> fx.GraphModule:
    return g.trace(randomise(NextViT(VARIANTS["nextvit_nano"], 10), seed=0))


def batch(seed: int, count: int = 3, side: int = 14) -> Tensor:
    return images(count, 3, side, side, seed=seed, dtype=torch.float64)


def watched(
    graph: fx.GraphModule, batches: list[Tensor], dtype: torch.dtype = torch.float64, *, grams: bool = True
) -> Observer:
    observer = Observer(graph, placement(graph), grams=grams, dtype=dtype)
    for each in batches:
        observer.see(each)
    return observer


class _Inputs(fx.Interpreter):
    """What every linear map reads, and what every node makes."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.read: dict[str, Tensor] = {}
        self.made: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        if isinstance(g.module_of(cast("fx.GraphModule", self.module), n), Map):
            self.read[str(n.target)] = self.env[n.all_input_nodes[0]]
        self.made[n.name] = super().run_node(n)
        return self.made[n.name]


@torch.no_grad()
def reference_on(graph: fx.GraphModule, x: Tensor) -> _Inputs:
    reference = _Inputs(graph)
    reference.run(x)
    return reference


def naive_patches(module: Map, x: Tensor) -> Tensor:
    """(groups, places, K), one place after another: what a single weight of one is multiplied with there."""
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, module.in_features)
    assert isinstance(module, nn.Conv2d)
    inner = module.weight[0].numel()
    one_hot = torch.eye(inner, dtype=x.dtype).view(inner, *module.weight.shape[1:])
    parts = [
        functional.conv2d(part, one_hot, None, module.stride, module.padding, module.dilation)
        for part in x.chunk(module.groups, 1)
    ]
    return torch.stack([part.permute(0, 2, 3, 1).reshape(-1, inner) for part in parts])


def test_means_and_products_are_those_of_plain_arithmetic(graph: fx.GraphModule) -> None:
    batches = [batch(seed, count) for seed, count in enumerate((3, 1, 2))]
    observer = watched(graph, batches)
    reference = reference_on(graph, torch.cat(batches))
    placed = placement(graph)
    assert (
        set(observer.means())
        == set(observer.grams())
        == set(placed.maps)
        == {"stem", "spread", "grouped", "one", "two"}
    )
    for name in placed.maps:
        rows = naive_patches(cast("Map", graph.get_submodule(name)), reference.read[name])
        np.testing.assert_allclose(observer.means()[name], rows.mean(1), rtol=1e-12, atol=1e-13)
        scale = float(torch.abs(rows.mT @ rows).max())
        np.testing.assert_allclose(observer.grams()[name], rows.mT @ rows, rtol=1e-12, atol=1e-13 * scale)


def test_steps_are_those_of_the_tensors(graph: fx.GraphModule) -> None:
    batches = [batch(seed) for seed in range(2)]
    reference = reference_on(graph, torch.cat(batches))
    found = watched(graph, batches).steps("minmax")
    assert tuple(found) == placement(graph).tensors
    assert len(found) == 4
    for name, size in found.items():
        assert size * LEVELS == pytest.approx(float(reference.made[name].abs().max()), rel=1e-15)


def test_float32_finds_the_same_but_for_its_rounding(graph: fx.GraphModule) -> None:
    batches = [batch(seed) for seed in range(2)]
    single, double = watched(graph, batches, torch.float32), watched(graph, batches)
    for name, gram in double.grams().items():
        np.testing.assert_allclose(single.grams()[name], gram, atol=2e-6 * np.abs(gram).max())
        np.testing.assert_allclose(single.means()[name], double.means()[name], atol=2e-6)
    for name, size in double.steps("mse").items():
        assert single.steps("mse")[name] == pytest.approx(size, rel=3e-3)


def test_products_laid_out_in_parts_are_the_same(graph: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = watched(graph, [batch(0, 4)]).grams()
    monkeypatch.setattr(observe, "_MOST_PATCHES", 1)
    for name, gram in watched(graph, [batch(0, 4)]).grams().items():
        np.testing.assert_allclose(gram, whole[name], rtol=1e-10, atol=1e-12 * np.abs(gram).max())


def test_steps_depend_on_neither_order_nor_batches(graph: fx.GraphModule) -> None:
    pictures = batch(4, 6)
    one_by_one = watched(graph, list(torch.split(pictures, 1)), grams=False)
    turned = watched(graph, list(torch.split(pictures.flip(0), 1)), grams=False)
    together = watched(graph, [pictures], grams=False)
    for method in METHODS:
        assert turned.steps(method) == one_by_one.steps(method)
    for name, size in one_by_one.steps("mse").items():  # the network's own sums differ in the last digit
        assert together.steps("mse")[name] == pytest.approx(size, rel=3e-3)


def test_going_on_from_a_state_gives_the_same_bits(nano: fx.GraphModule) -> None:
    batches = [images(2, 3, 64, 64, seed=seed) for seed in range(4)]
    through = Observer(nano, placement(nano), grams=True)
    first, second = (Observer(nano, placement(nano), grams=True) for _ in range(2))
    for index, each in enumerate(batches):
        through.see(each)
        through.look("percentile")
        if index == 2:
            second.restore({name: array.copy() for name, array in first.state().items()})
        late = second if index >= 2 else first
        late.see(each)
        late.look("percentile")
    assert (second.count, second.convergence()) == (8, through.convergence())
    for name, array in through.state().items():
        assert np.array_equal(array, second.state()[name]), name
    results = [each.result("mse", "0" * 64, "1" * 64).digest for each in (through, second)]
    assert results[0] == results[1]


def test_a_state_of_another_graph_is_refused(graph: fx.GraphModule, nano: fx.GraphModule) -> None:
    fresh = Observer(graph, placement(graph), grams=True)
    for other in (watched(nano, [], grams=True), watched(graph, [batch(0)], grams=False)):
        with pytest.raises(DeployError, match="doesn't fit this graph; calibrate again"):
            fresh.restore(other.state())
    assert fresh.count == 0


def test_what_is_not_finite_is_named(graph: fx.GraphModule) -> None:
    wrong = batch(0)
    wrong[1, 2, 3, 4] = float("nan")
    with pytest.raises(InvariantError, match="x holds NaN or infinity on these images"):
        watched(graph, [wrong])


def test_maps_that_read_the_same_share_their_products(graph: fx.GraphModule) -> None:
    found = watched(graph, [batch(0)]).grams()
    assert found["one"] is found["two"]
    assert sum(name.startswith("products/") for name in watched(graph, []).state()) == 4


def test_no_products_are_kept_where_nobody_asks(graph: fx.GraphModule) -> None:
    observer = watched(graph, [batch(0)], grams=False)
    assert not observer.grams()
    assert not any(name.startswith("products/") for name in observer.state())


def test_tensors_in_memory_do_not_grow_with_the_images(nano: fx.GraphModule) -> None:
    observer = Observer(nano, placement(nano), grams=True)

    def alive() -> tuple[int, int]:
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # asking some of torch's old names what they are is enough for a warning
            tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
        return len(tensors), sum(each.nbytes for each in observer.state().values())

    observer.see(images(2, 3, 64, 64, seed=0))
    first = alive()
    for seed in range(1, 4):
        observer.see(images(2, 3, 64, 64, seed=seed))
    assert alive() == first


def test_a_tensor_is_let_go_when_nobody_reads_it_any_more(
    nano: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    seen = observe._Run.run_node

    def count(self: observe._Run, n: fx.Node) -> object:
        held.append(len(self.env))
        return seen(self, n)

    monkeypatch.setattr(observe._Run, "run_node", count)
    watched(nano, [images(1, 3, 64, 64, seed=0)], grams=False)
    assert max(held) < len(held) / 4


def test_the_graph_stays_as_it_is(graph: fx.GraphModule) -> None:
    before = graph_hash(graph)
    observer = watched(graph, [batch(0)], torch.float32)
    observer.close()
    assert graph_hash(graph) == before
    assert graph(batch(1)).dtype == torch.float64


def test_only_what_the_placement_names_is_looked_at(graph: fx.GraphModule) -> None:
    observer = Observer(graph, Placement({"stem": "x"}), grams=True)
    observer.see(batch(0))
    assert set(observer.means()) == set(observer.grams()) == {"stem"}
    assert set(observer.steps("mse")) == {"x"}


SETTLED = np.array([[0.5, 2.0], [0.985, 2.0], [0.995, 2.0], [1.0, 2.001], [1.0, 2.0]])


def test_steps_that_settle_say_when() -> None:
    found = convergence([32, 64, 96, 112, 128], SETTLED)
    assert (found.after, found.count) == (96, 128)
    assert str(found) == "scales move < 1% after 96 of 128 images"


def test_steps_that_still_move_say_by_how_much() -> None:
    steps = SETTLED.copy()
    steps[-1, 0] = 1.25
    found = convergence([32, 64, 96, 112, 128], steps)
    assert found.after is None
    assert str(found) == "scales still move by up to 20.0% over the last 16 of 128 images; give more"


def test_one_step_in_a_hundred_may_move() -> None:
    steps = np.ones((3, 200))
    steps[0, :2] = 2.0
    assert convergence([8, 16, 24], steps).after == 8
    steps[0, :3] = 2.0
    assert convergence([8, 16, 24], steps).after == 16
    steps[1, 7] = 1.5  # another one than before, and still one alone
    assert convergence([8, 16, 24], steps).after == 16


def test_steps_that_settle_and_move_again_have_not_settled() -> None:
    assert convergence([1, 2, 3, 4], np.array([[1.0], [1.2], [1.0], [1.0]])).after == 3


def test_one_look_is_too_few() -> None:
    with pytest.raises(ValueError, match="two looks"):
        convergence([8], np.ones((1, 3)))


def _mean(graph: fx.GraphModule) -> fx.Node:
    mean: fx.Node = next(node for node in graph.graph.nodes if node.target == "mean")
    return mean


def _change(graph: fx.GraphModule, what: str) -> None:
    mean, one, grouped = _mean(graph), graph.get_submodule("one"), graph.get_submodule("grouped")
    match what:
        case "a weight's last bit":
            one.get_parameter("weight").data.view(torch.int64).flatten()[3].bitwise_xor_(1)
        case "a bias":
            one.get_parameter("bias").data.add_(1)
        case "a stride":
            setattr(grouped, "stride", (2, 2))  # noqa: B010 - a module's attributes have no types
        case "an operation":
            mean.target = "sum"
        case "an argument":
            mean.args = (mean.args[0], 2)
        case _:
            raise ValueError(what)


CHANGES = ("a weight's last bit", "a bias", "a stride", "an operation", "an argument")


@pytest.mark.parametrize("change", CHANGES)
def test_a_hash_tells_graphs_apart(change: str) -> None:
    graphs = [g.trace(every_kind()) for _ in range(2)]
    assert graph_hash(graphs[0]) == graph_hash(graphs[1])
    _change(graphs[1], change)
    assert graph_hash(graphs[0]) != graph_hash(graphs[1])


def test_a_hash_leaves_out_what_changes_nothing(graph: fx.GraphModule) -> None:
    before = graph_hash(graph)
    copied = g.clone(graph)
    g.measure(copied, batch(0))
    assert graph_hash(copied) == before
    assert len(before) == 64
