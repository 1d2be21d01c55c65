"""At which operations an artefact and PyTorch part, and which module is to blame for each.

A tensor without a counterpart is no parting where something computed from it has one: an artefact may do in two
operations what PyTorch does in one, and the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from nextvit_deploy.bisect.depth import OTHERS, own_tensor
from nextvit_deploy.bisect.known import Known, Node
from nextvit_deploy.bisect.match import Match
from nextvit_deploy.bisect.traced import Traced
from nextvit_exporters.executors.base import Step

_CLOSE: Final = 0.1
"""Share of the tolerance within which a tensor behind a parting has nothing of it any more."""


@dataclass(frozen=True, slots=True)
class Place:
    """An operation behind which nothing agrees, what PyTorch has there, and the module to blame."""

    step: Step
    node: Node | None
    module: str


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """An artefact, PyTorch and what is the same in both; ``sound`` nodes and ``agreed`` tensors need no explanation."""

    traced: Traced
    known: Known
    matches: Mapping[str, Match]
    sound: set[str]
    agreed: set[str]

    @classmethod
    def of(cls, traced: Traced, known: Known, matches: Mapping[str, Match], *, named: bool) -> Evidence:
        """From what has the same numbers.

        Where the artefact's operations are ``named`` as the model's layers are, a layer that is off needs to be
        explained even if nothing of it is left further on: the next activation may be zero on these images. So does
        one that gives another's numbers.
        """
        evidence = cls(traced, known, matches, _sound(known, matches), _agreed(traced, matches))
        for node in known.nodes.values() if named else ():
            if node.leaf and (tensor := own_tensor(node, traced, known, matches)) is not None:
                evidence.sound.discard(node.name)
                evidence.agreed.discard(tensor)
        return evidence

    @property
    def unexplained(self) -> bool:
        """Whether something parts at all."""
        return len(self.sound) < len(self.known.nodes) or self.traced.failure is not None


def _sound(known: Known, matches: Mapping[str, Match]) -> set[str]:
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
            if name in traced.values and any(traced.is_real(each) and each in agreed for each in after):
                agreed.add(name)
    for step in traced.steps:
        if agreed.issuperset(traced.read(step)):
            agreed |= {name for name in step.outputs if name in traced.values and not traced.is_real(name)}
    return agreed


def places(evidence: Evidence, tolerance: float) -> list[Place]:
    """Every place that none is in front of, in the order of execution.

    What is computed behind one counts no more, until it is well within the ``tolerance`` again.
    """
    known, agreed = evidence.known, evidence.agreed
    front = [n for n in known.nodes.values() if n.name not in evidence.sound and evidence.sound.issuperset(n.inputs)]
    found, behind = list[Place](), set[str]()
    for step in evidence.traced.steps:
        read = evidence.traced.read(step)
        if behind.isdisjoint(read) and not (read and agreed.issuperset(read) and not agreed.issuperset(step.outputs)):
            continue
        if behind.isdisjoint(read):
            node = _counterpart(evidence, step, read, front)
            if node is None and found:
                continue
            found.append(_place(evidence, step, node))
        behind |= {
            name for name in step.outputs if not _is_right_again(evidence, name, behind.intersection(read), tolerance)
        }
    return found or _lost(evidence, front)


def _is_right_again(evidence: Evidence, name: str, wrong: set[str], tolerance: float) -> bool:
    """Whether a tensor has nothing of what it is computed from; the same numbers in another shape have all of it."""
    matches = evidence.matches
    if name not in evidence.agreed or name not in matches or matches[name].error > _CLOSE * tolerance:
        return False
    return not any(each in matches and matches[each].nodes == matches[name].nodes for each in wrong)


def _lost(evidence: Evidence, front: list[Node]) -> list[Place]:
    """The operation that can't be executed where nothing that depends on the input leads to it."""
    traced = evidence.traced
    lost = next((step for step in traced.steps if not traced.values.keys() >= set(step.outputs)), None)
    if lost is None or traced.failure is None:
        return []
    node = next((each for each in front if each.module == lost.module), front[0] if front else None)
    return [_place(evidence, lost, node)]


def _counterpart(evidence: Evidence, step: Step, read: tuple[str, ...], front: list[Node]) -> Node | None:
    """Which of the first nodes that the artefact lacks an operation should have given."""
    own = [node for node in front if node.leaf and node.module == step.module]
    if own:
        return own[0]
    matches = evidence.matches
    given = {name for tensor in read if tensor in matches for name in matches[tensor].nodes}
    shared = [(len(given.intersection(node.inputs)), -at) for at, node in enumerate(front)]
    if shared and max(shared)[0]:
        return front[-max(shared)[1]]
    return next((node for node in front if node.module == step.module), front[0] if front else None)


def _place(evidence: Evidence, step: Step, node: Node | None) -> Place:
    """The place; at an operation in front that changes nothing, where PyTorch has there what the artefact lacks."""
    blamed = _blamed(evidence, step, node)
    if node is None or node.leaf or blamed == step.module:
        return Place(step, node, blamed)
    idle = _idle(evidence, step)
    return Place(step, node, idle.module if idle is not None and idle.module in evidence.known.modules else blamed)


def _blamed(evidence: Evidence, step: Step, node: Node | None) -> str:
    """The module that an operation should have computed: its own, or one in front that the artefact leaves out."""
    own = step.module if step.module in evidence.known.modules else ""
    if node is None or not own or own == node.module:
        return own or ("" if node is None else node.module)
    leaves = evidence.known.leaves(own)
    if leaves:
        return own if all(each.name in evidence.sound for each in leaves) else node.module
    return node.module if node.leaf else own


def _idle(evidence: Evidence, step: Step) -> Step | None:
    """What gives an operation the numbers that it read itself, as a transposition of nothing does."""
    traced, matches = evidence.traced, evidence.matches
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
