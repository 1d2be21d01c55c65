"""The one builder on the Python surfaces of TensorRT 10.0 and 11.4: a stand-in with their attributes and no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nextvit_exporters.spec import Precision
from tests.exporters.exports import NANO, Export

ROOT = Path(__file__).parents[3]
FAKES = ROOT / "tests" / "deploy" / "kit" / "fakes"
VERSIONS = pytest.mark.parametrize("version", ["10", "11"])
# Builds the engine beside an ONNX file, as `trt` does once the GPU is known, and prints what is read back.
ASSEMBLE = """
import sys
from pathlib import Path
from dataclasses import replace
from nextvit_exporters import to_tensorrt
from nextvit_exporters.engine_spec import ONE, EngineSpec, Range
from nextvit_exporters.errors import DeployError
from nextvit_exporters.spec import ExportSpec, Precision
from nextvit_models.preprocessing import Preprocessing

path, precision, cache, batch = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Range.from_text(sys.argv[4])
side = Range.of(64)
engine = EngineSpec("tensorrt", "t4", batch, side, side, workspace=64, opt_level=3, timing_cache=cache)
spec = ExportSpec(
    "nano", 10, "tensorrt", Precision(precision), 64, 64, batch.optimum, 20, Preprocessing(), engine=engine
)
try:
    to_tensorrt.check_spec(spec)
    to_tensorrt.assemble(spec, path, lambda step: print("step", step))
    saved = to_tensorrt.read(path)
    print("dtypes", saved.dtypes)
    print("facts", saved.facts["built by"], saved.facts["for"], len(saved.facts["kernel list"]))
except DeployError as error:
    print(type(error).__name__, error)
"""


def assemble(
    folder: Path, onnx: Path, version: str, fault: str = "", precision: str = "fp16", batch: str = "2"
) -> tuple[str, list[list[str]]]:
    """What was printed, and the calls of TensorRT that were made."""
    (folder / "x.onnx").write_bytes(onnx.read_bytes())
    calls = folder / "calls"
    done = subprocess.run(
        [sys.executable, "-c", ASSEMBLE, str(folder / "x.engine"), precision, str(folder / "timings"), batch],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": str(FAKES), "FAKE_TENSORRT": version, "FAKE_CALLS": str(calls), "FAKE_FAULT": fault},
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in calls.read_text("utf-8").splitlines()] if calls.exists() else []
    return done.stdout, [call for call in told if not call[0].startswith(("ILayer", "ITensor"))]


@pytest.fixture(scope="module")
def half(exported: Export) -> Path:
    return exported(replace(NANO, precision=Precision.FP16, opset=20)).path


@VERSIONS
def test_an_engine_is_built_and_read_back(tmp_path: Path, half: Path, version: str) -> None:
    out, calls = assemble(tmp_path, half, version)
    assert "step TensorRT: Building engine 50 %" in out
    found = next(line for line in out.splitlines() if line.startswith("dtypes"))
    assert found.startswith("dtypes fp16 asked, ")
    names = [call[0] for call in calls]
    assert names.index("Builder.build_serialized_network") < names.index("Runtime.deserialize_cuda_engine")
    assert names[:2] == ["Builder.create_network", "OnnxParser.parse"]  # strongly typed, or the stand-in refuses
    assert ["IBuilderConfig.set_memory_pool_limit", "MemoryPoolType.WORKSPACE", str(64 << 20)] in calls
    assert ["IBuilderConfig.builder_optimization_level=", "3"] in calls
    assert ["IBuilderConfig.set_timing_cache", "ITimingCache", "False"] in calls
    assert not any("set_flag" in name or "precision" in name.lower() for name in names)
    assert not any("compute_capability" in name for name in names)  # it builds for the GPU at hand
    assert (tmp_path / "timings").read_bytes() == b"timed "
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "calls",
        "timings",
        "x.engine",
        "x.engine.log",
        "x.onnx",
    ]


@VERSIONS
def test_earlier_timings_are_used(tmp_path: Path, half: Path, version: str) -> None:
    (tmp_path / "timings").write_bytes(b"earlier ")
    assemble(tmp_path, half, version)
    assert (tmp_path / "timings").read_bytes() == b"earlier timed "


@VERSIONS
def test_float32_is_without_tf32(tmp_path: Path, exported: Export, version: str) -> None:
    _, calls = assemble(tmp_path, exported(replace(NANO, opset=20)).path, version, precision="fp32")
    assert ["IBuilderConfig.clear_flag", "BuilderFlag.TF32"] in calls


@pytest.mark.parametrize(
    ("version", "fault", "says"),
    [
        ("10", "parse", "BuildFailed TensorRT's ONNX parser refuses the file: Made stem/Made: No importer registered"),
        (
            "11",
            "build",
            "BuildFailed tensorrt built nothing: IBuilder::buildSerializedNetwork: Error Code 10: no tactic for conv",
        ),
        ("10", "deserialize", "BuildFailed the built engine can't be loaded"),
        ("11", "type", "BuildFailed fp16 asked, "),
        ("10", "untold", "BuildFailed TensorRT's log lists no layers"),
    ],
)
def test_what_goes_wrong_is_one_line_and_nothing_is_written(
    tmp_path: Path, half: Path, version: str, fault: str, says: str
) -> None:
    out, _ = assemble(tmp_path, half, version, fault)
    last = out.splitlines()[-1]
    assert last.startswith(says)
    assert not any((tmp_path / name).exists() for name in ("x.engine", "x.engine.log", "timings"))


@VERSIONS
def test_timings_of_another_gpu_are_refused(tmp_path: Path, half: Path, version: str) -> None:
    (tmp_path / "timings").write_bytes(b"of another GPU")
    out, _ = assemble(tmp_path, half, version)
    assert out.splitlines()[-1].startswith("BuildFailed the timing cache is not one for this TensorRT and GPU")
    assert (tmp_path / "timings").read_bytes() == b"of another GPU"


@VERSIONS
def test_a_range_becomes_a_profile(tmp_path: Path, exported: Export, version: str) -> None:
    onnx = exported(replace(NANO, precision=Precision.FP16, opset=20, dynamic_batch=True)).path
    _, calls = assemble(tmp_path, onnx, version, batch="1:2:4")
    shapes = [f"({batch}, 3, 64, 64)" for batch in (1, 2, 4)]
    assert ["IOptimizationProfile.set_shape", "image", *shapes] in calls
    out, _ = assemble(tmp_path, onnx, version, "profile", batch="1:2:4")
    assert out.splitlines()[-1].startswith("BuildFailed TensorRT refuses the range batch 1:2:4, height 64, width 64")
