"""CUDA through pycuda, where that is what is installed; it has no CUDA graphs.

The GPU's primary context is used, the one TensorRT itself works in.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from nextvit_exporters.cuda.driver import CudaFailed
from nextvit_exporters.cuda.memory import Bytes, Event, Graph
from nextvit_exporters.errors import BuildFailed, MissingExtra, UnsupportedSpec

if TYPE_CHECKING:
    from typing_extensions import Self

_DEVICE: Final = 0


class PycudaCuda:
    """``Cuda`` by pycuda; see ``memory.Cuda`` for the contract."""

    def __init__(self) -> None:
        self.name = "pycuda"
        self._driver: Any = None
        self._stream: Any = None
        self._held = ExitStack()

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream.handle)

    def __enter__(self) -> Self:
        try:
            self._driver = importlib.import_module("pycuda.driver")
            package = importlib.import_module("pycuda")
        except ImportError as error:
            raise MissingExtra("running engines with pycuda", "pycuda") from error
        self.name = f"pycuda {package.VERSION_TEXT}"
        with ExitStack() as held, self._told():
            self._driver.init()
            context = self._driver.Device(_DEVICE).retain_primary_context()
            held.callback(self._free, context.detach)
            context.push()
            held.callback(self._free, self._driver.Context.pop)
            self._stream = self._driver.Stream()
            held.callback(setattr, self, "_stream", None)  # pycuda destroys it with its last reference
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._held:
                self.synchronize()
        except BuildFailed:
            if kind is None:  # otherwise what went wrong first is what is told
                raise

    def allocate(self, size: int) -> int:
        """The address of ``size`` new bytes on the GPU."""
        with self._told():
            made = self._driver.mem_alloc(size)
        self._held.callback(self._free, made.free)
        return int(made)

    def pin(self, size: int) -> Bytes:
        """``size`` new bytes of page-locked host memory."""
        with self._told():
            made: Bytes = self._driver.pagelocked_empty(size, "uint8")
        self._held.callback(self._free, made.base.free)  # type: ignore[union-attr]  # pycuda's own allocation
        return made

    def upload(self, address: int, host: Bytes) -> None:
        """Copy ``host`` to the GPU on the stream."""
        with self._told():
            self._driver.memcpy_htod_async(address, host, self._stream)

    def download(self, host: Bytes, address: int) -> None:
        """Copy from the GPU into ``host`` on the stream."""
        with self._told():
            self._driver.memcpy_dtoh_async(host, address, self._stream)

    def synchronize(self) -> None:
        """Wait until the stream has finished."""
        with self._told():
            self._stream.synchronize()

    def event(self) -> Event:
        """A new event that can tell times; pycuda destroys it with its last reference."""
        with self._told():
            return self._driver.Event()

    def record(self, event: Event) -> None:
        """Put ``event`` on the stream."""
        with self._told():
            event.record(self._stream)

    def elapsed(self, start: Event, end: Event) -> float:
        """Milliseconds between two events."""
        with self._told():
            end.synchronize()
            return float(start.time_till(end))

    def capture(self, work: Callable[[], None]) -> Graph:
        """Always raises UnsupportedSpec: pycuda has no graphs."""
        del work
        raise UnsupportedSpec("pycuda has no CUDA graphs; use --cuda cuda-bindings, or drop --graph")

    def _free(self, free: Callable[[], None]) -> None:
        with self._told():
            free()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn pycuda's errors, which name the call and CUDA's error, into BuildFailed."""
        try:
            yield
        except self._driver.Error as error:
            raise CudaFailed(f"CUDA fails: {' '.join(str(error).split())}") from error
