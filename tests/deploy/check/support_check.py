"""Cells whose process does what their name says, without a framework: for everything around the process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from nextvit_deploy.check.cells import Cell

_SITE = """
import os, signal, sys, time
import nextvit_deploy.check.child as child
from nextvit_deploy.check.result import Outcome

def run_cell(cell, output):
    word = cell.name.partition("-")[0]
    with open(os.path.join({ran!r}, cell.name), "a") as file:
        file.write("ran\\n")
    print(f"doing {{cell.name}}")
    sys.stderr.write("on stderr\\n")
    if word == "segfault":
        import ctypes
        ctypes.string_at(0)
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "raise":
        raise ValueError("a bug\\nwith a second line")
    if word == "exit":
        os._exit(0)
    if word == "slow":
        time.sleep(600)
    if word == "fork":
        if os.fork() == 0:
            time.sleep(600)
    if word == "chatty":
        sys.stderr.write("x" * 99 + "\\n")
        sys.stderr.write(("y" * 99 + "\\n") * 100_000)
    if word == "mend":
        return Outcome(error="give another --size")
    if word == "missing":
        return Outcome(error="pip install it", missing=True)
    path = output / cell.name / "x.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"an artefact")
    from nextvit_exporters.files import sha256_of
    manifest = {{
        "verdict": "verified", "checks": [{{
            "question": "same network", "executor": "none", "mode": "exact", "against": "PyTorch", "inputs": "noise",
            "verdict": "verified", "why": "", "comparisons": [], "findings": {{}},
        }}], "ops": {{"Conv": 1}}, "unit": "nodes", "versions": {{}},
        "spec": {{"model": "nextvit_nano", "target": "onnx", "precision": "fp32", "height": 64, "width": 64}},
        "checkpoint": {{"name": "demo", "sha256": "0" * 64, "fingerprint": "0" * 64, "layout": "official"}},
        "artifact": {{"file": "x.onnx", "sha256": sha256_of(path), "bytes": 11}},
    }}
    threads = os.environ["OMP_NUM_THREADS"]
    return Outcome(manifest=manifest, artefact=str(path), no_latency=threads)

child.run_cell = run_cell
"""


def acting(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Let every cell's process do what the cell's name says; returns the folder that counts the runs."""
    site, ran = folder / "site", folder / "ran"
    site.mkdir()
    ran.mkdir()
    (site / "sitecustomize.py").write_text(_SITE.format(ran=str(ran)), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("NEXTVIT_DEPLOY_CACHE", str(folder / "cache"))
    assert sys.executable
    return ran


def cell(name: str) -> Cell:
    """A cell that is named after what its process does."""
    return Cell(name, lane="onnx", precision="fp32")


def runs(ran: Path, name: str) -> int:
    """How often a cell's process ran."""
    return len((ran / name).read_text().splitlines()) if (ran / name).is_file() else 0
