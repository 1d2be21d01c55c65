"""What the tests of INT8 commands share: each artefact made once, pictures that are not judged, and planted faults."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from nextvit_deploy.calibrate import split
from nextvit_deploy.data import Pictures, find_pictures
from nextvit_deploy.manifest import manifest_path
from nextvit_deploy.quantization import calibration_of
from nextvit_exporters.to_tensorrt import log_of, onnx_of
from nextvit_models.checkpoint import load_checkpoint
from nextvit_models.demo import DEMO_CHECKPOINT, DEMO_IMAGES
from tests.deploy.support import Exported, Json, call

FEW: Final = ("--calibration-size", "16")
"""As few pictures as calibration takes."""
needs_tensorrt: Final = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx has no wheel for this platform"
)
_BUILT: Final[dict[tuple[Path, tuple[str, ...]], Exported]] = {}


def exported(base: Path, command: str, *options: str | Path, status: int = 0) -> Exported:
    """``command`` with ``options``, run once below the session's folder ``base``, its tables shown."""
    key = base, (command, *map(str, options))
    if key not in _BUILT:
        folder = base / f"int8-{len(_BUILT)}"
        ran = call(command, "--output", folder, *options)
        assert ran.status == status, ran
        (manifest,) = folder.glob("*.json")
        _BUILT[key] = Exported(manifest.with_suffix(""), ran)
    return _BUILT[key]


def beside(path: Path) -> list[Path]:
    """The files of an INT8 export, an ONNX file or an engine."""
    files = [path, manifest_path(path), calibration_of(path)]
    return files if path.suffix == ".onnx" else [*files, onnx_of(path), log_of(path)]


def copied(made: Exported, folder: Path, *, without: tuple[Path, ...] = ()) -> Path:
    """A copy with what is beside it, free to be damaged; ``without`` some of it."""
    for file in beside(made.path):
        if file not in without:
            shutil.copy(file, folder)
    return folder / made.path.name


def questions(manifest: Json) -> dict[str, list[Json]]:
    """Checks by question."""
    found: dict[str, list[Json]] = {}
    for check in manifest["checks"]:
        found.setdefault(check["question"], []).append(check)
    return found


def is_proven(manifest: Json) -> bool:
    """Whether both questions are answered on every input: the same network, and INT8's noise, which is there."""
    answers = questions(manifest)
    assert list(answers) == ["same network", "precision cost"]
    assert manifest["spec"]["precision"] == "int8"
    for checks, (least, most) in zip(answers.values(), ((0.0, 1e-5), (1e-3, 1e-1)), strict=True):
        for check in checks:
            (comparison,) = check["comparisons"]
            assert check["verdict"] == "verified"
            assert least <= comparison["relative_rms"] <= most, check["inputs"]
    return bool(manifest["verdict"] == "verified")


def parted(base: Path) -> tuple[Path, Path, Path]:
    """The demo's pictures in class folders: 128 to calibrate on, the 232 others, and 20 of those; copied once."""
    known, unseen, few = (base / name for name in ("known", "unseen", "few"))
    if not known.exists():
        some, others = split(pictures_of(DEMO_IMAGES), 128)
        _copy(some, known)
        _copy(others, unseen)
        for each in sorted(unseen.iterdir()):
            (few / each.name).mkdir(parents=True)
            for picture in sorted(each.iterdir())[:2]:
                shutil.copy(picture, few / each.name)
    return known, unseen, few


def pictures_of(folder: Path, limit: int | None = None) -> Pictures:
    """The pictures of a folder, or so many of them, as the demo's checkpoint wants them."""
    return find_pictures(folder, limit, (64, 64), load_checkpoint(DEMO_CHECKPOINT).preprocessing)


def _copy(pictures: Pictures, folder: Path) -> None:
    for path, label in zip(pictures.paths, pictures.labels, strict=True):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / str(label))


def nudge_weight(model: onnx.ModelProto) -> None:
    """One whole number of one weight, by one."""
    codes = next(each for each in model.graph.initializer if each.data_type == onnx.TensorProto.INT8 and each.dims)
    values = numpy_helper.to_array(codes).copy()
    values.flat[0] -= 1 if values.flat[0] > 0 else -1
    codes.CopyFrom(numpy_helper.from_array(values, codes.name))


def stretch_step(model: onnx.ModelProto) -> None:
    """Steps of one activation half as long again."""
    to = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    step = next(each for each in model.graph.initializer if each.name == to.input[1])
    value = numpy_helper.to_array(step)
    step.CopyFrom(numpy_helper.from_array(np.asarray(1.5 * value, value.dtype), step.name))
