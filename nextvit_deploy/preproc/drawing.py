"""A picture by a recipe: decoded, resized and cropped as the contract has it, or in any of the other usual ways."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from PIL import Image, ImageOps

from nextvit_deploy.preproc.recipe import Drawn, Pixels, Size
from nextvit_models.preprocessing import Preprocessing

_PILLOW: Final = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_SHIFTS: Final = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1), "down right": (1, 1)}
_CORNERS: Final = {"top left": (0.0, 0.0), "top right": (1.0, 0.0), "bottom left": (0.0, 1.0), "bottom right": (1, 1)}
_LONGEST: Final = 8192
"""Pixels a side of a resized picture; a recipe that leads beyond is not drawn."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """A box to cut first, the size to resize to, and a colour to fill up with; sizes are (width, height)."""

    box: tuple[int, int, int, int] | None
    size: tuple[int, int]
    fill: int | None = None


@dataclass(slots=True)
class Drawing:
    """One picture, as it was opened, by any recipe; what recipes share is done once.

    ``size`` is what the network reads.
    """

    opened: Image.Image
    size: Size
    preprocessing: Preprocessing
    _decoded: dict[tuple[str, str], Image.Image] = field(default_factory=dict)
    _resized: dict[object, Pixels] = field(default_factory=dict)

    @property
    def is_turned(self) -> bool:
        """Whether the camera's orientation changes the picture."""
        return self.opened.getexif().get(0x0112, 1) in range(2, 9)

    @property
    def has_alpha(self) -> bool:
        """Whether there is transparency to treat."""
        return "A" in self.opened.getbands() or "transparency" in self.opened.info

    def pixels(self, recipe: Drawn) -> Pixels | None:
        """The picture by ``recipe``; None where that leads nowhere, as a crop larger than the picture does."""
        picture = self._picture(recipe)
        plan = self._plan(recipe, picture.size)
        if plan is None or not 0 < min(plan.size) <= max(plan.size) <= _LONGEST:
            return None
        key = recipe.orientation, recipe.colours, plan, recipe.filter, recipe.depth
        if key not in self._resized:
            self._resized[key] = self._resize(picture, plan, recipe)
        cut = self._cut(self._resized[key], recipe)
        return None if cut is None else _flipped(cut, recipe.flip)

    def _picture(self, recipe: Drawn) -> Image.Image:
        key = recipe.orientation, recipe.colours
        if key not in self._decoded:
            turned = self.opened if recipe.orientation == "ignored" else ImageOps.exif_transpose(self.opened)
            self._decoded[key] = _coloured(turned, recipe.colours)
        return self._decoded[key]

    def _plan(self, recipe: Drawn, source: tuple[int, int]) -> _Plan | None:
        """``source`` is the picture's (width, height)."""
        (height, width), crop_pct = self.size, self.preprocessing.crop_pct
        kind, _, value = recipe.geometry.partition(" ")
        if kind == "crop_pct":
            crop_pct = float(value)
        cover = _rounded(width / crop_pct, recipe.margin), _rounded(height / crop_pct, recipe.margin)
        whole = 0, 0, *source
        plans: dict[str, _Plan] = {
            "cover": _Plan(None, _covering(source, cover, recipe.long)),
            "crop_pct": _Plan(None, _covering(source, cover, recipe.long)),
            "squash": _Plan(None, (width, height)),
            "squash-cover": _Plan(None, cover),
            "letterbox": _Plan(None, _within(source, (width, height), recipe.long), int(value or 0)),
            "crop-first": _Plan(_middle(whole, (width, height), 1.0), (width, height)),
            "crop-first-margin": _Plan(_middle(whole, (width, height), crop_pct), (width, height)),
            "as-is": _Plan(None, source),
        }
        return plans[kind]

    def _resize(self, picture: Image.Image, plan: _Plan, recipe: Drawn) -> Pixels:
        if plan.box is not None:
            picture = picture.crop(plan.box)
        name = self.preprocessing.interpolation if recipe.filter == "contract" else recipe.filter
        resized = _by_filter(picture, plan.size, name, recipe.depth)
        if plan.fill is None:
            return resized
        height, width = self.size
        padded = np.full((height, width, 3), plan.fill, np.float32)
        top, left = (height - resized.shape[0]) // 2, (width - resized.shape[1]) // 2
        padded[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
        return padded

    def _cut(self, resized: Pixels, recipe: Drawn) -> Pixels | None:
        if recipe.crop == "none":
            return resized
        height, width = self.size
        spare = resized.shape[1] - width, resized.shape[0] - height
        if min(spare) < 0:
            return None
        left, top = _offset(spare, recipe.crop)
        if not (0 <= left <= spare[0] and 0 <= top <= spare[1]):
            return None
        return resized[top : top + height, left : left + width]


def _coloured(picture: Image.Image, colours: str) -> Image.Image:
    if colours in {"over white", "over black"}:
        ground = Image.new("RGBA", picture.size, "white" if colours == "over white" else "black")
        return Image.alpha_composite(ground, picture.convert("RGBA")).convert("RGB")
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB").convert("L").convert("RGB") if colours == "grey" else picture.convert("RGB")


def _rounded(value: float, how: str) -> int:
    return {"floor": math.floor, "round": round, "ceil": math.ceil}[how](value)


def _covering(source: tuple[int, int], cover: tuple[int, int], how: str) -> tuple[int, int]:
    """The picture's sides, (width, height), so that it just covers ``cover``."""
    if cover[1] * source[0] >= cover[0] * source[1]:
        return _ratio(cover[1] * source[0], source[1], how), cover[1]
    return cover[0], _ratio(cover[0] * source[1], source[0], how)


def _within(source: tuple[int, int], frame: tuple[int, int], how: str) -> tuple[int, int]:
    """The picture's sides, (width, height), so that it just fits into ``frame``."""
    if frame[1] * source[0] >= frame[0] * source[1]:
        return frame[0], max(1, _ratio(frame[0] * source[1], source[0], how))
    return max(1, _ratio(frame[1] * source[0], source[1], how)), frame[1]


def _ratio(above: int, below: int, how: str) -> int:
    return above // below if how == "floor" else _rounded(above / below, how)


def _middle(whole: tuple[int, int, int, int], frame: tuple[int, int], share: float) -> tuple[int, int, int, int]:
    """The largest box of ``frame``'s proportions in the middle of a picture, or ``share`` of it."""
    scale = share * min(whole[2] / frame[0], whole[3] / frame[1])
    width, height = round(scale * frame[0]), round(scale * frame[1])
    left, top = (whole[2] - width) // 2, (whole[3] - height) // 2
    return left, top, left + width, top + height


def _offset(spare: tuple[int, int], crop: str) -> tuple[int, int]:
    """Where to cut, (left, top)."""
    if crop in _CORNERS:
        along, down = _CORNERS[crop]
        return round(along * spare[0]), round(down * spare[1])
    if crop in {"floor", "ceil"}:
        return _rounded(spare[0] / 2, crop), _rounded(spare[1] / 2, crop)
    shift = _SHIFTS.get(crop, (0, 0))
    return round(spare[0] / 2) + shift[0], round(spare[1] / 2) + shift[1]


def _flipped(pixels: Pixels, flip: str) -> Pixels:
    if flip == "left to right":
        return pixels[:, ::-1]
    if flip == "upside down":
        return pixels[::-1]
    return pixels.transpose(1, 0, 2) if flip == "transposed" else pixels


def _by_filter(picture: Image.Image, size: tuple[int, int], name: str, depth: str) -> Pixels:
    """The picture at ``size``, (width, height), as whole numbers or floats on the scale from 0 to 255."""
    if name in _PILLOW and depth == "uint8":
        return np.asarray(picture.resize(size, _PILLOW[name]), np.float32)
    if name in _PILLOW:
        bands = (each.convert("F").resize(size, _PILLOW[name]) for each in picture.split())
        floats = np.stack([np.asarray(each, np.float32) for each in bands], axis=-1)
    else:
        floats = _without_antialias(np.asarray(picture, np.float32), size, name)
    if depth == "float":
        return floats
    clipped = floats.clip(0, 255)
    if depth == "clipped":
        return clipped
    return np.floor(clipped) if depth == "truncated" else np.rint(clipped)


def _without_antialias(pixels: Pixels, size: tuple[int, int], name: str) -> Pixels:
    """By the few neighbours of each place, as torch does with antialias off and OpenCV always."""
    import torch
    from torch.nn.functional import interpolate

    kind, _, corners = name.removeprefix("plain ").partition(", ")
    tensor = torch.tensor(pixels).permute(2, 0, 1)[None]
    aligned = None if kind == "nearest" else bool(corners)
    found = interpolate(tensor, (size[1], size[0]), mode=kind, align_corners=aligned)
    result: Pixels = found[0].permute(1, 2, 0).numpy()
    return result
