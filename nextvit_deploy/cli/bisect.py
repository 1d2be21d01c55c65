"""``bisect``: where a saved artefact and PyTorch part."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nextvit_deploy import terminal as t
from nextvit_deploy.cli import options as o

if TYPE_CHECKING:
    from collections.abc import Callable

    from nextvit_deploy.bisect.bundle import Bundle
    from nextvit_deploy.bisect.cut import Cut
    from nextvit_deploy.bisect.record import Bisection


def bisect(  # noqa: PLR0913 - one parameter per option
    artefact: Annotated[Path, typer.Argument(help="An .onnx or .engine file, or an .mlpackage.")],
    *,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="CKPT", help="What it was made from; the demo when left out.")
    ] = None,
    ema: o.Ema = False,
    images: o.Images = None,
    count: Annotated[int, typer.Option("--count", min=1, help="How many images to run.")] = 8,
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", metavar="DIR", help="Where a repro bundle goes; beside the artefact when left out."),
    ] = None,
    no_bundle: Annotated[bool, typer.Option("--no-bundle", help="Write no repro bundle.")] = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Find the first layer where a saved file and PyTorch part, and write the smallest piece that shows it."""
    if no_bundle and bundle is not None:
        raise typer.BadParameter("--bundle and --no-bundle exclude each other; give one", param_hint="the bundle")
    with t.guard(), t.progress(quiet=quiet or as_json) as on_step:
        from nextvit_deploy.bisect.bundle import check_bundle_place
        from nextvit_deploy.bisect.run import bisect as run
        from nextvit_deploy.request import Request
        from nextvit_exporters.errors import MissingExtra, NotExecutable

        place = None if no_bundle else bundle or artefact.with_name(f"{artefact.name}.repro")
        if place is not None:
            check_bundle_place(place)
        request = Request(output=artefact.parent, checkpoint=checkpoint, ema=ema, images=images, count=count)
        try:
            found, cuts = run(artefact, request, on_step)
        except MissingExtra as error:  # which says nothing of the artefact
            raise NotExecutable(str(error)) from error
        made, note = (None, "") if place is None else _bundle(place, artefact, found, cuts, on_step)
    if as_json:
        written = None if made is None else {"folder": str(made.folder), "archive": str(made.archive)}
        t.print_json(found.as_dict() | {"bundle": written, "no_bundle": note})
    elif not quiet:
        from nextvit_deploy.render_bisect import show_bisection

        with t.printing() as console:
            show_bisection(console, found, verbose=verbose)
            for line in (note, *(() if made is None else (f"repro bundle: {made.folder}", *made.notes))):
                console.print(line, soft_wrap=True, markup=False, highlight=False) if line else None
    _leave(found)


def _bundle(
    place: Path, artefact: Path, found: Bisection, cuts: tuple[Cut, ...], on_step: Callable[[str], None]
) -> tuple[Bundle | None, str]:
    """The bundle of the first parting, or why there is none."""
    from nextvit_deploy.bisect.bundle import is_bundle, write_bundle
    from nextvit_exporters.errors import DeployError, OutputNotWritten

    first, old = found.parting, f"; {place} is an earlier run's" if is_bundle(place) else ""
    if first is None:
        return None, f"no repro bundle: nothing parts{old}" if old else ""
    cut = next((each for each in cuts if each.parting == first), None)
    if cut is None:
        return None, f"no repro bundle: no piece of the artefact shows it alone{old}"
    try:
        return write_bundle(place, artefact, cut, found, on_step), ""
    except OutputNotWritten:
        raise
    except DeployError as error:
        return None, f"no repro bundle: {error}{old}"


def _leave(found: Bisection) -> None:
    """Exit with 3 where they part, with 4 where nothing was executed."""
    from nextvit_deploy.render_bisect import verdict_of

    if found.parting is not None:
        t.fail(verdict_of(found), t.FAILED)
    if not any(series.layers for series in found.series):
        t.fail(f"not verified: {'; '.join(found.notes) or 'no layer could be executed'}", t.NOT_VERIFIED)
