"""A comparison of preprocessings in words, for people and as JSON."""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.markup import escape

from nextvit_deploy.contract.given import Given
from nextvit_deploy.contract.search import Found
from nextvit_deploy.contract.steps import Steps, resized_short_side, side_of, statistics
from nextvit_deploy.contract.trial import FITTED, MEAN_TOLERANCE, TOLERANCE
from nextvit_models.preprocessing import Preprocessing, Triple

_NEAR: Final = 16
"""Steps of a pixel on average beyond which the closest steps would only mislead."""


def difference(step: str, found: Found, wanted: Preprocessing) -> str:
    """Which step differs, and what to do about it, in one sentence."""
    return f"{_yours(step, found, wanted)}; {_fix(step, wanted)}"


def named(steps: Steps, wanted: Preprocessing) -> str:
    """The steps that aren't the contract's, in a few words."""
    contract = Steps(filter=wanted.interpolation)
    return ", ".join(f"{each} {steps.value(each)}" for each in steps.differing(contract)) or "as the contract says"


def conclusion(found: Found) -> str:
    """The outcome in one line."""
    if found.finding:
        return f"differs from the checkpoint: {found.finding}"
    if found.agrees:
        return f"agrees with the checkpoint, {found.largest:.2f} of 255 apart at most"
    if found.explained:
        return f"differs from the checkpoint in: {', '.join(found.differing)}"
    return f"differs from the checkpoint, up to {found.from_contract:.0f} of 255, and no known steps explain it"


def as_record(found: Found, given: Given, wanted: Preprocessing) -> dict[str, object]:
    """The comparison for a machine to read."""
    return {
        "agrees": found.agrees,
        "explained": found.explained,
        "conclusion": conclusion(found),
        "contract": wanted.as_dict(),
        "differing": {each: difference(each, found, wanted) for each in found.differing},
        "steps": {each: found.steps.value(each) for each in Steps.__slots__},
        "tolerance": TOLERANCE,
        "mean_tolerance": MEAN_TOLERANCE,
        "largest": None if found.finding else found.largest,
        "mean": None if found.finding else found.mean,
        "largest_from_contract": None if found.finding else found.from_contract,
        "others": [named(each, wanted) for each in found.others],
        "unseen": [named(each, wanted) for each in found.unseen],
        "where": found.where,
        "notes": [*given.notes, *found.hints],
    }


def show_preproc(console: Console, found: Found, given: Given, wanted: Preprocessing) -> None:
    """The outcome, each differing step with its fix, and what the picture can't show."""
    _say(console, f"contract: {_contract(wanted)}")
    _say(console, conclusion(found))
    if found.explained:
        for step in found.differing:
            _say(console, f"  {step}: {difference(step, found, wanted)}")
        if not found.agrees:
            _say(console, f"  with that, {found.largest:.2f} of 255 apart at most (tolerance {TOLERANCE})")
    elif not found.finding:
        near = named(found.steps, wanted) if found.mean <= _NEAR else "nothing known comes near"
        _say(console, f"  closest: {near}, {found.mean:.1f} of 255 apart on average")
        _say(console, f"  where: {found.where}")
    for other in found.others:
        _say(console, f"  would explain it too: {named(other, wanted)}")
    for note in (*given.notes, *found.hints):
        _say(console, f"note: {note}")
    if found.unseen:
        _say(console, f"this picture can't show: {'; '.join(named(each, wanted) for each in found.unseen)}")


def _say(console: Console, line: str) -> None:
    console.print(escape(line), soft_wrap=True, highlight=False)


def _contract(wanted: Preprocessing) -> str:
    return (
        f"RGB, short side to {resized_short_side(wanted)} ({wanted.interpolation}, antialiased), centre "
        f"{wanted.image_size}, divide by 255, mean {wanted.mean}, std {wanted.std}"
    )


def _yours(step: str, found: Found, wanted: Preprocessing) -> str:
    value = found.steps.value(step)
    if step == "stats":
        return _stats(value, found, wanted)
    if step == "geometry":
        return _GEOMETRIES.get(value, f"short side resized to {side_of(value, wanted)}")
    said = {
        "filter": f"resized with {_FILTERS.get(value, value)}",
        "antialias": "resized without antialiasing",
        "crop": "placed at the top left corner" if value == "corner" else f"placed {value} of the centre",
        "flip": f"mirrored, {value}",
        "channels": "grey in all three channels" if value == "grey" else f"channels in the order {value}",
        "orientation": "the camera's orientation is ignored",
        "scale": {
            "none": "pixels not divided by 255",
            "twice": "pixels divided by 255 twice, or mean and std multiplied by 255 for pixels from 0 to 1",
            "1/127.5 - 1": "pixels scaled to -1 to 1",
            "1/256": "pixels divided by 256",
        }.get(value, ""),
        "layout": {
            "HWC": "laid out as height, width, channels",
            "CWH": "laid out as channels, width, height",
        }.get(value, "height, width, channels reshaped to channels, height, width, which scrambles the picture"),
    }
    return said[step]


def _stats(value: str, found: Found, wanted: Preprocessing) -> str:
    mean, std = found.fitted if value == FITTED and found.fitted else statistics(value, wanted)
    values = f"(x - {_short(mean)}) / {_short(std)}"
    if value == FITTED:
        inverted = ", which inverts it" if max(std) < 0 else ""
        return f"normalised as {values}{inverted}, where x is a pixel from 0 to 1 and no known mean and std fit"
    return {
        "none": "not normalised",
        "no std": "the mean is subtracted, but not divided by std",
        "no mean": "divided by std, but no mean is subtracted",
        "swapped": "mean and std are swapped",
        "reversed": "mean and std are in the order BGR",
        "mean reversed": "the mean is in the order BGR, std in RGB",
        "std reversed": "std is in the order BGR, the mean in RGB",
        "before scaling": "mean and std, which are for pixels from 0 to 1, are applied before the division by 255",
        "0.5": f"normalised as {values}, as Inception is",
        "Caffe": f"normalised as {values}, as Caffe's networks are, without division by 255",
    }.get(value, f"normalised with {value}'s mean {_short(mean)} and std {_short(std)}")


_GEOMETRIES: Final = {
    "squash": "squashed to the square",
    "long side rounded": "the long side is rounded after the resize, not cut off to whole pixels",
    "crop first": "the centre is cropped before the resize",
    "crop fraction first": "the contract's fraction of the centre is cropped before the resize",
    "letterbox": "the long side resized to the size, the rest padded",
    "letterbox floored": "the long side resized to the size, the rest padded",
}
_FILTERS: Final = {
    "nearest": "nearest, as Pillow does",
    "floored nearest": "nearest, as PyTorch and OpenCV do",
    "area": "area, as OpenCV's INTER_AREA does",
}


def _short(values: Triple) -> str:
    return f"({', '.join(f'{each:.4g}' for each in values)})"


def _fix(step: str, wanted: Preprocessing) -> str:
    return {
        "filter": f"resize with {wanted.interpolation}",
        "antialias": "resize with antialias=True, or with Pillow",
        "geometry": f"resize the short side to {resized_short_side(wanted)} and keep the proportions",
        "flip": "leave random flips to training",
        "crop": f"crop the centre {wanted.image_size} x {wanted.image_size}, as torchvision's CenterCrop does",
        "channels": "convert to RGB",
        "orientation": "apply it first, with PIL.ImageOps.exif_transpose",
        "scale": "divide by 255 once, before mean and std",
        "stats": f"subtract mean {wanted.mean}, then divide by std {wanted.std}",
        "layout": "transpose to channels, height, width",
    }[step]
