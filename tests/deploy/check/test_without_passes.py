"""``passes = ["none"]`` is proven like the rest, in numbers that are rounded too."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextvit_deploy.check.cells import Cell
from nextvit_deploy.check.child import asked, run_cell
from tests.deploy.support_coreml import needs_coremltools

NORMS = {"fold-conv-norm", "fold-pre-norm", "fold-head-norm"}


@pytest.mark.parametrize("lane", ["onnx", "trt", "coreml"])
def test_norms_stay_folded_where_numbers_are_rounded(lane: str, tmp_path: Path) -> None:
    whole = asked(Cell("fp32", lane=lane, precision="fp32", passes="none", gpu="a10"), tmp_path)
    half = asked(Cell("fp16", lane=lane, precision="fp16", passes="none"), tmp_path)
    assert set(whole.skip) - set(half.skip) == NORMS
    assert "fold-attention-scale" in half.skip


@pytest.mark.parametrize(
    ("lane", "tight"),
    [
        ("onnx", 1e-6),
        ("trt", 1e-6),
        pytest.param("coreml", 1e-12, marks=needs_coremltools),
    ],
)
def test_fp16_without_passes_is_the_same_network(lane: str, tight: float, tmp_path: Path) -> None:
    """Twenty and more times below the constant of an attention's scale, were that left in float32: 4.8e-6."""
    if lane == "trt":
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    outcome = run_cell(Cell("it", lane=lane, precision="fp16", passes="none", count=2, layers=False), tmp_path)
    assert outcome.manifest is not None, outcome
    assert outcome.manifest["verdict"] == "verified"
    checks = {each["question"]: each["comparisons"] for each in outcome.manifest["checks"]}
    assert max(each["relative_rms"] for each in checks["same network"]) < tight
