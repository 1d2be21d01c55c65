"""``nextvit-export``: parse, call one function, print, exit status.

Exit status: 0 verified, 1 an error that the one line on stderr explains, 2 wrong usage, 3 outside the tolerance,
4 not verified (it could not be executed), 130 interrupted. Frameworks are imported inside the commands, so that
``--help`` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console

from nextvit_deploy import __version__
from nextvit_models.errors import DeployError

if TYPE_CHECKING:
    from nextvit_deploy.manifest import Manifest

app = typer.Typer(
    name="nextvit-export",
    help="Turn a trained Next-ViT into files that ship, and prove each file against PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

FAILED: Final = 3
NOT_VERIFIED: Final = 4
INTERRUPTED: Final = 130


class InputChoice(str, Enum):
    """What the file reads."""

    NORMALIZED = "normalized"
    FLOAT = "float"
    UINT8 = "uint8"


def _parse_size(text: str) -> tuple[int, int]:
    """``224`` or ``224x320`` (height x width), in pixels."""
    height, _, width = text.lower().partition("x")
    try:
        return int(height), int(width or height)
    except ValueError as error:
        msg = f"'{text}' is not a size; write 224 or HEIGHTxWIDTH such as 224x320"
        raise typer.BadParameter(msg) from error


Ckpt = Annotated[
    str | None,
    typer.Argument(
        help="A .pth or .safetensors file, or a hub id; the bundled demo when left out.", show_default=False
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the file and its manifest.")]
Size = Annotated[
    tuple[int, int] | None,
    typer.Option(
        "--size", metavar="N|HxW", parser=_parse_size, help="Input size in pixels; the checkpoint's when left out."
    ),
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
        typer.Option("--for", metavar="NAME", help="Who reads the file, such as tensorrt-10; sets the opset."),
    ] = None,
    opset: Annotated[int | None, typer.Option("--opset", help="ONNX opset, in place of --for's or 18.")] = None,
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
    with _guard(), _progress(quiet=quiet or as_json) as on_step:
        from nextvit_deploy.pipeline import Request, export_onnx
        from nextvit_exporters.spec import InputKind, Precision

        request = Request(
            output=output,
            checkpoint=checkpoint,
            ema=ema,
            precision=Precision.FP16 if fp16 else Precision.FP32,
            size=size,
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
        manifest = export_onnx(request, on_step)
    _report(manifest, as_json=as_json, quiet=quiet, verbose=verbose)


@app.command()
def verify(  # noqa: PLR0913 - one parameter per option
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
    with _guard(), _progress(quiet=quiet or as_json) as on_step:
        from nextvit_deploy.pipeline import Request, verify_onnx

        request = Request(output=artefact.parent, checkpoint=checkpoint, ema=ema, images=images, count=count)
        manifest = verify_onnx(artefact, request, on_step)
    _report(manifest, as_json=as_json, quiet=quiet, verbose=verbose)


@app.command()
def inspect(
    source: Annotated[
        str | None, typer.Argument(metavar="[ARTEFACT|CKPT]", help="An .onnx file, a checkpoint or a hub id.")
    ] = None,
    *,
    size: Size = None,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint or an artefact is."""
    with _guard():
        from nextvit_deploy.inspection import inspect as look
        from nextvit_deploy.render import show_inspection

        found = look(source, size)
        if as_json:
            _print_json({"name": found.name, **found.facts})
        else:
            show_inspection(_stdout(), found)


@app.command()
def passes(
    checkpoint: Ckpt = None,
    *,
    size: Size = None,
    skip: Skip = None,
    ema: Ema = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run the graph rewrites and print the certified table; nothing is written."""
    with _guard(), _progress(quiet=as_json) as on_step:
        from dataclasses import asdict

        from nextvit_deploy.pipeline import Request, certify
        from nextvit_deploy.render import show_notes, show_passes

        request = Request(output=Path(), checkpoint=checkpoint, ema=ema, size=size, skip=tuple(skip or ()))
        _, records, notes = certify(request, on_step)
    if as_json:
        _print_json({"passes": [asdict(each) for each in records], "notes": list(notes)})
    else:
        show_notes(_stdout(), notes)
        show_passes(_stdout(), records, verbose=verbose)
    if not all(each.certified for each in records):
        raise typer.Exit(FAILED)


@app.command()
def convert(
    checkpoint: Annotated[str, typer.Argument(help="A .pth or .safetensors file, or a hub id.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The file to write.")],
    *,
    ema: Ema = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint in its safe form: tensors and metadata, no pickle."""
    with _guard(), _progress(quiet=quiet) as on_step:
        from nextvit_models.checkpoint import load_checkpoint, save_safetensors

        if output.suffix != ".safetensors":
            msg = f"{output} does not end in .safetensors; name the output so"
            raise DeployError(msg)
        on_step("load the checkpoint")
        loaded = load_checkpoint(checkpoint, ema=ema)
        on_step("write")
        save_safetensors(loaded, output)
    if not quiet:
        for line in loaded.found:
            _stdout().print(line, soft_wrap=True, markup=False)
        _stdout().print(f"wrote {output}, weights {loaded.fingerprint[:12]}", soft_wrap=True, markup=False)


@app.command()
def doctor(*, as_json: AsJson = False) -> None:
    """Say what works on this machine, and how to install what is missing."""
    with _guard():
        from dataclasses import asdict

        from nextvit_deploy import doctor as d

        installed = d.installed_versions()
        facts, lanes = (*d.machine(), *d.packages(installed)), d.lanes(installed)
        if as_json:
            _print_json({"facts": {f.name: f.value for f in facts}, "lanes": [asdict(lane) for lane in lanes]})
        else:
            from nextvit_deploy.render_doctor import show_doctor

            show_doctor(_stdout(), facts, lanes)


def main() -> None:
    """Entry point of ``nextvit-export``."""
    app()


@app.callback(invoke_without_command=True)
def _root(
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _report(manifest: Manifest, *, as_json: bool, quiet: bool, verbose: bool) -> None:
    from nextvit_deploy.render import show_manifest
    from nextvit_deploy.verify import Verdict

    if as_json:
        _print_json(manifest.as_dict())
    elif not quiet:
        show_manifest(_stdout(), manifest, verbose=verbose)
    if manifest.verdict is Verdict.VERIFIED:
        return
    reasons = "; ".join(dict.fromkeys(c.why for c in manifest.checks if c.why))
    _fail(
        f"{manifest.artifact.path.name} is {manifest.verdict}: {reasons}",
        {
            Verdict.FAILED: FAILED,
            Verdict.NOT_VERIFIED: NOT_VERIFIED,
        }[manifest.verdict],
    )


@contextmanager
def _guard() -> Iterator[None]:
    """Turn what a user can act on into one line and a status; anything else is a bug and keeps its traceback."""
    try:
        yield
    except DeployError as error:
        _fail(" ".join(str(error).split()), 1)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", INTERRUPTED)


def _fail(line: str, status: int) -> None:
    Console(stderr=True).print(f"nextvit-export: {line}", soft_wrap=True, markup=False, highlight=False)
    raise typer.Exit(status)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show the running step on a terminal's stderr; elsewhere stay silent."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    with console.status("starting") as status:
        yield lambda step: status.update(f"{step} ...")


def _stdout() -> Console:
    """Tables on stdout; 120 columns where the terminal doesn't say."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
