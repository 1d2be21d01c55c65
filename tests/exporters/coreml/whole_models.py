"""Next-ViT nano, unchanged, as coremltools converts it, and how far what it gives is from PyTorch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nextvit_exporters.coreml.loading import coremltools, heard
from nextvit_exporters.coreml.program import Constant, Operation, Package
from nextvit_exporters.executors.base import Array
from nextvit_exporters.executors.mil import MilReference, Mode
from tests.exporters.passes_harness import nano

if importlib.util.find_spec("coremltools") is None:  # pragma: no cover - depends on the platform
    pytest.skip("coremltools has no wheel for this platform", allow_module_level=True)

SIZE: Final = 64
LABELS: Final = tuple(f"label {index}" for index in range(10))
SCALE: Final = 1 / 64
BIAS: Final = (-1.9, -1.8, -1.7)


class Pictured(nn.Module):
    """Nano behind a mean for each colour, with a softmax: what coremltools puts in front is done with ``preprocessed``.

    (1, 3, H, W) to probabilities (1, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = nano()

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.model(image)
        return found.softmax(1)


def preprocessed(picture: Array) -> Tensor:
    """A picture (1, H, W, 3) as ``ImageType(scale=SCALE, bias=BIAS)`` hands it to the model."""
    pixels = torch.from_numpy(np.array(picture)).float().permute(0, 3, 1, 2)
    return pixels * SCALE + torch.tensor(BIAS).reshape(1, 3, 1, 1)


def picture(height: int = SIZE, width: int = SIZE, seed: int = 0) -> Array:
    """uint8 (1, H, W, 3): large shapes and grain, the colours differ."""
    random = np.random.default_rng(seed)
    coarse = random.integers(30, 220, (1, 4, 4, 3)).repeat(-(-height // 4), 1).repeat(-(-width // 4), 2)
    grain = random.integers(-30, 30, (1, height, width, 3))
    found: Array = np.clip(coarse[:, :height, :width] + grain, 0, 255).astype(np.uint8)
    return found


@cache
def exported(model: Callable[[], nn.Module], batch: int, *, open_sizes: bool) -> Any:
    axis = torch.export.Dim.DYNAMIC
    example = torch.rand(batch, 3, SIZE, SIZE)
    with heard():
        program = torch.export.export(
            model().eval(), (example,), dynamic_shapes=({2: axis, 3: axis},) if open_sizes else None
        )
        return program.run_decompositions({})


def converted(
    given: Any,
    release: str = "iOS16",
    precision: str = "FLOAT32",
    model: Callable[[], nn.Module] = nano,
    batch: int = 1,
    *,
    open_sizes: bool = False,
    **options: Any,
) -> Any:
    """What coremltools makes of the model, not saved yet."""
    ct = coremltools()
    program = exported(model, batch, open_sizes=open_sizes)
    with heard():
        return ct.convert(
            program,
            inputs=[given],
            minimum_deployment_target=getattr(ct.target, release),
            compute_precision=getattr(ct.precision, precision),
            skip_model_load=True,
            **options,
        )


def tensors(*shape: Any) -> Any:
    return coremltools().TensorType(name="image", shape=shape or (1, 3, SIZE, SIZE), dtype=np.float32)


def logits() -> dict[str, Any]:
    return {"outputs": [coremltools().TensorType(name="logits", dtype=np.float32)]}


@cache
def plain(release: str, precision: str) -> Any:
    """Nano from one tensor to its logits; not to be changed."""
    return converted(tensors(), release, precision, **logits())


def saved(model: Any, path: Path) -> Path:
    with heard():
        model.save(str(path))
    return path


def ran(package: Path | Package, mode: Mode, image: Array) -> dict[str, Array]:
    with MilReference(package, mode) as executor:
        return executor.run({"image": image})


def distance(got: Array, expected: Array) -> float:
    """Relative root mean square, in float64."""
    difference = got.astype(np.float64) - expected.astype(np.float64)
    return float(np.sqrt((difference**2).mean() / (expected.astype(np.float64) ** 2).mean()))


def changed(package: Package, changes: Mapping[str, Callable[[Constant], Constant]]) -> Package:
    """The package with some constants, by name, replaced."""
    operations = tuple(
        replace(each, attributes={"val": changes[each.outputs[0].name](each.attributes["val"])})
        if each.kind == "const" and each.outputs[0].name in changes
        else each
        for each in package.program.operations
    )
    return replace(package, program=replace(package.program, operations=operations))


def rounded(package: Package) -> Package:
    """The package with every float32 constant rounded to what float16 holds, its type as before."""

    def half(held: Constant) -> Constant:
        return replace(held, data=held.data.astype(np.float16).astype(np.float32))

    floats = {each.outputs[0].name for each in package.program.operations if _is_float(each)}
    return changed(package, dict.fromkeys(floats, half))


def _is_float(operation: Operation) -> bool:
    return operation.kind == "const" and operation.attributes["val"].type.dtype == "float32"
