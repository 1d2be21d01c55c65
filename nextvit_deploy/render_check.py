"""A check for people: what runs while it runs, and at its end one table, what is wrong, and what moved."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from nextvit_deploy.check import figures
from nextvit_deploy.check.cells import Cell
from nextvit_deploy.check.result import CheckResult, Row
from nextvit_deploy.check.summary import changed
from nextvit_deploy.render import STYLE, show_notes, table
from nextvit_deploy.verdict import Verdict

_WAITING, _RUNNING, _DONE = "waiting", "running", "done"
_EDGE: Final = 4
"""Lines of a terminal that are left for what stands around the table."""
_REFRESH: Final = 4
"""A second."""


def show_check(console: Console, result: CheckResult) -> None:
    """Notes, rows, problems, moves, and the count of verdicts last."""
    show_notes(console, map(figures.one_line, result.notes))
    _show_rows(console, result)
    for row in result.rows:
        for each in row.problems:
            module = f" \\[{escape(figures.one_line(each.module))}]" if each.module else ""
            name, said = (escape(figures.one_line(text)) for text in (row.cell.name, each.message))
            console.print(
                f"[{STYLE[each.verdict]}]{name}: {each.kind}:[/] {said}{module}", soft_wrap=True, highlight=False
            )
    if result.baseline is not None:
        _show_moves(console, result)
    counts = ((sum(row.verdict is verdict for row in result.rows), verdict) for verdict in Verdict)
    told = ", ".join(f"[{STYLE[verdict]}]{count} {verdict}[/]" for count, verdict in counts if count)
    jobs = "1 job" if result.jobs == 1 else f"{result.jobs} jobs"
    console.print(f"{told or 'nothing checked'}; {figures.seconds_text(result.seconds)}, {jobs}", highlight=False)


def _show_rows(console: Console, result: CheckResult) -> None:
    shown = table(f"Check: {len(result.rows)} {'cell' if len(result.rows) == 1 else 'cells'}")
    shown.padding = (0, 1)
    shown.add_column("cell", overflow="fold")
    for name in ("cost", "size", "kernels", "time"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("verdict", justify="right", no_wrap=True)
    for row in result.rows:
        manifest = row.outcome.manifest
        told = ("", "", "")
        if manifest is not None:
            count = str(figures.kernels(manifest) or "?")
            cost = figures.error_text(figures.precision_cost(manifest))
            told = cost, figures.size_text(figures.size(manifest)), count
        took = "cached" if row.cached else figures.seconds_text(row.outcome.seconds)
        shown.add_row(Text(figures.one_line(row.cell.name)), *told, took, _verdict(row))
    console.print(shown)
    console.print("cost: relative rms of the stored precision against PyTorch in float32", style="dim", soft_wrap=True)


def _show_moves(console: Console, result: CheckResult) -> None:
    """What is another figure than the baseline's; the rest is counted in the title alone."""
    baseline = figures.one_line(str(result.baseline))
    rows = [(row, moved) for row in result.rows if (moved := changed(row.moves))]
    if not rows:
        console.print(f"nothing moved since the baseline {escape(baseline)}", soft_wrap=True, highlight=False)
        return
    console.print(f"[italic]Moved since the baseline {escape(baseline)}[/]", soft_wrap=True, highlight=False)
    for row, moved in rows:
        shown = table(escape(figures.one_line(row.cell.name)))
        shown.padding = (0, 1)
        shown.add_column("figure", overflow="fold")
        for name in ("before", "now", "allowed"):
            shown.add_column(name, justify="right", overflow="fold")
        shown.add_column("")
        for each in moved:
            texts = (each.what, each.before, each.after, (each.allowed or "").removeprefix("at most "))
            shown.add_row(
                *(Text(figures.one_line(text)) for text in texts), "[red]regression[/]" if each.regression else ""
            )
        console.print(shown)


def _verdict(row: Row) -> Text:
    return Text(str(row.verdict), STYLE[row.verdict])


@dataclass(slots=True)
class _Line:
    """A cell as the live table has it."""

    name: str
    state: str = _WAITING
    begun: float | None = None
    ended: float | None = None
    row: Row | None = None


@dataclass(slots=True)
class Shown:
    """The live table's content; events may come from any thread."""

    lines: dict[str, _Line]
    console: Console | None = None
    _lock: Lock = field(default_factory=Lock)

    def event(self, name: str, state: str, row: Row | None) -> None:
        """A cell is at ``state``, or ended with ``row``."""
        with self._lock:
            line = self.lines.setdefault(name, _Line(name))
            now = time.monotonic()
            if state == _RUNNING and line.begun is None:
                line.begun = now
            if row is not None:
                line.row, line.ended = row, now
            line.state = state if row is None else _DONE

    def __rich__(self) -> RenderableType:
        with self._lock:
            lines = list(self.lines.values())
            room = len(lines) if self.console is None else max(1, self.console.height - _EDGE)
            shown = {line.name for line in sorted(lines, key=_rank)[:room]}
            seen = Table.grid(padding=(0, 2))
            seen.add_column(no_wrap=True, overflow="ellipsis")
            seen.add_column(justify="right", no_wrap=True)
            seen.add_column(no_wrap=True)
            for line in lines:
                if line.name in shown:
                    seen.add_row(Text(figures.one_line(line.name)), *_state(line))
            return Group(seen, Text(_tally(lines), "dim"))


@contextmanager
def live(cells: Sequence[Cell], console: Console | None = None, *, quiet: bool = False) -> Iterator[Shown]:
    """Show every cell's state on a terminal's stderr until the block is left; elsewhere stay silent."""
    console = Console(stderr=True) if console is None else console
    shown = Shown({cell.name: _Line(cell.name) for cell in cells}, console)
    if quiet or not console.is_terminal:
        yield shown
        return
    with Live(
        shown,
        console=console,
        transient=True,
        refresh_per_second=_REFRESH,
        redirect_stdout=False,
        redirect_stderr=False,
    ):
        yield shown


def _rank(line: _Line) -> int:
    """What is shown first where there isn't room for all: what runs, what is wrong, what is done, what waits."""
    if line.row is None:
        return 0 if line.begun is not None else 3
    return 2 if line.row.verdict is Verdict.VERIFIED else 1


def _state(line: _Line) -> tuple[Text, Text]:
    """Elapsed seconds, and the verdict or what it is at."""
    if line.row is not None:
        took = 0.0 if line.begun is None or line.ended is None else line.ended - line.begun
        return Text("cached" if line.row.cached else figures.seconds_text(took)), _verdict(line.row)
    if line.begun is None:
        return Text(), Text(line.state, "dim")
    return Text(figures.seconds_text(time.monotonic() - line.begun)), Text(line.state, "cyan")


def _tally(lines: Sequence[_Line]) -> str:
    running = sum(line.row is None and line.begun is not None for line in lines)
    waiting = sum(line.row is None and line.begun is None for line in lines)
    return f"{len(lines) - running - waiting} of {len(lines)} done, {running} running, {waiting} waiting"
