"""What commands do to a terminal: one line for an error, an exit status, progress, tables and JSON.

rich is imported where it is used, so that ``--help`` does without.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

import typer

from nextvit_exporters.errors import NotExecutable
from nextvit_models.errors import DeployError

if TYPE_CHECKING:
    from rich.console import Console

ERROR: Final = 1
USAGE: Final = 2
FAILED: Final = 3
NOT_VERIFIED: Final = 4
INTERRUPTED: Final = 130
"""128 and the number of the signal, as shells report it."""

_NO_MEMORY: Final = "not enough memory; use a smaller --size, --batch or --count"
_WIDE: Final = 140
"""Columns of a table where nobody says how many there are: in a pipe or a log."""


class _Stopped(KeyboardInterrupt):
    """The system asked to stop; unwinds as an interruption does."""


@contextmanager
def guard(kept: str = "nothing was written") -> Iterator[None]:
    """Turn what a user can act on into one line and a status; anything else is a bug and keeps its traceback.

    ``kept`` is what is said of outputs where the command is stopped on its way.
    """
    try:
        with _stoppable():
            yield
    except NotExecutable as error:
        fail(f"not verified: {error}", NOT_VERIFIED)
    except DeployError as error:
        fail(str(error), ERROR)
    except MemoryError:
        fail(_NO_MEMORY, ERROR)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch has no type for it
            raise
        fail(_NO_MEMORY, ERROR)
    except _Stopped as stop:
        fail(f"stopped; {kept}", 128 + int(stop.args[0]))
    except KeyboardInterrupt:
        fail(f"interrupted; {kept}", INTERRUPTED)


def fail(line: str, status: int) -> None:
    """Print one line on stderr and leave the command with ``status``."""
    say(line)
    raise typer.Exit(status)


def say(line: str) -> None:
    """Print one line on stderr, never wrapped."""
    typer.echo(f"nextvit-export: {' '.join(line.split())}", err=True)


@contextmanager
def progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show the running step and the seconds since the start on a terminal's stderr; elsewhere stay silent."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as shown:
        running = shown.add_task("import PyTorch", total=None)
        yield lambda step: shown.update(running, description=step, refresh=True)


@contextmanager
def counting(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """As ``progress``, with a bar: how many are done, of how many; of 0 where that isn't known."""
    if quiet or not sys.stderr.isatty():
        yield lambda _step, _done, _total: None
        return
    from rich import progress as bar
    from rich.console import Console

    text = bar.TextColumn("{task.description}", markup=False)
    columns = text, bar.BarColumn(), bar.MofNCompleteColumn(), bar.TimeElapsedColumn(), bar.TimeRemainingColumn()
    console = Console(stderr=True)
    with bar.Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as shown:
        running = shown.add_task("import PyTorch", total=None)
        yield lambda step, done, total: shown.update(
            running, description=step, completed=done, total=total or None, refresh=True
        )


@contextmanager
def printing() -> Iterator[Console]:
    """Stdout for tables: as wide as the terminal, or wide where there is none.

    Where stdout can't be written the command fails in one line, and in silence where nobody reads on.
    """
    from rich.console import Console

    told = sys.stdout.isatty() or "COLUMNS" in os.environ
    try:
        yield Console(width=None if told else _WIDE, emoji=False)
        sys.stdout.flush()
    except OSError as error:
        with Path(os.devnull).open("wb") as nowhere:  # for what is still buffered
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            fail(f"the results can't be printed: {error.strerror}", ERROR)


def print_json(value: object) -> None:
    """Strict JSON on stdout, and nothing else."""
    with printing():
        sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let a request to end unwind the command, so that nothing half-written stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, _frame: FrameType | None) -> None:
    raise _Stopped(number)
