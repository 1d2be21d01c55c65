"""What is to be seen at a parting, in one line: for whoever has to mend it."""

from __future__ import annotations

from typing import Final

import numpy as np

from nextvit_deploy.bisect.known import Node
from nextvit_deploy.bisect.match import apart, rms
from nextvit_deploy.bisect.places import Evidence, Place
from nextvit_exporters.executors.base import Array

_FEW: Final = 0.5
"""Share of the channels up to which those that are off are named."""


def told(evidence: Evidence, place: Place, end: str, wanted: Node | None, *, folded: bool) -> str:
    """How what comes out differs, or why nothing does; what is read from elsewhere than in PyTorch is told first.

    Where a norm in front is ``folded`` in, what is in front of that is rightly read.
    """
    traced, matches = evidence.traced, evidence.matches
    if end not in traced.values:
        return "it can't be executed" if traced.failure is None else str(traced.failure)
    if not np.isfinite(traced.values[end]).all():
        return "NaN or infinity comes out"
    if end in matches:
        return f"{place.step.operation} gives {_name(evidence, matches[end].nodes[0])}"
    elsewhere = "" if folded else _elsewhere(evidence, place)
    return elsewhere or ("" if wanted is None else _difference(traced.values[end], wanted.value))


def _elsewhere(evidence: Evidence, place: Place) -> str:
    """That an operation reads another tensor than PyTorch does, or that one in front of it is left out."""
    known, matches, step, node = evidence.known, evidence.matches, place.step, place.node
    own = [each for each in known.leaves(step.module) if each.name not in evidence.sound]
    meant = own[0] if own else node
    read = [name for name in evidence.traced.read(step) if name in matches]
    if meant is None or len(read) != len([name for name in meant.inputs if not known.nodes[name].given]):
        return ""
    given = [set(matches[name].nodes) for name in read]
    other = next((name for name in read if matches[name].nodes and not {*matches[name].nodes} & {*meant.inputs}), None)
    if other is None:
        return ""
    made = _name(evidence, matches[other].nodes[0])
    if own and node is not None and node != meant and place.module != step.module:
        return f"left out: {step.operation} reads {made} itself"
    missing = next((name for name in meant.inputs if not any(name in each for each in given)), None)
    if missing is None or known.nodes[missing].module == known.nodes[matches[other].nodes[0]].module:
        return ""
    return f"{step.operation} reads {made}, and PyTorch {_name(evidence, missing)}"


def _name(evidence: Evidence, name: str) -> str:
    node = evidence.known.nodes[name]
    if node.given:
        return "the input"
    return f"what {node.module} gives" if node.leaf else f"{node.kind} of {node.module or 'the model'}"


def _difference(got: Array, wanted: Array) -> str:
    """By what factor, or in which channels, numbers differ; empty where neither says it."""
    flat, right = (each.reshape(-1).astype(np.float64) for each in (got, wanted))
    if flat.size != right.size or not np.isfinite(flat).all() or not rms(wanted):
        return ""
    factor = float(flat @ right / (right @ right))
    if abs(factor) > 1e-6 and apart(flat / factor, right) < 1e-2 * apart(flat, right):
        return f"{factor:.4g} times what PyTorch gives"
    if np.array_equal(np.maximum(flat, 0), right) or np.array_equal(flat, np.maximum(right, 0)):
        return "negative numbers are kept on one side, and not on the other"
    return _channels(got, flat - right)


def _channels(got: Array, difference: Array) -> str:
    axis = 2 if got.ndim == 5 else got.ndim - 1
    if axis < 1 or got.shape[axis] < 2:
        return ""
    by_channel = np.moveaxis(np.abs(difference.reshape(got.shape)), axis, 0).reshape(got.shape[axis], -1).max(1)
    off = np.flatnonzero(by_channel > 1e-3 * by_channel.max())
    if len(off) > _FEW * len(by_channel):
        return ""
    listed = ", ".join(map(str, off[:4])) + (", ..." if len(off) > 4 else "")
    return f"{len(off)} of {len(by_channel)} channels differ: {listed}"
