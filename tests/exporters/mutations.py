"""What the tests of planted mistakes share: a model at every stage of the passes, and what being caught means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
from torch import Tensor, fx

from nextvit_exporters import graph as g
from nextvit_exporters.passes.base import FLOAT64_BOUND, Pass, relative_error, run_passes
from nextvit_exporters.passes.pack_key_value import PackKeyValue
from nextvit_exporters.passes.sets import ONNX_RUNTIME
from tests.exporters.passes_harness import RAW, make, pixels

Plant = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True, slots=True)
class Stages:
    """A model's graph as each pass of the target finds it, and the inputs it reads there."""

    before: dict[str, fx.GraphModule]
    passes: dict[str, Pass]
    inputs: Tensor
    expected: tuple[Tensor, ...]


@cache
def stages(name: str, side: int) -> Stages:
    model = make(name)
    inputs = pixels(2, 3, side, side + 2 * (side % 2), seed=1)
    graph = g.trace(model)
    expected = g.execute(graph, inputs)
    before: dict[str, fx.GraphModule] = {"pack-key-value": graph}
    passes: dict[str, Pass] = {each.name: each for each in (*ONNX_RUNTIME, RAW, PackKeyValue())}
    for each in (*ONNX_RUNTIME, RAW):
        before[each.name] = graph
        graph, (record,) = run_passes(graph, [each], [inputs])
        assert record.certified
    return Stages(before, passes, inputs, expected)


def assert_caught(model: str, pass_name: str, plant: Plant, *, side: int = 64, at: str | None = None) -> float:
    """The pass certifies as it is; with the mistake it is rolled back, and nothing has changed.

    ``at`` names another pass whose place in the order it is tried at.
    """
    known = stages(model, side)
    return assert_undone(known.before[at or pass_name], known.passes[pass_name], known.inputs, known.expected, plant)


def assert_undone(
    graph: fx.GraphModule, each: Pass, inputs: Tensor, expected: tuple[Tensor, ...], plant: Plant
) -> float:
    """With the mistake ``plant`` the pass is rolled back, and nothing has changed; returns the error."""
    held, code = g.fingerprint(graph), graph.code
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        result, (record,) = run_passes(graph, [each], [inputs])
    assert not record.certified, f"{record.error_float64:.1e}"
    assert record.rewrites > 0
    assert result.code == graph.code == code
    assert g.fingerprint(graph) == held
    assert relative_error(g.execute(result, inputs), expected) <= FLOAT64_BOUND
    return record.error_float64
