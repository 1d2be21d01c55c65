"""Weights rounded group by group against the products that their own group reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.errors import InvariantError
from nextvit_exporters.quantize.codes import codes
from nextvit_exporters.quantize.gptq import feedback_codes
from nextvit_exporters.quantize.observe import Observer
from nextvit_exporters.quantize.placement import Placement, placement
from nextvit_exporters.quantize.weights import nearest_codes, weight_of, weight_steps
from tests.harness import images, randomise


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4, bias=False), nn.Flatten()
    )
    return g.trace(randomise(nn.Sequential(layers, nn.Linear(12 * 36, 4)), seed=1))


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return images(6, 3, 8, 8, seed=2, dtype=torch.float64)


@pytest.fixture(scope="module")
def observer(graph: fx.GraphModule, inputs: Tensor) -> Observer:
    result = Observer(graph, placement(graph), grams=True, dtype=torch.float64)
    result.see(inputs)
    return result


def test_each_group_is_rounded_against_its_own_products(graph: fx.GraphModule, observer: Observer) -> None:
    said: list[str] = []
    found = codes(graph, placement(graph), observer.grams(), "fp16", said.append)
    assert {name: each.shape for name, each in found.items()} == {"0.0": (8, 3, 3, 3), "0.2": (12, 2, 3, 3)}
    weight = graph.get_submodule("0.2").get_parameter("weight").detach().numpy().reshape(12, -1)
    steps = weight_steps(weight, "fp16")
    for group in range(4):
        own = slice(3 * group, 3 * group + 3)
        expected = feedback_codes(weight[own], steps[own], observer.grams()["0.2"][group])
        np.testing.assert_array_equal(found["0.2"][own].reshape(3, -1), expected)
    assert said == ["round weights, 0 of 2 maps", "round weights, 1 of 2 maps"]


def test_outputs_move_less_than_with_the_nearest(graph: fx.GraphModule, observer: Observer, inputs: Tensor) -> None:
    found = codes(graph, placement(graph), observer.grams(), "fp32")["0.0"]
    conv = graph.get_submodule("0.0")
    weight = conv.get_parameter("weight").detach().numpy()
    rows = weight.reshape(8, -1)
    steps = weight_steps(rows, "fp32")
    errors = []
    for whole in (found.reshape(8, -1), nearest_codes(rows, steps)):
        difference = torch.from_numpy(weight_of(whole, steps).reshape(weight.shape) - weight)
        errors.append(float(torch.nn.functional.conv2d(inputs, difference, padding=1).square().mean()))
    assert errors[0] < 0.7 * errors[1]


def test_products_that_are_missing_or_of_another_map_are_refused(graph: fx.GraphModule, observer: Observer) -> None:
    grams, placed = observer.grams(), placement(graph)
    for wrong in ({}, {"0.0": grams["0.2"]}, {"0.0": np.repeat(grams["0.0"], 3, 0)}):
        with pytest.raises(InvariantError, match=r"0\.0 was not calibrated for rounding with feedback"):
            codes(graph, placed, wrong, "fp16")
    with pytest.raises(InvariantError, match=r"0\.1 is a ReLU"):
        codes(graph, Placement({"0.1": "x"}), grams, "fp16")
