"""Find the fewest steps that have to differ from the contract for a tensor to come out as it did.

The cuts are tried first, each against the tensor with the gains and offsets that suit it best. Only those that it
could have been made from are given names for their scale, mean and std.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final

import numpy as np
from PIL import Image

from nextvit_deploy.contract import fit
from nextvit_deploy.contract.cuts import ORIENTATION, go_together, pixels, plan, upright
from nextvit_deploy.contract.steps import Steps, Values, laid_out, side, single_deviations, statistics, to_tensor
from nextvit_deploy.contract.trial import VALUE_STEPS, Explanation, Trial, fits
from nextvit_models.preprocessing import Preprocessing, Triple

_MOST: Final = 3
"""Steps of the cut that are tried together."""
_ALIKE: Final = (2.0, 0.1)
"""Another explanation's mean distance is at most so many times the best's, plus this, or it is no rival."""
_CLOSEST: Final = 6
"""Cuts that are given names where nothing explains a tensor."""
_NO_CLOSER: Final = 1.1
"""Steps that are so many times as far from a tensor as the closest are still preferred where they are fewer."""
_NEAREST: Final = 40
"""Cuts that are tried in floats where none explains a tensor in whole pixels."""
_TOO_FINE: Final = "1/256"
"""A choice of ``scale`` that no picture can show."""
_SAME: Final = 0.2
"""Steps of a pixel that a fitted value may be off the one that it is called by."""


@dataclass(frozen=True, slots=True)
class Found:
    """What explains a tensor.

    ``steps`` are those that reproduce it, or come closest where ``explained`` is false; ``differing`` names the ones
    that aren't the contract's. ``largest`` and ``mean`` are the distance to them, and ``from_contract`` the largest
    distance to the contract, in steps of a pixel. ``others`` are as few deviations that would do as well, and
    ``unseen`` single deviations that this picture can't show.
    """

    steps: Steps
    differing: tuple[str, ...]
    explained: bool
    largest: float
    mean: float
    from_contract: float
    others: tuple[Steps, ...]
    unseen: tuple[Steps, ...]
    where: str
    fitted: tuple[Triple, Triple] | None = None
    """Mean and std of pixels from 0 to 1, where those are no known ones."""
    hints: tuple[str, ...] = ()
    """What is within the tolerance, but worth saying."""
    finding: str = ""
    """What is wrong where it is no step of the preprocessing."""

    @property
    def agrees(self) -> bool:
        """Whether it is the contract that explains the tensor."""
        return self.explained and not self.differing


def search(tensor: Values, layout: str, picture: Image.Image, wanted: Preprocessing) -> Found:
    """The fewest deviations that reproduce ``tensor``, (3, H, W), within the tolerances; else the closest."""
    contract = Steps(filter=wanted.interpolation)
    singles = tuple(_distinct(contract, picture, wanted))
    cuts = tuple(each for each in singles if each.differing(contract)[0] not in VALUE_STEPS)
    values = _values(contract, singles)
    trial = Trial(tensor, picture, wanted, values)
    from_contract = float(trial.off(contract).max())
    explanations = _explanations(trial, contract, cuts) or _in_floats(trial, contract)
    if not explanations and layout == "CHW":
        layout, trial, explanations = _laid_out(trial, contract, cuts)
    explanations = explanations or _any_side(trial, contract)
    explanations.sort(key=lambda each: (*_order(each, contract), each.mean))
    unseen = tuple(_unseen(contract, singles, picture, wanted))
    if not explanations:
        steps = _closest(trial, contract)
        off = trial.off(steps)
        told = replace(steps, layout=layout)
        return Found(
            steps=told,
            differing=told.differing(contract),
            explained=False,
            largest=float(off.max()),
            mean=float(off.mean()),
            from_contract=from_contract,
            others=(),
            unseen=unseen,
            where=_where(off),
        )
    best = explanations[0]
    steps = replace(best.steps, layout=layout)
    return Found(
        steps=steps,
        differing=steps.differing(contract),
        explained=True,
        largest=best.largest,
        mean=best.mean,
        from_contract=from_contract,
        others=tuple(_others(explanations, contract)),
        unseen=unseen,
        where="",
        fitted=best.fitted,
        hints=tuple(_hints(trial, best)),
    )


def without_search(finding: str, layout: str, wanted: Preprocessing) -> Found:
    """What is wrong with a tensor where looking for steps would say nothing."""
    steps = Steps(filter=wanted.interpolation, layout=layout)
    return Found(
        steps, (), explained=False, largest=0, mean=0, from_contract=0, others=(), unseen=(), where="", finding=finding
    )


def never_reached(tensor: Values, picture: Image.Image, wanted: Preprocessing) -> str:
    """Which of the tensor's channels are one value all over though the picture's aren't; empty where none is."""
    cut = pixels(picture, Steps(filter=wanted.interpolation), wanted)
    flat = [each for each in range(3) if np.ptp(tensor[each]) == 0 and np.ptp(cut[each]) > 0]
    if len(flat) == 3 and np.ptp(tensor) == 0:
        return f"every value is {tensor.flat[0]}; the picture never reached it"
    return "; ".join(f"every value of channel {each} is {tensor[each].flat[0]}" for each in flat)


def _order(explanation: Explanation, contract: Steps) -> tuple[bool, int]:
    """Known values come before fitted ones, then fewer deviations before more."""
    return explanation.fitted is not None, len(explanation.steps.differing(contract))


def _explanations(trial: Trial, contract: Steps, cuts: tuple[Steps, ...], limit: int = _MOST) -> list[Explanation]:
    """All explanations of up to ``limit`` deviations of the cut that aren't worse than one with fewer."""
    found: list[Explanation] = []
    most = limit
    for count in range(limit + 1):
        if count > most:
            break
        for steps in _combined(contract, cuts, count):
            found += trial.explained(steps)
        if found:
            fitted, fewest = min(_order(each, contract) for each in found)
            most = count + 1 if fitted and most == limit else min(most, fewest)
    return found


def _laid_out(trial: Trial, contract: Steps, cuts: tuple[Steps, ...]) -> tuple[str, Trial, list[Explanation]]:
    """Explanations of a tensor whose values are in another order than its shape says; as given where there is none."""
    for layout, tensor in laid_out(trial.tensor, trial.wanted):
        other = Trial(tensor, trial.picture, trial.wanted, trial.values)
        found = _explanations(other, contract, cuts, _MOST - 1)  # the layout is one
        if found:
            return layout, other, found
    return "CHW", trial, []


def _in_floats(trial: Trial, contract: Steps) -> list[Explanation]:
    """Explanations by cuts that a fit to whole pixels only comes near to."""
    near = [steps for _, steps in sorted(trial.residuals, key=lambda each: each[0])[:_NEAREST]]
    return [each for steps in dict.fromkeys((contract, *near)) for each in trial.explained_in_floats(steps)]


def _any_side(trial: Trial, contract: Steps) -> list[Explanation]:
    """Short sides that nobody names, up to twice the size."""
    size, found = trial.wanted.image_size, list[Explanation]()
    resizes = {
        (contract.filter, "yes"): contract,
        ("bilinear", "yes"): replace(contract, filter="bilinear"),
        ("bilinear", "no"): replace(contract, filter="bilinear", antialias="no"),
    }
    for resize in resizes.values():
        for short in range(size, 2 * size + 1):
            for channels in ("RGB", "BGR"):
                found += trial.explained(replace(resize, geometry=side(short), channels=channels))
            trial.forget()
        if found:
            break
    return found


def _closest(trial: Trial, contract: Steps) -> Steps:
    """Of the cuts that came nearest, the one with the names that suit it best."""
    near = [contract, *(steps for _, steps in sorted(trial.residuals, key=lambda each: each[0])[:_CLOSEST])]
    named = [trial.named(steps, value) for steps in dict.fromkeys(near) for value in trial.values]
    few = [(trial.roughly(each), each) for each in named if len(each.differing(contract)) < _MOST]
    least = min(off for off, _ in few)
    alike = [(len(each.differing(contract)), off, each) for off, each in few if off <= _NO_CLOSER * least]
    return min(alike, key=lambda each: each[:2])[2]


def _others(explanations: list[Explanation], contract: Steps) -> Iterator[Steps]:
    """What explains a tensor as well as the first explanation, which is sorted to be the best."""
    best = explanations[0]
    times, plus = _ALIKE
    for each in explanations[1:] if best.steps != contract else ():
        if _order(each, contract) == _order(best, contract) and each.mean <= times * best.mean + plus:
            yield each.steps


def _hints(trial: Trial, best: Explanation) -> Iterator[str]:
    """That pixels were divided by 256, which is less than the tolerance."""
    if best.fitted is None:
        fitted, ends = fit.line(trial.tensor, trial.cut(best.steps)), fit.ends(trial.tensor)
        gain, offset = trial.gains(best.steps)
        exact, finer = (fit.between(ends, fitted, (gain * by, offset * by)) for by in (1.0, 256 / 255))
        if finer < _SAME and exact > 2 * _SAME:
            yield "pixels are divided by 256, not by 255: the checkpoint wants 255, though the tolerance allows it"


def _unseen(
    contract: Steps, singles: tuple[Steps, ...], picture: Image.Image, wanted: Preprocessing
) -> Iterator[Steps]:
    """The single deviations that a tensor of this picture wouldn't show."""
    ideal = Trial(to_tensor(pixels(picture, contract, wanted), contract, wanted), picture, wanted, ())
    for each in singles:
        if each.scale != _TOO_FINE and fits(ideal.off(each)):
            yield each


def _values(contract: Steps, singles: tuple[Steps, ...]) -> tuple[tuple[str, str], ...]:
    """Scale and stats, in all combinations."""
    scales = dict.fromkeys((contract.scale, *(each.scale for each in singles)))
    stats = dict.fromkeys((contract.stats, *(each.stats for each in singles)))
    return tuple((scale, stat) for scale in scales for stat in stats)


def _distinct(contract: Steps, picture: Image.Image, wanted: Preprocessing) -> Iterator[Steps]:
    """The single deviations that differ from each other and from the contract for this checkpoint and picture."""
    turned = picture.getexif().get(ORIENTATION, 1) != 1
    size = upright(picture, contract).size
    plans, stats = {plan(size, contract.geometry, wanted)}, {statistics("contract", wanted)}
    for each in single_deviations(contract, wanted):
        if not go_together(each) or (each.orientation != contract.orientation and not turned):
            continue
        if each.geometry != contract.geometry:
            done = plan(size, each.geometry, wanted)
            if done in plans and each.geometry != "squash":
                continue
            plans.add(done)
        if each.stats != contract.stats:
            values = statistics(each.stats, wanted)
            if values in stats:
                continue
            stats.add(values)
        yield each


def _combined(contract: Steps, singles: tuple[Steps, ...], count: int) -> Iterator[Steps]:
    """``contract`` with ``count`` of the single deviations, no two of the same step."""
    changes = [(each.differing(contract)[0], each) for each in singles]
    for chosen in combinations(changes, count):
        names = {name for name, _ in chosen}
        if len(names) == count:
            steps = replace(contract, **{name: each.value(name) for name, each in chosen})
            if go_together(steps):
                yield steps


def _where(off: Values) -> str:
    """Where a difference lies: its channels and its largest value."""
    channel, row, column = (int(index) for index in np.unravel_index(int(off.argmax()), off.shape))
    means = ", ".join(f"{mean:.1f}" for mean in off.mean(axis=(1, 2)))
    edge = max(1, off.shape[1] // 8)
    inner = off[:, edge:-edge, edge:-edge].mean()
    outer = (off.sum() - off[:, edge:-edge, edge:-edge].sum()) / (off.size - off[:, edge:-edge, edge:-edge].size)
    return (
        f"mean {means} in the channels, {inner:.1f} inside and {outer:.1f} along the border; "
        f"largest in channel {channel} at row {row}, column {column}"
    )
