"""``reproduce``: an artefact built again from what it records, and what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nextvit_deploy import terminal as t
from nextvit_deploy.cli import options as o


def reproduce(
    artefact: Annotated[Path, typer.Argument(help="An .onnx or .engine file or an .mlpackage of this tool.")],
    *,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="CKPT", help="What it was made from; the demo when left out.")
    ] = None,
    ema: o.Ema = False,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="DIR", help="The pictures it was calibrated on; else the demo's."),
    ] = None,
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", help="Leave what was built in this folder.")
    ] = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Build a saved file again from its manifest and its checkpoint: byte-identical, or what differs."""
    with t.guard(), t.progress(quiet=quiet or as_json) as on_step:
        from nextvit_deploy.reproduce import Request
        from nextvit_deploy.reproduce import reproduce as build_again
        from nextvit_exporters.errors import MissingExtra, NotExecutable

        try:
            result = build_again(Request(artefact, checkpoint, ema, calibration, keep), on_step)
        except MissingExtra as error:  # which says nothing of the artefact
            raise NotExecutable(str(error)) from error
    if as_json:
        t.print_json(result.as_dict())
    elif not quiet:
        from nextvit_deploy.render_reproduce import show_reproduction

        with t.printing() as console:
            show_reproduction(console, result)
    if not result.identical:
        why = result.differences[0].what if result.differences else "the bytes are others"
        t.fail(f"{artefact.name} differs from what is built here: {why}", t.FAILED)
