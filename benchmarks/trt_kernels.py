"""Kernels and memory of the FP16 engine that TensorRT-RTX builds for SM75 (T4), by which passes ran before.

Built on this machine without a GPU, and not run: kernels are the launches per image, activations the memory that an
execution context takes. "norms folded" is the usual route, a merge of every BatchNorm. Judged is ``fewest-kernels``
on Next-ViT-S at 224.

    python -m benchmarks.trt_kernels [--variant small] [--size 224]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import fx

from nextvit_exporters import graph as g
from nextvit_exporters import to_onnx
from nextvit_exporters.engine_spec import EngineSpec, Range
from nextvit_exporters.errors import MissingExtra
from nextvit_exporters.opsets import opset_for
from nextvit_exporters.passes import sets
from nextvit_exporters.passes.base import Pass, run_passes
from nextvit_exporters.passes.channel_first_attention import ChannelFirstAttention
from nextvit_exporters.passes.move_value_bias import MoveValueBias
from nextvit_exporters.spec import ExportSpec, Precision
from nextvit_exporters.tensorrt.backends import BACKENDS, Module, load
from nextvit_exporters.tensorrt.builder import build_engine
from nextvit_exporters.tensorrt.kernels import check_dtypes, read_log
from nextvit_models.config import VARIANTS
from nextvit_models.nextvit import NextViT
from nextvit_models.preprocessing import Preprocessing
from tests.harness import images, randomise

KERNELS_BOUND = 150
ACTIVATION_BOUND = 11.6
JUDGED = ("small", 224)
CONSUMER = "tensorrt-rtx-1"
RTX = BACKENDS["tensorrt-rtx"]
_NORMS = frozenset({"strip-train-only", "fold-conv-norm", "fold-pre-norm", "fold-head-norm"})


@dataclass(frozen=True, slots=True)
class Engine:
    """What the builder says of an engine: launches, bytes, seconds."""

    kernels: int
    activations: int
    weights: int
    size: int
    seconds: float


def main() -> int:
    """Build one engine a list of passes, print the table, and judge ``fewest-kernels``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=("small", "base", "large"), default="small")
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    try:
        module = load(RTX)
    except MissingExtra as error:
        print(error, file=sys.stderr)
        return 1
    name, size = f"nextvit_{arguments.variant}", arguments.size
    spec = ExportSpec(
        name, 1000, "onnx", Precision.FP16, size, size, 1, opset_for(CONSUMER), Preprocessing(), consumer=CONSUMER
    )
    graph = g.trace(randomise(NextViT(VARIANTS[name]), seed=0))
    print(f"{name} at {size}, batch 1, FP16; TensorRT-RTX {module.__version__} for SM75; built here, not run")
    print(f"{'passes':34}{'kernels':>8}{'activations':>13}{'weights':>10}{'engine':>10}{'GMACs':>8}{'build':>8}")
    engines = {}
    for route, passes in routes().items():
        rewritten, macs = _rewrite(graph, passes, spec)
        engines[route] = engine = _build(spec, module, _onnx(spec, rewritten))
        megabytes = f"{engine.activations / 1e6:>10.2f} MB{engine.weights / 1e6:>7.1f} MB{engine.size / 1e6:>7.1f} MB"
        print(f"{route:34}{engine.kernels:>8}{megabytes}{macs / 1e9:>8.3f}{engine.seconds:>6.1f} s", flush=True)
    if (arguments.variant, size) == JUDGED:
        _judge(engines["fewest-kernels"])
    return 0


def routes() -> dict[str, tuple[Pass, ...]]:
    """The lists of passes to compare, by the name in the table."""
    fewest = sets.FEWEST_KERNELS
    place = 1 + next(i for i, each in enumerate(fewest) if each.name == MoveValueBias().name)
    return {
        "nothing folded": (),
        "norms folded": tuple(each for each in fewest if each.name in _NORMS),
        **sets.TENSORRT,
        "fewest-kernels + channel-first": (*fewest[:place], ChannelFirstAttention(), *fewest[place:]),
    }


def _rewrite(graph: fx.GraphModule, passes: Sequence[Pass], spec: ExportSpec) -> tuple[fx.GraphModule, int]:
    """The graph after the passes, each certified at the full size, and its multiply-accumulates."""
    image = images(*spec.input_shape, seed=1, dtype=torch.float64)
    rewritten, records = run_passes(graph, passes, [image])
    if undone := [record.name for record in records if not record.certified]:
        raise SystemExit(f"{', '.join(undone)} moved the outputs and was rolled back")
    g.measure(rewritten, image)
    return rewritten, g.count_macs(rewritten)


def _onnx(spec: ExportSpec, graph: fx.GraphModule) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        to_onnx.build(spec, to_onnx.lower(spec, graph), path, {}, lambda _: None)
        return path.read_bytes()


def _build(spec: ExportSpec, module: Module, model: bytes) -> Engine:
    """Build for SM75, and read the engine's layers and memory from what the builder logs."""
    batch, side = Range.of(spec.batch), Range.of(spec.height)
    asked = replace(spec, engine=EngineSpec(RTX.name, "t4", batch, side, side))
    start = time.perf_counter()
    built = build_engine(RTX, module, model, asked, lambda _: None)
    seconds = time.perf_counter() - start
    report = read_log(built.log.lines())
    check_dtypes(report, spec.precision)
    return Engine(len(report.kernels), report.activation or 0, report.weights or 0, len(built.data), seconds)


def _judge(engine: Engine) -> None:
    megabytes = engine.activations / 1e6
    kernels, memory = engine.kernels <= KERNELS_BOUND, megabytes <= ACTIVATION_BOUND
    print(f"fewest-kernels: {engine.kernels} kernels; bound {KERNELS_BOUND}: {'met' if kernels else 'MISSED'}")
    print(
        f"fewest-kernels: {megabytes:.2f} MB of activations; bound {ACTIVATION_BOUND}: {'met' if memory else 'MISSED'}"
    )


if __name__ == "__main__":
    sys.exit(main())
