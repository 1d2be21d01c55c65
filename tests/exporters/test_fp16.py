"""The exact reference carries every constant of an FP16 file, those that stand beside no module too."""

from __future__ import annotations

import torch
from torch import nn

from nextvit_exporters import graph as g
from nextvit_exporters.precision.fp16 import round_constants
from tests.exporters.toys import Wired, feature_map
from tests.harness import randomise

SCALE = 24**-0.5


def test_a_number_that_a_tensor_is_multiplied_with_is_rounded_too() -> None:
    graph = g.trace(Wired(lambda _, x: x * SCALE).eval())
    image = feature_map().float()
    (found,) = g.execute(round_constants(graph), image)
    rounded = torch.tensor(SCALE).half().float()
    assert torch.equal(found, image * rounded)
    assert not torch.equal(found, image * SCALE)
    (before,) = g.execute(graph, image.double())
    assert torch.equal(before, image.double() * SCALE), "the graph itself is left as it was"


def test_what_a_module_holds_is_rounded_and_what_is_kept_is_not() -> None:
    model = randomise(Wired(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 8, 1)), seed=3)
    graph = g.trace(model)
    found = round_constants(graph, keep=("b",))
    for name, dtype in (("a", torch.float16), ("b", torch.float32)):
        whole = graph.get_parameter(f"{name}.weight")
        assert torch.equal(found.get_parameter(f"{name}.weight"), whole.to(dtype).float())
