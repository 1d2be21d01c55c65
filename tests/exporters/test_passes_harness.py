"""The harness itself: a pass that breaks one promise fails ``check_pass``."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from nextvit_exporters.errors import InvariantError
from nextvit_exporters.passes.base import PassResult, Refusal, Rewrite
from nextvit_exporters.passes.strip_train_only import StripTrainOnly
from tests.exporters.passes_harness import check_pass
from tests.exporters.toys import Wired, feature_map, wired

Body = Callable[[fx.GraphModule], PassResult]


class Broken(Rewrite):
    name = "broken"

    def __init__(self, body: Body) -> None:
        self.body = body

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        return self.body(graph)


def model() -> Wired:
    return wired(lambda m, x: m.drop(m.conv(x)), conv=nn.Conv2d(8, 8, 1), drop=nn.Dropout(0.5))


def double(graph: fx.GraphModule) -> PassResult:
    """Moves the outputs."""
    conv = graph.get_submodule("conv")
    assert isinstance(conv, nn.Conv2d)
    larger = nn.Conv2d(8, 8, 1).double().eval()
    larger.weight, larger.bias = nn.Parameter(conv.weight.detach() * 2.0), conv.bias
    graph.set_submodule("conv", larger)
    return PassResult(1)


def in_place(graph: fx.GraphModule) -> PassResult:
    with torch.no_grad():
        graph.get_parameter("conv.weight").mul_(2.0)
    return PassResult(1)


def add_zero(graph: fx.GraphModule) -> PassResult:
    """Sound, but never done."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    (result,) = output.all_input_nodes
    with graph.graph.inserting_before(output):
        output.replace_input_with(result, graph.graph.call_function(operator.add, (result, 0.0)))
    return PassResult(1)


def single(graph: fx.GraphModule) -> PassResult:
    """Leaves float64."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    (result,) = output.all_input_nodes
    with graph.graph.inserting_before(output):
        rounded = graph.graph.call_method("float", (result,))
        output.replace_input_with(result, graph.graph.call_method("double", (rounded,)))
    return PassResult(1)


@pytest.mark.parametrize(
    ("body", "error", "nodes"),
    [
        (double, AssertionError, 0),
        (in_place, InvariantError, 0),
        (add_zero, AssertionError, 1),
        (single, AssertionError, 2),
        (lambda graph: PassResult(2), AssertionError, 0),  # noqa: ARG005 - the parameter is the contract's
        (lambda graph: PassResult(1, (Refusal("conv", "no"),)), AssertionError, 0),  # noqa: ARG005 - as above
    ],
    ids=["outputs", "in place", "never done", "rounds", "counts", "refuses unasked"],
)
def test_a_broken_promise_is_seen(body: Body, error: type[Exception], nodes: int) -> None:
    with pytest.raises(error):
        check_pass(model(), (), Broken(body), rewrites=1, nodes=nodes, inputs=feature_map())


@pytest.mark.parametrize(("rewrites", "nodes"), [(2, -1), (1, -2), (0, 0)])
def test_a_wrong_expectation_is_seen(rewrites: int, nodes: int) -> None:
    with pytest.raises(AssertionError):
        check_pass(model(), (), StripTrainOnly(), rewrites=rewrites, nodes=nodes, inputs=feature_map())
    check_pass(model(), (), StripTrainOnly(), rewrites=1, nodes=-1, inputs=feature_map())
