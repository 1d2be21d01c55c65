"""What a whole T4 engine costs on this machine: seconds, and peak memory, of one `nextvit-export trt --fp16`.

A process of its own, imports and the proof on 8 images included; a variant with random weights, batch 1.

    python -m benchmarks.trt_cost [--variant small] [--size 224] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from nextvit_models.config import VARIANTS
from nextvit_models.nextvit import NextViT
from tests.harness import randomise

SECONDS_BOUND = 60.0
MEMORY_BOUND = 3.0
JUDGED = ("small", 224)


def main() -> int:
    """Export a few times, print the median and the peak, and judge small at 224."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=("small", "base", "large"), default="small")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    name = f"nextvit_{arguments.variant}"
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, f"{name}.pth")
        torch.save(randomise(NextViT(VARIANTS[name]), seed=0).state_dict(), checkpoint)
        runs = [_run(checkpoint, arguments.size, Path(folder, "out")) for _ in range(arguments.rounds)]
    seconds, gigabytes = statistics.median(run[0] for run in runs), max(run[1] for run in runs)
    print(f"{name} at {arguments.size}, FP16 engine for a T4, {arguments.rounds} rounds on {os.cpu_count()} cores")
    for what, value, unit, bound in (
        ("whole command", seconds, "s", SECONDS_BOUND),
        ("peak memory", gigabytes, "GB", MEMORY_BOUND),
    ):
        judged = (arguments.variant, arguments.size) == JUDGED
        verdict = f"; bound {bound:.0f} {unit}: {'met' if value <= bound else 'MISSED'}" if judged else ""
        print(f"  {what:14} {value:.2f} {unit}{verdict}")
    return 0


def _run(checkpoint: Path, size: int, output: Path) -> tuple[float, float]:
    """Seconds, and gigabytes at the peak."""
    command = [sys.executable, "-m", "nextvit_deploy", "trt", str(checkpoint), "--fp16", "--size", str(size)]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--backend", "tensorrt-rtx", "--output", str(output), "--quiet"])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the export failed with status {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - start, usage.ru_maxrss * unit / 1e9


if __name__ == "__main__":
    sys.exit(main())
