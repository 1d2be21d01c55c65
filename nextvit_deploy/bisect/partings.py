"""Where an artefact and PyTorch part: what goes in agrees, what comes out doesn't, and the tensors around that."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from nextvit_deploy.bisect.cut import Cut
from nextvit_deploy.bisect.known import Node
from nextvit_deploy.bisect.match import apart
from nextvit_deploy.bisect.places import Evidence, Place, places
from nextvit_deploy.bisect.record import Parting
from nextvit_deploy.bisect.seen import told
from nextvit_deploy.bisect.traced import Traced
from nextvit_exporters.executors.base import Array, Step

_FAR: Final = 12
"""Tensors behind a parting among which the first that PyTorch has too is looked for."""
_NORM: Final = "BatchNorm"


def partings(evidence: Evidence, tolerance: float, *, named: bool) -> tuple[Cut, ...]:
    """Every parting that none is in front of, in the order of execution, with the tensors around it.

    The evidence's matches hold within ``tolerance``; ``named`` says that operations bear the names of the model's own
    layers.
    """
    if not evidence.unexplained:
        return ()
    cuts: dict[str, Cut] = {}
    for place in places(evidence, tolerance):
        cut = _cut(evidence, place, named=named)
        cuts.setdefault(cut.parting.module, cut)
    return tuple(cuts.values())


def _cut(evidence: Evidence, place: Place, *, named: bool) -> Cut:
    traced, known = evidence.traced, evidence.known
    end, wanted = _first_difference(evidence, place)
    steps = _between(evidence, place.step, end)
    inner = {name for step in steps for name in step.outputs}
    read = dict.fromkeys(name for step in steps for name in traced.read(step) if name not in inner)
    run = _furthest_off(traced, end, wanted)
    inputs = {name: _stored(traced, name, traced.values[name][run]) for name in read if name in traced.values}
    got = {end: _stored(traced, end, traced.values[end][run])} if end in traced.values else {}
    expected: dict[str, Array] = {}
    error = math.inf
    if wanted is not None:
        fits = end in traced.values and traced.values[end].size == wanted.value.size
        shape = traced.values[end].shape[1:] if fits else wanted.value.shape[1:]
        expected = {end: _stored(traced, end, wanted.value[run].reshape(shape))}
    if wanted is not None and end in traced.values:
        error = apart(traced.values[end], wanted.value)
    module, carries = place.module, known.carried.get(place.module, ())
    folded = not named and _is_folded(place.node, wanted)
    if folded:
        assert wanted is not None  # noqa: S101 - or it would not be folded
        module, carries = wanted.module, (place.module,)
    parting = Parting(
        module=module,
        operations=tuple(step.operation for step in steps),
        kind=place.step.kind,
        error=error,
        input_error=max((evidence.matches[name].error for name in inputs if name in evidence.matches), default=0.0),
        carries=carries,
        why=told(evidence, Place(place.step, place.node, module), end, wanted, folded=folded),
    )
    return Cut(parting, inputs, expected, got, parting.operations)


def _furthest_off(traced: Traced, end: str, wanted: Node | None) -> int:
    """The run whose images show the difference most: another's may hide it, as behind a ReLU that gives zero.

    Where a number is none that is a run with such a number, else one whose error is a number too: it is no smaller than
    that of all runs together.
    """
    values = traced.values.get(end)
    if values is None or wanted is None or values.size != wanted.value.size or len(values) != len(wanted.value):
        return 0
    errors = [apart(*each) for each in zip(values, wanted.value, strict=True)]
    broken = [at for at, each in enumerate(values) if not np.isfinite(each).all()]
    finite = [at for at, error in enumerate(errors) if math.isfinite(error)]
    return max(broken or finite or range(len(errors)), key=lambda at: errors[at])


def _is_folded(node: Node | None, wanted: Node | None) -> bool:
    """Whether a norm was folded into the layer behind it, whose numbers are the nearest."""
    return node is not None and node.kind.startswith(_NORM) and wanted is not None and wanted.leaf and wanted != node


def _first_difference(evidence: Evidence, place: Place) -> tuple[str, Node | None]:
    """The first tensor behind a parting that PyTorch has one of the same size for, and that one."""
    traced, known = evidence.traced, evidence.known
    meant = list(known.leaves(place.step.module))
    if place.node is not None:
        meant += [place.node, *known.behind(place.node.name, _FAR)]
    queue = [name for name in place.step.outputs if name not in evidence.agreed] or list(place.step.outputs[:1])
    first, seen = queue[0], set(queue)
    while queue:
        name = queue.pop(0)
        if name not in traced.values:
            return first, next(iter(meant), None)
        values, kind = traced.values[name], traced.makers[name].kind.lower()
        there = meant
        if kind.startswith("dequantize") and place.node is not None:  # of a tensor that PyTorch reads as it is
            there = [*meant, *(known.nodes[each] for each in place.node.inputs)]
        fits = [(apart(values, each.value), at) for at, each in enumerate(there) if each.value.size == values.size]
        if fits and not kind.startswith("quantize"):
            return name, there[min(fits)[1]]
        for reader in traced.readers.get(name, ()) if len(seen) < _FAR else ():
            fresh = [each for each in reader.outputs if each not in seen]
            seen.update(fresh)
            queue += fresh
    return first, None


def _between(evidence: Evidence, start: Step, end: str) -> tuple[Step, ...]:
    """The operations from the last agreement to ``end``, in order."""
    traced = evidence.traced
    wanted, queue = {start.operation}, [end]
    while queue:
        step = traced.makers.get(queue.pop())
        if step is None or step.operation in wanted:
            continue
        wanted.add(step.operation)
        queue += [name for name in traced.read(step) if name not in evidence.agreed]
    return tuple(step for step in traced.steps if step.operation in wanted)


def _stored(traced: Traced, name: str, values: Array) -> Array:
    """Numbers in the type that the artefact stores the tensor in."""
    kind = traced.stored(name)
    if values.dtype.kind == "f" and kind in (np.int8, np.uint8):
        limits = np.iinfo(np.int8 if kind == np.int8 else np.uint8)
        return np.clip(np.rint(values), limits.min, limits.max).astype(kind)
    with np.errstate(over="ignore"):
        return values.astype(kind)
