"""pycuda is called as it is documented, its errors are told, and all is freed before the context goes."""

from __future__ import annotations

import sys
import weakref
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from nextvit_exporters.cuda.with_pycuda import PycudaCuda
from nextvit_exporters.errors import BuildFailed, MissingExtra, UnsupportedSpec


class Refused(Exception):
    """pycuda.driver.Error."""


class Journal:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: set[str] = set()

    def note(self, what: str) -> None:
        self.calls.append(what)
        if what in self.fails:
            raise Refused(f"{what} failed: out of\nmemory")


class Thing:
    """An allocation, a context, a stream or an event: every method of it is noted."""

    def __init__(self, journal: Journal, kind: str, methods: tuple[str, ...]) -> None:
        self.journal, self.kind, self.methods = journal, kind, methods
        self.handle = 4711

    def __getattr__(self, name: str) -> Any:
        if name not in self.methods:
            raise AttributeError(f"pycuda's {self.kind} has no {name}")

        def call(*arguments: object) -> float:
            del arguments
            self.journal.note(f"{self.kind}.{name}")
            return 1.5

        return call

    def __int__(self) -> int:
        return 1000


class Pinned(np.ndarray[Any, Any]):
    """An array whose base can be freed, as pycuda's can."""

    base: Any


class FakeDriver(ModuleType):
    Error = Refused

    def __init__(self, journal: Journal) -> None:
        super().__init__("pycuda.driver")
        self.journal = journal
        self.copies: list[tuple[Any, Any, Any]] = []
        self.Context = Thing(journal, "Context", ("pop",))

    def init(self) -> None:
        self.journal.note("init")

    def Device(self, index: int) -> Any:  # noqa: N802 - pycuda's name
        assert index == 0
        return self

    def retain_primary_context(self) -> Thing:
        self.journal.note("retain")
        return Thing(self.journal, "context", ("push", "detach"))

    def Stream(self) -> Thing:  # noqa: N802 - pycuda's name
        self.journal.note("Stream")
        return Thing(self.journal, "stream", ("synchronize",))

    def Event(self) -> Thing:  # noqa: N802 - pycuda's name
        return Thing(self.journal, "event", ("record", "synchronize", "time_till"))

    def mem_alloc(self, size: int) -> Thing:
        self.journal.note("mem_alloc")
        assert size > 0
        return Thing(self.journal, "memory", ("free",))

    def pagelocked_empty(self, size: int, dtype: str) -> np.ndarray[Any, Any]:
        self.journal.note("pagelocked_empty")

        class Owned(Pinned):
            base = Thing(self.journal, "pinned", ("free",))

        return np.zeros(size, dtype).view(Owned)

    def memcpy_htod_async(self, to: int, source: np.ndarray[Any, Any], stream: Thing) -> None:
        self.journal.note("htod")
        self.copies.append((to, source.nbytes, stream.kind))

    def memcpy_dtoh_async(self, to: np.ndarray[Any, Any], source: int, stream: Thing) -> None:
        self.journal.note("dtoh")
        self.copies.append((to.nbytes, source, stream.kind))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake, package = FakeDriver(Journal()), ModuleType("pycuda")
    package.VERSION_TEXT = "2026.1"  # type: ignore[attr-defined]  # as pycuda has it
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", fake)
    return fake


def test_everything_is_asked_and_freed_in_order(driver: FakeDriver) -> None:
    with PycudaCuda() as cuda:
        assert (cuda.name, cuda.stream) == ("pycuda 2026.1", 4711)
        address, host = cuda.allocate(64), cuda.pin(48)
        assert (address, host.shape, host.dtype) == (1000, (48,), np.dtype("uint8"))
        cuda.upload(address + 16, host[:32])
        cuda.download(host[16:], address)
        cuda.synchronize()
        start, end = cuda.event(), cuda.event()
        cuda.record(start)
        assert cuda.elapsed(start, end) == 1.5
        kept = weakref.ref(cuda._stream)
    assert kept() is None  # pycuda destroys a stream with its last reference, which must not outlive the context
    assert driver.copies == [(1016, 32, "stream"), (32, 1000, "stream")]
    assert driver.journal.calls == [
        *("init", "retain", "context.push", "Stream", "mem_alloc", "pagelocked_empty", "htod", "dtoh"),
        *("stream.synchronize", "event.record", "event.synchronize", "event.time_till"),
        *("stream.synchronize", "pinned.free", "memory.free", "Context.pop", "context.detach"),
    ]


@pytest.mark.parametrize(
    ("step", "freed"),
    [
        ("init", []),
        ("context.push", ["context.detach"]),
        ("Stream", ["Context.pop", "context.detach"]),
        ("mem_alloc", ["Context.pop", "context.detach"]),
        ("pagelocked_empty", ["memory.free", "Context.pop", "context.detach"]),
        ("htod", ["pinned.free", "memory.free", "Context.pop", "context.detach"]),
        ("memory.free", ["pinned.free", "memory.free", "Context.pop", "context.detach"]),
        ("stream.synchronize", ["pinned.free", "memory.free", "Context.pop", "context.detach"]),
    ],
)
def test_an_error_is_told_and_the_rest_is_freed(driver: FakeDriver, step: str, freed: list[str]) -> None:
    driver.journal.fails.add(step)
    with pytest.raises(BuildFailed, match=f"^CUDA fails: {step} failed: out of memory$"), PycudaCuda() as cuda:
        address = cuda.allocate(8)
        cuda.upload(address, cuda.pin(8))
    frees = {"pinned.free", "memory.free", "Context.pop", "context.detach"}
    assert [call for call in driver.journal.calls if call in frees] == freed


def test_what_went_wrong_first_is_told(driver: FakeDriver) -> None:
    driver.journal.fails = {"stream.synchronize", "memory.free"}
    with pytest.raises(ZeroDivisionError), PycudaCuda() as cuda:
        cuda.allocate(8)
        raise ZeroDivisionError
    assert driver.journal.calls[-2:] == ["Context.pop", "context.detach"]


def test_there_are_no_graphs(driver: FakeDriver) -> None:
    with PycudaCuda() as cuda, pytest.raises(UnsupportedSpec, match="no CUDA graphs; use --cuda cuda-bindings"):
        cuda.capture(lambda: pytest.fail("nothing is run"))
    assert driver.journal.calls[-1] == "context.detach"


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(MissingExtra, match=r"pip install 'nextvit-deploy\[pycuda\]'"):
        PycudaCuda().__enter__()
