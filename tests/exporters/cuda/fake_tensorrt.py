"""A TensorRT in any of four versions, on a fake GPU: a name that its bindings do not have is an AttributeError."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest

from nextvit_exporters.cuda.driver import Device, Driver
from nextvit_exporters.executors import tensorrt_device
from tests.exporters.cuda.fake_cuda import STREAM, Clock, FakeCuda, FakeGpu
from tests.exporters.cuda.surfaces import surface

if TYPE_CHECKING:
    pass

T4 = Driver((12, 8), (Device("Tesla T4", (7, 5)),))
CLASSES = 5
Shape = tuple[int, ...]


class Listed:
    """Something of TensorRT's that has the names its version's bindings list, and no others."""

    def __init__(self, version: str, kind: str) -> None:
        object.__setattr__(self, "_names", surface(version, kind))
        object.__setattr__(self, "_kind", f"{kind} of {version}")

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name not in object.__getattribute__(self, "_names"):
            raise AttributeError(f"{object.__getattribute__(self, '_kind')} has no {name}")
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        assert name.startswith("_") or name in self._names, f"{self._kind} has no {name}"
        object.__setattr__(self, name, value)


DataType = Enum("DataType", ["FLOAT", "HALF", "INT8", "UINT8", "INT32", "INT64", "BOOL", "BF16"])
TensorIOMode = Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
TensorLocation = Enum("TensorLocation", ["DEVICE", "HOST"])
TensorFormat = Enum("TensorFormat", ["LINEAR", "CHW4"])
Strategy = Enum("Strategy", ["LAZY", "EAGER", "NONE"])
NUMPY = {"FLOAT": "f4", "HALF": "f2", "INT8": "i1", "UINT8": "u1", "INT32": "i4"}


@dataclass
class Net:
    """An engine of one input and one output: every class's score is the sum of the image and the class's number.

    ``shape`` is the input's, -1 where open; ``ranges`` holds each profile's smallest, best and largest shape.
    """

    version: str
    gpu: FakeGpu
    shape: Shape = (-1, 3, 32, 32)
    ranges: Sequence[tuple[Shape, Shape, Shape]] = (((1, 3, 32, 32), (2, 3, 32, 32), (4, 3, 32, 32)),)
    reads: str = "FLOAT"
    writes: str = "FLOAT"
    location: str = "DEVICE"
    layout: str = "LINEAR"
    loads: bool = True
    contexts: bool = True
    refuses: frozenset[str] = frozenset()
    silent: bool = False
    capturable: bool = True

    def scores(self, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """What the engine answers, (B, classes)."""
        sums = images.reshape(len(images), -1).astype(np.float64).mean(axis=1, keepdims=True)
        scores: np.ndarray[Any, Any] = (sums + np.arange(CLASSES)).astype(NUMPY[self.writes])
        return scores


class FakeEngine(Listed):
    def __init__(self, net: Net) -> None:
        super().__init__(net.version, "ICudaEngine")
        self._net = net
        self.num_io_tensors = 2
        self.num_optimization_profiles = len(net.ranges)

    def get_tensor_name(self, index: int) -> str:
        return ("image", "logits")[index]

    def get_tensor_mode(self, name: str) -> Enum:
        return {"image": TensorIOMode["INPUT"], "logits": TensorIOMode["OUTPUT"]}[name]

    def get_tensor_dtype(self, name: str) -> Enum:
        return DataType[self._net.reads if name == "image" else self._net.writes]

    def get_tensor_location(self, name: str) -> Enum:
        return TensorLocation[self._net.location if name == "image" else "DEVICE"]

    def get_tensor_format(self, name: str) -> Enum:
        return TensorFormat[self._net.layout if name == "image" else "LINEAR"]

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(self._net.shape if name == "image" else (self._net.shape[0], CLASSES))

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        assert name == "image", "only inputs have profiles"
        return [list(shape) for shape in self._net.ranges[profile]]

    def create_runtime_config(self) -> Listed:
        return Listed(self._net.version, "IRuntimeConfig")

    def create_execution_context(self, config: Listed | None = None) -> FakeContext | None:
        kernels = None if config is None else config.dynamic_shapes_kernel_specialization_strategy.name
        self._net.gpu.note("context" if kernels is None else f"context {kernels}")
        return FakeContext(self._net) if self._net.contexts else None


class FakeContext(Listed):
    def __init__(self, net: Net) -> None:
        super().__init__(net.version, "IExecutionContext")
        self._net = net
        self._profile = 0
        self._shape: Shape = net.shape
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._net.gpu.note(f"profile {index}")
        assert stream == STREAM
        self._profile, self._shape, self._addresses = index, self._net.shape, {}
        return "profile" not in self._net.refuses

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        assert name == "image"
        self._net.gpu.note(f"shape {'x'.join(map(str, shape))}")
        low, _, high = self._net.ranges[self._profile]
        if -1 not in self._net.shape:
            low = high = self._net.shape
        within = all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        self._shape = shape
        return within and "shape" not in self._net.refuses

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._net.gpu.note(f"address {name}")
        assert address % 256 == 0
        self._addresses[name] = address
        return "address" not in self._net.refuses

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(self._shape if name == "image" else (self._shape[0], CLASSES))

    def is_stream_capturable(self, stream: int) -> bool:
        assert stream == STREAM
        return self._net.capturable

    def execute_async_v3(self, stream: int) -> bool:
        net = self._net
        net.gpu.note("execute")
        assert stream == STREAM
        assert -1 not in self._shape
        if "execute" in net.refuses:
            return False
        shape, source, to = self._shape, self._addresses["image"], self._addresses["logits"]
        net.gpu.put(lambda: self._compute(shape, source, to), Clock.EXECUTE)
        return True

    def _compute(self, shape: Shape, source: int, to: int) -> None:
        kind = np.dtype(NUMPY[self._net.reads])
        image = self._net.gpu.at(source, math.prod(shape) * kind.itemsize).view(kind).reshape(shape)
        scores = self._net.scores(image)
        if not self._net.silent:
            self._net.gpu.at(to, scores.nbytes)[:] = np.frombuffer(scores.tobytes(), np.uint8)


class FakeLogger:
    class Severity(IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    def log(self, severity: int, msg: str) -> None:
        raise NotImplementedError


class FakeModule(ModuleType):
    """``tensorrt`` or ``tensorrt_rtx`` in that version, whose every engine is ``net``."""

    ILogger: ClassVar[Any] = FakeLogger
    TensorIOMode: ClassVar[Any] = TensorIOMode
    TensorLocation: ClassVar[Any] = TensorLocation
    TensorFormat: ClassVar[Any] = TensorFormat

    def __init__(self, name: str, net: Net) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__version__ = net.version
        self.net = net
        if name == "tensorrt_rtx":
            self.DynamicShapesKernelSpecializationStrategy = Strategy

    def Runtime(self, logger: FakeLogger) -> FakeRuntime:  # noqa: N802 - TensorRT's name
        self.net.gpu.note("runtime")
        return FakeRuntime(self.net, logger)


class FakeRuntime(Listed):
    def __init__(self, net: Net, logger: FakeLogger) -> None:
        super().__init__(net.version, "Runtime")
        self._net = net
        self._logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> FakeEngine | None:
        assert data[1:4] == b"trt"
        if not self._net.loads:
            self._logger.log(FakeLogger.Severity.ERROR, "the plan is\nbroken")
            self._logger.log(FakeLogger.Severity.INFO, "not interesting")
            return None
        return FakeEngine(self._net)


def backend_of(version: str) -> str:
    return "tensorrt-rtx" if version.startswith("1.") else "tensorrt"


def write_engine(folder: Path, version: str, *, bits: int = 1) -> Path:
    """A file with the header of an engine of that version, for the compute capabilities in ``bits``."""
    data = bytearray(1000)
    rtx = backend_of(version) == "tensorrt-rtx"
    data[:4] = b"vtrt" if rtx else b"ftrt"
    struct.pack_into("<Q", data, 16, len(data))
    data[24:28] = bytes(int(part) for part in (version + ".9").split(".")[:4])
    data[32] = bits if rtx else 0
    path = folder / "small.engine"
    path.write_bytes(data)
    return path


def install(monkeypatch: pytest.MonkeyPatch, net: Net, driver: Driver = T4) -> None:
    """Put the fakes where the executor looks for the real ones."""
    name = "tensorrt_rtx" if backend_of(net.version) == "tensorrt-rtx" else "tensorrt"
    monkeypatch.setitem(sys.modules, name, FakeModule(name, net))
    monkeypatch.setattr(tensorrt_device, "probe_driver", lambda: driver)
    monkeypatch.setattr(tensorrt_device, "open_cuda", lambda _name: FakeCuda(net.gpu))
