"""The runner: certifies, rolls back, refuses what breaks its contract."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.errors import InvariantError
from nextvit_exporters.passes.base import (
    FLOAT32_BOUND,
    FLOAT64_BOUND,
    TOGETHER,
    Pass,
    PassResult,
    Refusal,
    Rewrite,
    relative_error,
    run_passes,
)
from nextvit_exporters.passes.strip_train_only import StripTrainOnly
from tests.exporters.toys import feature_map, wired
from tests.harness import images

Body = Callable[[fx.GraphModule], PassResult]
INF, NAN = math.inf, math.nan


class Scripted(Rewrite):
    """A pass that does what the test says."""

    def __init__(self, body: Body, name: str = "scripted", missing: str | None = None) -> None:
        self.body, self.name, self.missing = body, name, missing

    def requires(self, graph: fx.GraphModule) -> str | None:
        del graph
        return self.missing

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        return self.body(graph)


def model() -> fx.GraphModule:
    layers = {"conv": nn.Conv2d(8, 8, 1), "drop": nn.Dropout(0.5), "pool": nn.AvgPool2d(2, ceil_mode=True)}
    return g.trace(wired(lambda m, x: m.pool(m.drop(m.conv(x))), **layers))


def scale_by(factor: float) -> Body:
    """Multiply the output; with a factor off one, that moves it."""

    def body(graph: fx.GraphModule) -> PassResult:
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        (result,) = output.all_input_nodes
        with graph.graph.inserting_before(output):
            output.replace_input_with(result, graph.graph.call_function(operator.mul, (result, factor)))
        return PassResult(1, (Refusal("here", "because"),))

    return body


def replace_pool(graph: fx.GraphModule) -> PassResult:
    """Right at even sizes only: floor mode drops the last row of an odd map."""
    graph.set_submodule("pool", nn.AvgPool2d(2))
    return PassResult(1)


def run(graph: fx.GraphModule, *passes: Pass, probes: list[Tensor] | None = None) -> tuple[fx.GraphModule, list[bool]]:
    result, records = run_passes(graph, passes, probes or [feature_map()])
    return result, [record.certified for record in records]


def test_a_pass_that_moves_the_outputs_is_rolled_back() -> None:
    graph = model()
    result, records = run_passes(
        graph, [StripTrainOnly(), Scripted(scale_by(1.0 + 1e-9)), StripTrainOnly()], [feature_map()]
    )
    assert [record.certified for record in records] == [True, False, True]
    assert records[1].error_float64 == pytest.approx(1e-9, rel=1e-3)
    assert (records[1].rewrites, records[1].refused) == (1, (Refusal("here", "because"),))
    assert records[2].nodes == (g.nodes(result),) * 2 == (g.nodes(graph) - 1,) * 2
    assert "mul" not in str(result.graph)
    assert relative_error(g.execute(result, feature_map()), g.execute(graph, feature_map())) <= FLOAT64_BOUND


def test_what_stays_within_the_bound_is_kept() -> None:
    result, certified = run(model(), Scripted(scale_by(1.0 + 1e-13)))
    assert certified == [True]
    assert "mul" in str(result.graph)


def test_errors_do_not_add_up_unseen() -> None:
    """Each pass is held against the graph before it; 50 that stay just within the bound still stay within 50 of it."""
    graph = model()
    result, certified = run(graph, *(Scripted(scale_by(1.0 + 9e-13)) for _ in range(50)))
    assert all(certified)
    assert relative_error(g.execute(result, feature_map()), g.execute(graph, feature_map())) <= 50 * FLOAT64_BOUND


def test_a_pass_sound_in_float64_alone_is_rolled_back() -> None:
    """Adding 8192 and taking it away costs the last digits in float64 and the middle ones in float32."""

    def body(graph: fx.GraphModule) -> PassResult:
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        (result,) = output.all_input_nodes
        with graph.graph.inserting_before(output):
            there = graph.graph.call_function(operator.add, (result, 8192.0))
            output.replace_input_with(result, graph.graph.call_function(operator.sub, (there, 8192.0)))
        return PassResult(1)

    result, (record,) = run_passes(model(), [Scripted(body)], [feature_map()])
    assert record.error_float64 <= FLOAT64_BOUND
    assert record.error_float32 > FLOAT32_BOUND
    assert not record.certified
    assert "sub" not in str(result.graph)


def test_a_pass_without_rewrites_leaves_no_trace() -> None:
    graph = model()
    result, (record,) = run_passes(
        graph, [Scripted(lambda graph: PassResult(scale_by(2.0)(graph).rewrites - 1))], [feature_map()]
    )
    assert record.certified
    assert record.rewrites == 0
    assert record.nodes == (g.nodes(graph),) * 2
    assert torch.equal(g.execute(result, feature_map())[0], g.execute(graph, feature_map())[0])


def test_the_caller_s_graph_stays_as_it_is() -> None:
    graph = model()
    code, answer = graph.code, g.execute(graph, feature_map())
    run(graph, StripTrainOnly(), Scripted(scale_by(2.0)))
    assert graph.code == code
    assert torch.equal(g.execute(graph, feature_map())[0], answer[0])


def test_a_graph_may_be_given_up() -> None:
    """``consume`` lets the weights go; the answer is the same, and the model they came from is whole."""
    graph = model()
    expected = g.execute(graph, feature_map())
    passes: list[Pass] = [StripTrainOnly(), Scripted(scale_by(2.0)), Scripted(scale_by(1.0))]
    result, records = run_passes(graph, passes, [feature_map()], consume=True)
    assert [record.certified for record in records] == [True, False, True]
    assert relative_error(g.execute(result, feature_map()), expected) <= FLOAT64_BOUND
    assert list(graph.parameters()) == []


def test_an_unmet_precondition_names_the_pass_and_its_history() -> None:
    passes: list[Pass] = [
        StripTrainOnly(),
        Scripted(lambda _: PassResult(0), "idle"),
        Scripted(scale_by(1.0), "late", "fold first"),
    ]
    with pytest.raises(InvariantError, match=r"^late \(after strip-train-only, idle\): fold first$"):
        run_passes(model(), passes, [feature_map()])
    with pytest.raises(InvariantError, match=r"^late \(after nothing\): fold first$"):
        run_passes(model(), passes[2:], [feature_map()])


def numbers(graph: fx.GraphModule) -> PassResult:
    graph.get_parameter("conv.weight").data.mul_(1.5)
    return PassResult(1)


def numbers_but_none_reported(graph: fx.GraphModule) -> PassResult:
    with torch.no_grad():
        graph.get_parameter("conv.bias").add_(1.0)
    return PassResult(0)


def parameter(graph: fx.GraphModule) -> PassResult:
    conv = graph.get_submodule("conv")
    conv.weight = nn.Parameter(torch.ones(8, 8, 1, 1, dtype=torch.float64))
    return PassResult(1)


def attribute(graph: fx.GraphModule) -> PassResult:
    graph.get_submodule("pool").ceil_mode = False  # type: ignore[assignment]  # nn.Module takes any attribute
    return PassResult(1)


def swapped_rows(graph: fx.GraphModule) -> PassResult:
    """The sum stays: torch's count of in-place operations tells."""
    weight = graph.get_parameter("conv.weight")
    with torch.no_grad():
        weight.copy_(weight.flip(0))
    return PassResult(1)


def child(graph: fx.GraphModule) -> PassResult:
    graph.get_submodule("conv").add_module("inner", nn.Conv2d(8, 8, 1).double())
    return PassResult(0)


@pytest.mark.parametrize("body", [numbers, numbers_but_none_reported, parameter, attribute, swapped_rows, child])
def test_a_module_changed_in_place_is_an_error(body: Body) -> None:
    passes: list[Pass] = [StripTrainOnly(), Scripted(body, "careless")]
    message = r"^careless \(after strip-train-only\): it changed a module in place, .*; replace the module$"
    with pytest.raises(InvariantError, match=message):
        run_passes(model(), passes, [feature_map()])


def test_weights_that_are_not_numbers_are_no_change_in_place() -> None:
    graph = model()
    graph.get_parameter("conv.weight").data[0] = NAN
    _, (record,) = run_passes(graph, [StripTrainOnly()], [feature_map()])
    assert not record.certified
    assert record.error_float64 == INF


def test_probes_are_needed() -> None:
    with pytest.raises(ValueError, match="at least one probe"):
        run_passes(model(), [StripTrainOnly()], [])


def test_every_probe_counts() -> None:
    even, odd = feature_map(), images(1, 8, 7, 9, seed=2, dtype=torch.float64)
    assert run(model(), Scripted(replace_pool), probes=[even])[1] == [True]
    assert run(model(), Scripted(replace_pool), probes=[even, odd])[1] == [False]
    assert run(model(), Scripted(replace_pool), probes=[odd, even])[1] == [False]


def test_passes_see_the_first_probe_s_sizes() -> None:
    seen: list[tuple[int, ...]] = []

    def look(graph: fx.GraphModule) -> PassResult:
        seen.extend(node.meta["shape"] for node in graph.graph.nodes if node.op == "placeholder")
        return PassResult(0)

    first, second = feature_map(), images(1, 8, 7, 9, seed=2, dtype=torch.float64)
    run(model(), Scripted(look), StripTrainOnly(), Scripted(look), probes=[first, second])
    assert seen == [tuple(first.shape)] * 2


def test_progress_is_told_by_name() -> None:
    told: list[str] = []
    run_passes(model(), [StripTrainOnly(), Scripted(scale_by(1.0))], [feature_map()], told.append)
    assert told == ["strip-train-only", "scripted"]


def test_all_passes_together_are_held_against_the_original() -> None:
    graph, whole = model(), images(1, 8, 20, 24, seed=3, dtype=torch.float64)
    result, records = run_passes(graph, [StripTrainOnly(), Scripted(scale_by(2.0))], [feature_map()], whole=whole)
    last = records[-1]
    assert (last.name, last.certified, last.rewrites) == (TOGETHER, True, 1)
    assert last.nodes == (g.nodes(graph), g.nodes(result))
    assert last.macs == (8 * 8 * 20 * 24,) * 2
    batch, _, height, width = feature_map().shape
    assert records[0].macs == (8 * 8 * batch * height * width,) * 2


def test_what_is_wrong_at_full_size_alone_is_an_error() -> None:
    whole = images(1, 8, 21, 25, seed=3, dtype=torch.float64)
    with pytest.raises(InvariantError, match=r"^all passes moved the outputs by .* at 21x25, .*--skip$"):
        run_passes(model(), [Scripted(replace_pool)], [feature_map()], whole=whole)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ([[1.0, NAN]], [[1.0, 2.0]]),
        ([[1.0, 2.0]], [[1.0, NAN]]),
        ([[NAN, NAN]], [[NAN, NAN]]),
        ([[1.0, INF]], [[1.0, 2.0]]),
        ([[1.0, 2.0]], [[1.0, INF]]),
        ([[1.0, INF]], [[1.0, INF]]),
        ([[1.0, -INF]], [[1.0, INF]]),
        ([[1.0, 2.0]], [[1.0, 2.0, 3.0]]),
        ([[1.0, 2.0]], [[1.0], [2.0]]),
        ([[1.0], [2.0]], [[1.0]]),
        ([[1.0]], [[1.0], [2.0]]),
        ([], []),
        ([[1.0], [NAN]], [[1.0], [1.0]]),
    ],
)
def test_what_can_t_be_compared_is_infinitely_far(actual: list[list[float]], expected: list[list[float]]) -> None:
    assert relative_error([torch.tensor(a) for a in actual], [torch.tensor(e) for e in expected]) == INF


def test_shapes_are_not_broadcast() -> None:
    assert relative_error([torch.ones(2, 1)], [torch.ones(2, 2)]) == INF


def test_relative_error_is_the_worst_output_s() -> None:
    one, other = torch.tensor([4.0, -8.0]), torch.tensor([0.001])
    assert relative_error([one + 2.0, other], [one, other]) == 0.25
    assert relative_error([one, other * 1.5], [one, other]) == pytest.approx(0.5)
    assert relative_error([one, other], [one, other]) == 0.0
    assert relative_error([torch.zeros(2)], [torch.zeros(2)]) == 0.0
    assert relative_error([torch.full((2,), 1e-30)], [torch.zeros(2)]) > 1.0
