"""One builder for every TensorRT: a strongly typed network from ONNX bytes, profiles, an engine.

Precision is in the graph, since no other way is left in all of 10.0 to 11 and in TensorRT-RTX. What a backend
can't do is refused; nothing is left out in silence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from nextvit_exporters.engine_spec import EngineSpec
from nextvit_exporters.errors import BuildFailed, UnsupportedSpec
from nextvit_exporters.signals import held
from nextvit_exporters.spec import ExportSpec, Precision
from nextvit_exporters.tensorrt.backends import Backend, Module, gpu, sm
from nextvit_exporters.tensorrt.listening import BuildLog, Interruption, logger, monitor

_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine's bytes, what TensorRT logged, and its timing cache where one was asked for."""

    data: bytes
    log: BuildLog
    timing_cache: bytes | None


@contextmanager
def parsed(module: Module, data: bytes, log: BuildLog | None = None) -> Iterator[Any]:
    """The ``INetworkDefinition`` that this TensorRT makes of an ONNX file's bytes; needs no GPU.

    Raises BuildFailed with the parser's reasons, and UnsupportedSpec where strong typing is missing.
    """
    log = BuildLog() if log is None else log
    with held([]), _network(module, data, log) as (_, network):
        yield network


def build_engine(
    backend: Backend,
    module: Module,
    model: bytes,
    spec: ExportSpec,
    on_step: Callable[[str], None],
    timing_cache: bytes | None = None,
) -> BuiltEngine:
    """Build the engine that ``spec.engine`` asks for from the ONNX file's bytes ``model``.

    ``timing_cache`` holds an earlier build's timings, empty for none yet; None does without. Raises BuildFailed with
    TensorRT's own errors when it builds nothing, and UnsupportedSpec for what the backend can't do.
    """
    engine = spec.engine
    if engine is None:
        raise ValueError("the spec asks for no engine")
    log, interruption = BuildLog(), Interruption()
    with held(interruption.signals), _network(module, model, log) as (builder, network):
        config = builder.create_builder_config()
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
        config.progress_monitor = monitor(module, on_step, interruption)
        if spec.precision is Precision.FP32:
            config.clear_flag(module.BuilderFlag.TF32)  # asked for float32 means float32
        _set_limits(module, config, engine)
        _set_gpu(backend, module, config, engine)
        _set_profile(builder, network, config, spec, log)
        cache = _set_timing_cache(config, timing_cache, log)
        serialized = builder.build_serialized_network(network, config)
        interruption.again()
        if serialized is None:
            raise BuildFailed(f"{backend.name} built nothing: {log.reason()}")
        data = bytes(serialized)
        if not backend.layers_in_log:
            log.entries.append(("INFO", _inspect(module, data, log)))
        kept = None if cache is None else bytes(config.get_timing_cache().serialize())
        return BuiltEngine(data, log, kept)


@contextmanager
def _network(module: Module, data: bytes, log: BuildLog) -> Iterator[tuple[Any, Any]]:
    """Builder and parsed network; the parser owns the weights, so it lives as long as they do."""
    strong = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    if strong is None:
        raise UnsupportedSpec(f"{module.__name__} {module.__version__} has no strongly typed networks; take another")
    listener = logger(module, log)
    builder = module.Builder(listener)
    network = builder.create_network(1 << int(strong))
    parser = module.OnnxParser(network, listener)
    if not parser.parse(data):
        raise BuildFailed(f"TensorRT's ONNX parser refuses the file: {_reasons(parser, log)}")
    if network.num_outputs == 0:
        raise BuildFailed("TensorRT's ONNX parser finds no output in the file; is it empty?")
    yield builder, network
    del parser


def _reasons(parser: Any, log: BuildLog) -> str:
    """The parser's errors on one line, each with its node."""
    told: list[str] = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f"{error.node_operator()} {error.node_name()}: " if error.node_name() else ""
        told.append(f"{where}{' '.join(error.desc().split())}")
    return "; ".join(dict.fromkeys(told)) or log.reason()


def _set_limits(module: Module, config: Any, engine: EngineSpec) -> None:
    if engine.workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, engine.workspace * _MIB)
    if engine.opt_level is not None:
        config.builder_optimization_level = engine.opt_level


def _set_gpu(backend: Backend, module: Module, config: Any, engine: EngineSpec) -> None:
    """Name the GPU where the backend is told; the others build for the one at hand."""
    if not backend.builds_on_cpu:
        return
    wanted = gpu(engine.gpu)
    capability = getattr(module.ComputeCapability, sm(wanted.capability), None)
    if capability is None:
        raise UnsupportedSpec(f"{backend.name} {module.__version__} can't build for {wanted.title} ({wanted.sm})")
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(capability, 0):
        raise BuildFailed(f"{backend.name} {module.__version__} refuses to build for {wanted.title} ({wanted.sm})")


def _set_profile(builder: Any, network: Any, config: Any, spec: ExportSpec, log: BuildLog) -> None:
    """The range of sizes of an input with open axes; TensorRT says itself which axes are open."""
    engine = spec.engine
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    if engine is None or not any(-1 in tuple(each.shape) for each in inputs):
        return
    profile = builder.create_optimization_profile()
    for each in inputs:
        shapes = [spec.shape_at(size) for size in (engine.minimum, engine.optimum, engine.maximum)]
        profile.set_shape(each.name, *shapes)
    if config.add_optimization_profile(profile) < 0:
        raise BuildFailed(
            f"TensorRT refuses the range batch {engine.batch}, height {engine.height}, width {engine.width}: "
            f"{log.reason()}"
        )


def _inspect(module: Module, data: bytes, log: BuildLog) -> str:
    """The engine inspector's JSON on one line; the GPU that built the engine is there to load it."""
    engine = module.Runtime(logger(module, log)).deserialize_cuda_engine(data)
    if engine is None:
        raise BuildFailed(f"the built engine can't be loaded: {log.reason()}")
    text = engine.create_engine_inspector().get_engine_information(module.LayerInformationFormat.JSON)
    return json.dumps(json.loads(text))


def _set_timing_cache(config: Any, earlier: bytes | None, log: BuildLog) -> Any:
    if earlier is None:
        return None
    cache = config.create_timing_cache(earlier)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise BuildFailed(
            f"the timing cache is not one for this TensorRT and GPU: {log.reason()}; name another file, and it is made"
        )
    return cache
