"""Kits of a tiny network, and check.py run in them on a machine that the fakes pretend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nextvit_deploy.kit.build import write_kit
from nextvit_exporters.engine_spec import EngineSpec, Range
from nextvit_exporters.files import sha256_of
from nextvit_exporters.spec import ExportSpec, Precision, Tolerance
from nextvit_models.preprocessing import Preprocessing
from tests.deploy.support import Json, strict_json

FAKES: Final = Path(__file__).with_name("fakes")
CLASSES: Final = 3
TOLERANCE: Final = Tolerance(1e-2, "twenty times what the demo measures")
IMAGES: Final = np.random.default_rng(1).normal(size=(5, 3, 32, 32)).astype(np.float32)


def spec_of(batch: Range, precision: Precision = Precision.FP16, gpu: str = "t4") -> ExportSpec:
    engine = EngineSpec("tensorrt", gpu, batch, Range.of(32), Range.of(32))
    return ExportSpec("tiny", CLASSES, "tensorrt", precision, 32, 32, batch.optimum, 18, Preprocessing(), engine=engine)


STATIC: Final = spec_of(Range.of(2))
DYNAMIC: Final = spec_of(Range(1, 4, 8))


def tiny(spec: ExportSpec, *, half: bool | None = None) -> onnx.ModelProto:
    """Convolution, mean, matrix product: strongly typed, in the spec's precision between float32 edges.

    In INT8 the convolution is quantized, between steps in float32, or in float16 with ``half``.
    """
    random = np.random.default_rng(0)
    assert spec.engine is not None
    half = spec.precision is Precision.FP16 if half is None else half
    dtype, kind = (np.float16, TensorProto.FLOAT16) if half else (np.float32, TensorProto.FLOAT)
    weights = {"w": random.normal(size=(8, 3, 4, 4)), "m": random.normal(size=(8, CLASSES))}
    quantized = spec.precision is Precision.INT8
    steps = {"s": np.full((), 4.5 / 127), "t": np.full((), 4.5 / 127)} if quantized else {}
    batch: int | str = spec.batch if spec.engine.batch.fixed else "batch"
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], "cast", to=kind),
        *(_quantized("x", "s") if quantized else ()),
        *(_quantized("w", "t") if quantized else ()),
        helper.make_node("Conv", ["x/d", "w/d"] if quantized else ["x", "w"], ["c"], "conv", strides=[4, 4]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "m"], ["g"], "gemm"),
        helper.make_node("Cast", ["g"], ["logits"], "back", to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(value.astype(dtype), name) for name, value in {**weights, **steps}.items()]
        + ([numpy_helper.from_array(np.zeros((), np.int8), "zero")] if quantized else []),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def _quantized(name: str, step: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("QuantizeLinear", [name, step, "zero"], [f"{name}/q"], f"quantize_{name}"),
        helper.make_node("DequantizeLinear", [f"{name}/q", step, "zero"], [f"{name}/d"], f"dequantize_{name}"),
    ]


def answers(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same network in float32, as the golden reference."""
    model = tiny(spec_of(Range(1, 4, 8), Precision.FP32))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {"image": images})[0]
    assert isinstance(logits, np.ndarray)
    return logits.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Made:
    """A kit, the engine's manifest it points to, and the spec it is of."""

    folder: Path
    manifest: Path
    spec: ExportSpec

    @property
    def verdict(self) -> Path:
        return self.folder / "verdict.json"

    def json(self, name: str) -> Json:
        return strict_json((self.folder / name).read_text(encoding="utf-8"))


def make(
    folder: Path,
    spec: ExportSpec = STATIC,
    name: str = "kit",
    verdict: str = "not verified",
    *,
    half: bool | None = None,
) -> Made:
    """A kit in ``folder/name``, with the engine's manifest in ``folder``."""
    source, manifest = folder / "tiny.onnx", folder / "tiny.engine.json"
    source.write_bytes(tiny(spec, half=half).SerializeToString())
    fields = {"verdict": verdict, "onnx": {"sha256": sha256_of(source)}, "artifact": {"sha256": "e" * 64}}
    manifest.write_text(json.dumps(fields), encoding="utf-8")
    write_kit(folder / name, source, spec, IMAGES, answers(IMAGES), TOLERANCE, fields, manifest)
    return Made(folder / name, manifest, spec)


@dataclass(frozen=True, slots=True)
class Checked:
    """One run of check.py: exit status, output, and every call of TensorRT and CUDA."""

    status: int
    out: str
    err: str
    calls: list[list[str]]

    @property
    def line(self) -> str:
        """The one line of an error."""
        assert (self.status, self.out) == (1, ""), self
        assert self.err.startswith("check.py: ")
        assert self.err.count("\n") == 1, self.err
        return self.err.removeprefix("check.py: ").rstrip("\n")


def check(made: Made, *options: str, version: str = "10", **environment: str) -> Checked:
    """Run the kit's own check.py with the fakes in front of what is installed; ``FAULT="wrong"`` plants a fault."""
    calls = made.folder.with_name("calls")
    calls.write_bytes(b"")
    pretended = {f"FAKE_{name}": value for name, value in environment.items()}
    ran = subprocess.run(
        [sys.executable, str(made.folder / "check.py"), "--iterations", "3", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=made.folder.parent,
        env=os.environ
        | {"PYTHONPATH": str(FAKES), "FAKE_TENSORRT": version, "FAKE_CALLS": str(calls), "FAKE_CUINIT": "0"}
        | pretended,
    )
    lines = calls.read_text(encoding="utf-8").splitlines()
    return Checked(ran.returncode, ran.stdout, ran.stderr, [json.loads(line) for line in lines])


def changed(spec: ExportSpec, **fields: Any) -> ExportSpec:
    """The spec with some of its engine's fields changed."""
    assert spec.engine is not None
    return replace(spec, engine=replace(spec.engine, **fields))
