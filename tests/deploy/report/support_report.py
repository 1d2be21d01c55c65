"""Folders that tests make pages of: what the tools write, made small, and what nobody should have written."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from PIL import Image

from nextvit_deploy.bisect.record import Bisection, Layer, Parting, Series
from nextvit_deploy.check.cells import Cell
from nextvit_deploy.check.result import CheckResult, Kind, Move, Outcome, Problem, Row
from nextvit_deploy.evaluate.evaluation import Dataset, Evaluation, Run
from nextvit_deploy.evaluate.evaluation import Image as Shown
from nextvit_deploy.evaluate.results import Accuracy, Figures, Flip
from nextvit_deploy.manifest import CheckpointInfo
from nextvit_exporters.spec import Artifact, ExportSpec, Precision
from nextvit_models.preprocessing import Preprocessing

Json = dict[str, Any]

EVIL: Final = "<img src=x onerror=alert(1)> \"'&amp;{{ 7*7 }}\u202e"
_TARGETS: Final = {"onnx": "onnx", "trt": "tensorrt", "coreml": "coreml"}
_MODULES: Final = ("stem.0.conv", "stem.1.conv", "features.0.mlp.conv1", "features.1.e_mhsa.q", "norm", "proj_head.0")


def digest(text: str) -> str:
    """A SHA-256 to tell artefacts apart."""
    return sha256(text.encode()).hexdigest()


def compared(error: float, allowed: float = 1e-2) -> Json:
    """One output's comparison."""
    return {
        "output": "logits",
        "count": 8,
        "finite": True,
        "max_abs": error,
        "relative_rms": error,
        "sqnr_db": 60.0,
        "top1": 1.0,
        "can_flip": 0,
        "tolerance": {"relative_rms": allowed, "measured": "so"},
    }


def asked(question: str, error: float, verdict: str = "verified", why: str = "", **findings: object) -> Json:
    """One check of a manifest."""
    return {
        "question": question,
        "executor": "onnxruntime 1.23 cpu",
        "mode": "exact",
        "against": "PyTorch float32",
        "inputs": "8 of the demo's digits",
        "verdict": verdict,
        "why": why,
        "comparisons": [compared(error)],
        "findings": findings,
    }


def manifest(name: str, data: bytes = b"", lane: str = "onnx", precision: str = "fp16", error: float = 1e-3) -> Json:
    """A verified artefact's."""
    step = {"nodes": [9, 7], "parameters": [90, 80], "macs": [2_000_000, 1_000_000], "seconds": 0.1}
    refused = [{"where": "features.2.norm1", "reason": "is also read by something else"}]
    return {
        "schema": 1,
        "verdict": "verified",
        "spec": {
            "target": _TARGETS[lane],
            "precision": precision,
            "model": "nextvit_nano",
            "task": "classify",
            "num_classes": 10,
            "batch": 1,
            "height": 64,
            "width": 64,
            "input": "normalized",
            "engine": {"gpu": "t4"} if lane == "trt" else None,
            "skip": [],
        },
        "checkpoint": {"name": "demo.safetensors", "sha256": digest("c"), "fingerprint": digest("w"), "layout": "timm"},
        "artifact": {"file": name, "sha256": sha256(data).hexdigest(), "bytes": 1_500_000 + 1000 * len(name)},
        "passes": [
            {"name": "fold", "certified": True, "rewrites": 2, "refused": refused, "error_float64": 1e-16,
             "error_float32": 1e-7, **step},
            {"name": "all passes", "certified": True, "rewrites": 2, "refused": [], "error_float64": 1e-16,
             "error_float32": 1e-7, **step},
        ],
        "ops": {"Conv": 3, "Relu": 2},
        "unit": "nodes",
        "dtypes": f"5 of 5 operations in {precision}",
        "built": {},
        "checks": [asked("same network", 2e-7), asked("precision cost", error)],
        "notes": ["the demo is used"],
        "versions": {"torch": "2.9.0"},
        "seconds": {"build": 1.0},
    }  # fmt: skip


def headroom(largest: float = 150.0) -> Json:
    """What a Core ML package's check finds beside."""
    layer = {"operation": "matmul_1", "kind": "matmul", "module": "features.1.e_mhsa", "subnormal": 0.01}
    return {
        "limit": 65504.0,
        "accumulator_limit": 32768.0,
        "remark": "reported by a third party",
        "operations": 2,
        "weights_subnormal": 0.0,
        "layers": [{**layer, "largest": largest}, {**layer, "module": None, "largest": 0.5}],
    }


def plan() -> Json:
    """A precision plan that keeps one block of three."""
    block = {"maps": 2, "macs": 1000}
    return {
        "schema": 1,
        "model": "nextvit_nano",
        "size": [64, 64],
        "budget": "44dB",
        "method": "mse",
        "images": digest("i"),
        "count": 64,
        "blocks": [
            {"block": "stem.0", "sqnr_db": 55.0, "share": 0.1, "precision": "int8", **block},
            {"block": "features.0", "sqnr_db": "inf", "share": 0.0, "precision": "int8", **block},
            {"block": "features.1", "sqnr_db": 47.0, "share": 0.9, "precision": "fp16", **block},
        ],
        "predicted_db": 44.1,
        "sqnr_db": 44.2,
        "float_top1": 1.0,
        "top1": 1.0,
        "steps": [],
        "notes": [],
    }


def device(p50: float = 0.412) -> Json:
    """What a kit's machine adds to a manifest."""
    return {
        "verdict": "verified",
        "why": "",
        "gpu": {"name": "Tesla T4"},
        "tensorrt": "10.13",
        "tolerance": {"relative_rms": 1e-2},
        "comparison": {"images": 8, "relative_rms": 4e-4, "max_abs": 1e-3, "top1": 1.0},
        "latency_ms": {
            "shape": [1, 3, 64, 64],
            "without transfers": {"p50": p50, "p90": 0.43, "p99": 0.47},
            "with transfers": {"p50": 0.466, "p90": 0.49, "p99": 0.53},
        },
    }


def bisection(name: str, sha256: str, *, parted: bool = False) -> Bisection:
    """Every layer's error; parted at ``features.1.e_mhsa.q`` where asked."""
    errors = [1e-7, 2e-7, None, 0.3 if parted else 3e-7, 0.4 if parted else 4e-7, 5e-7]
    layers = tuple(Layer(module, f"/{module}", "Conv", error) for module, error in zip(_MODULES, errors, strict=True))
    parting = Parting(_MODULES[3], (f"/{_MODULES[3]}",), "MatMul", 0.3, 2e-7, ("features.1.norm1",), "off by 30 %")
    same = Series("same network", "onnxruntime", "PyTorch", 1e-5, layers, (parting,) if parted else ())
    cost = replace(same, question="precision cost", tolerance=1e-2, partings=(), layers=tuple(
        replace(each, error=each.error and each.error * 1e3) for each in layers))  # fmt: skip
    return Bisection(name, sha256, (same, cost))


def jpeg() -> str:
    """A small picture as an evaluation keeps it."""
    data = BytesIO()
    Image.new("RGB", (96, 64), (200, 80, 20)).save(data, "JPEG")
    return base64.b64encode(data.getvalue()).decode()


def evaluation(name: str, sha256: str, thumbnail: object = None) -> Json:
    """What ``evaluate`` writes: two images, one of them with a thumbnail."""
    image = {"label": "3", "pytorch": "3", "artefact": "5", "margin": 1.2, "relative_rms": 0.02}
    return {
        "artefact": {"file": name, "sha256": sha256},
        "dataset": {"folder": "val"},
        "figures": {
            "count": 360,
            "agreement": 0.9972,
            "flips": [{"count": 1}],
            "can_flip": 2,
            "not_finite": 0,
            "sqnr_db": 44.0,
            "artefact": {"top1": 0.99},
            "pytorch": {"top1": 1.0},
        },
        "worst": {
            "by_margin": [{"index": 4, "name": f"3/{EVIL}.png", **image}, {"index": 9, "name": "b.png", **image}]
        },
        "thumbnails": {"4": jpeg() if thumbnail is None else thumbnail},
    }


def evaluated() -> Evaluation:
    """What the page of an evaluation is made of: one flip among three images."""
    images = tuple(Shown(at, f"3/{at}-{EVIL}.png", "3", "3", "5" if at else "3", 1.2, 0.02) for at in range(3))
    accuracy = Accuracy(0.99, 1.0)
    return Evaluation(
        artefact=Artifact(Path(f"{EVIL}.onnx"), digest("a"), 10),
        checkpoint=CheckpointInfo("demo.safetensors", digest("c"), digest("w"), "timm", ()),
        spec=ExportSpec("nextvit_nano", 10, "onnx", Precision.FP16, 64, 64, 1, 18, Preprocessing(image_size=64)),
        executor="onnxruntime",
        mode="exact",
        dataset=Dataset("val", 3, 3, digest("d"), "class folders"),
        classes=tuple(map(str, range(10))),
        figures=Figures(3, accuracy, accuracy, 0.67, 1e-3, 60.0, 0.1, 1, 1, (Flip(3, 5, 1, 0, 1),)),
        by_margin=images,
        by_error=images,
        thumbnails={0: jpeg()},
        notes=("the demo is used",),
        versions={"torch": "2.9.0"},
        run=Run(1.0, 1, None, 0),
    )


def put(folder: Path, made: Json, data: bytes = b"") -> Path:
    """An artefact and its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    path: Path = folder / made["artifact"]["file"]
    path.write_bytes(data)
    write(Path(f"{path}.json"), made)
    return path


def write(path: Path, value: object) -> None:
    """JSON as the tools write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def whole(folder: Path) -> Path:
    """One of everything: three lanes, bisected, evaluated, planned, timed; all verified."""
    int8 = manifest("nano_int8.onnx", b"1", "onnx", "int8", 5e-3) | {"precision_plan": plan()}
    package = manifest("nano_fp16.mlpackage", b"3", "coreml")
    package["checks"][1]["findings"] = {"headroom": headroom()}
    for made, data in (
        (manifest("nano_fp16.onnx", b"0"), b"0"),
        (int8, b"1"),
        (manifest("nano_fp16.engine", b"2", "trt") | {"device": device()}, b"2"),
        (package, b"3"),
    ):
        path, sha = put(folder, made, data), made["artifact"]["sha256"]
        write(Path(f"{path}.layers.json"), bisection(path.name, sha).as_dict())
    write(folder / "nano_int8.onnx.evaluation.json", evaluation("nano_int8.onnx", int8["artifact"]["sha256"]))
    return folder


def checked(folder: Path) -> Path:
    """The same with a check in it: one row failed, one crashed, one could not be executed, and hostile texts."""
    whole(folder)
    rows = []
    for name in ("nano_fp16.onnx", "nano_int8.onnx"):
        made = json.loads((folder / f"{name}.json").read_text())
        moves = (Move("size", "1 MB", "2 MB", "1.1x", regression=True), Move("torch", EVIL, "2.9"))
        bad = (Problem(Kind.SAME_NETWORK, f"not the same network {EVIL}", "features.1"),) if "int8" in name else ()
        layers = bisection(name, made["artifact"]["sha256"], parted=bool(bad))
        write(folder / f"{name}.layers.json", layers.as_dict())
        cell = Cell(name=f"demo-{name}", lane="onnx", precision=made["spec"]["precision"])
        rows.append(Row(cell, Outcome(manifest=made, latency=0.71), bad, moves))
    crash = Problem(Kind.CRASH, "killed by SIGKILL after 40 s")
    rows.append(Row(Cell(name="demo-coreml-int8", lane="coreml", precision="int8"), Outcome(crash="SIGKILL"), (crash,)))
    missing = Problem(Kind.NOT_VERIFIED, "TensorRT needs an optional package")
    rows.append(Row(Cell(name=EVIL, lane="trt", precision="fp32"), Outcome(missing=True), (missing,)))
    write(folder / "check.json", CheckResult(tuple(rows), "out", notes=(EVIL,)).as_dict())
    (folder / "broken.json").write_text("{")
    return folder
