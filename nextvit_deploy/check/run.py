"""A check: find what is kept, run the rest, judge every row, write the result."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from nextvit_deploy.check.baseline import Baseline, read_baseline
from nextvit_deploy.check.cells import Cell
from nextvit_deploy.check.isolate import Isolated, Running
from nextvit_deploy.check.judge import judge
from nextvit_deploy.check.limits import Limits
from nextvit_deploy.check.result import CheckResult, Outcome, Row
from nextvit_deploy.check.store import Store
from nextvit_deploy.outputs import check_writable
from nextvit_exporters.files import atomic_write

State = Literal["waiting", "running", "done"]
OnEvent = Callable[[str, State, Row | None], None]
"""Told a cell's name and what it is at, with its row once it is done; from several threads."""
RESULT: Final = "check.json"
TIMEOUT: Final = 3600.0
"""Seconds for one cell, where nobody says."""
_MOST_JOBS: Final = 4
"""Where nobody says: a large model takes 2.4 GB at its peak."""


@dataclass(frozen=True, slots=True)
class CheckRequest:
    """What to check. None means: as many jobs as pay, nothing to compare with.

    ``ray`` is a cluster's address, which sees the same paths; ``jobs`` then bounds the cells at a time. With ``fresh``
    every cell is run. ``notes`` are what is to be told with the result.
    """

    cells: tuple[Cell, ...]
    output: Path
    limits: Limits = field(default_factory=Limits)
    jobs: int | None = None
    ray: str | None = None
    baseline: Path | None = None
    timeout: float = TIMEOUT
    fresh: bool = False
    whole: bool = True
    """Whether these are all cells that there are: only then is what the baseline has beside them gone."""
    notes: tuple[str, ...] = ()


def check(request: CheckRequest, on_event: OnEvent) -> CheckResult:
    """Run what isn't kept from an earlier check, judge all, and write ``check.json`` into the output folder.

    A cell that fails, crashes, or takes too long is a row; the others go on. What was finished when a check is
    interrupted is kept. Raises a DeployError where the baseline can't be read, or the output can't be written.
    """
    start, jobs = time.perf_counter(), _jobs(request)
    place = request.output / RESULT
    check_writable(place)
    before = (
        None
        if request.baseline is None
        else read_baseline(request.baseline).among([cell.name for cell in request.cells])
    )
    threads = max(1, (os.cpu_count() or 1) // jobs)
    store = Store(request.output, threads, fresh=request.fresh)
    rows: dict[int, Row] = {}
    waiting: list[int] = []
    for index, cell in enumerate(request.cells):
        kept = store.find(cell)
        if kept is None:
            waiting.append(index)
        else:
            rows[index] = _judged(cell, kept, request, before, cached=True)
            on_event(cell.name, "done", rows[index])
    work = Isolated(request.output.absolute(), threads, request.timeout)
    cells = [request.cells[index] for index in waiting]
    with closing(_outcomes(work, cells, jobs, request.ray, on_event)) as outcomes:
        for number, outcome in outcomes:
            index, cell = waiting[number], cells[number]
            store.add(cell, outcome)
            rows[index] = _judged(cell, outcome, request, before, cached=False)
            on_event(cell.name, "done", rows[index])
    ordered = tuple(rows[index] for index in range(len(request.cells)))
    result = CheckResult(
        rows=ordered,
        output=str(request.output),
        baseline=None if request.baseline is None else str(request.baseline),
        notes=(*request.notes, *_notes(store), *(before.gone(ordered) if before is not None and request.whole else ())),
        seconds=round(time.perf_counter() - start, 3),
        jobs=jobs,
    )
    atomic_write(place, (json.dumps(result.as_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n").encode())
    return result


def _jobs(request: CheckRequest) -> int:
    """How many cells at a time."""
    if request.jobs is not None:
        return request.jobs
    return max(1, min(os.cpu_count() or 1, len(request.cells), _MOST_JOBS))


def _judged(cell: Cell, outcome: Outcome, request: CheckRequest, before: Baseline | None, *, cached: bool) -> Row:
    return judge(cell, outcome, request.limits, before, cached=cached)


def _notes(store: Store) -> tuple[str, ...]:
    trouble = store.trouble
    return (f"what was found could not be kept for the next check: {trouble}",) if trouble else ()


def _outcomes(
    work: Isolated, cells: Sequence[Cell], jobs: int, ray: str | None, on_event: OnEvent
) -> Generator[tuple[int, Outcome], None, None]:
    """Every cell's number and outcome as they finish; close the generator to stop at once."""
    if ray is not None:
        from nextvit_deploy.pool.pool import pool

        for cell in cells:
            on_event(cell.name, "running", None)
        yield from pool(jobs, ray).run(work, cells)
        return
    running = Running()

    def one(cell: Cell) -> Outcome:
        on_event(cell.name, "running", None)
        return work.run(cell, running)

    with ThreadPoolExecutor(jobs) as threads:
        futures = {threads.submit(one, cell): number for number, cell in enumerate(cells)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:  # where somebody left the loop, nothing begins any more and nothing goes on
            running.stop()
