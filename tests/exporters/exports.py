"""ONNX files that several tests look at, each exported once a session, and how they are judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters import to_onnx
from nextvit_exporters.executors.onnx_runtime import OnnxRuntime
from nextvit_exporters.passes.base import run_passes
from nextvit_exporters.passes.normalize_input import NormalizeInput
from nextvit_exporters.spec import Artifact, ExportSpec, InputKind, Precision
from nextvit_models.preprocessing import Preprocessing
from tests.exporters.passes_harness import make, pixels

Floats = NDArray[np.float32]
NANO: Final = ExportSpec(
    model="nano",
    num_classes=10,
    target="onnx",
    precision=Precision.FP32,
    height=64,
    width=64,
    batch=2,
    opset=18,
    preprocessing=Preprocessing(),
)
PROVENANCE: Final[Mapping[str, object]] = {"nextvit-deploy": "0", "answer": [42]}


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """A file, and what it was made from."""

    spec: ExportSpec
    artifact: Artifact
    graph: fx.GraphModule
    """Behind the passes, float64."""
    steps: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.artifact.path

    @property
    def proto(self) -> onnx.ModelProto:
        """Read afresh, so that a test may damage it."""
        return onnx.load(str(self.path))

    def expected(self, normalised: Tensor) -> Floats:
        """PyTorch carrying the file's constants."""
        (result,) = g.execute(to_onnx.reference(self.spec, self.graph), self.feed(normalised))
        return np.asarray(result.numpy(), np.float32)

    def feed(self, normalised: Tensor) -> Tensor:
        """Normalised float64 images as the file wants them."""
        if self.spec.input is InputKind.NORMALIZED:
            return normalised.float()
        mean, std = self.spec.preprocessing.mean, self.spec.preprocessing.std
        last = self.spec.input is InputKind.UINT8_NHWC
        raw = NormalizeInput(mean, std, uint8=self.spec.input.is_uint8, channels_last=last).adapt(normalised)
        return raw if self.spec.input.is_uint8 else raw.float()

    def run(self, normalised: Tensor, mode: str = "exact", path: Path | None = None) -> Floats:
        """What ONNX Runtime makes of the file, or of a damaged copy at ``path``."""
        with OnnxRuntime(path or self.path, mode) as executor:
            result = executor.run({to_onnx.INPUT: self.feed(normalised).numpy()})
        assert list(result) == [to_onnx.OUTPUT]
        return np.asarray(result[to_onnx.OUTPUT], np.float32)


Export = Callable[[ExportSpec], Exported]


def probe(spec: ExportSpec, seed: int = 1) -> Tensor:
    """Whole pixels at the spec's shape, normalised, float64."""
    return pixels(spec.batch, 3, spec.height, spec.width, seed=seed)


def rewritten(model: nn.Module, spec: ExportSpec, side: int = 64) -> fx.GraphModule:
    """The graph behind the target's passes; ``side`` is the size they are certified at."""
    graph, records = run_passes(g.trace(model), to_onnx.passes_for(spec), [pixels(2, 3, side, side, seed=9)])
    assert all(record.certified for record in records)
    return graph


def export(spec: ExportSpec, folder: Path) -> Exported:
    """Build one file; ``spec.model`` names one of the harness's models."""
    graph = rewritten(make(spec.model), spec)
    steps: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    artifact = to_onnx.build(spec, to_onnx.lower(spec, graph), folder / "model.onnx", PROVENANCE, steps.append)
    return Exported(spec, artifact, graph, tuple(steps))


def original(spec: ExportSpec, normalised: Tensor) -> Floats:
    """What the model itself says, in float32."""
    with torch.no_grad():
        return np.asarray(make(spec.model)(normalised.float()).numpy(), np.float32)


def relative_rms(actual: Floats, expected: Floats) -> float:
    """Root mean square of the difference over that of the expectation; infinite for NaN and Inf."""
    assert actual.shape == expected.shape
    assert np.isfinite(expected).all()
    if not np.isfinite(actual).all():
        return float("inf")
    difference = actual.astype(np.float64) - expected.astype(np.float64)
    return float(np.sqrt(np.mean(difference**2) / np.mean(expected.astype(np.float64) ** 2)))
