"""INT8 files that several tests look at, and the small networks that INT8's rules are shown on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from nextvit_exporters import to_onnx
from nextvit_exporters.quantize.calibration import Calibration
from nextvit_exporters.quantize.observe import Observer
from nextvit_exporters.quantize.placement import placement
from nextvit_exporters.quantize.quantized import quantize_graph
from nextvit_exporters.quantize_spec import QuantizeSpec
from nextvit_exporters.spec import ExportSpec, InputKind, Precision
from tests.exporters.exports import NANO, PROVENANCE, Exported, rewritten
from tests.exporters.passes_harness import make, pixels

INT8 = replace(
    NANO,
    precision=Precision.INT8,
    opset=20,
    consumer="tensorrt-10",
    quantize=QuantizeSpec(rest="fp16", method="percentile"),
)
BESIDE_FP32 = replace(INT8, quantize=QuantizeSpec(rest="fp32", method="percentile"))
Files = Callable[[ExportSpec], Exported]


def observed(graph: fx.GraphModule, *images: Tensor, method: str = "minmax") -> Calibration:
    """What batches of images tell of a graph, with sums over float64 numbers."""
    observer = Observer(graph, placement(graph), grams=False, dtype=torch.float64)
    for batch in images:
        observer.see(batch)
    return observer.result(method, "0" * 64, "0" * 64)


@cache
def calibrated(spec: ExportSpec) -> tuple[fx.GraphModule, Calibration]:
    """The graph of a spec behind its passes, and what eight images tell of it; both stay as they are."""
    graph = rewritten(make(spec.model), spec)
    assert spec.quantize is not None
    seen = pixels(8, 3, spec.height, spec.width, seed=21)
    if spec.input is not InputKind.NORMALIZED:
        seen = to_onnx.input_passes(spec)[0].adapt(seen)
    return graph, observed(graph, seen, method=spec.quantize.method)


def export_int8(spec: ExportSpec, folder: Path) -> Exported:
    """Build one file; its ``graph`` is the quantized one in float64."""
    graph, found = calibrated(spec)
    assert spec.quantize is not None
    quantized = quantize_graph(graph, spec.quantize, found)
    steps: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    module = to_onnx.lower(spec, quantized)
    artifact = to_onnx.build(spec, module, folder / "model.onnx", PROVENANCE, steps.append)
    return Exported(spec, artifact, quantized, tuple(steps))


class Residual(nn.Module):
    """(B, 3, H, W) to (B, 5): one tensor read by two convolutions and a sum, then tokens, then a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU()
        self.grouped, self.plain = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 1, bias=False)
        self.tokens, self.back = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = x + self.grouped(x) + self.plain(x)
        t = x.flatten(2).transpose(1, 2)
        t = self.back(torch.relu(self.tokens(t))) + t
        out: Tensor = self.head(t.mean(1))
        return out
