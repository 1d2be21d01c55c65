from __future__ import annotations

import ast
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nextvit_deploy import pipeline
from nextvit_deploy.kit import device
from nextvit_deploy.kit.build import SCRIPTS, write_kit
from nextvit_deploy.kit.device import ENGINE_COMPUTE, kernel_types, kind_of
from nextvit_deploy.references import artefact_inputs, predict
from nextvit_exporters.engine_spec import EngineSpec, Range
from nextvit_exporters.files import sha256_of
from nextvit_exporters.spec import ExportSpec, Precision
from tests.deploy.kit.kits import DYNAMIC, FAKES, STATIC, TOLERANCE, Made, changed, check, make, spec_of
from tests.deploy.support import Exported, strict_json

VERSIONS = ("10", "11")
INT8 = spec_of(Range.of(2), Precision.INT8)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make(tmp_path)


def api(version: str) -> dict[str, dict[str, list[str]]]:
    told: dict[str, dict[str, list[str]]] = json.loads((FAKES / f"api_{version}.json").read_bytes())
    return told


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("spec", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_a_right_engine_is_verified(tmp_path: Path, version: str, spec: ExportSpec) -> None:
    made = make(tmp_path, spec)
    ran = check(made, version=version)
    assert ran.status == 0, ran
    found = made.json("verdict.json")
    assert (found["verdict"], found["why"]) == ("verified", "")
    assert found["tensorrt"] == api(version)["version"]
    assert found["gpu"] == {"name": "Tesla T4", "capability": "7.5", "driver": "CUDA 12.4"}
    seen = found["comparison"]
    assert (seen["images"], seen["finite"], seen["top1"]) == (5, True, 1.0)
    assert 0 < seen["relative_rms"] < 5e-3
    assert found["dtypes"] == {
        "network": ["HALF"],
        "engine": ["Half"],
        "told by kernels": 2,
        "image": "FLOAT",
        "logits": "FLOAT",
    }
    assert found["kernels"] == 7
    assert found["kit"] == sha256_of(made.folder / "kit.json")
    latency = found["latency_ms"]
    assert (latency["shape"], latency["iterations"]) == ([spec.batch, 3, 32, 32], 3)
    for percentiles in (latency["without transfers"], latency["with transfers"]):
        assert 0 < percentiles["p50"] <= percentiles["p90"] <= percentiles["p99"]
    assert latency["with transfers"]["p50"] > latency["without transfers"]["p50"]
    assert ran.out.startswith("verified: tiny fp16\n")
    assert "Tesla T4 (7.5)" in ran.out


@pytest.mark.parametrize("version", VERSIONS)
def test_only_what_all_versions_share_is_called(tmp_path: Path, version: str) -> None:
    made = make(tmp_path, changed(DYNAMIC, workspace=64, opt_level=4))
    ran = check(made, version=version)
    assert ran.status == 0, ran
    called = {name.removesuffix("=") for name, *_ in ran.calls if "." in name}
    assert not any("error_recorder" in name or "set_flag" in name for name in called)
    for each in map(api, VERSIONS):
        assert all(name.split(".")[1] in each["classes"][name.split(".")[0]] for name in called)
    said = [tuple(call) for call in ran.calls]
    strong = api(version)["enums"]["NetworkDefinitionCreationFlag"].index("STRONGLY_TYPED")
    assert ("Builder.create_network", str(1 << strong)) in said
    assert ("IBuilderConfig.profiling_verbosity=", "ProfilingVerbosity.DETAILED") in said
    assert ("IBuilderConfig.set_memory_pool_limit", "MemoryPoolType.WORKSPACE", str(64 << 20)) in said
    assert ("IBuilderConfig.builder_optimization_level=", "4") in said
    shapes = ("(1, 3, 32, 32)", "(4, 3, 32, 32)", "(8, 3, 32, 32)")
    assert ("IOptimizationProfile.set_shape", "image", *shapes) in said
    allocated, freed = (sum(name == each for name, *_ in ran.calls) for each in ("cudaMalloc", "cudaFree"))
    assert freed == 2 * allocated > 0  # as many again are the host's


def test_the_fakes_differ_as_the_versions_do(made: Made) -> None:
    code = "import tensorrt as t; print([hasattr(*each) for each in ((t.Builder, 'platform_has_fast_fp16'), "
    code += "(t.BuilderFlag, 'FP16'), (t.ICudaEngine, 'device_memory_size'), (t.BuilderFlag, 'TF32'))])"
    for version, expected in (("10", [True] * 4), ("11", [False] * 3 + [True])):
        environment = os.environ | {"PYTHONPATH": str(FAKES), "FAKE_TENSORRT": version}
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        assert ast.literal_eval(ran.stdout) == expected
    ran_twice = [check(made, version=version).status for version in VERSIONS]
    assert ran_twice == [0, 0]


def test_a_static_batch_is_filled_up(made: Made) -> None:
    ran = check(made)
    assert made.json("verdict.json")["comparison"]["images"] == 5
    shapes = {call[2] for call in ran.calls if call[0] == "IExecutionContext.set_input_shape"}
    assert shapes == {"(2, 3, 32, 32)"}
    assert not any(call[0].startswith("IOptimizationProfile") for call in ran.calls)


def test_a_dynamic_batch_runs_its_rest_as_it_is(tmp_path: Path) -> None:
    ran = check(make(tmp_path, DYNAMIC))
    shapes = [call[2] for call in ran.calls if call[0] == "IExecutionContext.set_input_shape"]
    assert shapes == ["(4, 3, 32, 32)", "(1, 3, 32, 32)"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("wrong", "relative rms 1.0e-01 > 1e-02"),
        ("infinite", "NaN or infinity in the output"),
        ("silent", "NaN or infinity in the output"),
        ("type", "a kernel of the engine computes in Float; nothing in it computes in Half"),
        ("network-type", "the network computes in FLOAT"),
        ("edge-type", "'logits' is HALF, not FLOAT"),
    ],
)
def test_a_wrong_engine_fails(made: Made, version: str, fault: str, why: str) -> None:
    ran = check(made, version=version, FAULT=fault)
    assert ran.status == 3, ran
    found = made.json("verdict.json")
    assert (found["verdict"], found["why"]) == ("failed", why)
    assert ran.out.startswith(f"failed: {why}\n")


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("build", "TensorRT builds no engine: IBuilder::buildSerializedNetwork: Error Code 10: no tactic for conv"),
        ("parse", "TensorRT's parser refuses model.onnx: No importer registered for op: Made"),
        ("deserialize", "TensorRT can't load the engine it built: it gave no reason; run again with --verbose"),
        ("execute", "TensorRT can't execute the engine; run again with --verbose"),
        ("no-memory", "cudaMallocHost fails on the GPU"),
    ],
)
def test_what_cannot_be_built_or_run_is_one_line_and_no_verdict(made: Made, fault: str, line: str) -> None:
    assert check(made).status == 0
    before = sorted(path.name for path in made.folder.iterdir() if path.name != "verdict.json")
    ran = check(made, FAULT=fault)
    assert ran.line.startswith(line.replace("cudaMallocHost", "cudaMalloc"))
    assert sorted(path.name for path in made.folder.iterdir()) == before


def test_a_range_that_tensorrt_refuses_is_one_line(tmp_path: Path) -> None:
    assert check(make(tmp_path, DYNAMIC), FAULT="profile").line.startswith("TensorRT refuses the range of sizes")


def test_kernels_that_tell_no_type_leave_the_networks(made: Made) -> None:
    ran = check(made, FAULT="untold")
    assert ran.status == 0, ran
    assert made.json("verdict.json")["dtypes"]["engine"] == []
    assert "HALF (the network's; no kernel tells its own)" in ran.out


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("half", "rest"), [(True, ["HALF"]), (False, ["FLOAT"])])
def test_int8_between_steps_of_either_type_is_verified(
    tmp_path: Path, version: str, *, half: bool, rest: list[str]
) -> None:
    made = make(tmp_path, INT8, half=half)
    ran = check(made, version=version)
    assert ran.status == 0, ran
    read = made.json("verdict.json")["dtypes"]
    assert (read["network"], read["engine"]) == (rest, ["Half" if half else "Float", "Int8"])


def test_int8_that_no_kernel_computes_in_fails(tmp_path: Path) -> None:
    made = make(tmp_path, INT8, half=True)
    assert check(made, FAULT="unfused").status == 3
    assert made.json("verdict.json")["why"] == "nothing in it computes in Int8"


def test_int8_that_no_kernel_tells_of_is_not_verified(tmp_path: Path) -> None:
    made = make(tmp_path, INT8, half=True)
    ran = check(made, FAULT="untold")
    assert ran.status == 4, ran
    why = "no kernel of the engine tells its types, so none was seen to compute in Int8"
    assert (made.json("verdict.json")["verdict"], made.json("verdict.json")["why"]) == ("not verified", why)
    assert check(made, FAULT="untold", GPU="NVIDIA A10:8.6").status == 4
    assert made.json("verdict.json")["why"].startswith(f"{why}; this is NVIDIA A10 (8.6)")


def test_checking_leaves_a_verdict_and_nothing_else(made: Made) -> None:
    before = {path.name for path in made.folder.iterdir()}
    assert check(made).status == 0
    assert {path.name for path in made.folder.iterdir()} == before | {"verdict.json"}


@pytest.mark.parametrize(
    ("cuinit", "why"), [("missing", "no CUDA driver"), ("100", "no usable CUDA driver: cuInit returns 100")]
)
def test_without_a_driver_nothing_is_touched(made: Made, cuinit: str, why: str) -> None:
    ran = check(made, version="none", CUINIT=cuinit)  # a version that TensorRT's stand-in can't import
    assert (ran.status, ran.out, ran.err) == (4, f"not verified: {why}\n", "")
    found = made.json("verdict.json")
    assert (found["verdict"], found["why"]) == ("not verified", why)
    assert "comparison" not in found
    assert ran.calls == []


def test_on_this_machine_as_it_is(made: Made) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("there is a CUDA driver here")
    script = [sys.executable, "-I", str(made.folder / "check.py")]
    ran = subprocess.run(script, capture_output=True, text=True, check=False, cwd=made.folder)
    assert (ran.returncode, ran.stdout) == (4, "not verified: no CUDA driver\n"), ran.stderr


def test_another_gpu_proves_nothing_of_this_one(made: Made) -> None:
    ran = check(made, GPU="NVIDIA A10:8.6")
    assert ran.status == 4
    found = made.json("verdict.json")
    assert (found["verdict"], found["why"]) == (
        "not verified",
        "this is NVIDIA A10 (8.6), the kit is for Tesla T4 (7.5)",
    )
    assert found["comparison"]["finite"] is True


def test_an_earlier_verdict_does_not_outlive_a_failed_run(made: Made) -> None:
    assert check(made).status == 0
    assert check(made, FAULT="build").status == 1
    assert not made.verdict.exists()


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "check.py", "device.py"])
def test_a_changed_file_is_refused(made: Made, name: str) -> None:
    with (made.folder / name).open("ab") as file:
        file.write(b"\n")
    ran = check(made)
    assert ran.line == f"{name} is not the file this kit was made with; copy the whole kit again"
    assert ran.calls == []
    assert not made.verdict.exists()


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b'{"files": 3}', b'{"files": {"gone": "0"}}', b"\xff"])
def test_a_damaged_kit_is_one_line(made: Made, damage: bytes) -> None:
    (made.folder / "kit.json").write_bytes(damage)
    assert check(made).line.startswith("the kit is not whole")


def test_the_engine_is_kept_when_asked(made: Made, tmp_path: Path) -> None:
    kept = tmp_path / "kept.engine"
    assert check(made, "--engine", str(kept)).status == 0
    assert made.json("verdict.json")["engine"] == {"sha256": sha256_of(kept), "bytes": kept.stat().st_size}
    refused = check(made, "--engine", str(tmp_path / "none" / "kept.engine"))
    assert "can't be written" in refused.line


def test_workspace_and_log(made: Made) -> None:
    ran = check(made, "--workspace", "16", "--verbose")
    assert ["IBuilderConfig.set_memory_pool_limit", "MemoryPoolType.WORKSPACE", str(16 << 20)] in ran.calls
    assert ran.err == "building\n"
    assert check(made, "--iterations", "0").status == 2


def test_float32_is_not_tf32(tmp_path: Path) -> None:
    ran = check(make(tmp_path, spec_of(Range.of(2), Precision.FP32)))
    assert ran.status == 0, ran
    assert ["IBuilderConfig.clear_flag", "BuilderFlag.TF32"] in ran.calls


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_are_old_python_and_stand_alone(made: Made, script: str) -> None:
    tree = ast.parse((made.folder / script).read_text(encoding="utf-8"), feature_version=(3, 8))
    bodies = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test).startswith("TYPE_CHECKING"))
    ]
    imported = {
        ast.unparse(node) for body in bodies for node in ast.walk(body) if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert not any("nextvit" in line or "tensorrt" in line or "cuda" in line for line in imported)


def test_types_as_tensorrt_words_them() -> None:
    kernel = {
        "LayerType": "CaskConvolution",
        "Inputs": [
            {"Name": "image", "Dimensions": [1, 3, 8, 8], "Format/Datatype": "Row major linear FP32"},
            {
                "Name": "a",
                "Dimensions": [1, 64, 8, 8],
                "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format.",
            },
            {"Name": "scale", "Dimensions": [1], "Format/Datatype": "Float"},
        ],
        "Outputs": [
            {"Name": "b", "Dimensions": [1, 64, 8, 8], "Format/Datatype": "Half"},
            {"Name": "c", "Dimensions": [1, 64, 8, 8], "Datatype": "BFloat16", "Format": "kLINEAR"},
            {"Name": "d", "Dimensions": [4], "Format/Datatype": "Unknown format"},
        ],
    }
    assert kernel_types(kernel, {"image"}) == {"Int8", "Half", "BFloat16"}
    kinds = [
        "CaskConvolution",
        "correlation __myelin_CASK_STUB",
        "CaskGemmMatrixMultiply",
        "gemm",
        "fusion _gemm_mha_v2_0x1",
        "MatrixMultiply",
    ]
    assert all(ENGINE_COMPUTE.search(kind) for kind in kinds)
    assert not any(
        ENGINE_COMPUTE.search(kind) for kind in ("Reformat", "kgen __myl_CastTranAddMulCastConc", "PointWiseV2")
    )
    assert kind_of({"LayerType": "gemm"}) == "gemm "


def test_the_demo_in_fp16_is_verified(half: Exported, tmp_path: Path) -> None:
    fields = half.manifest
    engine = EngineSpec("tensorrt", "t4", Range.of(3), Range.of(64), Range.of(64))
    spec = ExportSpec.from_dict(fields["spec"] | {"engine": engine.as_dict()})
    checkpoint = pipeline.open_checkpoint(None, ema=False)
    images = pipeline.open_images(None, 4, (64, 64), checkpoint)
    inputs, expected = artefact_inputs(spec, images), predict(spec, checkpoint.model, images.normalised())
    assert inputs.dtype == np.uint8
    kit = Made(tmp_path / "kit", half.path, spec)
    write_kit(kit.folder, half.path, spec, inputs, expected["logits"], TOLERANCE, fields, half.path)
    ran = check(kit, version="11")
    assert ran.status == 0, ran
    found = strict_json(kit.verdict.read_text(encoding="utf-8"))
    assert found["dtypes"]["engine"] == ["Half"]
    assert found["dtypes"]["image"] == "UINT8"


@pytest.mark.parametrize("spec", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_real_bindings_take_every_call_of_the_build(tmp_path: Path, spec: ExportSpec) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="the one TensorRT that builds without a GPU")
    made = make(tmp_path, changed(spec, workspace=64, opt_level=2))
    errors: list[str] = []
    logger = device.listener(trt, errors, verbose=False)
    data, network = device.build(
        trt, logger, errors, (made.folder / "model.onnx").read_bytes(), made.json("kit.json"), None
    )
    assert (network, errors) == (["HALF"], [])
    assert len(data) > 1000
    with pytest.raises(device.Stop, match="TensorRT's parser refuses"):
        device.build(trt, logger, errors, b"no graph", made.json("kit.json"), None)
    assert errors
