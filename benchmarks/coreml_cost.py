"""What a whole Core ML export costs on this machine, and what its conversion costs beside coremltools' plain one.

One `nextvit-export coreml`, a process of its own, with imports and the proof on 8 images: seconds, and peak memory.
Then the conversion alone, both ways alternating in this process: ours (torch.export of the rewritten graph,
coremltools, the package written) over the usual one (``torch.jit.trace`` of the model as it is, coremltools, saved).

    python -m benchmarks.coreml_cost [--variant small] [--size 224] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import fx

from benchmarks import coreml_ops
from benchmarks.pairs import Pairs, interleave
from benchmarks.whole_command import cost, tell
from nextvit_exporters import to_coreml
from nextvit_exporters.spec import ExportSpec
from nextvit_models.config import VARIANTS
from nextvit_models.nextvit import NextViT
from tests.harness import randomise

SECONDS_BOUND = 90.0
MEMORY_BOUND = 3.0
RATIO_BOUND = 1.0
JUDGED = ("small", 224)


def main() -> int:
    """Export and convert a few times, print the medians and the peak, and judge small at 224."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=("small", "base", "large"), default="small")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    name, size, rounds = f"nextvit_{arguments.variant}", arguments.size, arguments.rounds
    seconds, gigabytes = cost(name, size, rounds, ["coreml"])
    judged = (arguments.variant, size) == JUDGED
    print(f"{name} at {size}, FP16 classifier for iOS 16, {rounds} rounds on {os.cpu_count()} cores")
    tell("whole command", seconds, "s", SECONDS_BOUND if judged else None)
    tell("peak memory", gigabytes, "GB", MEMORY_BOUND if judged else None)
    pairs = _conversions(name, size, rounds)
    print(f"  conversion alone, ours over the usual: {pairs}")
    tell("conversion", pairs.ratio, "times the usual", RATIO_BOUND if judged else None)
    return 0


def _conversions(name: str, size: int, rounds: int) -> Pairs:
    """Seconds of both conversions, alternating, behind one of each that isn't counted."""
    model = randomise(NextViT(VARIANTS[name]), seed=0)
    spec = coreml_ops.spec_of(name, size, "logits")
    graph = coreml_ops.rewritten(model, spec)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.mlpackage")
        return interleave(
            _afresh(path, lambda: coreml_ops.convert_usually(model, size, path)),
            _afresh(path, lambda: _ours(spec, graph, path)),
            rounds,
            warmup=1,
            best_of=1,
        )


def _ours(spec: ExportSpec, graph: fx.GraphModule, path: Path) -> None:
    to_coreml.build(spec, to_coreml.lower(spec, graph), path, {}, lambda _: None)


def _afresh(path: Path, convert: Callable[[], object]) -> Callable[[], object]:
    def call() -> None:
        shutil.rmtree(path, ignore_errors=True)
        convert()

    return call


if __name__ == "__main__":
    sys.exit(main())
