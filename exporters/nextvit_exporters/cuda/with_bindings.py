"""CUDA through NVIDIA's cuda-bindings (12.8 or newer): the runtime API, every status checked."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nextvit_exporters.cuda.driver import CudaFailed
from nextvit_exporters.cuda.memory import Bytes, Event
from nextvit_exporters.errors import BuildFailed, MissingExtra

if TYPE_CHECKING:
    from typing_extensions import Self

_DEVICE: Final = 0


class BindingsCuda:
    """``Cuda`` by cuda-bindings; see ``memory.Cuda`` for the contract."""

    def __init__(self) -> None:
        self.name = "cuda-bindings"
        self._runtime: Any = None
        self._stream: Any = None
        self._held = ExitStack()

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream)

    def __enter__(self) -> Self:
        try:
            self._runtime = importlib.import_module("cuda.bindings.runtime")
            package = importlib.import_module("cuda.bindings")
        except ImportError as error:
            raise MissingExtra("running engines with cuda-bindings", "trt") from error
        self.name = f"cuda-bindings {package.__version__}"
        self._call("cudaSetDevice", _DEVICE)
        self._stream = self._create("cudaStreamCreate", "cudaStreamDestroy")
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
        finally:
            self._stream = None

    def allocate(self, size: int) -> int:
        """The address of ``size`` new bytes on the GPU."""
        return int(self._create("cudaMalloc", "cudaFree", size))

    def pin(self, size: int) -> Bytes:
        """``size`` new bytes of page-locked host memory."""
        address = int(self._create("cudaMallocHost", "cudaFreeHost", size))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def upload(self, address: int, host: Bytes) -> None:
        """Copy ``host`` to the GPU on the stream."""
        self._copy(address, host.ctypes.data, host.nbytes, "cudaMemcpyHostToDevice")

    def download(self, host: Bytes, address: int) -> None:
        """Copy from the GPU into ``host`` on the stream."""
        self._copy(host.ctypes.data, address, host.nbytes, "cudaMemcpyDeviceToHost")

    def synchronize(self) -> None:
        """Wait until the stream has finished."""
        self._call("cudaStreamSynchronize", self._stream)

    def event(self) -> Event:
        """A new event that can tell times."""
        return self._create("cudaEventCreate", "cudaEventDestroy")

    def record(self, event: Event) -> None:
        """Put ``event`` on the stream."""
        self._call("cudaEventRecord", event, self._stream)

    def elapsed(self, start: Event, end: Event) -> float:
        """Milliseconds between two events."""
        self._call("cudaEventSynchronize", end)
        return float(self._call("cudaEventElapsedTime", start, end))

    def capture(self, work: Callable[[], None]) -> BindingsGraph:
        """What ``work`` puts on the stream, as a graph."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            self._abandon()
            raise
        graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            executable = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)
        captured = BindingsGraph(self._call, executable, self._stream)
        self._held.callback(captured.close)
        return captured

    def _abandon(self) -> None:
        """End a capture that failed; the stream stays usable, and the failure is told by who saw it."""
        status, graph = self._runtime.cudaStreamEndCapture(self._stream)
        if int(status) == 0:
            self._runtime.cudaGraphDestroy(graph)

    def _create(self, create: str, destroy: str, *arguments: Any) -> Any:
        """Something new of CUDA's, which is given back at the end."""
        made = self._call(create, *arguments)
        self._held.callback(self._call, destroy, made)
        return made

    def _copy(self, to: int, source: int, size: int, direction: str) -> None:
        kind = getattr(self._runtime.cudaMemcpyKind, direction)
        self._call("cudaMemcpyAsync", to, source, size, kind, self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """The value of a runtime function; raises BuildFailed with the name of its error."""
        status, *values = getattr(self._runtime, name)(*arguments)
        if int(status) != 0:
            raise CudaFailed(f"CUDA fails: {name} gave {getattr(status, 'name', status)}")
        return values[0] if values else None


class BindingsGraph:
    """A captured graph; ``call`` checks every status."""

    def __init__(self, call: Callable[..., Any], executable: Any, stream: Any) -> None:
        self._call = call
        self._executable = executable
        self._stream = stream

    def launch(self) -> None:
        """Launch it on its stream."""
        self._call("cudaGraphLaunch", self._executable, self._stream)

    def close(self) -> None:
        """Free it, once."""
        executable, self._executable = self._executable, None
        if executable is not None:
            self._call("cudaGraphExecDestroy", executable)
