"""The command that compares someone's own preprocessing with a checkpoint's."""

from __future__ import annotations

import tempfile
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nextvit_deploy import terminal as t
from nextvit_deploy.cli import options as o

if TYPE_CHECKING:
    from PIL.Image import Image

    from nextvit_deploy.contract.given import Array


class Takes(str, Enum):
    """What the function is given."""

    PATH = "path"
    PIL = "pil"
    ARRAY = "array"


def check_preproc(
    source: Annotated[
        str, typer.Argument(metavar="FILE.py:FUNCTION|TENSOR", help="Your function, or the tensor it made.")
    ],
    *,
    image: Annotated[
        Path | None,
        typer.Option("--image", metavar="FILE", help="The picture; a generated one for a function when left out."),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="CKPT", help="Whose contract; the demo's when left out.")
    ] = None,
    ema: o.Ema = False,
    takes: Annotated[
        Takes, typer.Option("--takes", help="What the function takes: a path, a PIL image or an HWC uint8 array.")
    ] = Takes.PIL,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Compare your own preprocessing with the checkpoint's on one picture, and name the step that differs."""
    with t.guard():
        from nextvit_deploy.contract.calls import unsteady
        from nextvit_deploy.contract.given import given, open_picture, test_picture
        from nextvit_deploy.contract.search import never_reached, search, without_search
        from nextvit_deploy.render_contract import as_record, conclusion, show_preproc
        from nextvit_models.checkpoint import load_checkpoint
        from nextvit_models.demo import DEMO_CHECKPOINT

        picture = test_picture() if image is None else open_picture(image)
        arrays = _arrays(source, takes, image, picture)
        wanted = load_checkpoint(DEMO_CHECKPOINT if checkpoint is None else checkpoint, ema=ema).preprocessing
        read = given(arrays[0], source, wanted.image_size)
        finding = unsteady(arrays) or never_reached(read.values, picture, wanted)
        if finding:
            found = without_search(finding, read.layout, wanted)
        else:
            found = search(read.values, read.layout, picture, wanted)
    if as_json:
        t.print_json(as_record(found, read, wanted))
    elif not quiet:
        with t.printing() as console:
            show_preproc(console, found, read, wanted)
    if not found.agrees:
        t.fail(f"{source} {conclusion(found)}", t.FAILED)


def _arrays(source: str, takes: Takes, image: Path | None, picture: Image) -> tuple[Array, ...]:
    """What the function makes of the picture, call by call, or what the file holds."""
    from nextvit_deploy.contract.calls import call, is_function
    from nextvit_deploy.contract.given import load_tensor
    from nextvit_exporters.errors import DeployError

    if not is_function(source):
        if image is None:
            raise DeployError(f"{source} was made from a picture; name it with --image")
        return (load_tensor(Path(source)),)
    if image is not None:
        return call(source, takes.value, picture, image)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test-picture.png"
        picture.save(path)
        return call(source, takes.value, picture, path)
