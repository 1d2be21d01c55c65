"""Cuts to make bundles of: the tensors of a sound artefact around one place, and those of a damaged copy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import numpy_helper

from nextvit_deploy.bisect.bundle import Bundle, write_bundle
from nextvit_deploy.bisect.bundle_trial import relative_rms
from nextvit_deploy.bisect.cut import Cut
from nextvit_deploy.bisect.record import Bisection, Parting, Series
from nextvit_exporters.executors.base import Array, Arrays, Traceable
from nextvit_exporters.executors.onnx_runtime import OnnxRuntime
from nextvit_exporters.files import sha256_of
from nextvit_exporters.targets import SAME_NETWORK

ENDS = ("add_7", "relu_11")
"""Around a map and its ReLU in the demo's third stage."""
MODULE = "features.3.mlp.conv1"


class Opened(Traceable, AbstractContextManager[Any], Protocol):
    """An executor that shows what it computes."""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """All that ``write_bundle`` takes but the folder."""

    artefact: Path
    cut: Cut
    bisection: Bisection

    def write(self, folder: Path) -> Bundle:
        return write_bundle(folder, self.artefact, self.cut, self.bisection, lambda _: None)


def scale_bias(model: onnx.ModelProto) -> None:
    """Half as much again of what one map adds."""
    (tensor,) = (each for each in model.graph.initializer if each.name == f"{MODULE}.bias")
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((values * 1.5).astype(values.dtype), tensor.name))


def traced(executor: Opened, runs: Sequence[Arrays], names: Sequence[str]) -> dict[str, Array]:
    """Tensors by name, those of all runs one after the other."""
    found: dict[str, list[Array]] = {name: [] for name in names}

    def see(name: str, values: Array) -> None:
        if name in found:
            found[name].append(np.array(values))

    with executor:
        for each in runs:
            executor.trace(each, see)
    return {name: np.concatenate(values) for name, values in found.items()}


def images_for(path: Path, runs: int) -> list[Arrays]:
    """Inputs of an ONNX file, of order one, or pixels where it reads whole numbers."""
    (given,) = onnx.load(str(path), load_external_data=False).graph.input
    shape = [axis.dim_value for axis in given.type.tensor_type.shape.dim]
    random = np.random.default_rng(0)
    if given.type.tensor_type.elem_type == onnx.TensorProto.UINT8:
        return [{given.name: random.integers(0, 255, shape, np.uint8)} for _ in range(runs)]
    return [{given.name: random.standard_normal(shape).astype(np.float32)} for _ in range(runs)]


def onnx_case(sound: Path, artefact: Path, mode: str, runs: int = 1) -> Case:
    """What goes in and what is expected come from ``sound``, what the artefact gives from itself."""
    images = images_for(sound, runs)
    right = traced(OnnxRuntime(sound, mode), images, ENDS)
    wrong = traced(OnnxRuntime(artefact, mode), images, ENDS)
    return case(artefact, right, wrong, ENDS)


def case(
    artefact: Path,
    right: Mapping[str, Array],
    wrong: Mapping[str, Array],
    ends: tuple[str, str],
    question: str = SAME_NETWORK,
    tolerance: float = 1e-5,
) -> Case:
    start, end = ends
    error = relative_rms(wrong[end], right[end])
    parting = Parting(MODULE, ("Conv", "Relu"), "Conv", error, 0.0, (), "it adds something else")
    cut = Cut(parting, {start: wrong[start]}, {end: right[end]}, {end: wrong[end]}, parting.operations)
    series = Series(question, "an executor", "PyTorch", tolerance, (), (parting,))
    return Case(artefact, cut, Bisection(artefact.name, sha256_of(artefact), (series,)))


def repro(bundle: Bundle) -> tuple[int, str]:
    """What ``repro.py`` says, in a process that knows nothing of this project."""
    ran = subprocess.run(
        [sys.executable, "-I", str(bundle.folder / "repro.py")], capture_output=True, text=True, check=False
    )
    assert ran.stderr == ""
    return ran.returncode, ran.stdout
