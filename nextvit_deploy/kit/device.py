"""The GPU and TensorRT, for check.py: probing, building, reading types back, running, timing.

Of TensorRT only what 10.0 to 11 have in common is used: strongly typed networks, whose precision is the file's own.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

INSTALL = "pip install tensorrt-cu12 'cuda-bindings<13' numpy"
try:
    import numpy as np
except ImportError:
    raise SystemExit(f"check.py: numpy is not installed; run: {INSTALL}") from None

OLDEST, NEWEST = 10, 11
WARM_UP = 20
TRT_NAMES = {"float32": "FLOAT", "float16": "HALF", "uint8": "UINT8"}
"""NumPy's names of types to TensorRT's."""
NETWORK_COMPUTE = {"CONVOLUTION", "MATRIX_MULTIPLY", "EINSUM"}
ENGINE_COMPUTE = re.compile(r"conv|correlation|fprop|gemm|matmul|matrixmul|mha|attention", re.IGNORECASE)
WORDS = {"FP32": "Float", "FLOAT": "Float", "FP16": "Half", "HALF": "Half", "INT8": "Int8", "BF16": "BFloat16"}
WORDS.update({"BFLOAT16": "BFloat16", "FP8": "FP8", "DOUBLE": "Double", "FP64": "Double"})
"""The types that matter in the inspector's descriptions, such as ``Channel major FP16 format`` or ``Half``."""


class Stop(Exception):
    """What the user has to change, in one line."""


def no_driver() -> str:
    """Why no GPU can be reached, empty when one can; asked before TensorRT, which crashes without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return "no CUDA driver"
    status = driver.cuInit(0)
    return f"no usable CUDA driver: cuInit returns {status}" if status else ""


def load(name: str) -> Any:
    """Import what the host has to have; raises Stop with the line that installs it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise Stop(f"{name} can't be imported ({error}); run: {INSTALL}") from error


class Cuda:
    """The CUDA runtime, whose calls return their value and stop on an error."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime

    def call(self, name: str, *arguments: Any) -> Any:
        """The value of a runtime function; raises Stop when it fails."""
        status, *values = getattr(self.runtime, name)(*arguments)
        if int(status) != 0:
            raise Stop(f"{name} fails on the GPU: {getattr(status, 'name', status)}")
        return values[0] if values else None


class Runner:
    """An execution context with buffers for one input shape; times are of its own stream."""

    def __init__(self, cuda: Cuda, engine: Any, kit: dict[str, Any], shape: tuple[int, ...]) -> None:
        self.cuda = cuda
        self.held: list[Any] = []
        self.pinned: list[Any] = []
        self.stream = cuda.call("cudaStreamCreate")
        self.context = engine.create_execution_context()
        source, result = kit["input"], kit["output"]
        if self.context is None or not self.context.set_input_shape(source["name"], shape):
            raise Stop(f"TensorRT makes no execution context for {shape}; is the GPU's memory in use?")
        self.source, self.on_device = self._buffers(source, shape)
        self.result, self.result_on_device = self._buffers(result, tuple(self.context.get_tensor_shape(result["name"])))

    def _buffers(self, tensor: dict[str, Any], shape: tuple[int, ...]) -> tuple[Any, Any]:
        dtype = np.dtype(tensor["dtype"])
        size = math.prod(shape) * dtype.itemsize
        host, device = self.cuda.call("cudaMallocHost", size), self.cuda.call("cudaMalloc", size)
        self.pinned.append(host)
        self.held.append(device)
        if not self.context.set_tensor_address(tensor["name"], int(device)):
            raise Stop(f"TensorRT refuses the address of '{tensor['name']}'")
        return np.frombuffer((ctypes.c_byte * size).from_address(int(host)), dtype).reshape(shape), device

    def _in(self) -> None:
        self._copy(self.on_device, self.source.ctypes.data, self.source.nbytes, "cudaMemcpyHostToDevice")

    def _execute(self) -> None:
        if not self.context.execute_async_v3(int(self.stream)):
            raise Stop("TensorRT can't execute the engine; run again with --verbose")

    def _out(self) -> None:
        self._copy(self.result.ctypes.data, self.result_on_device, self.result.nbytes, "cudaMemcpyDeviceToHost")

    def _copy(self, to: Any, source: Any, size: int, kind: str) -> None:
        direction = getattr(self.cuda.runtime.cudaMemcpyKind, kind)
        self.cuda.call("cudaMemcpyAsync", to, source, size, direction, self.stream)

    def run(self, images: Any) -> Any:
        """The output for ``images`` of this runner's shape, as a new array."""
        self.source[...] = images
        self.result[...] = np.nan  # what the engine doesn't write must not look right
        self._copy(self.result_on_device, self.result.ctypes.data, self.result.nbytes, "cudaMemcpyHostToDevice")
        self._in()
        self._execute()
        self._out()
        self.cuda.call("cudaStreamSynchronize", self.stream)
        return self.result.copy()

    def time(self, iterations: int) -> dict[str, dict[str, float]]:
        """Percentiles in milliseconds, of the engine alone and with the copies to and from the GPU."""
        marks = [self.cuda.call("cudaEventCreate") for _ in range(4)]
        steps: list[Callable[[], None]] = [self._in, self._execute, self._out]
        alone, whole = [], []
        for index in range(WARM_UP + iterations):
            for mark, step in zip(marks, steps):  # noqa: B905 - Python 3.8 knows no strict
                self.cuda.call("cudaEventRecord", mark, self.stream)
                step()
            self.cuda.call("cudaEventRecord", marks[3], self.stream)
            self.cuda.call("cudaEventSynchronize", marks[3])
            if index >= WARM_UP:
                alone.append(self.cuda.call("cudaEventElapsedTime", marks[1], marks[2]))
                whole.append(self.cuda.call("cudaEventElapsedTime", marks[0], marks[3]))
        return {"without transfers": percentiles(alone), "with transfers": percentiles(whole)}

    def close(self) -> None:
        """Give the buffers back."""
        for address in self.held:
            self.cuda.call("cudaFree", address)
        for address in self.pinned:
            self.cuda.call("cudaFreeHost", address)


def describe_gpu(cuda: Cuda) -> dict[str, str]:
    """The first GPU: its name, compute capability, and the newest CUDA that its driver knows."""
    cuda.call("cudaSetDevice", 0)
    device = cuda.call("cudaGetDeviceProperties", 0)
    version = cuda.call("cudaDriverGetVersion")
    name = device.name.decode() if isinstance(device.name, bytes) else str(device.name)
    return {
        "name": name.rstrip("\0"),
        "capability": f"{device.major}.{device.minor}",
        "driver": f"CUDA {version // 1000}.{version % 1000 // 10}",
    }


def listener(trt: Any, errors: list[str], *, verbose: bool) -> Any:
    """A TensorRT logger that collects errors on one line each, and shows everything when asked."""
    bad = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

    def log(_self: Any, severity: Any, message: str) -> None:
        if severity in bad:
            errors.append(" ".join(message.split()))
        if verbose:
            sys.stderr.write(message + "\n")

    return type("Listener", (trt.ILogger,), {"log": log})()


def reasons(errors: list[str]) -> str:
    """What TensorRT complained about, in one line."""
    return "; ".join(dict.fromkeys(errors)) or "it gave no reason; run again with --verbose"


def build(
    trt: Any, logger: Any, errors: list[str], onnx: bytes, kit: dict[str, Any], workspace: int | None
) -> tuple[bytes, list[str]]:
    """The engine's bytes, and the types that the network's products read; precision is the file's own."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx):
        told = [str(parser.get_error(index).desc()) for index in range(parser.num_errors)]
        raise Stop(f"TensorRT's parser refuses model.onnx: {reasons([*told, *errors])}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if kit["precision"] == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # asked for float32 means float32
    mib = workspace or kit["workspace"]
    if mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, mib << 20)
    if kit["opt_level"] is not None:
        config.builder_optimization_level = kit["opt_level"]
    if -1 in tuple(network.get_input(0).shape):
        profile, sizes = builder.create_optimization_profile(), kit["profile"]
        profile.set_shape(kit["input"]["name"], *(tuple(sizes[each]) for each in ("min", "opt", "max")))
        if config.add_optimization_profile(profile) < 0:
            raise Stop(f"TensorRT refuses the range of sizes: {reasons(errors)}")
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    types = {word(each.get_input(0).dtype) for each in layers if word(each.type) in NETWORK_COMPUTE}
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise Stop(f"TensorRT builds no engine: {reasons(errors)}")
    return bytes(serialized), sorted(types)


def word(value: Any) -> str:
    """``HALF`` for ``DataType.HALF``."""
    return str(value).rpartition(".")[2]


def inspect(trt: Any, engine: Any) -> list[dict[str, Any]]:
    """The engine's kernels as TensorRT describes them."""
    told = json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
    return [each if isinstance(each, dict) else {"Name": str(each)} for each in told.get("Layers", [])]


def read_types(kit: dict[str, Any], network: list[str], engine: Any, kernels: list[dict[str, Any]]) -> dict[str, Any]:
    """The types in which the engine computes: of the network, of those kernels that tell any, and at both ends."""
    ends = [kit["input"]["name"], kit["output"]["name"]]
    found = [kernel_types(each, set(ends)) for each in kernels if ENGINE_COMPUTE.search(kind_of(each))]
    read = {
        "network": network,
        "engine": sorted(set().union(*found)),
        "told by kernels": sum(1 for each in found if each),
    }
    return {**read, **{name: word(engine.get_tensor_dtype(name)) for name in ends}}


def wrong_types(kit: dict[str, Any], read: dict[str, Any]) -> list[str]:
    """What is wrong with the types that were read."""
    wanted, network, engine = kit["dtypes"], read["network"], read["engine"]
    wrong = [f"the network computes in {each}" for each in network if each not in wanted["network"]]
    wrong += [f"a kernel of the engine computes in {each}" for each in engine if each not in wanted["engine"]]
    if not network or (engine and wanted["required"] not in engine):
        wrong.append(f"nothing in it computes in {wanted['required']}")
    for tensor in (kit["input"], kit["output"]):
        actual, right = read[tensor["name"]], TRT_NAMES[tensor["dtype"]]
        if actual != right:
            wrong.append(f"'{tensor['name']}' is {actual}, not {right}")
    return wrong


def unseen_type(kit: dict[str, Any], read: dict[str, Any]) -> str:
    """Why the type that the kit is about was not seen, empty where it was.

    A strongly typed network stands for kernels that don't tell their types; of INT8 it says nothing, since it
    dequantises in front of each product.
    """
    required = kit["dtypes"]["required"]
    if read["engine"] or required in {WORDS.get(each) for each in read["network"]}:
        return ""
    return f"no kernel of the engine tells its types, so none was seen to compute in {required}"


def kind_of(kernel: dict[str, Any]) -> str:
    """What a kernel does, in TensorRT's words."""
    return f"{kernel.get('LayerType', '')} {kernel.get('TacticName', '')}"


def kernel_types(kernel: dict[str, Any], edges: set[str]) -> set[str]:
    """The types of what a kernel reads and writes, without the engine's own input and output and single numbers."""
    found: set[str] = set()
    for tensor in [*kernel.get("Inputs", []), *kernel.get("Outputs", [])]:
        if tensor.get("Name") not in edges and math.prod(tensor.get("Dimensions", [0])) != 1:
            told = str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "")
            found.update(WORDS[each] for each in re.findall(r"\w+", told.upper()) if each in WORDS)
    return found


def execute(cuda: Cuda, engine: Any, kit: dict[str, Any], images: Any, iterations: int) -> tuple[Any, dict[str, Any]]:
    """The engine's outputs for all images, (N, classes), and its times at the batch it is tuned for.

    A last batch smaller than the engine takes is filled up by repeating its last image, and cut again.
    """
    runners: dict[tuple[int, ...], Runner] = {}
    least, size = kit["profile"]["min"][0], kit["batch"] or kit["profile"]["opt"][0]
    outputs = []
    for start in range(0, len(images), size):
        chunk = images[start : start + size]
        missing = max(0, least - len(chunk))
        filled = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)])
        if filled.shape not in runners:
            runners[filled.shape] = Runner(cuda, engine, kit, filled.shape)
        outputs.append(runners[filled.shape].run(filled)[: len(chunk)])
    shape = (size, *images.shape[1:])
    timed = runners.get(shape) or runners.setdefault(shape, Runner(cuda, engine, kit, shape))
    latency = {"shape": list(shape), "iterations": iterations, **timed.time(iterations)}
    for runner in runners.values():
        runner.close()
    return np.concatenate(outputs), latency


def percentiles(milliseconds: list[float]) -> dict[str, float]:
    """The median and the tail, in milliseconds."""
    return {f"p{each}": round(float(np.percentile(milliseconds, each)), 4) for each in (50, 90, 99)}
