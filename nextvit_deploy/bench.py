"""How long a saved TensorRT engine takes on the GPU that is here.

Times are the GPU's own, between two CUDA events, one run at a time. *With transfers* begins before the input is
copied to the GPU and ends when the output is back, both through page-locked memory; *without* finds the input on the
GPU and leaves the output there. The two are measured in turns, so that a GPU that grows warm and slow slows both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from nextvit_exporters.cuda.memory import Event
from nextvit_exporters.cuda.plan import Shape, image_shape
from nextvit_exporters.errors import BuildFailed, UnsupportedSpec
from nextvit_exporters.executors.base import Array
from nextvit_exporters.executors.tensorrt_device import TensorRTDevice
from nextvit_exporters.tensorrt.header import read_header

_SEED: Final = 0
_TOLD: Final = 20
"""How often the progress of the measurement is told."""


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What to time, and how.

    ``cuda`` is a name in ``cuda.memory.CUDA_NAMES``; ``graph`` launches the engine as a CUDA graph. ``batch`` images of
    ``size`` (height, width) in pixels are fed; None leaves what the engine is tuned for. Raises UnsupportedSpec for
    counts that measure nothing.
    """

    engine: Path
    cuda: str = "cuda-bindings"
    graph: bool = False
    warmup: int = 20
    iterations: int = 200
    batch: int | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.warmup < 0:
            raise UnsupportedSpec("nothing is measured; use --iterations 1 or more and --warmup 0 or more")


@dataclass(frozen=True, slots=True)
class Timing:
    """Statistics of one run's times, in milliseconds.

    A percentile lies between the two nearest of the sorted times, linearly (numpy's default). ``images_per_second`` is
    the batch over the mean: one batch is begun when the last has ended.
    """

    mean: float
    p50: float
    p90: float
    p99: float
    least: float
    most: float
    images_per_second: float

    @classmethod
    def of(cls, milliseconds: Sequence[float], batch: int) -> Timing:
        """Raises BuildFailed when a time is not a positive number: the GPU's clock then tells nothing."""
        times = np.asarray(milliseconds, np.float64)
        if not (np.isfinite(times).all() and (times > 0).all()):
            raise BuildFailed("CUDA's events tell no time; run it again, or with the other --cuda")
        p50, p90, p99 = (float(each) for each in np.percentile(times, (50, 90, 99)))
        mean = float(times.mean())
        return cls(mean, p50, p90, p99, float(times.min()), float(times.max()), batch * 1e3 / mean)


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What was measured, and on what.

    ``executor`` names TensorRT, its version and the GPU; ``shapes`` and ``dtypes`` are the inputs' and the outputs'.
    ``copied`` is the bytes that go to the GPU and come back in one run, ``memory`` those taken on the GPU for inputs
    and outputs, ``load`` the seconds until the engine was ready.
    """

    engine: Path
    executor: str
    cuda: str
    graph: bool
    warmup: int
    iterations: int
    batch: int
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    copied: tuple[int, int]
    memory: int
    load: float
    without_transfers: Timing
    with_transfers: Timing

    def as_dict(self) -> dict[str, object]:
        """JSON-ready: the timings in milliseconds, sizes in bytes, the load in seconds."""
        return {
            "engine": str(self.engine),
            "executor": self.executor,
            "cuda": self.cuda,
            "graph": self.graph,
            "warmup": self.warmup,
            "iterations": self.iterations,
            "batch": self.batch,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "dtypes": dict(self.dtypes),
            "copied_bytes": {"to_gpu": self.copied[0], "from_gpu": self.copied[1]},
            "memory_bytes": self.memory,
            "load_seconds": self.load,
            "milliseconds": {
                "without_transfers": asdict(self.without_transfers),
                "with_transfers": asdict(self.with_transfers),
            },
        }


def bench(request: BenchRequest, on_step: Callable[[str], None]) -> BenchResult:
    """Load the engine, warm up, and time it; ``on_step`` is told what is being done.

    Raises NoDevice without a CUDA driver and a GPU, UnsupportedSpec for a batch or a size that the engine doesn't take,
    and what else ``TensorRTDevice`` raises.
    """
    on_step(f"load {request.engine.name}")
    backend = read_header(request.engine).backend
    device, started = TensorRTDevice(request.engine, backend, request.cuda, graph=request.graph), time.perf_counter()
    with device:
        load = time.perf_counter() - started
        inputs = _inputs(device, request)
        on_step("warm up")
        device.run(inputs)
        for _ in range(request.warmup):
            _run_all(device)
        device.cuda.synchronize()
        without, through = _measure(device, request.iterations, on_step)
        tensors = {name: slot.tensor for name, slot in device.plan.slots.items()}
        arrays: dict[str, Array] = {**inputs, **device.outputs()}
        batch = next(iter(inputs.values())).shape[0]
        return BenchResult(
            engine=request.engine,
            executor=device.name,
            cuda=device.cuda.name,
            graph=request.graph,
            warmup=request.warmup,
            iterations=request.iterations,
            batch=batch,
            shapes={name: arrays[name].shape for name in tensors},
            dtypes={name: str(tensor.dtype) for name, tensor in tensors.items()},
            copied=device.transferred(),
            memory=device.plan.size,
            load=load,
            without_transfers=Timing.of(without, batch),
            with_transfers=Timing.of(through, batch),
        )


def _inputs(device: TensorRTDevice, request: BenchRequest) -> dict[str, Array]:
    """Noise, the same every time, of the shapes that are asked for."""
    generator = np.random.default_rng(_SEED)
    inputs: dict[str, Array] = {}
    for name, (_, best, _) in device.profiles[0].shapes.items():
        asked = request.batch is not None or request.size is not None
        shape = image_shape(best, request.batch, request.size) if asked else best
        inputs[name] = _noise(generator, shape, device.plan.slots[name].tensor.dtype)
    return inputs


def _noise(generator: np.random.Generator, shape: Shape, dtype: np.dtype[Any]) -> Array:
    if dtype.kind == "f":
        return generator.standard_normal(shape).astype(dtype)
    return generator.integers(0, 2 if dtype.kind == "b" else 128, shape).astype(dtype)


def _measure(
    device: TensorRTDevice, iterations: int, on_step: Callable[[str], None]
) -> tuple[list[float], list[float]]:
    """Milliseconds of each run without and with transfers."""
    start, end = device.cuda.event(), device.cuda.event()
    without: list[float] = []
    through: list[float] = []
    for index in range(iterations):
        if index % max(1, iterations // _TOLD) == 0:
            on_step(f"run {index + 1} of {iterations}")
        through.append(_timed(device, start, end, lambda: _run_all(device)))
        without.append(_timed(device, start, end, device.execute))
    return without, through


def _timed(device: TensorRTDevice, start: Event, end: Event, work: Callable[[], None]) -> float:
    device.cuda.record(start)
    work()
    device.cuda.record(end)
    return device.cuda.elapsed(start, end)


def _run_all(device: TensorRTDevice) -> None:
    device.upload()
    device.execute()
    device.download()
