"""The steps from a picture to a tensor: what each may be, as the checkpoint wants it and as it is often written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from nextvit_models.preprocessing import Preprocessing, Triple

Pixels = NDArray[np.uint8]
Values = NDArray[np.float64]

SHIFTS: Final = {
    f"one pixel {down}{' and ' if down and right else ''}{right}": (row, column)
    for row, down in ((-1, "up"), (0, ""), (1, "down"))
    for column, right in ((-1, "left"), (0, ""), (1, "right"))
    if row or column
}
"""Choices of ``crop``: by how many rows and columns it is off the centre."""
_SIDE: Final = "short side "
"""A choice of ``geometry`` that begins so goes on with the pixels along the short side."""
_FRACTIONS: Final = (1.0, 0.875, 0.9, 0.95)
_MORE: Final = 32
"""Pixels by which the short side is often made longer than the size: 256 for 224."""
CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "filter": ("nearest", "floored nearest", "box", "area", "bilinear", "hamming", "bicubic", "lanczos"),
    "antialias": ("yes", "no"),
    "geometry": (
        "short side",
        "squash",
        "long side rounded",
        "crop first",
        "crop fraction first",
        "letterbox",
        "letterbox floored",
    ),
    "crop": ("centre", "corner", *SHIFTS),
    "flip": ("no", "left to right", "top to bottom"),
    "channels": ("RGB", "BGR", "grey"),
    "orientation": ("applied", "ignored"),
    "scale": ("1/255", "none", "twice", "1/127.5 - 1", "1/256"),
    "stats": (
        "contract",
        "none",
        "no std",
        "no mean",
        "ImageNet",
        "CLIP",
        "0.5",
        "Caffe",
        "swapped",
        "reversed",
        "mean reversed",
        "std reversed",
        "before scaling",
    ),
    "layout": ("CHW", "HWC", "CWH", "reshaped"),
}
"""What each step may be; ``geometry`` may also be another short side, which depends on the checkpoint."""
_CLIP: Final = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_CAFFE: Final = (123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255, 1 / 255, 1 / 255)


@dataclass(frozen=True, slots=True)
class Steps:
    """One way from a picture to a tensor; the defaults are the contract's but for ``filter``, which it names.

    ``layout`` is read off the tensor's shape where that tells it, the others are searched for.
    """

    filter: str
    antialias: str = "yes"
    geometry: str = "short side"
    crop: str = "centre"
    flip: str = "no"
    channels: str = "RGB"
    orientation: str = "applied"
    scale: str = "1/255"
    stats: str = "contract"
    layout: str = "CHW"

    def value(self, step: str) -> str:
        """What one step is."""
        return str(getattr(self, step))

    def differing(self, other: Steps) -> tuple[str, ...]:
        """The names of the steps in which the two differ."""
        return tuple(each.name for each in fields(self) if self.value(each.name) != other.value(each.name))


def single_deviations(contract: Steps, wanted: Preprocessing) -> Iterator[Steps]:
    """Every way to get exactly one of the searched steps wrong."""
    for step, choices in CHOICES.items():
        if step == "layout":
            continue
        for choice in choices if step != "geometry" else (*choices, *other_sides(wanted)):
            if choice != contract.value(step):
                changed = dict.fromkeys((step,), choice)
                yield replace(contract, **changed)


def statistics(name: str, wanted: Preprocessing) -> tuple[Triple, Triple]:
    """The mean and std, of pixels from 0 to 1, that a choice of ``stats`` stands for."""
    zero, one, half = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.5, 0.5, 0.5)
    default, mean, std = Preprocessing(), wanted.mean, wanted.std
    return {
        "contract": (mean, std),
        "none": (zero, one),
        "no std": (mean, one),
        "no mean": (zero, std),
        "ImageNet": (default.mean, default.std),
        "CLIP": _CLIP,
        "0.5": (half, half),
        "Caffe": _CAFFE,
        "swapped": (std, mean),
        "reversed": (_reversed(mean), _reversed(std)),
        "mean reversed": (_reversed(mean), std),
        "std reversed": (mean, _reversed(std)),
        "before scaling": ((mean[0] / 255, mean[1] / 255, mean[2] / 255), std),
    }[name]


def to_tensor(values: Pixels, steps: Steps, wanted: Preprocessing) -> Values:
    """Pixels scaled and normalised as the steps say, (3, H, W)."""
    mean, std = (np.reshape(each, (3, 1, 1)) for each in statistics(steps.stats, wanted))
    factor, offset = _scale(steps.scale)
    result: Values = (values.astype(np.float64) * factor + offset - mean) / std
    return result


def gains(steps: Steps, wanted: Preprocessing) -> tuple[Values, Values]:
    """What undoes ``to_tensor``: pixels are the tensor times the first, plus the second, by channel."""
    mean, std = (np.array(each) for each in statistics(steps.stats, wanted))
    factor, offset = _scale(steps.scale)
    return std / factor, (mean - offset) / factor


def laid_out(tensor: Values, wanted: Preprocessing) -> Iterator[tuple[str, Values]]:
    """A tensor of channels, height and width as it is if it was laid out wrongly, which its shape doesn't tell."""
    yield "CWH", tensor.transpose(0, 2, 1)
    yield "reshaped", _unreshaped(tensor)
    mean, std = (np.reshape(each, (3, 1, 1)) for each in (wanted.mean, wanted.std))
    yield "reshaped", (_unreshaped(tensor * std + mean) - mean) / std  # and normalised after that


def _unreshaped(tensor: Values) -> Values:
    return tensor.reshape(*tensor.shape[1:], 3).transpose(2, 0, 1)


def side_of(geometry: str, wanted: Preprocessing) -> int | None:
    """Pixels along the short side before the crop, where a choice of ``geometry`` names them."""
    if geometry == _SIDE.strip():
        return resized_short_side(wanted)
    return int(geometry.removeprefix(_SIDE)) if geometry.startswith(_SIDE) else None


def side(pixels: int) -> str:
    """The choice of ``geometry`` that resizes the short side to so many pixels."""
    return f"{_SIDE}{pixels}"


def resized_short_side(wanted: Preprocessing) -> int:
    """Pixels along the short side before the crop."""
    return wanted.cover(wanted.image_size)


def other_sides(wanted: Preprocessing) -> tuple[str, ...]:
    """Short sides of other crop fractions than the contract's, and the contract's rounded up."""
    exact = (wanted.image_size / each for each in (wanted.crop_pct, *_FRACTIONS))
    found = [*(each for side in exact for each in (math.floor(side), round(side))), wanted.image_size + _MORE]
    return tuple(side(each) for each in dict.fromkeys(found) if each != resized_short_side(wanted))


def _reversed(values: Triple) -> Triple:
    return values[2], values[1], values[0]


def _scale(name: str) -> tuple[float, float]:
    return {
        "1/255": (1 / 255, 0.0),
        "none": (1.0, 0.0),
        "twice": (1 / 255**2, 0.0),
        "1/127.5 - 1": (1 / 127.5, -1.0),
        "1/256": (1 / 256, 0.0),
    }[name]
