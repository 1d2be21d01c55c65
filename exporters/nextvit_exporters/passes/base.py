"""The contract of a pass, and the runner that certifies each one.

A pass rewrites a graph so that its outputs stay what they were. The runner applies it to a copy, executes graph
and copy on the same inputs, and keeps the copy only when the outputs agree: in float64, where sound algebra
leaves about 1e-15 and the mildest mistake (one BatchNorm's eps) leaves 1e-4, and in float32, the arithmetic of
the artefact. A pass that moves the outputs is rolled back and reported; the graph before it goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor, fx

from nextvit_exporters import graph as g
from nextvit_exporters.errors import InvariantError

FLOAT64_BOUND: Final = 1e-12
"""Largest max|difference| / max|output| of a certified pass in float64; sound passes measure below 2e-14."""
FLOAT32_BOUND: Final = 1e-4
"""The same in float32 against the float64 original; float32 alone costs up to about 1e-5 on a full-size model."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A place that looked like a match and was left alone, and why."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class PassResult:
    """What one pass did: how many rewrites, and which near-matches it refused."""

    rewrites: int
    refused: tuple[Refusal, ...] = ()


class Pass(Protocol):
    """A rewrite. Its docstring holds the algebra, before, after, and when it does not apply."""

    @property
    def name(self) -> str:
        """Kebab-case, as it appears in tables, logs and manifests."""
        ...

    def requires(self, graph: fx.GraphModule) -> str | None:
        """Why this graph may not be handed to the pass, or None when it may."""
        ...

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Rewrite ``graph`` in place, replacing modules and never changing one.

        Node shapes are in ``node.meta`` (see ``graph.measure``). Running it again rewrites nothing.
        """
        ...

    def adapt(self, inputs: Tensor) -> Tensor:
        """The inputs that the rewritten graph wants in place of ``inputs``; most passes return them as is."""
        ...


class Rewrite:
    """Defaults shared by passes: no precondition, and the same inputs as before."""

    def requires(self, graph: fx.GraphModule) -> str | None:
        """Nothing is required."""
        del graph
        return None

    def adapt(self, inputs: Tensor) -> Tensor:
        """The inputs stay what they were."""
        return inputs


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One line of the certified table. Pairs are (before, after)."""

    name: str
    certified: bool
    rewrites: int
    refused: tuple[Refusal, ...]
    nodes: tuple[int, int]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    error_float64: float
    error_float32: float
    seconds: float


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Worst max|actual - expected| / max|expected| over the outputs; infinite when they can't be compared."""
    if len(actual) != len(expected) or not expected:
        return float("inf")
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape or not bool(torch.isfinite(a).all() and torch.isfinite(e).all()):
            return float("inf")
        scale = e.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        worst = max(worst, ((a.double() - e.double()).abs().max() / scale).item())
    return worst


def run_passes(
    graph: fx.GraphModule,
    passes: Sequence[Pass],
    probes: Sequence[Tensor],
    on_pass: Callable[[str], None] | None = None,
) -> tuple[fx.GraphModule, tuple[PassRecord, ...]]:
    """Apply ``passes`` in order, each certified on ``probes``, and return the graph and the certified table.

    ``probes`` are float64 inputs, (B, 3, H, W) each; the first one's sizes are what passes see as node shapes.
    The caller's graph is not touched. Raises InvariantError, naming the pass and those before it, when a pass's
    precondition is not met or it changed a module in place, and ValueError without probes.
    """
    if not probes:
        msg = "certifying needs at least one probe"
        raise ValueError(msg)
    current, inputs = g.clone(graph), list(probes)
    measured = [g.measure(current, x) for x in reversed(inputs)][::-1]
    records: list[PassRecord] = []
    for each in passes:
        if on_pass:
            on_pass(each.name)
        if reason := each.requires(current):
            raise _broken(each, records, reason)
        held = g.fingerprint(current)
        candidate, adapted, after, record = _certify(current, each, inputs, measured)
        if g.fingerprint(current) != held:
            raise _broken(each, records, "it changed a module in place, which other graphs share; replace the module")
        records.append(record)
        if record.certified and record.rewrites:
            current, inputs, measured = candidate, adapted, after
    return current, tuple(records)


def _broken(each: Pass, records: Sequence[PassRecord], reason: str) -> InvariantError:
    history = ", ".join(r.name for r in records) or "nothing"
    return InvariantError(f"{each.name} (after {history}): {reason}")


def _certify(
    before: fx.GraphModule, each: Pass, inputs: list[Tensor], measured: list[g.Measured]
) -> tuple[fx.GraphModule, list[Tensor], list[g.Measured], PassRecord]:
    """Apply one pass to a copy of ``before`` and measure what it did."""
    start = time.perf_counter()
    candidate = g.clone(before)
    result = each(candidate)
    g.finish(candidate)
    if result.rewrites == 0:
        adapted, after, error64, error32 = inputs, measured, 0.0, 0.0
    else:
        adapted = [each.adapt(x) for x in inputs]
        after = [g.measure(candidate, x) for x in reversed(adapted)][::-1]
        error64 = max(relative_error(a.outputs, b.outputs) for a, b in zip(after, measured, strict=True))
        error32 = _float32_error(candidate, adapted[0], measured[0])
    record = PassRecord(
        name=each.name,
        certified=error64 <= FLOAT64_BOUND and error32 <= FLOAT32_BOUND,
        rewrites=result.rewrites,
        refused=result.refused,
        nodes=(g.nodes(before), g.nodes(candidate)),
        parameters=(g.parameters(before), g.parameters(candidate)),
        macs=(measured[0].macs, after[0].macs),
        error_float64=error64,
        error_float32=error32,
        seconds=time.perf_counter() - start,
    )
    return candidate, adapted, after, record


def _float32_error(graph: fx.GraphModule, inputs: Tensor, expected: g.Measured) -> float:
    single = g.cast(graph, torch.float32)
    inputs = inputs.float() if inputs.is_floating_point() else inputs
    return relative_error(g.execute(single, inputs), expected.outputs)
