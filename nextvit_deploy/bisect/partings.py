"""Where an artefact and PyTorch part: what goes in agrees, what comes out doesn't, and nothing behind it agrees again.

A tensor without a counterpart is no parting where something computed from it has one: an artefact may do in two
operations what PyTorch does in one, and the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nextvit_deploy.bisect.cut import Cut
from nextvit_deploy.bisect.depth import OTHERS, by_name
from nextvit_deploy.bisect.known import Known, Node
from nextvit_deploy.bisect.match import Match, apart
from nextvit_deploy.bisect.record import Parting
from nextvit_deploy.bisect.seen import told
from nextvit_deploy.bisect.traced import Traced
from nextvit_exporters.executors.base import Array, Step

_FAR = 12
"""Tensors behind a parting among which the first that PyTorch has too is looked for."""


@dataclass(frozen=True, slots=True)
class _Place:
    """An operation behind which nothing agrees, what PyTorch has there, and the module to blame."""

    step: Step
    node: Node | None
    module: str


def partings(traced: Traced, known: Known, matches: Mapping[str, Match], *, named: bool) -> tuple[Cut, ...]:
    """Every parting that none is in front of, in the order of execution, with the tensors around it.

    Where the artefact's operations are ``named`` as the model's layers are, a layer that is off is one even if nothing
    of it is left further on: behind it stands an activation that is zero on these images, as likely as not.
    """
    sound, agreed = _sound_nodes(known, matches), _agreed(traced, matches)
    matched = {name for found in matches.values() for name in found.nodes}
    for node in known.nodes.values() if named else ():
        if node.leaf and node.name not in matched and (tensor := by_name(node, traced, matches)):
            sound.discard(node.name)
            agreed.discard(tensor)
    if len(sound) == len(known.nodes) and traced.failure is None:
        return ()
    cuts: dict[str, Cut] = {}
    for place in _places(traced, known, matches, sound, agreed):
        if place.module not in cuts:
            cuts[place.module] = _cut(place, traced, known, matches, agreed)
    return tuple(cuts.values())


def _sound_nodes(known: Known, matches: Mapping[str, Match]) -> set[str]:
    """Nodes that the artefact has too, or without which it could not have what is computed from them."""
    sound = {name for found in matches.values() for name in found.nodes}
    for node in reversed(list(known.nodes.values())):
        if node.given or not sound.isdisjoint(known.readers.get(node.name, ())):
            sound.add(node.name)
    return sound


def _agreed(traced: Traced, matches: Mapping[str, Match]) -> set[str]:
    """The same of the artefact's tensors; whole numbers agree where all that they are computed from does."""
    agreed = set(matches) | set(traced.given)
    for step in reversed(traced.steps):
        for name in step.outputs:
            after = (each for reader in traced.readers.get(name, ()) for each in reader.outputs)
            if name in traced.values and any(_is_real(traced, each) and each in agreed for each in after):
                agreed.add(name)
    for step in traced.steps:
        if agreed.issuperset(traced.read(step)):
            agreed |= {name for name in step.outputs if name in traced.values and not _is_real(traced, name)}
    return agreed


def _is_real(traced: Traced, name: str) -> bool:
    return name in traced.values and traced.values[name].dtype.kind == "f"


def _places(
    traced: Traced, known: Known, matches: Mapping[str, Match], sound: set[str], agreed: set[str]
) -> list[_Place]:
    front = [n for n in known.nodes.values() if n.name not in sound and sound.issuperset(n.inputs)]
    places = list[_Place]()
    for step in traced.steps:
        read = traced.read(step)
        if not read or not agreed.issuperset(read) or agreed.issuperset(step.outputs):
            continue
        node = _counterpart(step, read, front, matches)
        if node is not None or not places:
            places.append(_place(step, node, traced, known, matches, sound))
    lost = next((step for step in traced.steps if not traced.values.keys() >= set(step.outputs)), None)
    if places or lost is None or traced.failure is None:
        return places
    # nothing that depends on the input leads to it: what reads it was lost with it
    node = next((each for each in front if each.module == lost.module), front[0] if front else None)
    return [_Place(lost, node, _blamed(lost, node, known, sound))]


def _place(
    step: Step, node: Node | None, traced: Traced, known: Known, matches: Mapping[str, Match], sound: set[str]
) -> _Place:
    """The place; at an operation in front that changes nothing, where PyTorch has there what the artefact lacks."""
    blamed = _blamed(step, node, known, sound)
    if node is None or node.leaf or blamed == step.module:
        return _Place(step, node, blamed)
    idle = _idle(step, traced, matches)
    return _Place(step, node, idle.module if idle is not None and idle.module in known.modules else blamed)


def _idle(step: Step, traced: Traced, matches: Mapping[str, Match]) -> Step | None:
    """What gives an operation the numbers that it read itself, as a transposition of nothing does."""
    queue = list(traced.read(step))
    while queue:
        name = queue.pop(0)
        maker = traced.makers.get(name)
        if maker is None:
            continue
        read = traced.read(maker)
        if maker.kind in OTHERS:
            queue += read
        elif name in matches and any(each in matches and matches[each].nodes == matches[name].nodes for each in read):
            return maker
    return None


def _counterpart(step: Step, read: tuple[str, ...], front: list[Node], matches: Mapping[str, Match]) -> Node | None:
    """Which of the first nodes that the artefact lacks an operation should have given."""
    own = [node for node in front if node.leaf and node.module == step.module]
    if own:
        return own[0]
    given = {name for tensor in read if tensor in matches for name in matches[tensor].nodes}
    shared = [(len(given.intersection(node.inputs)), -at) for at, node in enumerate(front)]
    if shared and max(shared)[0]:
        return front[-max(shared)[1]]
    return next((node for node in front if node.module == step.module), front[0] if front else None)


def _blamed(step: Step, node: Node | None, known: Known, sound: set[str]) -> str:
    """The module that an operation should have computed: its own, or one in front that the artefact leaves out."""
    own = step.module if step.module in known.modules else ""
    if node is None or not own or own == node.module:
        return own or ("" if node is None else node.module)
    leaves = known.leaves(own)
    if leaves:
        return own if all(each.name in sound for each in leaves) else node.module
    return node.module if node.leaf else own


def _cut(place: _Place, traced: Traced, known: Known, matches: Mapping[str, Match], agreed: set[str]) -> Cut:
    end, wanted = _first_difference(place, traced, known, agreed)
    steps = _between(place.step, end, traced, agreed)
    inner = {name for step in steps for name in step.outputs}
    read = dict.fromkeys(name for step in steps for name in traced.read(step) if name not in inner)
    inputs = {name: _stored(traced, name, traced.values[name][0]) for name in read if name in traced.values}
    got = {end: _stored(traced, end, traced.values[end][0])} if end in traced.values else {}
    expected: dict[str, Array] = {}
    error = math.inf
    if wanted is not None:
        fits = end in traced.values and traced.values[end].size == wanted.value.size
        shape = traced.values[end].shape[1:] if fits else wanted.value.shape[1:]
        expected = {end: _stored(traced, end, wanted.value[0].reshape(shape))}
    if wanted is not None and end in traced.values:
        error = apart(traced.values[end], wanted.value)
    parting = Parting(
        module=place.module,
        operations=tuple(step.operation for step in steps),
        kind=place.step.kind,
        error=error,
        input_error=max((matches[name].error for name in inputs if name in matches), default=0.0),
        carries=known.carried.get(place.module, ()),
        why=told(place.step, place.node, place.module, end, wanted, traced, known, matches),
    )
    return Cut(parting, inputs, expected, got, parting.operations)


def _first_difference(place: _Place, traced: Traced, known: Known, agreed: set[str]) -> tuple[str, Node | None]:
    """The first tensor behind a parting that PyTorch has one of the same size for, and that one."""
    meant = list(known.leaves(place.step.module))
    if place.node is not None:
        meant += [place.node, *known.behind(place.node.name, _FAR)]
    queue = [name for name in place.step.outputs if name not in agreed]
    first, seen = queue[0], set(queue)
    while queue:
        name = queue.pop(0)
        if name not in traced.values:
            return first, next(iter(meant), None)
        values = traced.values[name]
        fits = [(apart(values, each.value), at) for at, each in enumerate(meant) if each.value.size == values.size]
        if fits:
            return name, meant[min(fits)[1]]
        for reader in traced.readers.get(name, ()) if len(seen) < _FAR else ():
            fresh = [each for each in reader.outputs if each not in seen]
            seen.update(fresh)
            queue += fresh
    return first, None


def _between(start: Step, end: str, traced: Traced, agreed: set[str]) -> tuple[Step, ...]:
    """The operations from the last agreement to ``end``, in order."""
    wanted, queue = {start.operation}, [end]
    while queue:
        step = traced.makers.get(queue.pop())
        if step is None or step.operation in wanted:
            continue
        wanted.add(step.operation)
        queue += [name for name in traced.read(step) if name not in agreed]
    return tuple(step for step in traced.steps if step.operation in wanted)


def _stored(traced: Traced, name: str, values: Array) -> Array:
    """Numbers in the type that the artefact stores the tensor in."""
    kind = traced.stored(name)
    if values.dtype.kind == "f" and kind in (np.int8, np.uint8):
        limits = np.iinfo(np.int8 if kind == np.int8 else np.uint8)
        return np.clip(np.rint(values), limits.min, limits.max).astype(kind)
    with np.errstate(over="ignore"):
        return values.astype(kind)
