"""cuda-bindings is called as its functions are declared, every status is read, and all is freed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nextvit_exporters.cuda.driver import probe_driver
from nextvit_exporters.cuda.memory import CUDA_NAMES, open_cuda
from nextvit_exporters.cuda.with_bindings import BindingsCuda, BindingsGraph
from nextvit_exporters.errors import BuildFailed, MissingExtra, UnsupportedSpec

Status = IntEnum("Status", {"cudaSuccess": 0, "cudaErrorMemoryAllocation": 2, "cudaErrorIllegalAddress": 700})

ARGUMENTS = {
    "cudaSetDevice": 1,
    "cudaStreamCreate": 0,
    "cudaStreamDestroy": 1,
    "cudaStreamSynchronize": 1,
    "cudaStreamBeginCapture": 2,
    "cudaStreamEndCapture": 1,
    "cudaMalloc": 1,
    "cudaFree": 1,
    "cudaMallocHost": 1,
    "cudaFreeHost": 1,
    "cudaMemcpyAsync": 5,
    "cudaEventCreate": 0,
    "cudaEventDestroy": 1,
    "cudaEventRecord": 2,
    "cudaEventSynchronize": 1,
    "cudaEventElapsedTime": 2,
    "cudaGraphInstantiate": 2,
    "cudaGraphDestroy": 1,
    "cudaGraphLaunch": 2,
    "cudaGraphExecDestroy": 1,
}
"""How many arguments each function takes in cuda-bindings 12.9 and 13.5."""

MAKES = {
    "cudaStreamCreate": "cudaStreamDestroy",
    "cudaMalloc": "cudaFree",
    "cudaMallocHost": "cudaFreeHost",
    "cudaEventCreate": "cudaEventDestroy",
    "cudaStreamEndCapture": "cudaGraphDestroy",
    "cudaGraphInstantiate": "cudaGraphExecDestroy",
}
PAIRS = {destroy: create for create, destroy in MAKES.items()}


class FakeRuntime(ModuleType):
    """Hands out numbers, or real memory for the host, and knows what was not given back."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815 - its name
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815 - its name

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.calls: list[str] = []
        self.arguments: list[tuple[Any, ...]] = []
        self.open: dict[int, str] = {}
        self.host: list[np.ndarray[Any, Any]] = []
        self.fails: dict[str, Status] = {}

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if name not in ARGUMENTS:
            raise AttributeError(f"cuda-bindings has no {name}, or the test does not know it")
        return lambda *arguments: self._call(name, arguments)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        assert len(arguments) == ARGUMENTS[name], name
        self.calls.append(name)
        self.arguments.append(arguments)
        if name in self.fails:
            return (self.fails[name], *([None] if name in MAKES or name == "cudaEventElapsedTime" else []))
        if name in PAIRS:
            assert self.open.pop(int(arguments[0])) == PAIRS[name]
        if name == "cudaEventElapsedTime":
            return Status.cudaSuccess, 1.5
        return (Status.cudaSuccess, self._make(name, arguments)) if name in MAKES else (Status.cudaSuccess,)

    def _make(self, name: str, arguments: tuple[Any, ...]) -> int:
        if name == "cudaMallocHost":
            self.host.append(np.zeros(arguments[0], np.uint8))
            made = int(self.host[-1].ctypes.data)
        else:
            made = 1000 + len(self.calls)
        self.open[made] = name
        return made

    def since(self, count: int) -> list[tuple[Any, ...]]:
        return [(name, *arguments) for name, arguments in zip(self.calls, self.arguments, strict=True)][count:]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake, package = FakeRuntime(), ModuleType("cuda.bindings")
    package.__version__ = "12.9.10"  # type: ignore[attr-defined]  # as packages have it
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    return fake


def test_memory_and_copies(runtime: FakeRuntime) -> None:
    with open_cuda("cuda-bindings") as cuda:
        assert cuda.name == "cuda-bindings 12.9.10"
        address, host = cuda.allocate(64), cuda.pin(48)
        assert (host.dtype, host.shape) == (np.dtype("uint8"), (48,))
        host[:] = 7
        assert (runtime.host[0] == 7).all()
        before = len(runtime.calls)
        cuda.upload(address + 16, host[:32])
        cuda.download(host[16:], address)
        cuda.synchronize()
        at = host.ctypes.data
        assert runtime.since(before) == [
            ("cudaMemcpyAsync", address + 16, at, 32, 1, cuda.stream),
            ("cudaMemcpyAsync", at + 16, address, 32, 2, cuda.stream),
            ("cudaStreamSynchronize", cuda.stream),
        ]
    assert runtime.open == {}
    assert runtime.calls[:2] == ["cudaSetDevice", "cudaStreamCreate"]
    assert runtime.calls[-4:] == ["cudaStreamSynchronize", "cudaFreeHost", "cudaFree", "cudaStreamDestroy"]


def test_events_tell_milliseconds(runtime: FakeRuntime) -> None:
    with BindingsCuda() as cuda:
        start, end = cuda.event(), cuda.event()
        cuda.record(start)
        cuda.record(end)
        before = len(runtime.calls)
        assert cuda.elapsed(start, end) == 1.5
        assert runtime.since(before) == [("cudaEventSynchronize", end), ("cudaEventElapsedTime", start, end)]
    assert runtime.open == {}


def test_a_graph_is_captured_and_launched(runtime: FakeRuntime) -> None:
    with BindingsCuda() as cuda:
        before = len(runtime.calls)
        graph = cuda.capture(lambda: runtime.calls.append("work"))
        captured = [
            "cudaStreamBeginCapture",
            "work",
            "cudaStreamEndCapture",
            "cudaGraphInstantiate",
            "cudaGraphDestroy",
        ]
        assert runtime.calls[before:] == captured
        for _ in range(3):
            graph.launch()
        assert runtime.calls[before + 5 :] == ["cudaGraphLaunch"] * 3
        graph.close()
        graph.close()
    assert runtime.calls.count("cudaGraphExecDestroy") == 1
    assert runtime.open == {}


def test_a_graph_nobody_closes_is_freed(runtime: FakeRuntime) -> None:
    with BindingsCuda() as cuda:
        cuda.capture(lambda: None)
    assert runtime.open == {}


def test_a_capture_that_fails_is_ended(runtime: FakeRuntime) -> None:
    def work() -> None:
        raise BuildFailed("TensorRT refuses to execute the engine")

    with BindingsCuda() as cuda, pytest.raises(BuildFailed, match="TensorRT refuses"):
        cuda.capture(work)
    assert runtime.calls.count("cudaStreamEndCapture") == 1
    assert runtime.open == {}
    runtime.fails["cudaGraphInstantiate"] = Status.cudaErrorMemoryAllocation
    with (
        BindingsCuda() as cuda,
        pytest.raises(BuildFailed, match="cudaGraphInstantiate gave cudaErrorMemoryAllocation"),
    ):
        cuda.capture(lambda: None)
    assert runtime.open == {}


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name not in PAIRS])
def test_every_status_is_read(runtime: FakeRuntime, name: str) -> None:
    runtime.fails[name] = Status.cudaErrorMemoryAllocation
    with (
        pytest.raises(BuildFailed, match=rf"^CUDA fails: {name} gave cudaErrorMemoryAllocation$"),
        BindingsCuda() as cuda,
    ):
        start, end, host = cuda.event(), cuda.event(), cuda.pin(8)
        cuda.upload(cuda.allocate(8), host)
        cuda.capture(lambda: None).launch()
        cuda.record(start)
        cuda.elapsed(start, end)
    runtime.open = {handle: kind for handle, kind in runtime.open.items() if kind != name}
    assert runtime.open == {}


@pytest.mark.parametrize("name", PAIRS)
def test_a_failure_to_free_is_told_and_the_rest_is_freed(runtime: FakeRuntime, name: str) -> None:
    runtime.fails[name] = Status.cudaErrorIllegalAddress
    with pytest.raises(BuildFailed, match=f"{name} gave cudaErrorIllegalAddress"), BindingsCuda() as cuda:
        cuda.event(), cuda.pin(8), cuda.allocate(8), cuda.capture(lambda: None)
    assert set(runtime.open.values()) <= {PAIRS[name], "cudaGraphInstantiate"}


def test_what_went_wrong_first_is_told(runtime: FakeRuntime) -> None:
    runtime.fails = dict.fromkeys(("cudaStreamSynchronize", "cudaFree"), Status.cudaErrorIllegalAddress)
    with pytest.raises(ZeroDivisionError), BindingsCuda() as cuda:
        cuda.allocate(8)
        raise ZeroDivisionError
    assert list(runtime.open.values()) == ["cudaMalloc"]


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingExtra, match=r"pip install 'nextvit-deploy\[trt\]'"):
        BindingsCuda().__enter__()


@pytest.mark.skipif(bool(probe_driver().devices), reason="a GPU is here, and would be asked for nonsense")
def test_the_real_functions_take_what_they_are_given() -> None:
    real = pytest.importorskip("cuda.bindings.runtime", exc_type=ImportError)
    cuda, host, event = BindingsCuda(), np.zeros(8, np.uint8), real.cudaEvent_t(1)
    with pytest.raises(BuildFailed, match=r"^CUDA fails: cudaSetDevice gave cudaError"):
        cuda.__enter__()
    cuda._runtime, cuda._stream = real, real.cudaStream_t(7)
    assert cuda.stream == 7
    asked: dict[str, Callable[[], object]] = {
        "cudaMalloc": lambda: cuda.allocate(8),
        "cudaMallocHost": lambda: cuda.pin(8),
        "cudaMemcpyAsync": lambda: cuda.upload(256, host),
        "cudaStreamSynchronize": cuda.synchronize,
        "cudaEventCreate": cuda.event,
        "cudaEventRecord": lambda: cuda.record(event),
        "cudaEventSynchronize": lambda: cuda.elapsed(event, event),
        "cudaStreamBeginCapture": lambda: cuda.capture(lambda: None),
        "cudaGraphLaunch": BindingsGraph(cuda._call, real.cudaGraphExec_t(0), cuda._stream).launch,
        "cudaGraphExecDestroy": BindingsGraph(cuda._call, real.cudaGraphExec_t(0), cuda._stream).close,
    }
    plain: dict[str, tuple[object, ...]] = {
        "cudaStreamCreate": (),
        "cudaStreamDestroy": (cuda._stream,),
        "cudaStreamEndCapture": (cuda._stream,),
        "cudaFree": (256,),
        "cudaFreeHost": (256,),
        "cudaEventDestroy": (event,),
        "cudaEventElapsedTime": (event, event),
        "cudaGraphInstantiate": (real.cudaGraph_t(0), 0),
        "cudaGraphDestroy": (real.cudaGraph_t(0),),
    }
    asked |= {name: partial(cuda._call, name, *arguments) for name, arguments in plain.items()}
    assert set(asked) | {"cudaSetDevice"} == set(ARGUMENTS)
    for name, call in asked.items():
        with pytest.raises(BuildFailed, match=f"^CUDA fails: {name} gave cudaError"):
            call()


def test_there_is_no_other_package() -> None:
    assert [open_cuda(name).name for name in CUDA_NAMES] == list(CUDA_NAMES)
    with pytest.raises(UnsupportedSpec, match="no CUDA package 'cupy'; choose one of cuda-bindings, pycuda"):
        open_cuda("cupy")
