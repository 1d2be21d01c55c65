"""Make a piece that fails smaller, as long as it fails."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from nextvit_deploy.bisect.bundle_trial import FACTOR, Trial, Way, run, shares
from nextvit_exporters.cutting.piece import Piece
from nextvit_exporters.errors import DeployError
from nextvit_exporters.executors.base import Array, Arrays, Traceable

_MOST_SHARES: Final = 64
_MOST_CUTS: Final = 40
"""How many pieces are tried."""

Fails = Callable[[Trial], bool]


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The smallest piece that still fails, and what was tried."""

    trial: Trial
    notes: tuple[str, ...]


def shrink(way: Way, trial: Trial, folder: Path, fails: Fails, tolerance: float) -> Shrunk:
    """First fewer images, then fewer operations; ``folder`` is for what is tried on the way.

    Operations are dropped from the front where exact arithmetic tells what goes into the rest: what the artefact itself
    computed there can't stand in for it, as it may be what is wrong.
    """
    notes = []
    single = _one_share(way, trial, fails)
    if single is not None:
        notes.append("of the images it was found on one batch is enough; the others were left out")
        trial = single
    if len(trial.piece.operations) == 1:
        return Shrunk(trial, tuple(notes))
    known = _between(way, trial, tolerance)
    if known is None:
        notes.append("no operation was left out: nothing but the artefact tells the numbers between them")
        return Shrunk(trial, tuple(notes))
    shorter = _fewer_operations(way, trial, known, folder, fails)
    if shorter is not None:
        left_out = len(trial.piece.operations) - len(shorter.piece.operations)
        notes.append(
            f"the first {left_out} operation{'s' if left_out > 1 else ''} of the cut could be left out: the inputs are "
            "what they give in exact arithmetic, which agrees with PyTorch"
        )
        trial = shorter
    return Shrunk(trial, tuple(notes))


def _one_share(way: Way, trial: Trial, fails: Fails) -> Trial | None:
    """The image that is furthest off, alone, where it fails alone; None where there is but one, or it doesn't."""
    count = trial.times if trial.times > 1 else _shares_of(trial)
    if count == 1 or count > _MOST_SHARES:
        return None
    given, wanted = shares(trial.inputs, count), shares(trial.expected, count)
    found = [run(way, trial.path, trial.piece, *each) for each in zip(given, wanted, strict=True)]
    failing = [each for each in found if fails(each)]
    return max(failing, key=lambda each: each.error or 0.0, default=None)


def _shares_of(trial: Trial) -> int:
    """How many images there seem to be where the piece takes any number: what all first axes are a multiple of."""
    edges = (*trial.piece.inputs, *trial.piece.outputs)
    if any(edge.shape is None or edge.shape[:1] != (None,) for edge in edges):
        return 1
    arrays = (*trial.inputs.values(), *trial.expected.values())
    return math.gcd(*(len(each) if each.ndim else 1 for each in arrays))


def _between(way: Way, trial: Trial, tolerance: float) -> Mapping[str, Array] | None:
    """Every number of the piece in exact arithmetic, where that is known to be right; None where it isn't."""
    if way.mode == "unrounded" or trial.times > 1 or trial.error is None:
        return None
    exact = replace(way, mode="unrounded")
    try:
        reading = run(exact, trial.path, trial.piece, trial.inputs, trial.expected)
        if reading.error is None or reading.error > min(tolerance, trial.error / FACTOR):
            return None
        seen: dict[str, Array] = {}
        with exact.executor(trial.path, exact.mode) as executor:
            if not isinstance(executor, Traceable):
                return None
            executor.trace(reading.inputs, lambda name, values: seen.__setitem__(name, np.array(values)))
    except DeployError:  # it says nothing of the piece in its own precision
        return None
    return seen


def _fewer_operations(way: Way, trial: Trial, known: Mapping[str, Array], folder: Path, fails: Fails) -> Trial | None:
    """The shortest end of the piece that still fails; None where all of it is needed."""
    operations = trial.piece.operations
    for count in range(len(operations) - 1, 0, -1)[-_MOST_CUTS:]:
        inputs = _front(trial.piece, count)
        if not inputs or not known.keys() >= set(inputs):
            continue
        place = folder / f"shorter-{count}" / way.name
        place.parent.mkdir()
        given: Arrays = {name: known[name] for name in inputs}
        try:
            piece = way.cut(trial.path, inputs, list(trial.expected), place, given)
            shorter = run(way, place, piece, given, trial.expected)
        except DeployError:  # such as numbers that no file of the format takes
            continue
        if fails(shorter) and not shorter.broken:
            return shorter
        shutil.rmtree(place.parent)
    return None


def _front(piece: Piece, count: int) -> Sequence[str]:
    """What goes into the operations behind the first ``count``."""
    there = {edge.name for edge in piece.inputs} | {name for each in piece.operations[:count] for name in each.writes}
    read = {name for each in piece.operations[count:] for name in each.reads}
    return sorted(there & read)
