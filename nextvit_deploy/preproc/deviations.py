"""What people do instead of each step, in words, with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Final

from nextvit_deploy.preproc.drawing import Drawing
from nextvit_deploy.preproc.recipe import STATISTICS, Drawn, Scaled, Size
from nextvit_models.preprocessing import Preprocessing


@dataclass(frozen=True, slots=True)
class Deviation:
    """One step done in another way: ``field`` of a recipe has ``value``."""

    step: str
    field: str
    value: str
    words: str
    fix: str


STEPS: Final = {
    "orientation": "camera's orientation",
    "colours": "colours",
    "geometry": "resize geometry",
    "margin": "size before the crop",
    "long": "longer side",
    "filter": "resize filter",
    "depth": "number type after the resize",
    "crop": "crop",
    "flip": "flip",
    "channels": "channel order",
    "scale": "scale",
    "statistics": "mean and std",
    "order": "order of scale and mean",
    "layout": "layout",
    "random": "repeatability",
}
"""Every step in the order in which it is done, by its field."""
_MARGINS: Final = (0.875, 0.9, 0.95, 0.96, 0.965, 0.97, 1.0)
"""What checkpoints have as crop_pct: a picture prepared for another one."""
_FILTERS: Final = {
    "nearest": "nearest neighbour",
    "box": "box (area, OpenCV's INTER_AREA)",
    "bilinear": "bilinear",
    "hamming": "hamming",
    "bicubic": "bicubic",
    "lanczos": "lanczos",
    "plain nearest": "nearest neighbour counted from the corner, as torch and OpenCV do",
    "plain bilinear": "bilinear without antialiasing, as torch's antialias=False and OpenCV do",
    "plain bicubic": "bicubic without antialiasing, as torch's antialias=False and OpenCV do",
    "plain bilinear, aligned": "bilinear without antialiasing and with aligned corners",
}
_CROPS: Final = {
    "none": "no crop was taken",
    "top left": "the top left corner was taken in place of the middle",
    "top right": "the top right corner was taken in place of the middle",
    "bottom left": "the bottom left corner was taken in place of the middle",
    "bottom right": "the bottom right corner was taken in place of the middle",
    "floor": "the crop's offset is rounded down",
    "ceil": "the crop's offset is rounded up",
    "right": "the crop is one pixel too far right",
    "left": "the crop is one pixel too far left",
    "down": "the crop is one pixel too far down",
    "up": "the crop is one pixel too far up",
    "down right": "the crop is one pixel too far down and right",
}
_STATISTICS: Final = {
    "none": "no mean and std were applied",
    "mean only": "the mean was taken off, and nothing divided by std",
    "std only": "it was divided by std, and no mean taken off",
    "exchanged": "mean and std are exchanged",
    "reversed": "mean and std are in the order blue, green, red",
    "added": "the mean was added, not taken off",
    "multiplied": "it was multiplied by std, not divided",
    "imagenet": "mean and std are ImageNet's",
    "inception": "mean and std are 0.5 (the scale from -1 to 1)",
    "clip": "mean and std are CLIP's",
    "caffe": "Caffe's means were taken off, on the scale from 0 to 255",
}


def drawn_deviations(drawing: Drawing) -> tuple[Deviation, ...]:
    """Other ways to draw a picture; those that nothing in the picture can tell apart are left out."""
    size, wanted = drawing.size, drawing.preprocessing
    return tuple(
        Deviation(STEPS[field], field, value, words, fix)
        for field, value, words, fix in (
            *_decoding(drawing),
            *_geometries(size, wanted),
            *_filters(wanted),
            *_crops(size),
        )
    )


Row = tuple[str, str, str, str]


def _decoding(drawing: Drawing) -> Iterator[Row]:
    if drawing.is_turned:
        fix = "turn the picture first: PIL.ImageOps.exif_transpose(image)"
        yield "orientation", "ignored", "the orientation that the camera recorded is ignored", fix
    fix = "keep the three colours: image.convert('RGB')"
    yield "colours", "grey", "the picture was turned into shades of grey", fix
    if drawing.has_alpha:
        fix = "drop transparency: image.convert('RGB')"
        yield "colours", "over white", "transparent parts were laid over white", fix
        yield "colours", "over black", "transparent parts were laid over black", fix


def _geometries(size: Size, wanted: Preprocessing) -> Iterator[Row]:
    cover = _text((int(size[0] / wanted.crop_pct), int(size[1] / wanted.crop_pct)))
    fix = f"resize so that the short side becomes {cover}, keeping proportions, then crop the middle {_text(size)}"
    for share in _MARGINS:
        if share != wanted.crop_pct:
            other = _text((int(size[0] / share), int(size[1] / share)))
            words = f"the short side became {other} (crop_pct {share:g}), not {cover} (crop_pct {wanted.crop_pct:g})"
            yield "geometry", f"crop_pct {share}", words, fix
    yield "geometry", "squash", f"the picture was stretched to {_text(size)}", fix
    if wanted.crop_pct != 1:
        yield "geometry", "squash-cover", f"the picture was stretched to {cover} before the crop", fix
        words = "the middle was cropped first, crop_pct of it, and then resized"
        yield "geometry", "crop-first-margin", words, fix
    yield "geometry", "crop-first", "the middle was cropped first and then resized", fix
    for fill, name in ((0, "black"), (114, "grey (114)"), (128, "grey (128)"), (255, "white")):
        words = f"the long side became {_text(size)} and the rest was filled with {name}"
        yield "geometry", f"letterbox {fill}", words, fix
    yield "geometry", "as-is", "the picture was cropped without a resize", fix
    for how, name in (("round", "rounded"), ("ceil", "rounded up")):
        words = f"size / crop_pct is {name}, not rounded down"
        yield "margin", how, words, f"round it down: the short side becomes {cover}"
        words = f"the longer side is {name}, not rounded down"
        yield "long", how, words, "round it down: int(short * long_of_picture / short_of_picture)"


def _filters(wanted: Preprocessing) -> Iterator[Row]:
    asked = wanted.interpolation
    fix = f"resize by {asked} with antialiasing: Pillow's, or torchvision's with antialias=True"
    for name, told in _FILTERS.items():
        if name != asked:
            yield "filter", name, f"the filter is {told}, not {asked}", fix
    fix = "resize the picture itself, before it becomes a float tensor"
    words = "it was resized in floating point, beyond 0 and 255 where the filter overshoots"
    yield "depth", "float", words, f"{fix}, or clip it"
    yield "depth", "clipped", "it was resized in floating point and not rounded to whole numbers", fix
    yield "depth", "truncated", "whole numbers after the resize are cut off, not rounded", "round before .astype(uint8)"


def _crops(size: Size) -> Iterator[Row]:
    fix = f"crop the middle: offset round((resized - size) / 2) for {_text(size)}"
    for value, words in _CROPS.items():
        yield "crop", value, words, fix
    yield "flip", "left to right", "left and right are exchanged", "leave training's flips out"
    yield "flip", "upside down", "it is upside down", "read rows from the top; leave training's flips out"
    yield "flip", "transposed", "rows and columns are exchanged", "from (H, W, 3) it is transpose(2, 0, 1)"


def channels(order: tuple[int, int, int]) -> Deviation | None:
    """The channels in another order; None for red, green, blue."""
    if order == (0, 1, 2):
        return None
    names = ", ".join(("red", "green", "blue")[index] for index in order)
    fix = "OpenCV reads blue, green, red: cv2.cvtColor(image, cv2.COLOR_BGR2RGB)"
    words = f"the channels are {names}, not red, green, blue"
    return Deviation(STEPS["channels"], "channels", "".join("RGB"[index] for index in order), words, fix)


def scaled_deviations(wanted: Preprocessing) -> tuple[Deviation, ...]:
    """Other ways to scale numbers."""
    mean, std = (tuple(round(value, 4) for value in each) for each in (wanted.mean, wanted.std))
    by_statistics = f"take off the mean {mean} and divide by {std}, in the order red, green, blue, on the scale 0 to 1"
    by_scale = "divide by 255 once, before mean and std"
    rows = [
        ("scale", "none", "nothing was divided by 255", by_scale),
        ("scale", "256", "it was divided by 256, not 255", by_scale),
        ("scale", "-1 to 1", "it was brought to the scale from -1 to 1, not 0 to 1", by_scale),
        ("scale", "twice", "it was divided by 255 twice (torchvision's ToTensor does it already)", by_scale),
        ("order", "before", "mean and std were applied before the division by 255", by_scale),
    ]
    for name, words in _STATISTICS.items():
        if STATISTICS.get(name) != (wanted.mean, wanted.std):
            rows.append(("statistics", name, words, by_statistics))
    for name in ("imagenet", "clip"):
        words = f"{_STATISTICS[name]}, in the order blue, green, red"
        rows.append(("statistics", f"{name}, reversed", words, by_statistics))
    return tuple(Deviation(STEPS[field], field, value, words, fix) for field, value, words, fix in rows)


def scaled_recipes(wanted: Preprocessing) -> Iterator[tuple[Scaled, tuple[Deviation, ...]]]:
    """Every way to scale numbers with what it deviates in, fewest deviations first."""
    by_field: dict[str, list[Deviation | None]] = {name: [None] for name in ("scale", "statistics", "order")}
    for each in scaled_deviations(wanted):
        by_field[each.field].append(each)
    every = (tuple(each for each in chosen if each is not None) for chosen in product(*by_field.values()))
    for deviations in sorted(every, key=len):
        yield replace(Scaled(), **{each.field: each.value for each in deviations}), deviations


def drawn_by(deviations: tuple[Deviation, ...]) -> Drawn:
    """The recipe with these steps done in another way."""
    return replace(Drawn(), **{each.field: each.value for each in deviations})


def _text(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
