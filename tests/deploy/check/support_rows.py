"""Manifests, outcomes and rows as a check has them, without making an artefact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from nextvit_deploy.check.cells import Cell
from nextvit_deploy.check.judge import judge
from nextvit_deploy.check.limits import Limits
from nextvit_deploy.check.result import CheckResult, Kind, Outcome, Row
from nextvit_exporters.targets import PRECISION_COST, SAME_NETWORK

Json = dict[str, Any]

CELL: Final = Cell("demo-onnx-fp16", lane="onnx", precision="fp16")
HOSTILE: Final = "a|b<script>alert(1)</script>\x1b[31m`x`\n**y**[z](u)$e$&\udcff"
"""What a file may be called."""


def comparison(error: float | str, allowed: float = 1e-2, *, output: str = "logits") -> Json:
    """One output's, as JSON has it: infinite errors are text."""
    return {
        "output": output,
        "finite": error not in {"inf", "nan"},
        "relative_rms": error,
        "tolerance": {"relative_rms": allowed, "measured": "in a test"},
    }


def answer(
    question: str, *comparisons: Json, verdict: str = "verified", why: str = "", inputs: str = "8 digits"
) -> Json:
    return {
        "question": question,
        "executor": "onnxruntime 1.32 cpu",
        "mode": "exact",
        "against": "PyTorch float32",
        "inputs": inputs,
        "verdict": verdict,
        "why": why,
        "comparisons": list(comparisons),
        "findings": {},
    }


SAME: Final = answer(SAME_NETWORK, comparison(2e-7, 1e-5))


def manifest(*checks: Json, cost: float | str = 4e-4, **changes: Any) -> Json:
    """A sound one; ``changes`` are to its spec, or with a capital letter in front to the rest."""
    found = list(checks) or [SAME, answer(PRECISION_COST, comparison(cost))]
    spec = {
        "model": "nextvit_nano",
        "task": "classify",
        "target": "onnx",
        "precision": "fp16",
        "height": 64,
        "width": 64,
        "batch": 1,
        "input": "normalized",
        "io": "fp32",
        "dynamic_batch": False,
        "dynamic_size": False,
        "consumer": None,
        "pass_set": None,
        "skip": [],
        "engine": None,
        "coreml": None,
        "quantize": None,
    }
    verdicts = {each["verdict"] for each in found}
    whole: Json = {
        "schema": 1,
        "verdict": "failed" if "failed" in verdicts else "verified" if verdicts == {"verified"} else "not verified",
        "spec": spec | {key: value for key, value in changes.items() if not key[0].isupper()},
        "checkpoint": {"name": "nano.safetensors", "sha256": "c" * 64, "fingerprint": "f" * 64},
        "artifact": {"file": "x.onnx", "sha256": "a" * 64, "bytes": 1_700_000},
        "passes": [{"name": "fold-conv-norm", "rewrites": 19}],
        "ops": {"Conv": 52, "Relu": 18},
        "unit": "nodes",
        "built": {},
        "checks": found,
        "notes": [],
        "versions": {"torch": "2.14.1", "onnx": "1.23.2"},
        "seconds": {},
    }
    return whole | {key[0].lower() + key[1:]: value for key, value in changes.items() if key[0].isupper()}


def outcome(found: Mapping[str, Any] | None = None, **changes: Any) -> Outcome:
    """What the process of a cell left."""
    made = manifest() if found is None else found
    return replace(Outcome(made, "/w/demo-onnx-fp16/x.onnx", log="/w/demo-onnx-fp16.log", seconds=3.5), **changes)


def layers(*series: tuple[str, str]) -> Json:
    """What bisect found: by question the module of its first parting, none where that is empty."""
    return {
        "schema": 1,
        "series": [{"question": question, "partings": [{"module": m}] if m else []} for question, m in series],
    }


def judged(made: Outcome, *, cell: Cell = CELL, limits: Limits = Limits(), before: Any = None) -> Row:  # noqa: B008 - frozen
    return judge(cell, made, limits, before, cached=False)


def problems(row: Row) -> list[tuple[Kind, str]]:
    return [(each.kind, each.message) for each in row.problems]


def result(rows: Sequence[Row], **changes: Any) -> CheckResult:
    return replace(CheckResult(tuple(rows), output="/w", seconds=75.0, jobs=2), **changes)


def rows_of_every_kind() -> list[Row]:
    """A verified one, one that fails with a module, one not verified, one crashed, timed out and refused."""
    bad = answer(SAME_NETWORK, comparison(2e-3, 1e-5), verdict="failed")
    blank = answer(PRECISION_COST, verdict="not verified", why="no CUDA driver")
    engine = Cell("demo-trt-fp16", lane="trt", precision="fp16")
    failed = outcome(manifest(bad, SAME), layers=layers((SAME_NETWORK, "features.3.mlp.conv1")))
    return [
        judged(outcome()),
        judged(failed, cell=replace(CELL, name="demo-onnx-fp16-bad")),
        judged(outcome(manifest(SAME, blank, target="tensorrt", Unit="kernels")), cell=engine),
        judged(Outcome(crash="killed by SIGSEGV", log="/w/x.log", seconds=2.0), cell=replace(engine, name="dead")),
        judged(Outcome(timed_out=True, seconds=3600.0), cell=replace(engine, name="slow")),
        judged(Outcome(error="a batch of 0 is empty; use --batch 1 or more"), cell=replace(CELL, name="refused")),
    ]
