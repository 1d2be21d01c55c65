"""What is to be seen at a parting, in one line: for whoever has to mend it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from nextvit_deploy.bisect.known import Known, Node
from nextvit_deploy.bisect.match import Match, apart, rms
from nextvit_deploy.bisect.traced import Traced
from nextvit_exporters.executors.base import Array, Step

_FEW: Final = 0.5
"""Share of the channels up to which those that are off are named."""


def told(
    step: Step,
    node: Node | None,
    module: str,
    end: str,
    wanted: Node | None,
    traced: Traced,
    known: Known,
    matches: Mapping[str, Match],
) -> str:
    """How what comes out differs, or why nothing does; what is read from elsewhere than in PyTorch is told first."""
    if end not in traced.values:
        return "it can't be executed" if traced.failure is None else str(traced.failure)
    if not np.isfinite(traced.values[end]).all():
        return "NaN or infinity comes out"
    read = [name for name in traced.read(step) if name in matches]
    if elsewhere := _elsewhere(step, node, module, read, known, matches):
        return elsewhere
    return "" if wanted is None else _difference(traced.values[end], wanted.value)


def _elsewhere(
    step: Step, node: Node | None, module: str, read: list[str], known: Known, matches: Mapping[str, Match]
) -> str:
    """That an operation reads another tensor than PyTorch does, or that one in front of it is left out."""
    own = known.leaves(step.module)
    meant = own[0] if own else node
    if meant is None or len(read) != len([name for name in meant.inputs if not known.nodes[name].given]):
        return ""
    for name in read:
        if not set(matches[name].nodes).intersection(meant.inputs):
            made = _name(known, matches[name].nodes[0])
            if own and node is not None and module == node.module != step.module:
                return f"left out: {step.operation} reads {made} itself"
            return f"{step.operation} reads {made}, and PyTorch {_name(known, meant.inputs[0])}"
    return ""


def _name(known: Known, name: str) -> str:
    node = known.nodes[name]
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
