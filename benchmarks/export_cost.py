"""What proof costs: time and peak memory of a whole export against a bare ``torch.onnx.export``.

The export loads the checkpoint, certifies every pass, exports, simplifies, checks, and verifies the saved file on 8
images. The bare one builds the same model from the same file and calls ``torch.onnx.export``. Both run in processes
of their own, alternating; compared are the whole processes (imports included), and the calls alone.

    python -m benchmarks.export_cost [--rounds 3] [--variant small]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nextvit_models.config import VARIANTS
from nextvit_models.nextvit import NextViT
from tests.harness import randomise

TIME_BOUND = 2.5
MEMORY_BOUND = {"small": 2.2, "large": 3.0}

_BARE = """
import json, sys, time, warnings
import torch
from nextvit_models.config import VARIANTS
from nextvit_models.nextvit import NextViT
warnings.simplefilter("ignore")
checkpoint, name, output = sys.argv[1:]
model = NextViT(VARIANTS[name]).eval()
model.load_state_dict(torch.load(checkpoint, weights_only=True))
start = time.perf_counter()
torch.onnx.export(model, (torch.randn(1, 3, 224, 224),), output, dynamo=True, verbose=False, external_data=False)
print(json.dumps(time.perf_counter() - start))
"""
_WHOLE = """
import json, sys, time
from pathlib import Path
from nextvit_deploy.pipeline import export
from nextvit_deploy.request import Request
checkpoint, name, output = sys.argv[1:]
start = time.perf_counter()
manifest = export(Request(output=Path(output), checkpoint=checkpoint), lambda _: None)
assert str(manifest.verdict) == "verified", manifest.checks
print(json.dumps(time.perf_counter() - start))
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One process: seconds in all, seconds in the call, peak resident memory in bytes."""

    process: float
    call: float
    memory: int


def main() -> None:
    """Alternate both and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variant", choices=("small", "base", "large"), default="small")
    arguments = parser.parse_args()
    name = f"nextvit_{arguments.variant}"
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = str(Path(folder, "checkpoint.pth"))
        torch.save(randomise(NextViT(VARIANTS[name]), seed=0).state_dict(), checkpoint)
        rounds = []
        for _ in range(arguments.rounds):
            bare = _run(_BARE, checkpoint, name, str(Path(folder, "bare.onnx")))
            rounds.append((bare, _run(_WHOLE, checkpoint, name, folder)))
    process = statistics.median(whole.process / bare.process for bare, whole in rounds)
    call = statistics.median(whole.call / bare.call for bare, whole in rounds)
    memory = max(whole.memory for _, whole in rounds) / 1e9
    bare, whole = rounds[-1]
    print(f"{name} at 224, {arguments.rounds} pairs, last: bare {bare.process:.1f} s, whole {whole.process:.1f} s")
    print(f"  whole process over bare process: {process:.2f}; bound {TIME_BOUND}: {_met(process, TIME_BOUND)}")
    print(f"  call over call:                  {call:.2f}; bound {TIME_BOUND}: {_met(call, TIME_BOUND)}")
    bound = MEMORY_BOUND.get(arguments.variant)
    judged = f"; bound {bound} GB: {_met(memory, bound)}" if bound else ""
    print(f"  peak memory {memory:.2f} GB (bare {max(b.memory for b, _ in rounds) / 1e9:.2f} GB){judged}")


def _run(script: str, *arguments: str) -> Run:
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)
    with process:
        output = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"a benchmarked process failed with status {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(time.perf_counter() - start, json.loads(output.splitlines()[-1]), usage.ru_maxrss * unit)


def _met(value: float, bound: float) -> str:
    return "met" if value <= bound else "MISSED"


if __name__ == "__main__":
    main()
