"""``init``: a configuration for ``check``, written for a checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Final

import typer

from nextvit_deploy import terminal as t
from nextvit_deploy.cli import options as o

CONFIG: Final = Path("nextvit-export.toml")


def init(
    checkpoint: o.Ckpt = None,
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The configuration to write.")
    ] = CONFIG,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    ema: o.Ema = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Write a configuration for check, with every option explained."""
    with t.guard(), t.progress(quiet=quiet or as_json) as on_step:
        from nextvit_deploy import doctor
        from nextvit_deploy.check.init import write_config

        on_step("load the checkpoint")
        lanes = doctor.lanes(doctor.installed_versions())
        written = write_config(checkpoint, output, lanes, ema=ema, force=force)
    if as_json:
        t.print_json({"file": str(output), "targets": list(written.targets), "waiting": list(written.waiting)})
    elif not quiet:
        waiting = f"; {', '.join(written.waiting)} not here: the file says what to install" if written.waiting else ""
        command = "nextvit-export check" if output == CONFIG else f"nextvit-export check {shlex.quote(str(output))}"
        with t.printing() as console:
            line = f"wrote {output}: {', '.join(written.targets) or 'no target'}{waiting}. Run: {command}"
            console.print(line, soft_wrap=True, markup=False, highlight=False)
