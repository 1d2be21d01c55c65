from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes import equalize_channels
from nextvit_exporters.passes.base import relative_error, run_passes
from nextvit_exporters.passes.equalize_channels import EqualizeChannels, balance, divided, find_pairs, multiplied
from nextvit_exporters.passes.sets import FEWEST_KERNELS, FEWEST_MACS, NEURAL_ENGINE, ONNX_RUNTIME
from tests.exporters.mutations import Plant, assert_undone
from tests.exporters.passes_harness import certified, check_pass, make, pixels
from tests.exporters.quantize.scrambled import scramble
from tests.exporters.toys import Attend, Permuted, Pooled, Unscaled, Wired, Wiring, feature_map, wired
from tests.harness import randomise

PASS = EqualizeChannels()
LISTS = {"kernels": FEWEST_KERNELS, "macs": FEWEST_MACS, "onnxruntime": ONNX_RUNTIME, "neural engine": NEURAL_ENGINE}


def between(m: Wired, x: Tensor) -> object:
    return m.second(m.act(m.first(x)))


def conv(inside: int, outside: int, size: int = 1, groups: int = 1, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, size, stride, padding=size // 2, groups=groups)


PAIRS: dict[str, Wired] = {
    "1x1 twice": wired(between, first=conv(8, 6), act=nn.ReLU(), second=conv(6, 5)),
    "padded 3x3 twice": wired(between, first=conv(8, 6, 3), act=nn.ReLU(), second=conv(6, 5, 3, stride=2)),
    "grouped first": wired(between, first=conv(8, 12, 3, groups=4), act=nn.ReLU(), second=conv(12, 5)),
    "grouped second": wired(between, first=conv(8, 12), act=nn.ReLU(), second=conv(12, 8, 3, groups=4)),
    "depthwise": wired(between, first=conv(8, 8), act=nn.ReLU(), second=conv(8, 16, 3, groups=8)),
    "nothing between": wired(between, first=conv(8, 6), act=nn.Identity(), second=conv(6, 5)),
    "in place": wired(between, first=conv(8, 6), act=nn.ReLU(inplace=True), second=conv(6, 5)),
    "no bias": wired(between, first=nn.Conv2d(8, 6, 1, bias=False), act=nn.ReLU(), second=conv(6, 5)),
    "average between": wired(
        lambda m, x: m.second(m.pool(m.first(x).relu())), first=conv(8, 6), pool=nn.AvgPool2d(2), second=conv(6, 5)
    ),
    "to tokens": wired(
        lambda m, x: m.second(m.first(x).relu().flatten(2).transpose(1, 2)), first=conv(8, 6), second=nn.Linear(6, 5)
    ),
    "two readers": wired(
        lambda m, x: (m.second(y := m.first(x).relu()), m.third(y)),
        first=conv(8, 6),
        second=conv(6, 5),
        third=conv(6, 4),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equalizes(name: str) -> None:
    checked = check_pass(PAIRS[name], (), PASS, rewrites=1, nodes=0, inputs=feature_map())
    (scale,) = balance(checked.graph, find_pairs(measured(checked.graph))[0])
    assert float((scale - 1.0).abs().max()) < 1e-6


def measured(graph: fx.GraphModule) -> fx.GraphModule:
    g.measure(graph, feature_map())
    return graph


@pytest.mark.parametrize("kind", [Attend, Unscaled, Permuted, Pooled])
def test_equalizes_values_with_the_projection(kind: type[Attend]) -> None:
    check_pass(randomise(kind(), 0), (), PASS, rewrites=1, nodes=0, inputs=feature_map())


REFUSED: dict[str, tuple[Wiring, str]] = {
    "residual": (lambda m, x: m.second(y := m.first(x)) + y[:, :1], "getitem also reads it"),
    "addition": (lambda m, x: (m.second(y := m.first(x).relu()), y + 1.0), "add also reads it"),
    "output": (lambda m, x: (m.second(y := m.first(x).relu()), y), "the graph's output also reads it"),
    "concatenation": (lambda m, x: (m.second(y := m.first(x)), torch.cat([y, x], 1)), "cat also reads it"),
    "another curve": (lambda m, x: (m.second(y := m.first(x)), y.sigmoid()), "sigmoid also reads it"),
    "channels moved": (
        lambda m, x: m.second(m.first(x).relu().unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)),
        "second does not read the channels in their order",
    ),
    "read twice": (
        lambda m, x: (m.second(m.first(x).relu()), m.second(x[:, :6])),
        "second is called, or its weight is shared, elsewhere",
    ),
    "made twice": (
        lambda m, x: (m.second(m.first(x).relu()), m.first(x + 1.0)),
        "it is called, or its weight is shared, elsewhere",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    wiring, reason = REFUSED[name]
    model = wired(wiring, first=conv(8, 6), second=conv(6, 5))
    check_pass(model, (), PASS, rewrites=0, nodes=0, inputs=feature_map(), refused=[reason])


def test_what_is_no_multiple_between_is_no_pair() -> None:
    model = wired(lambda m, x: m.second(m.first(x).sigmoid()), first=conv(8, 6), second=conv(6, 5))
    check_pass(model, (), PASS, rewrites=0, nodes=0, inputs=feature_map())


def test_dead_channels_stay() -> None:
    model = wired(between, first=conv(8, 6), act=nn.ReLU(), second=conv(6, 5))
    with torch.no_grad():
        model.first.weight[1] = 0.0
        model.second.weight[:, 2] = 0.0
        model.first.weight[3] *= 1e-14
    checked = check_pass(model, (), PASS, rewrites=1, nodes=0, inputs=feature_map())
    after = g.module_as(checked.graph, next(n for n in checked.graph.graph.nodes if n.target == "first"), nn.Conv2d)
    same = (after.weight == model.first.weight.double()).flatten(1).all(dim=1)
    assert same.tolist() == [False, True, True, True, False, False]


@cache
def behind(name: str, model: str = "nano") -> fx.GraphModule:
    graph, _ = run_passes(g.trace(make(model)), LISTS[name], [pixels(2, 3, 64, 64, seed=1)])
    return graph


@pytest.mark.parametrize(("name", "count"), [("kernels", 21), ("macs", 21), ("onnxruntime", 21), ("neural engine", 18)])
def test_on_the_model(name: str, count: int) -> None:
    """4 from the stem, 7 in MHCA, 7 in MLPs, 3 values; packed keys and values are refused, since keys may not move."""
    inputs = pixels(2, 3, 64, 64, seed=1)
    graph, (record,) = run_passes(behind(name), [PASS], [inputs])
    assert record.certified, record
    assert record.error_float64 < 2e-14
    assert record.rewrites == count
    assert len(record.refused) == 8  # what a residual branch starts from
    assert {refusal.reason.partition(" ")[2] for refusal in record.refused} == {"also reads it"}
    _, (again,) = run_passes(graph, [PASS], [inputs])
    assert again.rewrites == 0


def test_on_timm() -> None:
    """4 pairs from the stem, 20 in MHCA, 20 in MLPs, 4 values; its ReLUs write in place."""
    done = certified("timm")
    graph, (record,) = run_passes(done.graph, [PASS], [done.inputs])
    assert record.certified, record
    assert record.rewrites == 48
    assert relative_error(g.execute(graph, done.inputs), done.expected) <= 1e-12


def test_a_scrambled_copy_ends_as_the_same_numbers() -> None:
    """The scales have one optimum, whatever they were before."""
    inputs = pixels(2, 3, 64, 64, seed=1)
    start = behind("kernels")
    mixed = scramble(start, 3.0, seed=5)
    assert relative_error(g.execute(mixed, inputs), g.execute(start, inputs)) < 1e-12
    ends = [run_passes(graph, [PASS], [inputs])[0] for graph in (start, mixed)]
    for (name, one), (_, other) in zip(*(end.named_parameters() for end in ends), strict=True):
        assert float((one - other).abs().max()) <= 0.02 * float(one.abs().max()), name


def test_scales_reach_their_group() -> None:
    weight = torch.arange(1.0, 9.0).view(4, 2, 1, 1)
    found = multiplied(weight, torch.tensor([1.0, 10.0, 100.0, 1000.0]), groups=2).flatten(1)
    assert found.tolist() == [[1, 20], [3, 40], [500, 6000], [700, 8000]]
    assert divided(weight, torch.tensor([1.0, 2.0, 1.0, 4.0])).flatten(1)[3].tolist() == [1.75, 2.0]


def swapped(weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    return multiplied(weight, scale.view(groups, -1).flip(0).flatten() if groups > 1 else scale.flip(0), groups)


MISTAKES: dict[str, Plant] = {
    "readers not multiplied": lambda p: p.setattr(equalize_channels, "multiplied", lambda w, _s, _g: w),
    "source not divided": lambda p: p.setattr(equalize_channels, "divided", lambda w, _: w),
    "bias not divided": lambda p: p.setattr(
        equalize_channels, "divided", lambda w, s: divided(w, s) if w.dim() > 1 else w
    ),
    "multiplied twice": lambda p: p.setattr(equalize_channels, "multiplied", lambda w, s, n: multiplied(w, s * s, n)),
    "channels in another order": lambda p: p.setattr(equalize_channels, "multiplied", swapped),
    "negative": lambda p: p.setattr(
        equalize_channels, "balance", lambda gr, pairs: tuple(-s for s in balance(gr, pairs))
    ),
    "in float32": lambda p: p.setattr(equalize_channels, "divided", lambda w, s: divided(w, s).float().double()),
    "through any curve": lambda p: p.setattr(equalize_channels, "_through", through_all),
}
THROUGH = equalize_channels._through


def through_all(
    graph: fx.GraphModule, node: fx.Node, given: list[fx.Node], arrived: dict[fx.Node, Tensor]
) -> Tensor | None:
    """Additions let pass as if what they add were scaled too."""
    if g.is_op(node, "add"):
        return arrived[given[0]]
    return THROUGH(graph, node, given, arrived)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(mistake: str) -> None:
    start, inputs = behind("kernels"), pixels(2, 3, 64, 64, seed=1)
    error = assert_undone(start, PASS, inputs, g.execute(start, inputs), MISTAKES[mistake])
    assert error > 1e-9
