"""Whether pictures are fit to calibrate on: enough of them, different from each other, and pictures at all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nextvit_deploy.data import Pictures
from nextvit_exporters.errors import DeployError

LEAST: Final = 16
"""Usable pictures without which no calibration is made."""
RECOMMENDED: Final = 128
UNRELATED: Final = 0.45
"""Correlation of neighbouring pixels below which a set, by its median, is taken for noise.

Measured at 32 to 224 pixels behind the usual preprocessing: uniform and Gaussian noise, grey or coloured, saved at 64
to 500 pixels as PNG or JPEG, 0.10 to 0.22; the demo's digits 0.99; 64 crops of scikit-learn's two photographs, cut at
64 to 400 pixels, 0.92 to 0.99 by the median and no picture below 0.56. Noise that was enlarged before is smooth, 0.89
when 64 pixels become 224, and is not told from a picture so.
"""

_BLANK: Final = 1.0
"""Deviation of pixels, in levels of 255, below which a picture shows nothing; JPEG leaves traces in one colour too."""
_TOLERATED: Final = 0.1
"""Share of blank pictures, or of repeated ones, that is told but not refused."""
_AT_A_TIME: Final = 8


@dataclass(slots=True)
class _Seen:
    """What is remembered of the pictures, a few numbers each."""

    first: dict[bytes, str] = field(default_factory=dict)
    repeated: list[tuple[str, str]] = field(default_factory=list)
    blank: list[str] = field(default_factory=list)
    related: list[float] = field(default_factory=list)

    def look(self, name: str, pixels: NDArray[np.uint8]) -> None:
        """Take up one picture, (3, H, W)."""
        if float(pixels.std(axis=(1, 2)).max()) < _BLANK:
            self.blank.append(name)
            return
        self.related.append(relatedness(pixels))
        earlier = self.first.setdefault(hashlib.sha256(pixels.tobytes()).digest(), name)
        if earlier != name:
            self.repeated.append((earlier, name))


def check_pictures(pictures: Pictures, on_step: Callable[[str], None]) -> tuple[str, ...]:
    """Read all of them, and return what is to be known of them.

    Raises DeployError for fewer than 16 usable ones, or where more than a tenth are blank or repeat another, or where
    they are noise. Pictures are compared as the network sees them, cut to size.
    """
    total, where = len(pictures), f"images in {pictures.folder}"
    if total < LEAST:
        taken = str(total) if total == pictures.total else f"{total} of {pictures.total}"
        raise DeployError(f"only {taken} {where}; calibration takes at least {LEAST}, {RECOMMENDED} are recommended")
    seen = _Seen()
    for start in range(0, total, _AT_A_TIME):
        on_step(f"look at calibration images, {start} of {total}")
        images = pictures.read(start, start + _AT_A_TIME)
        for name, pixels in zip(images.names, images.pixels, strict=True):
            seen.look(name, pixels)
    _refuse(seen, pictures, where)
    return tuple(_notes(seen, total))


def relatedness(pixels: NDArray[np.uint8]) -> float:
    """How much neighbouring pixels of a picture, (3, H, W), go together.

    The mean over both directions of the correlation between grey values one pixel apart, from -1 to 1; 1 where nothing
    varies.
    """
    grey = pixels.mean(axis=0, dtype=np.float64)
    pairs = ((grey[:, 1:], grey[:, :-1]), (grey[1:], grey[:-1]))
    return float(np.mean([_correlation(one, other) for one, other in pairs]))


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    one, other = one - one.mean(), other - other.mean()
    scale = np.sqrt((one * one).sum() * (other * other).sum())
    return float((one * other).sum() / scale) if scale > 0 else 1.0


def _refuse(seen: _Seen, pictures: Pictures, where: str) -> None:
    total, size = len(pictures), "x".join(map(str, pictures.size))
    if len(seen.blank) > _TOLERATED * total:
        raise DeployError(
            f"{len(seen.blank)} of {total} {where} are blank: {_few(seen.blank)}; give pictures of your task"
        )
    if len(seen.first) == 1:
        raise DeployError(f"all {total} {where} are the same at {size}; give different pictures of your task")
    if len(seen.repeated) > _TOLERATED * total:
        first, second = seen.repeated[0]
        raise DeployError(
            f"{len(seen.repeated)} of {total} {where} repeat another, as {second} does {first}; give different pictures"
        )
    if len(seen.first) < LEAST:
        raise DeployError(
            f"only {len(seen.first)} usable {where}; calibration takes at least {LEAST}, {RECOMMENDED} are recommended"
        )
    if (median := float(np.median(seen.related))) < UNRELATED:
        raise DeployError(
            f"the {total} {where} are noise: neighbouring pixels correlate by {median:.2f}, those of pictures by "
            f"more than {UNRELATED}; give pictures of your task"
        )


def _notes(seen: _Seen, total: int) -> Iterator[str]:
    if total < RECOMMENDED:
        yield f"calibrated on {total} images; {RECOMMENDED} are recommended"
    if seen.blank:
        yield f"{len(seen.blank)} calibration images are blank: {_few(seen.blank)}"
    if seen.repeated:
        first, second = seen.repeated[0]
        yield f"{len(seen.repeated)} calibration images repeat another, as {second} does {first}"


def _few(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names[:2])) + (", ..." if len(names) > 2 else "")
