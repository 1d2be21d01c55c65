"""What is asked of CUDA to run an engine, and who can answer: cuda-bindings, or pycuda.

One of them holds one stream; everything runs on it, and everything it gives out is freed when its ``with`` ends, in
the reverse order and after the stream has finished, on errors too.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from nextvit_exporters.errors import UnsupportedSpec

if TYPE_CHECKING:
    from typing_extensions import Self

Bytes = NDArray[np.uint8]
"""Memory of the host, (N,) uint8."""

Event = Any
"""A mark on the stream; each implementation has its own kind."""

CUDA_NAMES: Final = ("cuda-bindings", "pycuda")


class Graph(Protocol):
    """Work that was captured once and is launched as a whole."""

    def launch(self) -> None:
        """Launch it on the stream it was captured on; raises BuildFailed when CUDA refuses."""
        ...

    def close(self) -> None:
        """Free it, once; raises BuildFailed when CUDA refuses."""
        ...


class Cuda(Protocol):
    """CUDA on the first GPU: memory, one stream, events and graphs; a context manager that frees all of it.

    Entering raises MissingExtra without the package. Every method raises BuildFailed, with CUDA's own name of the
    error, when a call fails.
    """

    @property
    def name(self) -> str:
        """The package and its version: ``cuda-bindings 12.9.10``."""
        ...

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def allocate(self, size: int) -> int:
        """The address of ``size`` new bytes on the GPU."""
        ...

    def pin(self, size: int) -> Bytes:
        """``size`` new bytes of page-locked host memory, (size,) uint8; gone when the ``with`` ends."""
        ...

    def upload(self, address: int, host: Bytes) -> None:
        """Copy ``host`` to the GPU behind what the stream is doing."""
        ...

    def download(self, host: Bytes, address: int) -> None:
        """Copy from the GPU into ``host`` behind what the stream is doing."""
        ...

    def synchronize(self) -> None:
        """Wait until the stream has finished."""
        ...

    def event(self) -> Event:
        """A new event that can tell times."""
        ...

    def record(self, event: Event) -> None:
        """Put ``event`` behind what the stream is doing."""
        ...

    def elapsed(self, start: Event, end: Event) -> float:
        """Milliseconds between two events; waits for ``end``."""
        ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """What ``work`` puts on the stream, as a graph; nothing is executed.

        Raises UnsupportedSpec where there are no graphs.
        """
        ...


def open_cuda(name: str) -> Cuda:
    """The implementation of that name in ``CUDA_NAMES``; raises UnsupportedSpec when there is none."""
    if name == "cuda-bindings":
        from nextvit_exporters.cuda.with_bindings import BindingsCuda

        return BindingsCuda()
    if name == "pycuda":
        from nextvit_exporters.cuda.with_pycuda import PycudaCuda

        return PycudaCuda()
    raise UnsupportedSpec(f"there is no CUDA package '{name}'; choose one of {', '.join(CUDA_NAMES)}")
