"""Commands that look at what is there: an artefact, a checkpoint, this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nextvit_deploy import terminal as t
from nextvit_deploy.cli import options as o
from nextvit_deploy.cli.ending import ending


def verify(  # noqa: PLR0913 - one parameter per option
    artefact: Annotated[Path, typer.Argument(help="An .onnx or .engine file, an .mlpackage, or a kit.")],
    *,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="CKPT", help="What it was made from; the demo when left out.")
    ] = None,
    ema: o.Ema = False,
    images: o.Images = None,
    count: o.Count = 8,
    merge: Annotated[
        Path | None, typer.Option("--merge", metavar="VERDICT", help="Put a kit's verdict.json into its manifests.")
    ] = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Execute a saved file and compare it with its checkpoint, or merge what a kit found on its GPU."""
    if merge is not None:
        _check_nothing_ignored({"--checkpoint": checkpoint is not None, "--ema": ema, "--images": images is not None})
        _merge(artefact, merge, as_json=as_json, quiet=quiet)
        return
    if artefact.is_dir():
        _check_no_kit(artefact)
    with t.guard(), t.progress(quiet=quiet or as_json) as on_step:
        from nextvit_deploy.pipeline import verify_saved
        from nextvit_deploy.request import Request
        from nextvit_exporters.errors import MissingExtra, NotExecutable

        request = Request(output=artefact.parent, checkpoint=checkpoint, ema=ema, images=images, count=count)
        try:
            manifest = verify_saved(artefact, request, on_step)
        except MissingExtra as error:  # which says nothing of the artefact
            raise NotExecutable(str(error)) from error
    ending(manifest, as_json=as_json, quiet=quiet, verbose=verbose)


def _check_nothing_ignored(given: dict[str, bool]) -> None:
    """Raise BadParameter where one of these options came with --merge."""
    if ignored := [name for name, is_given in given.items() if is_given]:
        msg = f"executes nothing, so it can't be combined with {', '.join(ignored)}; leave one out"
        raise typer.BadParameter(msg, param_hint="'--merge'")


def _check_no_kit(folder: Path) -> None:
    with t.guard():
        from nextvit_deploy.kit.build import is_kit
        from nextvit_exporters.errors import UnsupportedSpec

        if is_kit(folder):
            raise UnsupportedSpec(
                f"{folder} is a kit: run its check.py on the GPU's machine, then add --merge VERDICT with what it wrote"
            )


def _merge(kit: Path, verdict: Path, *, as_json: bool, quiet: bool) -> None:
    """What the device found, printed, with the exit status of the worse of its verdict and the merged manifest's."""
    with t.guard():
        from nextvit_deploy.kit.merge import merge_verdict
        from nextvit_deploy.render import show_device
        from nextvit_deploy.verdict import Verdict

        merged = merge_verdict(kit, verdict)
    if as_json:
        t.print_json(merged)
    elif not quiet:
        with t.printing() as console:
            show_device(console, merged["device"])
    verdicts, why = {merged["verdict"], merged["device"]["verdict"]}, merged["device"]["why"] or "as its manifest says"
    if str(Verdict.FAILED) in verdicts:
        t.fail(f"{kit} is failed: {why}", t.FAILED)
    if verdicts != {str(Verdict.VERIFIED)}:
        t.fail(f"{kit} is not verified: {why}", t.NOT_VERIFIED)


def inspect(
    source: Annotated[
        str | None,
        typer.Argument(metavar="[ARTEFACT|CKPT]", help="An .onnx, .engine or .mlpackage, a checkpoint or a hub id."),
    ] = None,
    *,
    size: o.Size = None,
    ema: o.Ema = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Say what a checkpoint or an artefact is."""
    with t.guard():
        from nextvit_deploy.inspection import inspect as look
        from nextvit_deploy.manifest import plain
        from nextvit_deploy.render import show_inspection

        found = look(source, o.parse_size(size), ema=ema)
        if as_json:
            t.print_json(plain({"name": found.name, **found.facts}))
        elif not quiet:
            with t.printing() as console:
                show_inspection(console, found)


def lint(package: Annotated[Path, typer.Argument(help="An .mlpackage.")], *, as_json: o.AsJson = False) -> None:
    """Say what in a Core ML package tends to leave the Neural Engine; heuristics, each with its source."""
    with t.guard():
        from dataclasses import asdict

        from nextvit_exporters.coreml.lint import lint as look
        from nextvit_exporters.coreml.reader import read_package

        findings = look(read_package(package))
        if as_json:
            t.print_json({"findings": [asdict(each) for each in findings]})
        else:
            from nextvit_deploy.render_coreml import show_findings

            with t.printing() as console:
                show_findings(console, package.name, findings)


def passes(
    checkpoint: o.Ckpt = None,
    *,
    size: o.Size = None,
    skip: o.Skip = None,
    ema: o.Ema = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Run the graph rewrites and print the certified table; nothing is written."""
    with t.guard(), t.progress(quiet=quiet or as_json) as on_step:
        from dataclasses import asdict

        from nextvit_deploy.manifest import plain
        from nextvit_deploy.pipeline import certify
        from nextvit_deploy.render import show_notes, show_passes
        from nextvit_deploy.request import Request

        request = Request(
            output=Path(), checkpoint=checkpoint, ema=ema, size=o.parse_size(size), skip=tuple(skip or ())
        )
        _, records, notes = certify(request, on_step)
    if as_json:
        t.print_json(plain({"passes": [asdict(each) for each in records], "notes": notes}))
    elif not quiet:
        with t.printing() as console:
            show_notes(console, notes)
            show_passes(console, records, verbose=verbose)
    if wrong := [each.name for each in records if not each.certified]:
        t.fail(f"rolled back, for it moved the outputs: {', '.join(wrong)}; report it, or --skip-pass it", t.FAILED)


def doctor(*, as_json: o.AsJson = False) -> None:
    """Say what works on this machine, and how to install what is missing."""
    with t.guard():
        from dataclasses import asdict

        from nextvit_deploy import doctor as d

        installed = d.installed_versions()
        facts = (*d.machine(), *d.packages(installed), *d.core_ml(installed))
        lanes = d.lanes(installed)
        if as_json:
            t.print_json({"facts": {f.name: f.value for f in facts}, "lanes": [asdict(lane) for lane in lanes]})
        else:
            from nextvit_deploy.render_doctor import show_doctor

            with t.printing() as console:
                show_doctor(console, facts, lanes)
