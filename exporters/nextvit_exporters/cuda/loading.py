"""An engine file on its way into TensorRT's runtime: what is checked first, and what the loaded engine takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nextvit_exporters.cuda.driver import CudaFailed, Device
from nextvit_exporters.cuda.plan import Profile, Shape, dtype_of
from nextvit_exporters.errors import BuildFailed, UnsupportedSpec
from nextvit_exporters.tensorrt.backends import Backend, Module
from nextvit_exporters.tensorrt.header import EngineHeader
from nextvit_exporters.tensorrt.listening import BuildLog, logger


def check_backend(path: Path, header: EngineHeader, backend: Backend) -> None:
    """Raise BuildFailed when another TensorRT wrote the engine."""
    if header.backend != backend.name:
        raise BuildFailed(f"{path.name} was built by {header.backend}, and {backend.name} can't run it")


def check_version(path: Path, header: EngineHeader, version: str) -> None:
    """Raise BuildFailed unless the engine's version is that of the TensorRT at hand, as far as both tell it.

    Neither TensorRT promises to run an engine of another version.
    """
    pairs = zip(header.version.split("."), version.split("."), strict=False)
    if any(built != here for built, here in pairs):
        raise BuildFailed(
            f"{path.name} was built by {header.backend} {header.version}, and {version} is installed; build it again, "
            f"or install that version"
        )


def check_device(path: Path, header: EngineHeader, device: Device) -> None:
    """Raise BuildFailed when the engine says which GPUs it is for and ``device`` is none of them."""
    if header.capabilities is not None and device.capability not in header.capabilities:
        raise BuildFailed(
            f"{path.name} was built for {header.gpus or 'no GPU'}, and {device.name} is {device.sm}; build it again "
            f"for this GPU"
        )


def load_engine(module: Module, path: Path, log: BuildLog) -> Any:
    """The engine of that file; raises BuildFailed, with what TensorRT logged, when it refuses.

    Only to be called where a CUDA driver is: without one the runtime crashes the interpreter.
    """
    engine = module.Runtime(logger(module, log)).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise BuildFailed(f"TensorRT can't load {path.name}: {log.reason()}")
    return engine


def create_context(module: Module, engine: Any, log: BuildLog) -> Any:
    """An execution context; raises CudaFailed when TensorRT makes none.

    TensorRT-RTX compiles kernels for a new shape in the background unless told to finish that first; it is told, so
    that all runs at one shape use the same kernels.
    """
    strategies = getattr(module, "DynamicShapesKernelSpecializationStrategy", None)
    if strategies is None:
        context = engine.create_execution_context()
    else:
        config = engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        context = engine.create_execution_context(config)
    if context is None:
        raise CudaFailed(f"TensorRT makes no execution context: {log.reason()}; is the GPU's memory in use?")
    return context


def tensor_names(engine: Any) -> Iterator[str]:
    """Names of all inputs and outputs, in the engine's order."""
    return (engine.get_tensor_name(index) for index in range(engine.num_io_tensors))


def check_tensors(module: Module, engine: Any) -> None:
    """Raise UnsupportedSpec for a tensor that is not plain numbers, row by row, in the GPU's memory."""
    for name in tensor_names(engine):
        dtype_of(name, engine.get_tensor_dtype(name).name)
        if engine.get_tensor_location(name) != module.TensorLocation.DEVICE:
            raise UnsupportedSpec(f"'{name}' is a shape, which has to lie in host memory; it can't be run here")
        if engine.get_tensor_format(name) != module.TensorFormat.LINEAR:
            raise UnsupportedSpec(f"'{name}' is not stored row by row; build the engine with linear inputs and outputs")


def profiles(module: Module, engine: Any) -> tuple[Profile, ...]:
    """What each optimisation profile takes; an input without open axes has one shape in all of them."""
    inputs = [name for name in tensor_names(engine) if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT]
    return tuple(
        Profile(index, {name: _range(engine, name, index) for name in inputs})
        for index in range(engine.num_optimization_profiles)
    )


def _range(engine: Any, name: str, profile: int) -> tuple[Shape, Shape, Shape]:
    shape = tuple(engine.get_tensor_shape(name))
    if -1 not in shape:
        return shape, shape, shape
    low, best, high = engine.get_tensor_profile_shape(name, profile)
    return tuple(low), tuple(best), tuple(high)
