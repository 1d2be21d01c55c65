"""One cell in a process of its own: whatever becomes of it, the check goes on and knows how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock, Thread
from typing import IO, Final

from nextvit_deploy.check.cells import Cell
from nextvit_deploy.check.result import Outcome
from nextvit_exporters.errors import OutputNotWritten
from nextvit_exporters.files import atomic_write

_CHILD: Final = (
    *(sys.executable, "-X", "faulthandler", "-c"),
    "from nextvit_deploy.check.child import main; main()",
)
_LOG: Final = 2000
"""Lines of a log that are kept: the last ones."""
_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(slots=True, eq=False)
class Running:
    """The processes that are at work, so that they can all be ended at once; then no more begin."""

    processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopped: bool = False
    _lock: Lock = field(default_factory=Lock)

    def begin(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes] | None:
        """Start one, in a session of its own: Ctrl-C is for this process to hear. None once all were stopped."""
        with self._lock:
            if self.stopped:
                return None
            pipe = subprocess.PIPE
            process = subprocess.Popen(  # noqa: S603 - our own module, by our own interpreter
                command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, start_new_session=True
            )
            self.processes.add(process)
            return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Kill one, and whatever it started."""
        with suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()
        with self._lock:
            self.processes.discard(process)

    def stop(self) -> None:
        """Kill all."""
        with self._lock:
            self.stopped = True
            processes = list(self.processes)
        for process in processes:
            self.end(process)


@dataclass(frozen=True, slots=True)
class Isolated:
    """Work for a pool: runs a cell in a process of its own on ``threads`` threads, for ``timeout`` seconds at most.

    Artefacts go below ``output``, into a folder of the cell's name, and the process's log beside that folder.
    """

    output: Path
    threads: int
    timeout: float

    def __call__(self, cell: Cell) -> Outcome:
        """What the cell came to."""
        return self.run(cell, Running())

    def run(self, cell: Cell, running: Running) -> Outcome:
        """The same, among processes that somebody may stop; a stopped one crashed."""
        start = time.perf_counter()
        given = json.dumps({"cell": cell.as_dict(), "output": str(self.output)})
        environment = dict(os.environ) | dict.fromkeys(_THREADS, str(self.threads))
        process = running.begin([*_CHILD, given], environment)
        if process is None:
            return Outcome(crash="stopped before it began")
        answer, log = _Drain(process.stdout, None), _Drain(process.stderr, _LOG)
        timed_out = False
        try:
            process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        running.end(process)
        for pipe in (answer, log):
            pipe.join()
        outcome = _outcome(answer.data, log.data, process.returncode, timed_out=timed_out)
        if process.stdin is not None:
            process.stdin.close()
        path = self.output / f"{cell.name}.log"
        return replace(outcome, log=_keep(path, log.data), seconds=round(time.perf_counter() - start, 3))


class _Drain(Thread):
    """Reads a pipe to its end, so that nobody waits for it to be read; keeps the last lines, or all for None."""

    def __init__(self, pipe: IO[bytes] | None, lines: int | None) -> None:
        super().__init__(daemon=True)
        self._pipe, self._lines = pipe, deque[bytes](maxlen=lines)
        self.start()

    def run(self) -> None:
        """Read on until the other side is closed."""
        if self._pipe is not None:
            with self._pipe:
                self._lines.extend(self._pipe)

    @property
    def data(self) -> bytes:
        """What was read."""
        return b"".join(self._lines)


def _outcome(answer: bytes, log: bytes, status: int, *, timed_out: bool) -> Outcome:
    if timed_out:
        return Outcome(timed_out=True)
    if status == 0:
        with suppress(ValueError, TypeError):
            return Outcome.from_dict(json.loads(answer))
        return Outcome(crash="it ended without an answer")
    if status < 0:
        return Outcome(crash=f"killed by {_name(-status)}")
    last = next((line for line in reversed(log.decode(errors="replace").splitlines()) if line.strip()), "")
    return Outcome(crash=f"exit status {status}" + (f": {last.strip()}" if last else ""))


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _keep(path: Path, log: bytes) -> str | None:
    """Where the log is; None where there is nothing to tell, or no room for it."""
    if not log.strip():
        with suppress(OSError):
            path.unlink()  # an earlier one's
        return None
    try:
        atomic_write(path, log)
    except (OSError, OutputNotWritten):
        return None
    return str(path)
