"""Work for a pool that goes wrong on demand; processes and Ray's workers import it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nextvit_deploy.pool.pool import keep
from nextvit_exporters.errors import MissingExtra


@dataclass(frozen=True, slots=True)
class Sum:
    """Task: a word and a number. Returns (number squared, threads torch has, times this process opened)."""

    folder: Path

    def __call__(self, task: tuple[str, int]) -> tuple[int, int, int]:
        what, number = task
        opened = keep(self.folder, self.opened)
        if what == "die once" and not self.marked(f"died-{number}"):
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "die":
            self.marked(f"died-{number}-{time.time_ns()}")
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "lack":
            raise MissingExtra("this test", "nothing")
        if what == "fail":
            raise KeyError("a bug")
        if what == "sleep":
            time.sleep(60)
        return number**2, torch.get_num_threads(), opened

    @contextmanager
    def opened(self) -> Iterator[int]:
        place = self.folder / f"open-{os.getpid()}"
        self.marked(place.name)
        yield len(list(self.folder.glob(f"open-{os.getpid()}*")))
        self.marked(f"closed-{os.getpid()}")

    def marked(self, name: str) -> bool:
        """Whether there was such a mark before; there is one now."""
        path = self.folder / name
        before = path.exists()
        path.touch()
        return before


def pids(folder: Path) -> set[int]:
    """Of every process that opened something."""
    return {int(path.name.removeprefix("open-")) for path in folder.glob("open-*")}
