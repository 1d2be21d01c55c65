"""Find the fewest steps that have to differ from the contract for a tensor to come out as it did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final

import numpy as np
from PIL import Image

from nextvit_deploy.contract.steps import (
    ORIENTATION,
    Pixels,
    Steps,
    Values,
    pixels,
    same_side,
    single_deviations,
    statistics,
    to_pixels,
    to_tensor,
    unrounded,
)
from nextvit_models.preprocessing import Preprocessing, Triple

TOLERANCE: Final = 1.5
"""Steps of a pixel, of 255: what rounding to whole pixels between two passes of a resize can come to."""
_MOST: Final = 3
"""Steps that are tried together."""
FITTED: Final = "fitted"
"""What ``Steps.stats`` is where mean and std are the tensor's own."""
_FLAT: Final = 1e-12
_OVERSHOOT: Final = 64
"""Steps by which a bicubic resize in floats may pass 0 and 255 where whole pixels are clipped."""


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

    @property
    def agrees(self) -> bool:
        """Whether it is the contract that explains the tensor."""
        return self.explained and not self.differing


@dataclass(slots=True)
class _Trial:
    """Candidates against one tensor; pixels are made once for all candidates that share them."""

    picture: Image.Image
    wanted: Preprocessing
    made: dict[Steps, Pixels]
    floats: dict[Steps, Values]

    def cut(self, steps: Steps) -> Pixels:
        key = replace(steps, scale="", stats="", layout="")
        if key not in self.made:
            self.made[key] = pixels(self.picture, steps, self.wanted)
        return self.made[key]

    def off(self, tensor: Values, steps: Steps) -> Values:
        """By how many steps of a pixel each value is off, (3, H, W)."""
        seen = to_pixels(tensor, steps, self.wanted)
        beyond = np.clip(seen, -_OVERSHOOT, 255 + _OVERSHOOT)
        clipped = np.where(seen == beyond, np.clip(seen, 0, 255), seen)
        result: Values = np.abs(clipped - self.cut(steps))
        if result.mean() > TOLERANCE or result.max() <= TOLERANCE or steps.antialias == "no":
            return result
        key = replace(steps, scale="", stats="", layout="")  # near: it may have been resized in floats
        if key not in self.floats:
            self.floats[key] = unrounded(self.picture, steps, self.wanted)
        exact: Values = np.abs(seen - self.floats[key])
        return exact if exact.max() < result.max() else result


def search(tensor: Values, layout: str, picture: Image.Image, wanted: Preprocessing) -> Found:
    """The fewest deviations that reproduce ``tensor``, (3, H, W), within ``TOLERANCE``; else the closest."""
    trial = _Trial(picture, wanted, {}, {})
    contract = Steps(filter=wanted.interpolation)
    singles = tuple(_distinct(contract, picture, wanted))
    from_contract = float(trial.off(tensor, contract).max())
    ideal = to_tensor(trial.cut(contract), contract, wanted)
    unseen = tuple(each for each in singles if trial.off(ideal, each).max() <= TOLERANCE)
    closest, least = contract, np.inf
    for count in range(_MOST + 1):
        fitting: list[tuple[float, Steps]] = []
        for steps in _combined(contract, singles, count):
            off = trial.off(tensor, steps)
            if off.max() <= TOLERANCE:
                fitting.append((float(off.mean()), steps))
            if count < _MOST and off.mean() < least:
                closest, least = steps, float(off.mean())
        if fitting:
            fitting.sort(key=lambda each: each[0])
            best = fitting[0][1]
            others = () if count == 0 else tuple(steps for _, steps in fitting[1:])
            return _found(trial, tensor, replace(best, layout=layout), others, (from_contract, unseen))
    fit = _fit(trial, tensor, (contract, *singles))
    if fit is not None:
        steps, mean, std = fit
        own = _Trial(picture, replace(wanted, mean=mean, std=std), trial.made, trial.floats)
        told = _found(own, tensor, replace(steps, layout=layout), (), (from_contract, unseen))
        differing = replace(steps, stats=FITTED, layout=layout)
        return replace(told, steps=differing, differing=differing.differing(contract), fitted=(mean, std))
    return _found(trial, tensor, replace(closest, layout=layout), (), (from_contract, unseen))


def _fit(trial: _Trial, tensor: Values, candidates: tuple[Steps, ...]) -> tuple[Steps, Triple, Triple] | None:
    """The cut for which each channel is ``(pixel / 255 - mean) / std`` of some mean and std: by least squares.

    One that differs from the contract in its cut alone; None where no line fits within ``TOLERANCE``.
    """
    fitting: list[tuple[float, Steps, Triple, Triple]] = []
    for steps in dict.fromkeys(replace(each, scale="1/255", stats="contract") for each in candidates):
        cut = trial.cut(steps).astype(np.float64) / 255
        mean, std = [], []
        for pixel, value in zip(cut, tensor, strict=True):
            centred, spread = pixel - pixel.mean(), value - value.mean()
            slope = float((spread * centred).sum() / max((spread**2).sum(), _FLAT))  # of the pixel over the value
            std.append(slope)
            mean.append(float(pixel.mean() - slope * value.mean()))
        off = np.abs(tensor * np.reshape(std, (3, 1, 1)) + np.reshape(mean, (3, 1, 1)) - cut) * 255
        if off.max() <= TOLERANCE and min(std) > 0:
            fitting.append((float(off.mean()), steps, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])))
    return min(fitting, key=lambda each: each[0])[1:] if fitting else None


def _found(
    trial: _Trial,
    tensor: Values,
    steps: Steps,
    others: tuple[Steps, ...],
    known: tuple[float, tuple[Steps, ...]],
) -> Found:
    off = trial.off(tensor, steps)
    explained = bool(off.max() <= TOLERANCE)
    return Found(
        steps=steps,
        differing=steps.differing(Steps(filter=trial.wanted.interpolation)),
        explained=explained,
        largest=float(off.max()),
        mean=float(off.mean()),
        from_contract=known[0],
        others=others,
        unseen=known[1],
        where="" if explained else _where(off),
    )


def _distinct(contract: Steps, picture: Image.Image, wanted: Preprocessing) -> Iterator[Steps]:
    """The single deviations that differ from each other and from the contract for this checkpoint and picture."""
    turned = picture.getexif().get(ORIENTATION, 1) != 1
    seen = {statistics("contract", wanted)}
    for each in single_deviations(contract):
        if each.differing(contract) == ("geometry",) and same_side(each.geometry, wanted):
            continue
        if each.orientation != contract.orientation and not turned:
            continue
        if each.stats != contract.stats:
            values = statistics(each.stats, wanted)
            if values in seen:
                continue
            seen.add(values)
        yield each


def _combined(contract: Steps, singles: tuple[Steps, ...], count: int) -> Iterator[Steps]:
    """``contract`` with ``count`` of the single deviations, no two of the same step."""
    changes = [(each.differing(contract)[0], each) for each in singles]
    for chosen in combinations(changes, count):
        names = {name for name, _ in chosen}
        if len(names) == count:
            changed = {name: each.value(name) for name, each in chosen}
            yield replace(contract, **changed)


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
