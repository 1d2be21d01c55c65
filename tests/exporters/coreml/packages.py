"""Small Core ML packages, written by coremltools, and ways to damage them."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nextvit_exporters.coreml.loading import coremltools, heard, part
from nextvit_exporters.coreml.program import MODEL, WEIGHTS, WEIGHTS_SHA256
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.errors import BuildFailed, DeployError
from tests import harness

if importlib.util.find_spec("coremltools") is None:  # pragma: no cover - depends on the platform
    pytest.skip("coremltools has no wheel for this platform", allow_module_level=True)

LABELS = [f"label {index}" for index in range(12)]


class Tiny(nn.Module):
    """Images (B, 3, H, W) to logits (B, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.mix = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 12)

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.mix(torch.relu(self.conv(image)))).mean((2, 3)))
        return found


def tiny() -> Tiny:
    return harness.randomise(Tiny(), 0)


def image(**options: Any) -> Any:
    return coremltools().ImageType(**({"name": "image", "shape": (1, 3, 16, 16)} | options))


def tensor(**options: Any) -> Any:
    return coremltools().TensorType(**({"name": "image", "shape": (1, 3, 16, 16)} | options))


def convert(target: str = "iOS16", given: Any = None, *, open_sizes: bool = False, **options: Any) -> Any:
    """What coremltools makes of ``tiny``; not saved yet."""
    package = coremltools()
    axis = torch.export.Dim.DYNAMIC
    with heard():
        program = torch.export.export(
            tiny(), (torch.rand(1, 3, 16, 16),), dynamic_shapes=({2: axis, 3: axis},) if open_sizes else None
        ).run_decompositions({})
        return package.convert(
            program,
            inputs=[image() if given is None else given],
            minimum_deployment_target=getattr(package.target, target),
            skip_model_load=True,
            **options,
        )


def classifier(target: str = "iOS16", labels: list[Any] | None = None) -> Any:
    return convert(target, classifier_config=coremltools().ClassifierConfig(labels or LABELS))


def from_mil(function: Callable[..., Any], *specs: tuple[int, ...], target: str = "iOS16") -> Any:
    """What coremltools makes of a function of MIL's builder, called with float32 tensors of these shapes."""
    package, builder = coremltools(), part("converters.mil.mil").Builder
    version = getattr(package.target, target)
    with heard():
        program = builder.program(
            input_specs=[builder.TensorSpec(shape=each) for each in specs], opset_version=version
        )(function)
        return package.convert(
            program, minimum_deployment_target=version, skip_model_load=True, pass_pipeline=package.PassPipeline.EMPTY
        )


def save(model: Any, path: Path) -> Path:
    with heard():
        model.save(str(path))
    return path


def edit(package: Path, change: Callable[[Any], object]) -> None:
    """Change the message that a package holds."""
    file = package / MODEL
    model = part("proto.Model_pb2").Model.FromString(file.read_bytes())
    change(model)
    file.write_bytes(model.SerializeToString(deterministic=True))


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of images that knows the hash of its weights; not to be changed."""
    model = classifier()
    path = save(model, tmp_path_factory.mktemp("sound") / "tiny.mlpackage")
    digest = hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest()
    edit(path, lambda m: m.description.metadata.userDefined.update({WEIGHTS_SHA256: digest}))
    return path


@pytest.fixture
def package(sound: Path, tmp_path: Path) -> Path:
    """A copy of the sound one, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / sound.name))


def refused(path: Path, kind: type[DeployError] = BuildFailed) -> str:
    with pytest.raises(kind) as refusal:
        read_package(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    return message.removeprefix(f"{path}: ")
