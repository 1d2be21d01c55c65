"""What a whole T4 engine costs on this machine: seconds, and peak memory, of one `nextvit-export trt --fp16`.

A process of its own, imports and the proof on 8 images included; a variant with random weights, batch 1.

    python -m benchmarks.trt_cost [--variant small] [--size 224] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import sys

from benchmarks.whole_command import cost, tell

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
    name, size, rounds = f"nextvit_{arguments.variant}", arguments.size, arguments.rounds
    seconds, gigabytes = cost(name, size, rounds, ["trt", "--fp16", "--backend", "tensorrt-rtx"])
    judged = (arguments.variant, size) == JUDGED
    print(f"{name} at {size}, FP16 engine for a T4, {rounds} rounds on {os.cpu_count()} cores")
    tell("whole command", seconds, "s", SECONDS_BOUND if judged else None)
    tell("peak memory", gigabytes, "GB", MEMORY_BOUND if judged else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
