"""What would overflow FP16 is found on images: that node, and whoever reads it."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.coreml.overflow import MOST, name_of, overflowing
from nextvit_exporters.passes.base import run_passes
from nextvit_exporters.passes.normalize_input import NormalizeInput
from nextvit_exporters.passes.sets import NEURAL_ENGINE
from nextvit_models.checkpoint import load_checkpoint
from nextvit_models.demo import DEMO_CHECKPOINT
from tests import harness
from tests.exporters.toys import Wired


def branching(model: Wired, x: Tensor) -> Tensor:
    """One branch is large, the sum behind it comes back down."""
    small = model.small(x)
    large = model.large(small)
    back = torch.tanh(large)
    out: Tensor = model.last(back + small)
    return out


def toy(factor: float, *, weight: float = 1.0) -> fx.GraphModule:
    """``branching`` on one channel: ``large`` multiplies by ``factor``, everything else by one."""
    layers = {name: nn.Conv2d(1, 1, 1, bias=False) for name in ("small", "large", "last")}
    for name, value in {"small": weight, "large": factor, "last": 1.0}.items():
        nn.init.constant_(layers[name].weight, value)
    return g.trace(Wired(branching, **layers).eval())


def ones(*values: float) -> Any:
    return np.stack([np.full((1, 4, 4), value, np.float32) for value in values])


def test_the_node_that_exceeds_and_its_readers() -> None:
    assert overflowing(toy(30000.0), ones(2.0)) == ("large", "tanh")


def test_nothing_where_nothing_exceeds() -> None:
    assert overflowing(toy(3.0), ones(2.0, -2.0)) == ()


BEYOND: Final = float(np.nextafter(np.float32(MOST), np.float32(np.inf)))


@pytest.mark.parametrize(("value", "kept"), [(MOST, ()), (-MOST, ()), (BEYOND, ("large", "tanh"))])
def test_the_bound_is_half_of_what_float16_holds(value: float, kept: tuple[str, ...]) -> None:
    assert float(np.finfo(np.float16).max) / 2 == MOST
    assert overflowing(toy(value), ones(1.0)) == kept


def test_one_image_of_many_is_enough() -> None:
    assert overflowing(toy(30000.0), ones(0.1, -2.0, 0.1)) == ("large", "tanh")


def test_a_constant_that_float16_cannot_hold_is_kept_whatever_the_image() -> None:
    found = overflowing(toy(1.0, weight=1e5), ones(1e-4))
    assert found == ("small", "large", "add")


def test_numbers_that_are_not_finite_are_kept() -> None:
    assert overflowing(toy(3e38), ones(1e3)) == ("large", "tanh")


def test_modules_are_named_once_and_operations_by_their_own_name() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.conv = nn.Conv2d(1, 1, 1, bias=False)
            nn.init.constant_(self.inner.conv.weight, 1e4)

        def forward(self, x: Tensor) -> Tensor:
            inner: Any = self.inner
            out: Tensor = inner.conv(torch.tanh(inner.conv(x) * 2))
            return out

    graph = g.trace(Shared().eval())
    assert overflowing(graph, ones(2.0, 5.0)) == ("inner.conv", "mul", "tanh")
    names = [name_of(node) for node in graph.graph.nodes if node.op.startswith("call")]
    assert names == ["inner.conv", "mul", "tanh", "inner.conv"]


def test_the_graph_is_left_as_it_is() -> None:
    graph = toy(30000.0)
    code, mark = graph.code, g.fingerprint(graph)
    overflowing(graph, ones(2.0))
    assert (graph.code, g.fingerprint(graph)) == (code, mark)


def test_the_demo_needs_nothing_kept() -> None:
    checkpoint = load_checkpoint(DEMO_CHECKPOINT)
    wanted = checkpoint.preprocessing
    image = harness.images(1, 3, 64, 64, seed=1, dtype=torch.float64)
    passes = (*NEURAL_ENGINE, NormalizeInput(wanted.mean, wanted.std, uint8=False))
    graph, _ = run_passes(g.trace(checkpoint.model), passes, [image])
    pixels = (harness.images(2, 3, 64, 64, seed=2) * 60 + 120).round().clamp(0, 255)
    assert overflowing(graph, pixels.numpy()) == ()
