"""``nextvit-export``: parse, call one function, print, exit status.

Exit status: 0 verified, 1 an error that the one line on stderr explains, 2 wrong usage, 3 outside the tolerance,
4 not verified (it could not be executed), 130 interrupted. Frameworks are imported inside the commands, so that
``--help`` answers at once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from enum import Enum
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, cast

import typer

from nextvit_deploy import __version__
from nextvit_deploy import terminal as t
from nextvit_models.errors import DeployError

if TYPE_CHECKING:
    from nextvit_deploy.manifest import Manifest

app = typer.Typer(
    name="nextvit-export",
    help="Turn a trained Next-ViT into files that ship, and prove each file against PyTorch.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help comes in half the time
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``nextvit-export``: runs one command and exits with its status."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be printable
    # newer typers bring their own copy of click; this is its UsageError in either
    usage_error = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])
    try:
        status = app(arguments, prog_name=app.info.name, standalone_mode=False)
    except usage_error as error:
        command = error.ctx.command_path if error.ctx else app.info.name
        message = error.format_message()
        t.say(f"{message}{'' if message.endswith(('.', '?')) else '.'} See: {command} --help")
        sys.exit(t.USAGE)
    except typer.Abort:  # interrupted outside of a command's own guard
        t.say("interrupted")
        sys.exit(t.INTERRUPTED)
    sys.exit(status)


_LARGEST: Final = 16384
"""Pixels a side; beyond it even counting overflows."""


class InputChoice(str, Enum):
    """What the file reads."""

    NORMALIZED = "normalized"
    FLOAT = "float"
    UINT8 = "uint8"
    UINT8_NHWC = "uint8-nhwc"


Ckpt = Annotated[
    str | None,
    typer.Argument(
        help="A .pth or .safetensors file, or a hub id; the bundled demo when left out.", show_default=False
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the file and its manifest.")]
Size = Annotated[
    str | None,
    typer.Option("--size", metavar="N|HxW", help="Input size in pixels; the checkpoint's when left out."),
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Images at a time.")]
Images = Annotated[
    Path | None, typer.Option("--images", metavar="DIR", help="Images to verify on; the demo's when left out.")
]
Count = Annotated[int, typer.Option("--count", min=1, help="How many images to verify on.")]
Ema = Annotated[bool, typer.Option("--ema", help="Take the averaged weights where the file holds both.")]
Skip = Annotated[
    list[str] | None, typer.Option("--skip-pass", metavar="NAME", help="Leave a pass out; may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more: what was inferred, what was left alone.")]


@app.command()
def onnx(  # noqa: PLR0913 - one parameter per option
    checkpoint: Ckpt = None,
    *,
    output: Output = Path("exports"),
    fp16: Annotated[bool, typer.Option("--fp16", help="FP16 inside, float32 at input and output.")] = False,
    size: Size = None,
    batch: Batch = 1,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Leave the batch open.")] = False,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="Leave height and width open.")] = False,
    reads: Annotated[
        InputChoice, typer.Option("--input", help="Normalised float32, or raw RGB pixels from 0 to 255.")
    ] = InputChoice.NORMALIZED,
    consumer: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="NAME",
            help="Who reads the file, such as tensorrt-10; sets the opset.",
            autocompletion=_consumers,
        ),
    ] = None,
    opset: Annotated[int | None, typer.Option("--opset", min=1, help="ONNX opset, in place of --for's or 18.")] = None,
    simplify: Annotated[bool, typer.Option(help="Run onnx-simplifier.")] = True,
    skip: Skip = None,
    ema: Ema = False,
    images: Images = None,
    count: Count = 8,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Export to ONNX and verify the saved file against PyTorch."""
    with t.guard(), t.progress(quiet=quiet or as_json) as on_step:
        from nextvit_deploy.pipeline import Request, export
        from nextvit_exporters.spec import InputKind, Precision

        request = Request(
            output=output,
            checkpoint=checkpoint,
            ema=ema,
            precision=Precision.FP16 if fp16 else Precision.FP32,
            size=_parse_size(size),
            batch=batch,
            images=images,
            count=count,
            input=InputKind(reads.value),
            consumer=consumer,
            opset=opset,
            dynamic_batch=dynamic_batch,
            dynamic_size=dynamic_size,
            simplify=simplify,
            skip=tuple(skip or ()),
        )
        manifest = export(request, on_step)
    _report(manifest, as_json=as_json, quiet=quiet, verbose=verbose)


@app.command()
def verify(
    artefact: Annotated[Path, typer.Argument(help="An .onnx file.")],
    *,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="CKPT", help="What it was made from; the demo when left out.")
    ] = None,
    ema: Ema = False,
    images: Images = None,
    count: Count = 8,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Execute a saved file and compare it with its checkpoint."""
    with t.guard(), t.progress(quiet=quiet or as_json) as on_step:
        from nextvit_deploy.pipeline import Request, verify_saved

        request = Request(output=artefact.parent, checkpoint=checkpoint, ema=ema, images=images, count=count)
        manifest = verify_saved(artefact, request, on_step)
    _report(manifest, as_json=as_json, quiet=quiet, verbose=verbose)


@app.command()
def inspect(
    source: Annotated[
        str | None, typer.Argument(metavar="[ARTEFACT|CKPT]", help="An .onnx file, a checkpoint or a hub id.")
    ] = None,
    *,
    size: Size = None,
    ema: Ema = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say what a checkpoint or an artefact is."""
    with t.guard():
        from nextvit_deploy.inspection import inspect as look
        from nextvit_deploy.manifest import plain
        from nextvit_deploy.render import show_inspection

        found = look(source, _parse_size(size), ema=ema)
        if as_json:
            t.print_json(plain({"name": found.name, **found.facts}))
        elif not quiet:
            with t.printing() as console:
                show_inspection(console, found)


@app.command()
def passes(
    checkpoint: Ckpt = None,
    *,
    size: Size = None,
    skip: Skip = None,
    ema: Ema = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the graph rewrites and print the certified table; nothing is written."""
    with t.guard(), t.progress(quiet=quiet or as_json) as on_step:
        from dataclasses import asdict

        from nextvit_deploy.manifest import plain
        from nextvit_deploy.pipeline import Request, certify
        from nextvit_deploy.render import show_notes, show_passes

        request = Request(output=Path(), checkpoint=checkpoint, ema=ema, size=_parse_size(size), skip=tuple(skip or ()))
        _, records, notes = certify(request, on_step)
    if as_json:
        t.print_json(plain({"passes": [asdict(each) for each in records], "notes": notes}))
    elif not quiet:
        with t.printing() as console:
            show_notes(console, notes)
            show_passes(console, records, verbose=verbose)
    if wrong := [each.name for each in records if not each.certified]:
        t.fail(f"rolled back, for it moved the outputs: {', '.join(wrong)}; report it, or --skip-pass it", t.FAILED)


@app.command()
def convert(
    checkpoint: Annotated[str, typer.Argument(help="A .pth or .safetensors file, or a hub id.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The file to write.")],
    *,
    ema: Ema = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint in its safe form: tensors and metadata, no pickle."""
    with t.guard(), t.progress(quiet=quiet or as_json) as on_step:
        from nextvit_deploy.outputs import check_writable
        from nextvit_models.checkpoint import load_checkpoint, save_safetensors

        if output.suffix != ".safetensors":
            msg = f"{output} does not end in .safetensors; name the output so"
            raise DeployError(msg)
        check_writable(output)
        on_step("load the checkpoint")
        loaded = load_checkpoint(checkpoint, ema=ema)
        on_step("write")
        save_safetensors(loaded, output)
    if as_json:
        t.print_json({"file": str(output), "weights": loaded.fingerprint, "found": list(loaded.found)})
    elif not quiet:
        with t.printing() as console:
            for line in (*loaded.found, f"wrote {output}, weights {loaded.fingerprint[:12]}"):
                console.print(line, soft_wrap=True, markup=False, highlight=False)


@app.command()
def doctor(*, as_json: AsJson = False) -> None:
    """Say what works on this machine, and how to install what is missing."""
    with t.guard():
        from dataclasses import asdict

        from nextvit_deploy import doctor as d

        installed = d.installed_versions()
        facts, lanes = (*d.machine(), *d.packages(installed)), d.lanes(installed)
        if as_json:
            t.print_json({"facts": {f.name: f.value for f in facts}, "lanes": [asdict(lane) for lane in lanes]})
        else:
            from nextvit_deploy.render_doctor import show_doctor

            with t.printing() as console:
                show_doctor(console, facts, lanes)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _consumers(incomplete: str) -> list[str]:
    from nextvit_exporters.opsets import CONSUMERS

    return [name for name in CONSUMERS if name.startswith(incomplete)]


def _parse_size(text: str | None) -> tuple[int, int] | None:
    """``224`` or ``224x320`` (height x width), in pixels."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text, re.ASCII | re.IGNORECASE)
    if found is None:
        msg = f"'{text}' is not a size; write 224 or HEIGHTxWIDTH such as 224x320"
        raise typer.BadParameter(msg, param_hint="'--size'")
    height, width = int(found[1]), int(found[2] or found[1])
    if max(height, width) > _LARGEST:
        msg = f"'{text}' is larger than {_LARGEST} pixels a side"
        raise typer.BadParameter(msg, param_hint="'--size'")
    return height, width


def _report(manifest: Manifest, *, as_json: bool, quiet: bool, verbose: bool) -> None:
    from nextvit_deploy.render import show_manifest
    from nextvit_deploy.verify import Verdict

    if as_json:
        t.print_json(manifest.as_dict())
    elif not quiet:
        with t.printing() as console:
            show_manifest(console, manifest, verbose=verbose)
    if manifest.verdict is Verdict.VERIFIED:
        return
    reasons = "; ".join(dict.fromkeys(f"{c.question}: {c.why}" for c in manifest.checks if c.why))
    status = t.FAILED if manifest.verdict is Verdict.FAILED else t.NOT_VERIFIED
    t.fail(f"{manifest.artifact.path.name} is {manifest.verdict}: {reasons}", status)
