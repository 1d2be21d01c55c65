"""A bench's table for people, at home in 80 columns."""

from __future__ import annotations

import math

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nextvit_deploy.bench import BenchResult, Timing


def show_bench(console: Console, result: BenchResult) -> None:
    """What was timed, and one row without transfers and one with."""
    console.print(f"{escape(result.executor)}, {escape(result.cuda)}", soft_wrap=True)
    for name, shape in result.shapes.items():
        size = math.prod(shape) * np.dtype(result.dtypes[name]).itemsize
        console.print(f"  {escape(name)}: {'x'.join(map(str, shape))} {result.dtypes[name]}, {_size(size)}")
    how = "as a CUDA graph" if result.graph else "without a CUDA graph"
    console.print(f"{result.iterations} runs {how}, after {result.warmup} to warm up", soft_wrap=True)
    console.print(f"loaded in {result.load:.1f} s, {_size(result.memory)} for inputs and outputs", soft_wrap=True)
    table = Table(
        title="Milliseconds of one run, and images per second",
        title_justify="left",
        title_style="italic",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("transfers", no_wrap=True)
    for name in ("mean", "p50", "p90", "p99", "least", "most", "images/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("without", *_row(result.without_transfers))
    table.add_row("with", *_row(result.with_transfers))
    console.print(table)


def _row(timing: Timing) -> tuple[str, ...]:
    times = timing.mean, timing.p50, timing.p90, timing.p99, timing.least, timing.most
    return (*(_time(each) for each in times), f"{timing.images_per_second:.0f}")


def _time(milliseconds: float) -> str:
    """Four digits or so: a time of the GPU's is good to half a microsecond."""
    return f"{milliseconds:.3f}" if milliseconds < 100 else f"{milliseconds:.1f}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} B"
