"""``bench``: how long an engine takes on the GPU at hand."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from nextvit_deploy import terminal as t
from nextvit_deploy.cli import options as o


class CudaChoice(str, Enum):
    """What talks to CUDA."""

    CUDA_BINDINGS = "cuda-bindings"
    PYCUDA = "pycuda"


def bench(  # noqa: PLR0913 - one parameter per option
    engine: Annotated[Path, typer.Argument(help="An .engine file.")],
    *,
    cuda: Annotated[CudaChoice, typer.Option("--cuda", help="What talks to CUDA.")] = CudaChoice.CUDA_BINDINGS,
    graph: Annotated[bool, typer.Option("--graph", help="Launch the engine as one CUDA graph.")] = False,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Runs before the first that counts.")] = 20,
    iterations: Annotated[int, typer.Option("--iterations", min=1, help="Runs that count.")] = 200,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Images at a time; as tuned if left out.")] = None,
    size: o.Size = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Time an engine on the GPU at hand, with and without transfers."""
    with t.guard(), t.progress(quiet=quiet or as_json) as on_step:
        from nextvit_deploy.bench import BenchRequest
        from nextvit_deploy.bench import bench as measure
        from nextvit_deploy.render_bench import show_bench

        asked = BenchRequest(engine, cuda.value, graph, warmup, iterations, batch, o.parse_size(size))
        result = measure(asked, on_step)
    if as_json:
        t.print_json(result.as_dict())
    elif not quiet:
        with t.printing() as console:
            show_bench(console, result)
