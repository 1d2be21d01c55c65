"""A TensorRT that runs ONNX files on the CPU, with the attributes of one real version and no others.

``FAKE_TENSORRT`` names the version (10 or 11), ``FAKE_CALLS`` the file that every call is written to, ``FAKE_FAULT``
what goes wrong.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

API = json.loads(Path(__file__).parents[1].joinpath(f"api_{os.environ['FAKE_TENSORRT']}.json").read_text("utf-8"))
FAULT = os.environ.get("FAKE_FAULT", "")
__version__ = API["version"]
_TYPES = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.UINT8: "UINT8"}
_TYPES[onnx.TensorProto.INT8] = "INT8"
_WORDS = {"HALF": ("Half", "Channel major FP16 format where channel % 8 == 0"), "INT8": ("Int8", "Int8 format")}
_KINDS = {"Conv": "CONVOLUTION", "Gemm": "MATRIX_MULTIPLY", "MatMul": "MATRIX_MULTIPLY"}
_MAGIC = b"ftrt" + bytes(20) + bytes(int(part) for part in __version__.split(".")[:3]).ljust(40, b"\0")


def _record(name: str, *arguments: object) -> None:
    with Path(os.environ["FAKE_CALLS"]).open("a", encoding="utf-8") as calls:
        calls.write(json.dumps([name, *map(str, arguments)]) + "\n")


class _Enum(int, enum.Enum):
    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


def _enum(name: str) -> Any:
    make: Any = _Enum
    return make(name, {member: index for index, member in enumerate(API["enums"][name])})


NetworkDefinitionCreationFlag = _enum("NetworkDefinitionCreationFlag")
BuilderFlag = _enum("BuilderFlag")
MemoryPoolType = _enum("MemoryPoolType")
ProfilingVerbosity = _enum("ProfilingVerbosity")
LayerInformationFormat = _enum("LayerInformationFormat")
DataType = _enum("DataType")
LayerType = _enum("LayerType")


class _Severity(_Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class _Limited:
    """Has what the class of that name has in this version; calls and assignments are written down."""

    def __init_subclass__(cls) -> None:
        if cls.__name__ not in API["classes"]:
            return  # a class of the user's
        for name, value in list(vars(cls).items()):
            if name.startswith("_"):
                continue
            if name not in API["classes"][cls.__name__]:
                delattr(cls, name)
            elif callable(value) and not isinstance(value, type):
                setattr(cls, name, _recorded(f"{cls.__name__}.{name}", value))

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_") and type(self).__name__ in API["classes"]:
            if name not in API["classes"][type(self).__name__]:
                raise AttributeError(f"{type(self).__name__} has no {name} in {__version__}")
            _record(f"{type(self).__name__}.{name}=", value)
        object.__setattr__(self, name, value)


def _recorded(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: object, *arguments: Any, **options: Any) -> Any:
        told = (*arguments, *options.values())
        _record(name, *(each if isinstance(each, (int, str, tuple)) else type(each).__name__ for each in told))
        return method(self, *arguments, **options)

    return call


class ILogger(_Limited):
    Severity = _Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = _Severity

    def __init__(self) -> None:
        self._ready = True


class IProgressMonitor(_Limited):
    def __init__(self) -> None:
        self._ready = True


class ITimingCache(_Limited):
    def __init__(self, earlier: bytes) -> None:
        self._data = earlier

    def serialize(self) -> bytes:
        return self._data + b"timed "


class ITensor(_Limited):
    def __init__(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self.name, self.dtype, self.shape = name, DataType[dtype], shape


class ILayer(_Limited):
    def __init__(self, node: onnx.NodeProto, types: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        self.name, self.type = node.name, LayerType[_KINDS.get(node.op_type, "ACTIVATION")]
        self._node, self._types = node, types

    def get_input(self, index: int) -> ITensor:
        dtype, shape = self._types[self._node.input[index]]
        if FAULT == "network-type" and self.type in (LayerType.CONVOLUTION, LayerType.MATRIX_MULTIPLY):
            dtype = "FLOAT"
        return ITensor(self._node.input[index], dtype, shape)


class INetworkDefinition(_Limited):
    def __init__(self, flags: int) -> None:
        assert flags == 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self._data = b""
        self._layers: list[ILayer] = []
        self._inputs: list[ITensor] = []

    def _read(self, data: bytes) -> None:
        model = onnx.load_from_string(data)
        types = _types(model)
        self._data = data
        self._layers = [ILayer(node, types) for node in model.graph.node]
        self._inputs = [ITensor(each.name, *types[each.name]) for each in model.graph.input]

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return 1

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_layer(self, index: int) -> ILayer:
        return self._layers[index]

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]


class ParserError(_Limited):
    def desc(self) -> str:
        return "No importer registered for op: Made"

    def node_name(self) -> str:
        return "stem/Made"

    def node_operator(self) -> str:
        return "Made"


class OnnxParser(_Limited):
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        assert logger._ready
        self._network = network

    @property
    def num_errors(self) -> int:
        return 1

    def get_error(self, index: int) -> ParserError:
        assert index == 0
        return ParserError()

    def parse(self, data: bytes) -> bool:
        if FAULT == "parse":
            return False
        self._network._read(data)
        return True


class IOptimizationProfile(_Limited):
    def set_shape(self, name: str, low: tuple[int, ...], best: tuple[int, ...], high: tuple[int, ...]) -> None:
        assert name == "image"
        self._shapes = (low, best, high)


class IBuilderConfig(_Limited):
    _profile: IOptimizationProfile | None = None
    _cache: ITimingCache | None = None

    def create_timing_cache(self, earlier: bytes) -> ITimingCache | None:
        return None if earlier == b"of another GPU" else ITimingCache(earlier)

    def set_timing_cache(self, cache: ITimingCache, *, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profile = profile
        return -1 if FAULT == "profile" else 0

    def clear_flag(self, flag: _Enum) -> None:
        assert flag in BuilderFlag

    def set_flag(self, flag: _Enum) -> None:
        assert flag in BuilderFlag

    def set_memory_pool_limit(self, pool: _Enum, size: int) -> None:
        assert pool in MemoryPoolType
        assert size > 0


class Builder(_Limited):
    platform_has_fast_fp16 = True

    def __init__(self, logger: ILogger) -> None:
        self._logger: Any = logger

    def create_network(self, flags: int) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        self._logger.log(ILogger.INFO, "building")
        monitor = vars(config).get("progress_monitor")
        if monitor is not None:
            monitor.phase_start("Building engine", None, 2)
            if not all(monitor.step_complete("Building engine", step) for step in range(2)):
                return None
            monitor.phase_finish("Building engine")
        if FAULT == "build":
            self._logger.log(ILogger.ERROR, "IBuilder::buildSerializedNetwork:\n Error Code 10: no tactic for conv")
            return None
        shapes = config._profile and config._profile._shapes
        return _MAGIC + json.dumps(shapes).encode() + b"\n" + network._data


class EngineInspector(_Limited):
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, how: _Enum) -> str:
        assert how is LayerInformationFormat.JSON
        model = onnx.load_from_string(self._engine._data)
        if FAULT == "untold":
            return json.dumps({"Layers": [node.name for node in model.graph.node]})
        types = _types(model)
        steps = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
        kernels = [_kernel(node, types, steps) for node in model.graph.node]
        return json.dumps({"Layers": kernels, "Bindings": ["image", "logits"]})


class IExecutionContext(_Limited):
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._addresses: dict[str, int] = {}
        self._shape: tuple[int, ...] = ()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, high = self._engine._range
        self._shape = tuple(shape)
        return name == "image" and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == "logits"
        classes: int = self._engine._session.get_outputs()[0].shape[1]
        return self._shape[0], classes

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in {"image", "logits"}

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        image = _view(self._addresses["image"], self._shape, self._engine._dtype("image"))
        (logits,) = self._engine._session.run(["logits"], {"image": image})
        target = _view(self._addresses["logits"], logits.shape, self._engine._dtype("logits"))
        if FAULT == "wrong":
            logits = logits * logits.dtype.type(1.1)
        if FAULT == "infinite":
            logits[0, 0] = np.inf
        if FAULT != "silent":
            target[...] = logits
        return FAULT != "execute"


class ICudaEngine(_Limited):
    device_memory_size = 1

    def __init__(self, data: bytes) -> None:
        head, _, self._data = data.removeprefix(_MAGIC).partition(b"\n")
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(self._data, options, providers=["CPUExecutionProvider"])
        static = self._session.get_inputs()[0].shape
        shapes = json.loads(head) or (static, static, static)
        self._range = shapes[0], shapes[2]
        self._types = _types(onnx.load_from_string(self._data))

    def _dtype(self, name: str) -> Any:
        return {"FLOAT": np.float32, "HALF": np.float16, "UINT8": np.uint8}[self._types[name][0]]

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)

    def get_tensor_dtype(self, name: str) -> _Enum:
        found: _Enum = DataType["HALF" if FAULT == "edge-type" and name == "logits" else self._types[name][0]]
        return found


class Runtime(_Limited):
    def __init__(self, logger: ILogger) -> None:
        assert logger._ready

    def deserialize_cuda_engine(self, data: bytes) -> ICudaEngine | None:
        return None if FAULT == "deserialize" else ICudaEngine(data)


def _view(address: int, shape: tuple[int, ...], dtype: Any) -> Any:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_byte * size).from_address(address), dtype).reshape(shape)


def _types(model: onnx.ModelProto) -> dict[str, tuple[str, tuple[int, ...]]]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    found = {each.name: (_TYPES.get(each.data_type, "INT64"), tuple(each.dims)) for each in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        shape = tuple(each.dim_value if each.HasField("dim_value") else -1 for each in tensor.shape.dim)
        found[value.name] = _TYPES.get(tensor.elem_type, "INT64"), shape
    return found


def _kernel(
    node: onnx.NodeProto, types: dict[str, tuple[str, tuple[int, ...]]], steps: dict[str, str]
) -> dict[str, Any]:
    """As TensorRT 10 and 11 word it: a sentence with the type in it, or the type on its own; ``steps`` are fused."""
    kind = {"Conv": "CaskConvolution", "Gemm": "gemm", "MatMul": "gemm"}.get(node.op_type, "kgen")

    def tensor(name: str) -> dict[str, Any]:
        dtype, shape = types[name]
        told = "FLOAT" if FAULT == "type" and kind != "kgen" else dtype
        word, text = _WORDS.get(told, ("Float", "Row major linear FP32"))
        if API["version"].startswith("10."):
            return {"Name": name, "Location": "Device", "Dimensions": shape, "Format/Datatype": text}
        return {"Name": name, "Dimensions": shape, "Datatype": word, "Format": "kLINEAR"}

    return {
        "Name": node.name,
        "LayerType": kind,
        "Inputs": [tensor(node.input[0] if FAULT == "unfused" else steps.get(node.input[0], node.input[0]))],
        "Outputs": [tensor(each) for each in node.output],
        "TacticName": f"{kind}_tactic",
    }
