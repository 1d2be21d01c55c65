"""``nextvit-export``: parse, call one function, print, exit status.

Exit status: 0 verified, 1 an error that the one line on stderr explains, 2 wrong usage, 3 outside the tolerance,
4 not verified (it could not be executed), 130 interrupted. Frameworks are imported inside the commands, so that
``--help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated, cast

import typer

from nextvit_deploy import __version__
from nextvit_deploy import terminal as t
from nextvit_deploy.cli import (
    bench,
    bisect,
    check,
    contract,
    convert,
    coreml,
    evaluate,
    init,
    looks,
    onnx,
    report,
    reproduce,
    trt,
)

app = typer.Typer(
    name="nextvit-export",
    help="Turn a trained Next-ViT into files that ship, and prove each file against PyTorch.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help comes in half the time
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    onnx.onnx,
    trt.trt,
    coreml.coreml,
    init.init,
    check.check,
    bisect.bisect,
    report.report,
    looks.verify,
    evaluate.evaluate,
    reproduce.reproduce,
    contract.check_preproc,
    looks.inspect,
    looks.lint,
    bench.bench,
    looks.passes,
    convert.convert,
    looks.doctor,
):
    app.command()(_command)
app.command("all")(check.all_lanes)


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
