"""``report``: a folder of artefacts as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nextvit_deploy import terminal as t
from nextvit_deploy.cli import options as o


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What the artefacts were written to.")],
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The page; report.html in DIR when left out."),
    ] = None,
    quiet: o.Quiet = False,
) -> None:
    """Write one offline HTML page about all artefacts in a folder; exit status 0 whatever their verdict."""
    with t.guard(), t.progress(quiet=quiet) as on_step:
        on_step("read and draw")
        from nextvit_deploy.report.page import REPORT, write_report

        written = write_report(folder, folder / REPORT if output is None else output)
    if not quiet:
        with t.printing() as console:
            console.print(f"written: {written}", markup=False, soft_wrap=True)
