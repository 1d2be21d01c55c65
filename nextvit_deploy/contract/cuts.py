"""A picture brought to the model's size, by any of the searched ways of doing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import ExifTags, Image, ImageOps

from nextvit_deploy.contract.steps import SHIFTS, Pixels, Steps, Values, resized_short_side, side_of
from nextvit_deploy.data import to_rgb
from nextvit_models.errors import DeployError
from nextvit_models.preprocessing import Preprocessing

ORIENTATION: Final = ExifTags.Base.Orientation
"""The EXIF tag of how the camera was held."""
_LONGEST: Final = 100_000
"""Pixels along the longer side after the resize."""

_GREY: Final = np.array([0.299, 0.587, 0.114])
"""How much red, green and blue count for grey."""
_ANTIALIASED_OR_NOT: Final = ("bilinear", "bicubic")
_SQUARE: Final = ("squash", "crop first", "crop fraction first")
"""Choices of ``geometry`` after which nothing is left to crop."""

Box = tuple[int, int, int, int]
"""Left, top, right and bottom."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which part of a picture is resized, and to what width and height."""

    part: Box
    size: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """A picture at the model's size, (3, H, W) from 0 to 255; ``inside`` is False where it is padding."""

    pixels: Pixels
    inside: np.ndarray[tuple[int, int], np.dtype[np.bool_]]


def plan(size: tuple[int, int], geometry: str, wanted: Preprocessing) -> Plan:
    """What a choice of ``geometry`` comes to for a picture of this width and height."""
    (width, height), target = size, wanted.image_size
    whole = (0, 0, width, height)
    match geometry:
        case "squash":
            return Plan(whole, (target, target))
        case "crop first":
            return Plan(_centre(size, min(size)), (target, target))
        case "crop fraction first":
            return Plan(_centre(size, max(1, int(min(size) * wanted.crop_pct))), (target, target))
        case "letterbox" | "letterbox floored":
            exact = min(size) * target / max(size)
            short = max(1, int(exact) if geometry == "letterbox floored" else round(exact))
            return Plan(whole, (short, target) if width <= height else (target, short))
    short = side_of(geometry, wanted) or resized_short_side(wanted)
    exact = short * max(size) / min(size)
    if exact > _LONGEST:
        raise DeployError("the picture is too long and thin; use another")
    long = round(exact) if geometry == "long side rounded" else short * max(size) // min(size)
    return Plan(whole, (short, long) if width <= height else (long, short))


def go_together(steps: Steps) -> bool:
    """Whether each of the steps changes something, with the others as they are."""
    plain = steps.antialias == "yes" or steps.filter in _ANTIALIASED_OR_NOT
    return plain and (steps.crop == "centre" or steps.geometry not in _SQUARE)


def upright(picture: Image.Image, steps: Steps) -> Image.Image:
    """The picture in RGB, turned as the camera was held if that is one of the steps."""
    return to_rgb(ImageOps.exif_transpose(picture) if steps.orientation == "applied" else picture)


def resized(picture: Image.Image, steps: Steps, wanted: Preprocessing) -> Image.Image:
    """The picture resized, but not cropped: all that depends on filter, antialias, geometry and orientation."""
    turned = upright(picture, steps)
    done = plan(turned.size, steps.geometry, wanted)
    part = turned if done.part == (0, 0, *turned.size) else turned.crop(done.part)
    if steps.filter == "area":
        return _area(part, done.size)
    if steps.filter == "floored nearest" or steps.antialias == "no":
        return _interpolated(part, done.size, steps)
    return part.resize(done.size, Image.Resampling[steps.filter.upper()])


def cropped(done: Image.Image, steps: Steps, wanted: Preprocessing) -> Cut:
    """What is left of a resized picture, in the steps' order of channels."""
    box = _box(done.size, steps, wanted)
    inside = np.zeros((wanted.image_size, wanted.image_size), bool)
    inside[_within(box[1], done.height, wanted), _within(box[0], done.width, wanted)] = True
    array = np.asarray(done.crop(box)).transpose(2, 0, 1)
    if steps.channels == "grey":
        weighed = np.tensordot(_GREY, array.astype(np.float64), 1)
        array = np.broadcast_to(np.rint(weighed).astype(np.uint8), array.shape)
    first, down, across = _directions(steps)
    return Cut(array[::first, ::down, ::across], inside[::down, ::across])


def pixels(picture: Image.Image, steps: Steps, wanted: Preprocessing) -> Pixels:
    """The picture cut to size, (3, H, W) from 0 to 255, in the steps' order of channels."""
    return cropped(resized(picture, steps, wanted), steps, wanted).pixels


def unrounded(picture: Image.Image, steps: Steps, wanted: Preprocessing) -> Values | None:
    """As ``pixels``, resized in floats: neither rounded nor clipped. None where nobody resizes so."""
    if steps.filter in {"area", "floored nearest"} or steps.antialias == "no":
        return None
    turned = upright(picture, steps)
    done = plan(turned.size, steps.geometry, wanted)
    bands = [Image.fromarray(np.asarray(band, np.float32)).crop(done.part) for band in turned.split()]
    filters, box = Image.Resampling[steps.filter.upper()], _box(done.size, steps, wanted)
    array: Values = np.stack([np.asarray(band.resize(done.size, filters).crop(box), np.float64) for band in bands])
    if steps.channels == "grey":
        array = np.broadcast_to(np.tensordot(_GREY, array, 1), array.shape)
    first, down, across = _directions(steps)
    return array[::first, ::down, ::across]


def _directions(steps: Steps) -> tuple[int, int, int]:
    """1, or -1 where the channels, the rows or the columns go the other way."""
    reversed_ = (steps.channels == "BGR", steps.flip == "top to bottom", steps.flip == "left to right")
    first, down, across = (-1 if each else 1 for each in reversed_)
    return first, down, across


def _box(size: tuple[int, int], steps: Steps, wanted: Preprocessing) -> Box:
    """What is cropped; it passes a letterboxed picture's edges."""
    target, (width, height) = wanted.image_size, size
    left, top = (0, 0) if steps.crop == "corner" else (round((width - target) / 2), round((height - target) / 2))
    down, right = SHIFTS.get(steps.crop, (0, 0))
    return left + right, top + down, left + right + target, top + down + target


def _within(start: int, length: int, wanted: Preprocessing) -> slice:
    """The rows or columns of a crop that lie in the picture."""
    return slice(max(0, -start), max(0, min(wanted.image_size, length - start)))


def _centre(size: tuple[int, int], target: int) -> Box:
    left, top = round((size[0] - target) / 2), round((size[1] - target) / 2)
    return left, top, left + target, top + target


def _area(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Means over areas, parts of pixels among them, as OpenCV's INTER_AREA shrinks."""
    array = np.asarray(picture, np.float64).transpose(2, 0, 1)
    done = _shares(picture.height, size[1]) @ array @ _shares(picture.width, size[0]).T
    return Image.fromarray(np.rint(done).clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


def _shares(before: int, after: int) -> Values:
    """By how much each of ``before`` pixels counts for each of ``after``."""
    edges, starts = np.arange(after + 1) * before / after, np.arange(before)
    shared = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    result: Values = shared.clip(0) * after / before
    return result


def _interpolated(picture: Image.Image, size: tuple[int, int], steps: Steps) -> Image.Image:
    """PyTorch's resize without antialiasing, as OpenCV's does the same."""
    import torch

    array = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    nearest = steps.filter == "floored nearest"
    bigger = torch.nn.functional.interpolate(
        array, size[::-1], mode="nearest" if nearest else steps.filter, align_corners=None if nearest else False
    )
    rounded = bigger[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(rounded.contiguous().numpy())
