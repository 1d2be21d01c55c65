"""Files of other tools whose edges are not this tool's: FP16 in and out, and names of their own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.deploy.support import call, forget, refusal, rename
from tests.deploy.support_trt import exported, is_proven

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed; pip install 'nextvit-deploy[trt-rtx]'")


@pytest.fixture(scope="module")
def half_edges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP16 from edge to edge, and nothing that tells where it comes from."""
    made = exported(tmp_path_factory.getbasetemp(), "--fp16", "--io", "fp16")
    model = onnx.load(str(made.path.with_suffix(".onnx")))
    forget(model)
    path = tmp_path_factory.mktemp("half") / "half.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_fp16_edges_are_taken_from_the_file(half_edges: Path, tmp_path: Path) -> None:
    kit, triton = tmp_path / "kit", tmp_path / "triton"
    ran = call("trt", "--onnx", half_edges, "--fp16", "-o", tmp_path, "--kit", kit, "--triton", triton, "--json")
    assert (ran.status, ran.err) == (0, "")
    assert is_proven(ran.json)
    assert ran.json["spec"]["io"] == "fp16"
    with np.load(kit / "golden.npz") as golden:
        assert golden["inputs"].dtype == np.float16
    config = (triton / "nextvit_nano" / "config.pbtxt").read_text("utf-8")
    assert config.count("TYPE_FP16") >= 2
    assert "TYPE_FP32" not in config
    assert call("verify", next(tmp_path.glob("*.engine")), "--quiet").status == 0


def test_a_kit_needs_this_tool_s_names(half_edges: Path, tmp_path: Path) -> None:
    model = onnx.load(str(half_edges))
    rename(model, {"image": "pixels", "logits": "scores"})
    path = tmp_path / "renamed.onnx"
    path.write_bytes(model.SerializeToString())
    for option in ("--kit", "--triton"):
        line = refusal("trt", "--onnx", path, "--fp16", "-o", tmp_path / "out", option, tmp_path / "folder")
        assert line.startswith("renamed.onnx calls its tensors pixels and scores; --kit and --triton take image and")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "folder").exists()
    ran = call("trt", "--onnx", path, "--fp16", "-o", tmp_path / "out", "--json")
    assert json.loads(ran.out)["verdict"] == "verified"
