"""What one whole export costs: processes of their own, imports and the proof on 8 images included."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from nextvit_models.config import VARIANTS
from nextvit_models.nextvit import NextViT
from tests.harness import randomise


def cost(name: str, size: int, rounds: int, command: Sequence[str]) -> tuple[float, float]:
    """Median seconds, and gigabytes at the peak, of ``command`` on a variant with random weights.

    ``command`` is ``nextvit-export``'s, with its own options and without checkpoint, size and output.
    """
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, f"{name}.pth")
        torch.save(randomise(NextViT(VARIANTS[name]), seed=0).state_dict(), checkpoint)
        told = [str(checkpoint), "--size", str(size), "--output", str(Path(folder, "out")), "--quiet"]
        runs = [_run([sys.executable, "-m", "nextvit_deploy", *command, *told]) for _ in range(rounds)]
    return statistics.median(run[0] for run in runs), max(run[1] for run in runs)


def tell(what: str, value: float, unit: str, bound: float | None) -> None:
    """A figure on a line, with whether it is within its bound where it has one."""
    verdict = "" if bound is None else f"; bound {bound:g} {unit}: {'met' if value <= bound else 'MISSED'}"
    print(f"  {what:14} {value:.2f} {unit}{verdict}", flush=True)


def _run(command: Sequence[str]) -> tuple[float, float]:
    """Seconds, and gigabytes at the peak."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the export failed with status {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - start, usage.ru_maxrss * unit / 1e9
