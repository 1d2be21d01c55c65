"""Next-ViT nano written as packages by processes of their own, and small models converted here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Final

import pytest
import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters import to_coreml
from nextvit_exporters.coreml.convert import to_model
from nextvit_exporters.coreml.package import write_package
from nextvit_exporters.coreml.program import Package
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.coreml_spec import About, CoreMLSpec
from nextvit_exporters.executors.base import Array
from nextvit_exporters.passes.base import run_passes
from nextvit_exporters.spec import ExportSpec, InputKind, Precision
from nextvit_models.config import VARIANTS
from nextvit_models.nextvit import NextViT
from nextvit_models.preprocessing import Preprocessing
from tests import harness

if importlib.util.find_spec("coremltools") is None:  # pragma: no cover - depends on the platform
    pytest.skip("coremltools has no wheel for this platform", allow_module_level=True)

ROOT: Final = Path(__file__).resolve().parents[3]
ABOUT: Final = About("A. Author", "Apache-2.0", "4.5", "What is in the picture")
LABELS: Final = tuple(f"label {9 - index}" for index in range(10))
"""Against the alphabet, so that sorting them would show."""
SPEC: Final = ExportSpec(
    "nano",
    10,
    "coreml",
    Precision.FP16,
    64,
    64,
    1,
    18,
    Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), image_size=64),
    LABELS,
    InputKind.IMAGE,
    coreml=CoreMLSpec(16, about=ABOUT),
)
LOGITS: Final = replace(SPEC, input=InputKind.NORMALIZED, coreml=CoreMLSpec(16, "logits"))
SPECS: Final = {
    "fp16": SPEC,
    "lut4": replace(SPEC, coreml=CoreMLSpec(16, about=ABOUT, weights="lut4")),
    "w8a8": replace(SPEC, coreml=CoreMLSpec(17, about=ABOUT, activations="int8")),
}
PROVENANCE: Final = {"nextvit-deploy": "0", "answer": [42]}
SIDE: Final = 32


@cache
def graph() -> fx.GraphModule:
    """Nano behind the passes for pictures, float64; not to be changed."""
    model = harness.randomise(NextViT(VARIANTS["nextvit_nano"], 10), seed=0)
    image = harness.images(1, 3, 64, 64, seed=1, dtype=torch.float64)
    made, records = run_passes(g.trace(model), to_coreml.passes_for(SPEC), [image])
    assert all(record.certified for record in records)
    return made


def pictures(count: int = 2) -> Array:
    """(N, H, W, 3) uint8."""
    pixels = harness.images(count, 64, 64, 3, seed=5) * 60 + 120
    found: Array = pixels.round().clamp(0, 255).byte().numpy()
    return found


def write(names: Iterable[str], folder: Path) -> None:
    """Build ``SPECS`` of these names in ``folder``."""
    for name in names:
        spec = SPECS[name]
        path = folder / f"{name}.mlpackage"
        to_coreml.build(spec, to_coreml.lower(spec, graph()), path, PROVENANCE, lambda _: None, pictures())


_SCRIPT: Final = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from tests.exporters.coreml.built import write
write(sys.argv[2:], Path(sys.argv[1]))
"""


def started(folder: Path, seed: int, names: Iterable[str] = SPECS) -> subprocess.Popen[str]:
    """A process that writes packages to ``folder``: its own working directory, temporary folder and hashes."""
    home, temporary = folder / f"working-{seed}", folder / f"temporary-{seed}"
    for each in (home, temporary):
        each.mkdir(parents=True)
    paths = os.pathsep.join(str(ROOT / each) for each in (".", "models", "exporters"))
    environment = {"PYTHONHASHSEED": str(seed), "TMPDIR": str(temporary), "PYTHONPATH": paths, "HOME": str(home)}
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(folder), *names],
        cwd=home,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Attends(nn.Module):
    """A convolution of stride two, and attention between all positions of its map; (B, 3, H, W) in, a map out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.q, self.k = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        q, k, v = self.q(x).flatten(2), self.k(x).flatten(2), x.flatten(2)
        weights = (q.transpose(1, 2) @ k).softmax(-1)
        out: Tensor = self.last(x + (v @ weights).reshape(x.shape))
        return out


class Classes(nn.Module):
    """(B, 3, H, W) to logits (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.conv(x)).mean((2, 3)))
        return out


def toy(model: nn.Module) -> fx.GraphModule:
    """A small model as a float64 graph, every number of it random."""
    return g.trace(harness.randomise(model, seed=0).double())


def toy_spec(asked: CoreMLSpec, batch: int = 1) -> ExportSpec:
    """What a toy is converted to: ``SIDE`` pixels, tensors in."""
    return ExportSpec(
        "toy",
        3,
        "coreml",
        Precision.FP16,
        SIDE,
        SIDE,
        batch,
        18,
        Preprocessing(image_size=SIDE),
        dynamic_size=bool(asked.sizes or asked.flexible),
        coreml=asked,
    )


def saved(spec: ExportSpec, made: fx.GraphModule, folder: Path) -> Package:
    """A graph as a package, without a log."""
    path = folder / "toy.mlpackage"
    path.mkdir()
    write_package(to_model(spec, to_coreml.lower(spec, made)), path, ABOUT, {}, {})
    return read_package(path)
