"""``evaluate``: an artefact and PyTorch over a folder of pictures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from nextvit_deploy import terminal as t
from nextvit_deploy.cli import options as o


def evaluate(  # noqa: PLR0913 - one parameter per option
    artefact: Annotated[Path, typer.Argument(help="An .onnx or .engine file, or an .mlpackage.")],
    dataset: Annotated[
        Path | None,
        typer.Argument(
            help="A folder of images, a folder in it for each class or none; the demo's, with its checkpoint, when "
            "left out.",
            show_default=False,
        ),
    ] = None,
    *,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="CKPT", help="What it was made from; the demo when left out.")
    ] = None,
    ema: o.Ema = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the report; beside the artefact when left out."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Images; all when left out.")] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, metavar="N", help="Processes; as many as pay when left out.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="A Ray cluster to work on: auto or HOST:PORT.")
    ] = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Compare a saved file with PyTorch over a whole folder of images, and report it."""
    with t.guard(), t.counting(quiet=quiet or as_json) as tell:
        from nextvit_deploy.evaluate.run import EvaluateRequest
        from nextvit_deploy.evaluate.run import evaluate as run

        request = EvaluateRequest(artefact, dataset, checkpoint, ema, output, limit, workers, ray)
        found = run(request, tell)
    if as_json:
        t.print_json(found.as_dict() | {"run": asdict(found.run)})
    elif not quiet:
        from nextvit_deploy.render_evaluate import show_evaluation

        with t.printing() as console:
            show_evaluation(console, found, verbose=verbose)
            console.print(f"written: {request.places[1]}", markup=False, soft_wrap=True)
