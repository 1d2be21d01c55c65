"""A GPU and a CUDA that do what they are told, late as the real ones do, and remember it.

Nothing on the stream happens before somebody waits for it. Memory that was freed, or that is not page-locked, fails
the test that uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from nextvit_exporters.cuda.memory import Bytes
from nextvit_exporters.errors import BuildFailed

if TYPE_CHECKING:
    from typing_extensions import Self

STREAM = 4711


class Clock:
    """What the GPU's work takes, in milliseconds."""

    UPLOAD, EXECUTE, LAUNCH, DOWNLOAD = 1.0, 4.0, 2.0, 0.5


@dataclass
class FakeGpu:
    """Memory, a stream, and everything that was asked of either."""

    journal: list[str] = field(default_factory=list)
    fails: set[str] = field(default_factory=set)
    memory: dict[int, Bytes] = field(default_factory=dict)
    pinned: list[Bytes] = field(default_factory=list)
    queue: list[Callable[[], None]] = field(default_factory=list)
    now: float = 0.0
    graphs: int = 0

    def note(self, what: str) -> None:
        """Remember it, and fail where the test wants that."""
        self.journal.append(what)
        if what.split(maxsplit=1)[0] in self.fails:
            raise BuildFailed(f"CUDA fails: {what} gave cudaErrorFake")

    def at(self, address: int, size: int) -> Bytes:
        """``size`` bytes of the GPU's memory."""
        for start, block in self.memory.items():
            if start <= address and address + size <= start + len(block):
                return block[address - start : address - start + size]
        raise AssertionError(f"{address} to {address + size} is not memory")

    def put(self, work: Callable[[], None], takes: float) -> None:
        """Put work on the stream."""

        def timed() -> None:
            work()
            self.now += takes

        self.queue.append(timed)

    def drain(self) -> None:
        """Do what is on the stream."""
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    def count(self, word: str) -> int:
        """How often it was asked for something that begins with ``word``."""
        return sum(each.split()[0] == word for each in self.journal)


@dataclass
class FakeGraph:
    gpu: FakeGpu
    work: list[Callable[[], None]]
    open: bool = True

    def launch(self) -> None:
        assert self.open
        self.gpu.note("launch")

        def run() -> None:
            started = self.gpu.now
            for each in self.work:
                each()
            self.gpu.now = started

        self.gpu.put(run, Clock.LAUNCH)

    def close(self) -> None:
        if self.open:
            self.gpu.note("close-graph")
            self.gpu.graphs -= 1
        self.open = False


class FakeCuda:
    """``Cuda`` on a FakeGpu."""

    name = "fake-cuda 1.0"
    stream = STREAM

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.made: list[FakeGraph] = []

    def __enter__(self) -> Self:
        self.gpu.note("open")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for graph in self.made:
            graph.close()
        self.gpu.memory.clear()
        self.gpu.pinned.clear()
        self.gpu.note("freed")

    def allocate(self, size: int) -> int:
        self.gpu.note(f"allocate {size}")
        address = 256 * (1 + len(self.gpu.memory)) * 1000
        self.gpu.memory[address] = np.zeros(size, np.uint8)
        return address

    def pin(self, size: int) -> Bytes:
        self.gpu.note(f"pin {size}")
        self.gpu.pinned.append(np.zeros(size, np.uint8))
        return self.gpu.pinned[-1]

    def upload(self, address: int, host: Bytes) -> None:
        self.gpu.note(f"upload {host.nbytes}")
        self._check(host)
        self.gpu.put(lambda: np.copyto(self.gpu.at(address, host.nbytes), host), Clock.UPLOAD)

    def download(self, host: Bytes, address: int) -> None:
        self.gpu.note(f"download {host.nbytes}")
        self._check(host)
        self.gpu.put(lambda: np.copyto(host, self.gpu.at(address, host.nbytes)), Clock.DOWNLOAD)

    def synchronize(self) -> None:
        self.gpu.note("synchronize")
        self.gpu.drain()

    def event(self) -> list[float]:
        self.gpu.note("event")
        return []

    def record(self, event: list[float]) -> None:
        def mark() -> None:
            event[:] = [self.gpu.now]

        self.gpu.put(mark, 0.0)

    def elapsed(self, start: list[float], end: list[float]) -> float:
        self.gpu.drain()
        return end[0] - start[0]

    def capture(self, work: Callable[[], None]) -> FakeGraph:
        self.gpu.note("capture")
        assert not self.gpu.queue, "a capture must not begin while the stream has work"
        work()
        captured, self.gpu.queue = self.gpu.queue, []
        self.gpu.graphs += 1
        self.made.append(FakeGraph(self.gpu, captured))
        return self.made[-1]

    def _check(self, host: Bytes) -> None:
        assert any(np.shares_memory(host, each) for each in self.gpu.pinned), "the memory is not page-locked"
