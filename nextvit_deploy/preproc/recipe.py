"""Preprocessing as data: each step by name, and what becomes of a picture and of its numbers by them.

The contract, which ``nextvit_deploy.data`` carries out, is the recipe in which every step is the first of its choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from nextvit_models.preprocessing import Preprocessing, Triple

Pixels = NDArray[np.float32]
"""(H, W, 3), on the scale from 0 to 255."""
Size = tuple[int, int]
"""Height and width in pixels."""

STATISTICS: Final[dict[str, tuple[Triple, Triple]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "caffe": ((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255, 1 / 255, 1 / 255)),
}
"""Mean and std that go with other checkpoints, on the scale from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """How a picture becomes (H, W, 3) on the scale from 0 to 255; each field names one of the choices of a step.

    ``margin`` is how ``size / crop_pct`` is rounded, ``long`` how the longer side is; ``depth`` is what holds the
    resized picture.
    """

    orientation: str = "applied"
    colours: str = "rgb"
    geometry: str = "cover"
    margin: str = "floor"
    long: str = "floor"
    filter: str = "contract"
    depth: str = "uint8"
    crop: str = "centre"
    flip: str = "none"


@dataclass(frozen=True, slots=True)
class Scaled:
    """How numbers from 0 to 255 become what the network reads."""

    scale: str = "255"
    statistics: str = "contract"
    order: str = "after"


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """``gain * pixel + offset`` for each of three output channels."""

    gain: NDArray[np.float64]
    offset: NDArray[np.float64]


def affine(numbers: Scaled, preprocessing: Preprocessing) -> Affine:
    """What a recipe for numbers does to a pixel from 0 to 255."""
    mean, std = (np.array(each, np.float64) for each in _statistics(numbers.statistics, preprocessing))
    gain, offset = {
        "255": (1 / 255, 0.0),
        "none": (1.0, 0.0),
        "256": (1 / 256, 0.0),
        "-1 to 1": (1 / 127.5, -1.0),
        "twice": (1 / 255**2, 0.0),
    }[numbers.scale]
    if numbers.order == "before":
        return Affine(gain / std, offset - gain * mean / std)
    return Affine(gain / std, (offset - mean) / std)


def _statistics(name: str, preprocessing: Preprocessing) -> tuple[Triple, Triple]:
    mean, std = preprocessing.mean, preprocessing.std
    nothing, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    own: dict[str, tuple[Triple, Triple]] = {
        "contract": (mean, std),
        "none": (nothing, one),
        "mean only": (mean, one),
        "std only": (nothing, std),
        "exchanged": (std, tuple(value or 1.0 for value in mean)),  # type: ignore[dict-item]  # three, as mean is
        "reversed": (mean[::-1], std[::-1]),
        "added": (tuple(-value for value in mean), std),  # type: ignore[dict-item]  # as above
        "multiplied": (mean, tuple(1 / value for value in std)),  # type: ignore[dict-item]  # as above
    }
    if name in own:
        return own[name]
    known, _, reverse = name.partition(", ")
    mean, std = STATISTICS[known]
    return (mean[::-1], std[::-1]) if reverse else (mean, std)
