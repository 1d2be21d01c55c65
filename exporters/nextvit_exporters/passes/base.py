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
TOGETHER: Final = "all passes"
"""Name of the record that certifies all passes as one."""
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
    whole: Tensor | None = None,
    *,
    consume: bool = False,
) -> tuple[fx.GraphModule, tuple[PassRecord, ...]]:
    """Apply ``passes`` in order, each certified on ``probes``, and return the graph and the certified table.

    ``probes`` are float64 inputs, (B, 3, H, W) each; the first one's sizes are what passes see as node shapes. With
    ``whole``, one more input, a last record holds all kept passes together, certified on it. Work is counted at the
    sizes a record was certified on. The caller's graph is not touched, unless ``consume`` says that it may be
    emptied, so that its weights go as passes replace them. Raises InvariantError when a pass's precondition is not
    met or it changed a module in place, naming the pass and those before it, and when all passes together are not
    certified; ValueError without probes.
    """
    if not probes:
        msg = "certifying needs at least one probe"
        raise ValueError(msg)
    start = None if whole is None else _State.of(g.clone(graph), (whole,))
    state = _State.of(g.clone(graph), tuple(probes))
    if start:
        g.release(start.graph)
    if consume:
        g.release(graph)
    records: list[PassRecord] = []
    for each in passes:
        if on_pass:
            on_pass(each.name)
        after, record = _hold_to_contract(state, each, records)
        records.append(record)
        state = _keep(state, after, record)
    if start:
        records.append(_certify_together(start, state, passes, records))
    return state.graph, tuple(records)


def _hold_to_contract(state: _State, each: Pass, records: Sequence[PassRecord]) -> tuple[_State, PassRecord]:
    """Certify a pass whose precondition is met and that leaves the modules of other graphs alone."""
    if reason := each.requires(state.graph):
        raise _broken(each, records, reason)
    held = g.fingerprint(state.graph)
    certified = _certify(state, each)
    if g.fingerprint(state.graph) != held:
        raise _broken(each, records, "it changed a module in place, which other graphs share; replace the module")
    return certified


def _broken(each: Pass, records: Sequence[PassRecord], reason: str) -> InvariantError:
    history = ", ".join(r.name for r in records) or "nothing"
    return InvariantError(f"{each.name} (after {history}): {reason}")


@dataclass(frozen=True, slots=True)
class _Size:
    """How large a graph is; multiply-accumulates are those of its first input."""

    nodes: int
    parameters: int
    macs: int


@dataclass(frozen=True, slots=True)
class _State:
    """A graph with what is known of it: its inputs, its outputs on them, and its size."""

    graph: fx.GraphModule
    inputs: tuple[Tensor, ...]
    outputs: tuple[tuple[Tensor, ...], ...]
    size: _Size

    @classmethod
    def of(cls, graph: fx.GraphModule, inputs: tuple[Tensor, ...]) -> _State:
        """Execute ``graph``; the first input comes last, so its sizes are the ones left on the nodes."""
        outputs = tuple(g.measure(graph, x) for x in reversed(inputs))[::-1]
        return cls(graph, inputs, outputs, _Size(g.nodes(graph), g.parameters(graph), g.count_macs(graph)))


def _certify(before: _State, each: Pass) -> tuple[_State, PassRecord]:
    """Apply one pass to a copy of ``before`` and measure what it did."""
    start = time.perf_counter()
    candidate = g.clone(before.graph)
    result = each(candidate)
    g.finish(candidate)
    after, error64, error32 = before, 0.0, 0.0
    if result.rewrites:
        inputs = tuple(each.adapt(x) for x in before.inputs)
        after = _State.of(candidate, inputs)
        error64 = max(relative_error(a, b) for a, b in zip(after.outputs, before.outputs, strict=True))
        error32 = _float32_error(candidate, inputs[0], before.outputs[0])
    seconds = time.perf_counter() - start
    return after, _record(each.name, result, (before.size, after.size), (error64, error32), seconds)


def _keep(before: _State, after: _State, record: PassRecord) -> _State:
    """The state to go on with; the other one's graph is let go."""
    if after is before:
        return before
    kept, gone = (after, before) if record.certified else (before, after)
    g.release(gone.graph)
    return kept


def _certify_together(
    before: _State, state: _State, passes: Sequence[Pass], records: Sequence[PassRecord]
) -> PassRecord:
    """The last line of the table: all kept passes as one, on the input of ``before``."""
    start = time.perf_counter()
    (whole,) = before.inputs
    for each, kept in zip(passes, records, strict=True):
        if kept.certified and kept.rewrites:
            whole = each.adapt(whole)
    after = _State.of(state.graph, (whole,))
    error64 = relative_error(after.outputs[0], before.outputs[0])
    error32 = _float32_error(state.graph, whole, before.outputs[0])
    rewrites = PassResult(sum(kept.rewrites for kept in records if kept.certified))
    seconds = time.perf_counter() - start
    record = _record(TOGETHER, rewrites, (before.size, after.size), (error64, error32), seconds)
    if not record.certified:
        size = "x".join(map(str, whole.shape[2:]))
        msg = (
            f"{TOGETHER} moved the outputs by {max(error64, error32):.1e} at {size}, though each alone did not on "
            "smaller inputs; find the one with --skip"
        )
        raise InvariantError(msg)
    return record


def _record(
    name: str, result: PassResult, sizes: tuple[_Size, _Size], errors: tuple[float, float], seconds: float
) -> PassRecord:
    before, after = sizes
    return PassRecord(
        name=name,
        certified=errors[0] <= FLOAT64_BOUND and errors[1] <= FLOAT32_BOUND,
        rewrites=result.rewrites,
        refused=result.refused,
        nodes=(before.nodes, after.nodes),
        parameters=(before.parameters, after.parameters),
        macs=(before.macs, after.macs),
        error_float64=errors[0],
        error_float32=errors[1],
        seconds=seconds,
    )


def _float32_error(graph: fx.GraphModule, inputs: Tensor, expected: Sequence[Tensor]) -> float:
    """The error of the graph in float32 against outputs that were computed in float64."""
    single = g.cast(graph, torch.float32)
    inputs = inputs.float() if inputs.is_floating_point() else inputs
    error = relative_error(g.execute(single, inputs), expected)
    g.release(single)
    return error
