"""One tensor, held against one way of preprocessing after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from PIL import Image

from nextvit_deploy.contract import fit
from nextvit_deploy.contract.cuts import Cut, cropped, resized, unrounded
from nextvit_deploy.contract.steps import Steps, Values, gains
from nextvit_models.preprocessing import Preprocessing, Triple

TOLERANCE: Final = 2.5
"""Steps of a pixel, of 255, that a value may be off: what rounding to whole pixels in a resize can come to.

Correct pipelines on pictures as hard as noise of black and white were measured against Pillow's: torchvision on
Pillow's images 0.00, its tensor backend with antialiasing in uint8 1.00 where it shrinks and 2.00 where it enlarges,
in float32 and float64 1.00.
"""
MEAN_TOLERANCE: Final = 1.0
"""Steps of a pixel that values may be off on average; the same pipelines came to 0.28."""
FITTED: Final = "fitted"
"""What ``Steps.stats`` is where mean and std are the tensor's own."""
VALUE_STEPS: Final = ("scale", "stats")
"""The steps that change each pixel alone; the others make the cut."""
_NEAR: Final = 1.5
"""Mean steps of a pixel, after a fit to whole pixels, up to which a cut may be the right one."""
_NEAR_IN_FLOATS: Final = 10.0
"""The same without a fit, where floats pass 0 and 255: on noise of black and white they came to 7.6."""
_ROUGH: Final = 32
"""Rows and columns, at least, that a cut is first compared on."""
_LIKELY: Final = 3 * TOLERANCE
"""Steps of a pixel, at the tensor's extremes, between fitted values and those that are worth trying."""


def fits(off: Values) -> bool:
    """Whether values that are so many steps of a pixel off are within the tolerances."""
    return bool(off.max() <= TOLERANCE and off.mean() <= MEAN_TOLERANCE)


@dataclass(frozen=True, slots=True)
class Explanation:
    """Steps that reproduce the tensor within the tolerances; ``fitted`` is mean and std where they have no name."""

    steps: Steps
    largest: float
    mean: float
    fitted: tuple[Triple, Triple] | None = None


@dataclass(slots=True)
class Trial:
    """A tensor, (3, H, W), and what was made of the picture so far; ``values`` are pairs of scale and stats."""

    tensor: Values
    picture: Image.Image
    wanted: Preprocessing
    values: tuple[tuple[str, str], ...]
    residuals: list[tuple[float, Steps]] = field(default_factory=list)
    """How far each cut was from the tensor, roughly and at best."""
    _resized: dict[Steps, Image.Image] = field(default_factory=dict)
    _unrounded: tuple[Steps, Values | None] | None = None

    def cut(self, steps: Steps) -> Cut:
        """The picture at the model's size, by the steps."""
        key = replace(steps, scale="", stats="", layout="", crop="", flip="", channels="")
        if key not in self._resized:
            self._resized[key] = resized(self.picture, steps, self.wanted)
        return cropped(self._resized[key], steps, self.wanted)

    def forget(self) -> None:
        """Drop the resized pictures."""
        self._resized.clear()

    def gains(self, steps: Steps) -> tuple[Values, Values]:
        """Gain and offset that undo the steps' scale and stats."""
        return gains(steps, self.wanted)

    def named(self, steps: Steps, value: tuple[str, str]) -> Steps:
        """The steps with this scale and these stats."""
        scale, stats = value
        return replace(steps, scale=scale, stats=stats)

    def off(self, steps: Steps) -> Values:
        """By how many steps of a pixel each value is off, (3, H, W)."""
        return self._off(steps, self.cut(steps), *self.gains(steps))

    def roughly(self, steps: Steps) -> float:
        """By how many steps of a pixel values are off on average, from a part of them."""
        cut, tensor = self._rough(self.cut(steps))
        return float(fit.apart(fit.seen(tensor, *self.gains(steps)), cut).mean())

    def explained(self, steps: Steps) -> Iterator[Explanation]:
        """What scale and stats explain the tensor with this cut: those that have names, or one that has none."""
        whole = self.cut(steps)
        cut, tensor = self._rough(whole)
        residual = float(fit.apart(fit.seen(tensor, *fit.line(tensor, cut)), cut).mean())
        self.residuals.append((residual, steps))
        if residual <= _NEAR:
            yield from self._named(steps, whole, *fit.line(self.tensor, whole))

    def explained_in_floats(self, steps: Steps) -> Iterator[Explanation]:
        """As ``explained``, fitted to a resize in floats: those far past 0 and 255 spoil a fit to whole pixels."""
        floats = self._floats(steps)
        if floats is not None:
            whole = self.cut(steps)
            yield from self._named(steps, whole, *fit.line_unclipped(self.tensor, floats, whole))

    def _named(self, steps: Steps, whole: Cut, gain: Values, offset: Values) -> Iterator[Explanation]:
        known, ends = False, fit.ends(self.tensor)
        for value in self.values:
            named = self.named(steps, value)
            if fit.between(ends, (gain, offset), self.gains(named)) <= _LIKELY:
                off = self._off(named, whole, *self.gains(named))
                if fits(off):
                    known = True
                    yield Explanation(named, float(off.max()), float(off.mean()))
        if known or not fit.tells(whole) or not gain.all():
            return
        off = self._off(steps, whole, gain, offset)
        if fits(off):
            fitted = _triple(offset / 255), _triple(gain / 255)
            yield Explanation(replace(steps, stats=FITTED), float(off.max()), float(off.mean()), fitted)

    def _off(self, steps: Steps, cut: Cut, gain: Values, offset: Values) -> Values:
        seen = fit.seen(self.tensor, gain, offset)
        result = fit.apart(seen, cut)
        if result.mean() > _NEAR_IN_FLOATS or fits(result):
            return result
        floats = self._floats(steps)  # near: it may have been resized in floats
        if floats is None:
            return result
        exact = fit.apart_unclipped(seen, floats, cut)
        return exact if exact.max() < result.max() else result

    def _floats(self, steps: Steps) -> Values | None:
        """``unrounded``, kept for the next scale and stats of the same cut."""
        key = replace(steps, scale="", stats="", layout="")
        if self._unrounded is None or self._unrounded[0] != key:
            self._unrounded = key, unrounded(self.picture, steps, self.wanted)
        return self._unrounded[1]

    def _rough(self, cut: Cut) -> tuple[Cut, Values]:
        """A part of a cut, evenly spread, and the same part of the tensor."""
        step = max(1, self.wanted.image_size // _ROUGH)
        return Cut(cut.pixels[:, ::step, ::step], cut.inside[::step, ::step]), self.tensor[:, ::step, ::step]


def _triple(values: Values) -> Triple:
    return float(values[0]), float(values[1]), float(values[2])
