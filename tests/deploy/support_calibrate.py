"""What the tests of calibration share: a small network, and pictures for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import fx, nn

from nextvit_deploy.data import Pictures, find_pictures, noise_images
from nextvit_exporters import graph as g
from nextvit_exporters.quantize_spec import QuantizeSpec
from nextvit_exporters.spec import ExportSpec, Precision
from nextvit_models.preprocessing import Preprocessing
from tests.harness import randomise

SIDE = 32
STEPS = Preprocessing(crop_pct=1.0, image_size=SIDE)
SPEC = ExportSpec(
    model="small",
    num_classes=5,
    target="onnx",
    precision=Precision.INT8,
    height=SIDE,
    width=SIDE,
    batch=1,
    opset=21,
    preprocessing=STEPS,
    quantize=QuantizeSpec(method="percentile"),
)


def network(seed: int = 3) -> fx.GraphModule:
    layers = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=4), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)
    )
    return g.trace(randomise(layers, seed=seed))


def pixels_of(seed: int, side: int = SIDE) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = noise_images(1, (side, side), STEPS, seed).pixels[0].transpose(1, 2, 0)
    return pixels


def folder_of(path: Path, count: int = 24) -> Path:
    """Different pictures with shapes in them, in two classes."""
    for seed in range(count):
        place = path / f"{seed % 2}" / f"{seed:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_of(seed)).save(place)
    return path


def of(folder: Path, limit: int | None = None) -> Pictures:
    return find_pictures(folder, limit, (SIDE, SIDE), STEPS)


def silent(_: str) -> None:
    """For whom progress is nothing."""
