"""Independent tasks, shared among processes here or on a Ray cluster, or done one after the other; the answers agree.

Sums that threads share differ in their last bits with the number of threads. So every task is done on one thread,
wherever it is done, and more work at a time means more processes.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Protocol, TypeVar

from nextvit_exporters.errors import DeployError

Task = TypeVar("Task")
Result = TypeVar("Result")
Resource = TypeVar("Resource")

ATTEMPTS: Final = 3
"""How often a task is begun whose worker dies; what kills three of them will kill the next."""


class Pool(Protocol):
    """Who does the work."""

    def run(self, work: Callable[[Task], Result], tasks: Sequence[Task]) -> Generator[tuple[int, Result], None, None]:
        """Every task's number and result, as they finish; close the generator to stop at once.

        ``work`` goes to other processes, so it is a frozen dataclass of a module that they can import, and tasks and
        results can be pickled. What it opens it ``keep``s. A task is named in errors by its ``str``.

        A DeployError of ``work`` is raised here. A worker that dies (memory, a crash) is replaced and its task begun
        anew; a DeployError that names the task is raised when that has happened three times. Any other exception is
        a RuntimeError with its traceback as text, or what it is where nobody else is asked to work.
        """
        ...


def pool(workers: int, ray: str | None = None) -> Pool:
    """``workers`` processes here, none but this one for 1; or at most so many (0: all) on the Ray cluster at ``ray``.

    Raises MissingExtra where Ray is asked for and isn't installed; a cluster that can't be reached is a DeployError
    of the first ``run``.
    """
    if ray is not None:
        from nextvit_deploy.pool.on_ray import RayCluster, check_installed

        check_installed()
        return RayCluster(ray, workers)
    if workers > 1:
        from nextvit_deploy.pool.processes import Processes

        return Processes(workers)
    return Serial()


@dataclass(frozen=True, slots=True)
class Serial:
    """Only this process, one task after the other."""

    def run(self, work: Callable[[Task], Result], tasks: Sequence[Task]) -> Generator[tuple[int, Result], None, None]:
        """See ``Pool``."""
        try:
            for index, task in enumerate(tasks):
                with one_thread():
                    result = work(task)
                yield index, result
        finally:
            let_go()


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong in a worker, in a form that every process can read."""

    kind: type[Exception]
    message: str

    def error(self) -> Exception:
        """The exception to raise; made without its constructor, which may want other arguments."""
        error: Exception = self.kind.__new__(self.kind, self.message)
        error.args = (self.message,)
        return error


@dataclass(frozen=True, slots=True)
class Done(Generic[Result]):
    """A task's result."""

    result: Result


def attempt(work: Callable[[Task], Result], task: Task) -> Done[Result] | Failure:
    """``work(task)`` on one thread; what a worker does."""
    try:
        with one_thread():
            return Done(work(task))
    except DeployError as error:
        return Failure(type(error), str(error))
    except MemoryError as error:
        return Failure(MemoryError, str(error))
    except Exception:  # noqa: BLE001 - it travels as text and is raised on the other side
        return Failure(RuntimeError, f"a worker failed\n{traceback.format_exc()}")


@dataclass(slots=True)
class Deaths:
    """How often workers died of each task, by its number."""

    tasks: Sequence[object]
    counts: Counter[int] = field(default_factory=Counter)

    def add(self, index: int, why: str) -> None:
        """Count one; raises DeployError at the last attempt. ``why`` ends a sentence."""
        self.counts[index] += 1
        if self.counts[index] >= ATTEMPTS:
            raise DeployError(
                f"{self.tasks[index]} can't be done: the worker died {ATTEMPTS} times, {why}; where memory is short, "
                "use fewer --workers"
            )


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch, and the executors that ask it, compute on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_KEPT: Final[dict[Hashable, Any]] = {}
_OPEN: Final = ExitStack()


def keep(key: Hashable, opened: Callable[[], AbstractContextManager[Resource]]) -> Resource:
    """What ``opened`` gives on entering, opened once per process; an equal ``key`` gets the same.

    It stays open until the pool is done. Meant for what takes long to open: a model, an executor.
    """
    if key not in _KEPT:
        _KEPT[key] = _OPEN.enter_context(opened())
    resource: Resource = _KEPT[key]
    return resource


def let_go() -> None:
    """Close all that this process kept."""
    _KEPT.clear()
    _OPEN.close()
