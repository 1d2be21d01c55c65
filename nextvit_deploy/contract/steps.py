"""The steps from a picture to a tensor, as the checkpoint wants them and as they are often written instead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nextvit_models.errors import DeployError
from nextvit_models.preprocessing import INTERPOLATIONS, Preprocessing, Triple

Pixels = NDArray[np.uint8]
Values = NDArray[np.float64]

ORIENTATION: Final = 0x0112
"""The EXIF tag of how the camera was held."""
_LONGEST: Final = 100_000
"""Pixels along the longer side after the resize."""
_SHIFTS: Final = {
    f"one pixel {down}{' and ' if down and right else ''}{right}": (row, column)
    for row, down in ((-1, "up"), (0, ""), (1, "down"))
    for column, right in ((-1, "left"), (0, ""), (1, "right"))
    if row or column
}
SHORT_SIDES: Final = {
    "short side is the size": 1.0,
    "crop fraction 0.875": 0.875,
    "crop fraction 0.9": 0.9,
    "crop fraction 0.95": 0.95,
}
"""Choices of ``geometry``: the size's share of the short side before the crop."""
_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "filter": INTERPOLATIONS,
    "antialias": ("yes", "no"),
    "geometry": ("short side", "squash", *SHORT_SIDES),
    "crop": ("centre", "corner", *_SHIFTS),
    "channels": ("RGB", "BGR"),
    "orientation": ("applied", "ignored"),
    "scale": ("1/255", "none", "twice", "1/127.5 - 1"),
    "stats": ("contract", "none", "no std", "no mean", "ImageNet", "0.5", "swapped", "reversed"),
    "layout": ("CHW", "HWC"),
}
"""What each step may be."""


@dataclass(frozen=True, slots=True)
class Steps:
    """One way from a picture to a tensor; the defaults are the contract's but for ``filter``, which it names.

    ``layout`` is read off the tensor's shape, the others are searched for.
    """

    filter: str
    antialias: str = "yes"
    geometry: str = "short side"
    crop: str = "centre"
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


def single_deviations(contract: Steps) -> Iterator[Steps]:
    """Every way to get exactly one of the searched steps wrong."""
    for step, choices in _CHOICES.items():
        if step != "layout":
            for choice in choices:
                if choice != contract.value(step):
                    changed = dict.fromkeys((step,), choice)
                    yield replace(contract, **changed)


def statistics(name: str, wanted: Preprocessing) -> tuple[Triple, Triple]:
    """The mean and std that a choice of ``stats`` stands for."""
    zero, one, half = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.5, 0.5, 0.5)
    default = Preprocessing()
    return {
        "contract": (wanted.mean, wanted.std),
        "none": (zero, one),
        "no std": (wanted.mean, one),
        "no mean": (zero, wanted.std),
        "ImageNet": (default.mean, default.std),
        "0.5": (half, half),
        "swapped": (wanted.std, wanted.mean),
        "reversed": (_reversed(wanted.mean), _reversed(wanted.std)),
    }[name]


def pixels(picture: Image.Image, steps: Steps, wanted: Preprocessing) -> Pixels:
    """The picture cut to size, (3, H, W) from 0 to 255, in the steps' order of channels."""
    upright = ImageOps.exif_transpose(picture) if steps.orientation == "applied" else picture
    size = wanted.image_size
    width, height = _scaled(upright.size, steps, wanted)
    if max(width, height) > _LONGEST:
        raise DeployError("the picture is too long and thin; use another")
    resized = _resize(upright.convert("RGB"), (width, height), steps)
    left, top = (0, 0) if steps.crop == "corner" else (round((width - size) / 2), round((height - size) / 2))
    down, right = _SHIFTS.get(steps.crop, (0, 0))
    cut = resized.crop((left + right, top + down, left + right + size, top + down + size))
    array = np.asarray(cut).transpose(2, 0, 1)
    return array[::-1] if steps.channels == "BGR" else array


def unrounded(picture: Image.Image, steps: Steps, wanted: Preprocessing) -> Values:
    """As ``pixels``, resized in floats: neither rounded nor clipped."""
    upright = ImageOps.exif_transpose(picture) if steps.orientation == "applied" else picture
    bands = [Image.fromarray(np.asarray(band, np.float32)) for band in upright.convert("RGB").split()]
    size, (width, height) = wanted.image_size, _scaled(upright.size, steps, wanted)
    left, top = (0, 0) if steps.crop == "corner" else (round((width - size) / 2), round((height - size) / 2))
    down, right = _SHIFTS.get(steps.crop, (0, 0))
    box = (left + right, top + down, left + right + size, top + down + size)
    filters = Image.Resampling[steps.filter.upper()]
    array: Values = np.stack(
        [np.asarray(band.resize((width, height), filters).crop(box), np.float64) for band in bands]
    )
    return array[::-1] if steps.channels == "BGR" else array


def to_tensor(values: Pixels, steps: Steps, wanted: Preprocessing) -> Values:
    """Pixels scaled and normalised as the steps say, (3, H, W)."""
    mean, std = (np.reshape(each, (3, 1, 1)) for each in statistics(steps.stats, wanted))
    factor, offset = _scale(steps.scale)
    result: Values = (values.astype(np.float64) * factor + offset - mean) / std
    return result


def to_pixels(tensor: Values, steps: Steps, wanted: Preprocessing) -> Values:
    """``to_tensor`` undone: what the pixels were, if these were the steps."""
    mean, std = (np.reshape(each, (3, 1, 1)) for each in statistics(steps.stats, wanted))
    factor, offset = _scale(steps.scale)
    result: Values = (tensor * std + mean - offset) / factor
    return result


def same_side(choice: str, wanted: Preprocessing) -> bool:
    """Whether a choice of ``geometry`` is another name for what the contract has."""
    return choice in SHORT_SIDES and math.floor(wanted.image_size / SHORT_SIDES[choice]) == resized_short_side(wanted)


def side_of(choice: str, wanted: Preprocessing) -> int:
    """Pixels along the short side that a choice of ``geometry`` other than ``squash`` stands for."""
    return math.floor(wanted.image_size / SHORT_SIDES[choice])


def resized_short_side(wanted: Preprocessing) -> int:
    """Pixels along the short side before the crop."""
    return math.floor(wanted.image_size / wanted.crop_pct)


def _reversed(values: Triple) -> Triple:
    return values[2], values[1], values[0]


def _scale(name: str) -> tuple[float, float]:
    return {"1/255": (1 / 255, 0.0), "none": (1.0, 0.0), "twice": (1 / 255**2, 0.0), "1/127.5 - 1": (1 / 127.5, -1.0)}[
        name
    ]


def _scaled(size: tuple[int, int], steps: Steps, wanted: Preprocessing) -> tuple[int, int]:
    if steps.geometry == "squash":
        return wanted.image_size, wanted.image_size
    fraction = SHORT_SIDES.get(steps.geometry)
    short = resized_short_side(wanted) if fraction is None else math.floor(wanted.image_size / fraction)
    width, height = size
    return (short, short * height // width) if width <= height else (short * width // height, short)


def _resize(picture: Image.Image, size: tuple[int, int], steps: Steps) -> Image.Image:
    """Pillow's resize, which antialiases; without, PyTorch's, as OpenCV's does the same."""
    if steps.antialias == "yes" or steps.filter not in {"bilinear", "bicubic"}:
        return picture.resize(size, Image.Resampling[steps.filter.upper()])
    import torch

    array = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    bigger = torch.nn.functional.interpolate(array, size=size[::-1], mode=steps.filter, align_corners=False)
    rounded = bigger[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(rounded.contiguous().numpy())
