"""``convert``: a checkpoint in its safe form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nextvit_deploy import terminal as t
from nextvit_deploy.cli import options as o
from nextvit_models.errors import DeployError


def convert(
    checkpoint: Annotated[str, typer.Argument(help="A .pth or .safetensors file, or a hub id.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The file to write.")],
    *,
    ema: o.Ema = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
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
