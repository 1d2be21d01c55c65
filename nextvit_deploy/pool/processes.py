"""Processes on this machine; each does one task after the other, and is replaced when it dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Final

from nextvit_deploy.pool.pool import Deaths, Done, Failure, Result, Task, attempt

_SPAWN: Final = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in whatever state they are
_PATIENCE: Final = 5.0
"""Seconds that a dying process has to tell its exit status."""
_GONE: Final = (EOFError, OSError)
"""What a pipe raises whose other end died."""


@dataclass(frozen=True, slots=True)
class Processes:
    """``workers`` processes, or as many as there are tasks where those are fewer."""

    workers: int

    def run(self, work: Callable[[Task], Result], tasks: Sequence[Task]) -> Generator[tuple[int, Result], None, None]:
        """See ``Pool``."""
        crew = _Crew(work, tasks, deque(range(len(tasks))), Deaths(tasks))
        try:
            for _ in range(min(self.workers, len(tasks))):
                crew.hire()
            while crew.members:
                for index, answer in crew.answers():
                    if isinstance(answer, Failure):
                        raise answer.error()
                    yield index, answer.result
        finally:
            crew.stop()


@dataclass(slots=True, eq=False)
class _Worker:
    process: SpawnProcess
    pipe: Connection
    index: int = -1
    """Of the task it is at."""


@dataclass(slots=True)
class _Crew:
    work: Callable[[Any], Any]
    tasks: Sequence[Any]
    waiting: deque[int]
    deaths: Deaths
    members: list[_Worker] = field(default_factory=list)

    def hire(self) -> None:
        """One more worker, with a task, where any is waiting."""
        if not self.waiting:
            return
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_serve, args=(theirs, self.work), daemon=True)
        worker = _Worker(process, ours)
        with _without_interrupts():
            process.start()
            self.members.append(worker)
        theirs.close()  # the worker's is the only one left, so that its death can be read here
        self.give(worker)

    def give(self, worker: _Worker) -> None:
        """The next task; a worker that nothing is left for goes."""
        if not self.waiting:
            self.dismiss(worker)
            return
        worker.index = self.waiting.popleft()
        with suppress(*_GONE):  # it is dead, which is noticed where answers are read
            worker.pipe.send((self.tasks[worker.index],))

    def answers(self) -> Iterator[tuple[int, Done[Any] | Failure]]:
        """Wait until some workers have answered or died; those that answered go on with their next task."""
        ends: dict[Any, _Worker] = {}
        for each in self.members:
            ends |= {each.pipe: each, each.process.sentinel: each}
        for worker in dict.fromkeys(ends[end] for end in connection.wait(ends)):
            index = worker.index
            try:
                answer = worker.pipe.recv() if worker.pipe.poll() else None
            except _GONE:
                answer = None
            if answer is None:
                self.replace(worker)
            else:
                self.give(worker)
                yield index, answer

    def replace(self, worker: _Worker) -> None:
        """Somebody else for a worker that died, and its task to the front of those that wait."""
        worker.process.join(_PATIENCE)
        self.waiting.appendleft(worker.index)
        self.deaths.add(worker.index, _why(worker.process.exitcode))
        self.dismiss(worker)
        self.hire()

    def dismiss(self, worker: _Worker) -> None:
        self.members.remove(worker)
        _end([worker])

    def stop(self) -> None:
        _end(self.members)
        self.members.clear()


def _end(workers: Iterable[_Worker]) -> None:
    """Kill them: what they hold is theirs alone, and nothing is lost that was answered."""
    workers = list(workers)
    for each in workers:
        each.process.kill()
    for each in workers:
        each.process.join()
        each.process.close()
        each.pipe.close()


def _why(code: int | None) -> str:
    """How a process ended, to end a sentence."""
    if code is None or code >= 0:
        return f"with exit status {code}"
    try:
        return f"of {signal.Signals(-code).name}"
    except ValueError:
        return f"of signal {-code}"


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let a process start that doesn't hear Ctrl-C: it is for this one to stop it, and without a traceback.

    Here an interruption waits meanwhile.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which would lift the block when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, work: Callable[[Any], Any]) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with suppress(*_GONE):
        while True:
            (task,) = pipe.recv()
            pipe.send(attempt(work, task))


def _leave_with_parent() -> None:
    """However the parent ends, nobody works on for it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
