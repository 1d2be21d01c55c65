"""The demo's pictures: a warm digit drawn over the blue ghost of another digit.

The 8x8 digits of scikit-learn are enlarged to 64x64 RGB. The digit to recognise is drawn in a warm ink; blue light
adds another digit, of another class, to the background. So the colours carry the answer: read the channels in the
wrong order and the ghost looks like the digit. Everything random is drawn from a ``torch.Generator``.

Source of the digits: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, doi 10.24432/C50P49, CC BY 4.0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from nextvit_models.errors import MissingExtra

CLASSES: Final = tuple("0123456789")
IMAGE_SIZE: Final = 64
HELD_OUT: Final = 360
"""Digits kept out of training: a fifth of the 1797."""

_SOURCE_MAX: Final = 16.0  # load_digits counts the dark pixels of a 4x4 block

# Lower and upper bound of each drawn colour, red, green, blue in 0..1.
_PAPER: Final = ((0.05, 0.30), (0.10, 0.40), (0.15, 0.40))
_INK: Final = ((0.75, 1.00), (0.30, 0.70), (0.05, 0.30))
_GHOST: Final = (0.30, 0.55)  # blue added to the paper


@dataclass(frozen=True, slots=True)
class Digits:
    """N digits: ``pixels`` (N, 8, 8) float32 in 0..1, ``labels`` (N,) int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Digits:
        """The digits at ``index``, (M,) int64."""
        return Digits(self.pixels[index], self.labels[index])


@dataclass(frozen=True, slots=True)
class Scenes:
    """What was drawn for N pictures: the digits, their ghosts (N, 8, 8) and the colours in 0..1.

    ``paper`` and ``ink`` are (N, 3, 1, 1), ``glow``, the blue of the ghost, is (N, 3, 1, 1) with zero red and green.
    """

    digits: Tensor
    ghosts: Tensor
    paper: Tensor
    ink: Tensor
    glow: Tensor


def load_split(seed: int) -> tuple[Digits, Digits]:
    """The training and the held-out digits, the same share of each class in both.

    Raises MissingExtra when scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingExtra("training the demo", "dev") from error
    source = load_digits()
    parts = train_test_split(
        source.images, source.target, test_size=HELD_OUT, stratify=source.target, random_state=seed
    )
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return (
        Digits((train_x / _SOURCE_MAX).float(), train_y.long()),
        Digits((test_x / _SOURCE_MAX).float(), test_y.long()),
    )


def draw_scenes(digits: Digits, pool: Digits, generator: torch.Generator) -> Scenes:
    """Colours for every digit, and a ghost from ``pool`` of another class than the digit's."""
    count = len(digits)
    ghosts = torch.randint(len(pool), (count,), generator=generator)
    while bool((same := pool.labels[ghosts] == digits.labels).any()):
        ghosts[same] = torch.randint(len(pool), (int(same.sum()),), generator=generator)
    blue = _uniform((_GHOST,), count, generator)
    return Scenes(
        digits=digits.pixels,
        ghosts=pool.pixels[ghosts],
        paper=_uniform(_PAPER, count, generator),
        ink=_uniform(_INK, count, generator),
        glow=torch.cat([torch.zeros(count, 2, 1, 1), blue], dim=1),
    )


def render(scenes: Scenes, digit_poses: Tensor | None = None, ghost_poses: Tensor | None = None) -> Tensor:
    """The pictures, (N, 3, 64, 64) float32 in 0..1; poses are (N, 2, 3) affine maps, upright by default."""
    ghost = _enlarge(scenes.ghosts, ghost_poses)
    digit = _enlarge(scenes.digits, digit_poses)
    behind = scenes.paper + ghost * scenes.glow
    return behind + digit * (scenes.ink - behind)


def render_upright(digits: Digits, pool: Digits, seed: int) -> Tensor:
    """The pictures as they are stored: upright, (N, 3, 64, 64) uint8."""
    scenes = draw_scenes(digits, pool, torch.Generator().manual_seed(seed))
    return (render(scenes) * 255.0).round().to(torch.uint8)


def render_augmented(digits: Digits, pool: Digits, generator: torch.Generator) -> Tensor:
    """Training pictures, (N, 3, 64, 64) float32: moved, in fresh colours, brighter or darker, with noise."""
    scenes = draw_scenes(digits, pool, generator)
    count = len(digits)
    pictures = render(scenes, _random_poses(count, generator), _random_poses(count, generator))
    contrast = _uniform(((0.85, 1.15),), count, generator)
    brightness = _uniform(((-0.08, 0.08),), count, generator)
    noise = torch.randn(pictures.shape, generator=generator) * 0.03
    return (pictures * contrast + brightness + noise).clamp(0.0, 1.0)


def write_pictures(folder: Path, pictures: Tensor, labels: Tensor) -> None:
    """PNG files ``folder/<class>/<nnn>.png`` from (N, 3, 64, 64) uint8, numbered within their class."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number, picture in enumerate(pictures[labels == label]):
            rows = picture.permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(rows).save(folder / name / f"{number:03d}.png", optimize=True)


def read_pictures(folder: Path) -> tuple[Tensor, Tensor]:
    """All pictures of the class folders, (N, 3, 64, 64) uint8, and their labels, (N,) int64, in order of path."""
    paths = sorted(folder.glob("*/*.png"))
    pictures = []
    for path in paths:
        with Image.open(path) as opened:
            pictures.append(torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1))
    return torch.stack(pictures), torch.tensor([CLASSES.index(path.parent.name) for path in paths])


def _enlarge(small: Tensor, poses: Tensor | None) -> Tensor:
    """(N, 8, 8) -> (N, 1, 64, 64), bicubic, kept in 0..1; outside the digit is empty."""
    if poses is None:
        poses = torch.eye(2, 3).expand(len(small), 2, 3)
    grid = functional.affine_grid(poses, [len(small), 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    large = functional.grid_sample(small[:, None], grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return large.clamp(0.0, 1.0)


def _random_poses(count: int, generator: torch.Generator) -> Tensor:
    """(N, 2, 3): up to 12 degrees of turn, a tenth of shear, 0.85 to 1.1 in size, an eighth of a side of shift."""
    turn, shear, size, across, down = _uniform(
        ((-math.pi / 15, math.pi / 15), (-0.1, 0.1), (1 / 1.1, 1 / 0.85), (-0.125, 0.125), (-0.125, 0.125)),
        count,
        generator,
    )[:, :, 0, 0].unbind(1)
    cos, sin = turn.cos() * size, turn.sin() * size
    return torch.stack([cos, shear * cos - sin, across, sin, shear * sin + cos, down], dim=1).view(count, 2, 3)


def _uniform(bounds: tuple[tuple[float, float], ...], count: int, generator: torch.Generator) -> Tensor:
    """(N, C, 1, 1) uniform draws, channel c between ``bounds[c]``."""
    low, high = torch.tensor(bounds).view(1, -1, 2, 1).unbind(2)
    drawn: Tensor = low + torch.rand(count, len(bounds), 1, generator=generator) * (high - low)
    return drawn.unsqueeze(-1)
