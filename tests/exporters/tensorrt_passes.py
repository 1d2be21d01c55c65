"""The passes that only TensorRT's lists hold: models on their way through the list, and what being caught means."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from torch import Tensor, fx

from nextvit_exporters import graph as g
from nextvit_exporters.passes.base import FLOAT64_BOUND, Pass, PassRecord, relative_error, run_passes
from nextvit_exporters.passes.sets import FEWEST_KERNELS
from tests.exporters.mutations import Plant, assert_undone
from tests.exporters.passes_harness import make, pixels


@dataclass(frozen=True, slots=True)
class OnItsWay:
    """A model's graph as each pass of FEWEST_KERNELS finds it, and the line of the table that the pass made."""

    before: dict[str, fx.GraphModule]
    passes: dict[str, Pass]
    records: dict[str, PassRecord]
    inputs: Tensor
    expected: tuple[Tensor, ...]

    def counts(self, name: str) -> tuple[int, tuple[str, ...]]:
        """Rewrites of one pass, and the places it refused."""
        record = self.records[name]
        assert record.certified, record
        return record.rewrites, tuple(refusal.where for refusal in record.refused)


@cache
def on_its_way(name: str, height: int = 64, width: int = 64) -> OnItsWay:
    """One of ``passes_harness.MODELS`` through FEWEST_KERNELS, each pass certified; once per process."""
    model = make(name)
    inputs = pixels(2, 3, height, width, seed=1)
    graph = g.trace(model)
    expected = g.execute(graph, inputs)
    before, records = {}, {}
    for each in FEWEST_KERNELS:
        before[each.name] = graph
        graph, (records[each.name],) = run_passes(graph, [each], [inputs])
    assert relative_error(g.execute(graph, inputs), expected) <= FLOAT64_BOUND
    return OnItsWay(before, {each.name: each for each in FEWEST_KERNELS}, records, inputs, expected)


def assert_rolled_back(pass_name: str, plant: Plant, size: tuple[int, int] = (64, 64)) -> float:
    """With the mistake the pass is rolled back on nano, and nothing has changed; returns the error."""
    known = on_its_way("nano", *size)
    return assert_undone(known.before[pass_name], known.passes[pass_name], known.inputs, known.expected, plant)
