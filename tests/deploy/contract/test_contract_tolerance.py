"""Correct pipelines are as far from the contract as the tolerances' docstrings say, and no farther."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2  # type: ignore[import-untyped]

from nextvit_deploy.contract.given import test_picture as make_picture
from nextvit_deploy.contract.search import search
from nextvit_deploy.contract.steps import Steps, Values
from nextvit_deploy.contract.trial import MEAN_TOLERANCE, TOLERANCE, Trial, fits
from nextvit_models.preprocessing import Preprocessing

WANTED = Preprocessing(image_size=64, crop_pct=0.875)
LARGER = Preprocessing(image_size=224, crop_pct=0.875)
SHRINKS: Final = "shrinks"
ENLARGES: Final = "enlarges"
HARD: Final = "black and white"


def picture(kind: str) -> Image.Image:
    if kind != HARD:
        return make_picture() if kind == SHRINKS else make_picture().resize((150, 200))
    either = np.random.default_rng(1).choice([0, 255], (90, 80, 3))
    return Image.fromarray(either.astype(np.uint8))


def run(way: str, wanted: Preprocessing, kind: str) -> Values:
    """The tensor that torchvision makes, cutting Pillow's images or tensors of a type."""
    side, filters = int(wanted.image_size / wanted.crop_pct), v2.InterpolationMode(wanted.interpolation)
    cut = [v2.Resize(side, filters, antialias=True), v2.CenterCrop(wanted.image_size)]
    scale = v2.ToDtype(torch.float64 if way == "float64" else torch.float32, scale=True)
    steps = {"pil": [*cut, v2.ToImage(), scale], "uint8": [v2.ToImage(), *cut, scale]}
    order = steps.get(way, [v2.ToImage(), scale, *cut])
    tensor = v2.Compose([*order, v2.Normalize(wanted.mean, wanted.std)])(picture(kind))
    return np.asarray(tensor.numpy(), np.float64)


@pytest.mark.parametrize(
    ("way", "kind", "filters", "largest"),
    [
        ("pil", SHRINKS, "bicubic", 0.0),
        ("pil", ENLARGES, "bilinear", 0.0),
        ("uint8", SHRINKS, "bicubic", 1.0),
        ("uint8", SHRINKS, "bilinear", 1.0),
        ("uint8", ENLARGES, "bicubic", 2.0),
        ("uint8", ENLARGES, "lanczos", 2.0),
        ("uint8", HARD, "bicubic", 1.0),
        ("float32", SHRINKS, "bilinear", 1.0),
        ("float64", ENLARGES, "bilinear", 1.0),
        ("float32", SHRINKS, "bicubic", 0.01),
        ("float64", HARD, "bicubic", 0.01),
        ("float32", HARD, "lanczos", 0.01),
        ("float32", ENLARGES, "lanczos", 0.01),
    ],
)
def test_correct_pipelines_agree(way: str, kind: str, filters: str, largest: float) -> None:
    wanted = replace(LARGER if kind == ENLARGES else WANTED, interpolation=filters)
    tensor = run(way, wanted, kind)
    off = Trial(tensor, picture(kind), wanted, ()).off(Steps(filter=filters))
    assert off.max() <= largest + 1e-4 < TOLERANCE
    assert off.max() >= 0.75 * largest or largest == 0.01, "the stated figure is too large"
    assert off.mean() <= 0.29 < MEAN_TOLERANCE
    assert search(tensor, "CHW", picture(kind), wanted).agrees


def test_both_limits_count() -> None:
    one = np.zeros((3, 8, 8))
    one[0, 0, 0] = TOLERANCE
    assert fits(one)
    assert not fits(one * 1.01)
    assert not fits(np.full((3, 8, 8), MEAN_TOLERANCE * 1.01))
