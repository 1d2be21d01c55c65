"""ONNX models of a few nodes, and what TensorRT's parser and ONNX Runtime make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nextvit_exporters.executors.tensorrt_network import Mode, TensorRTNetwork
from nextvit_exporters.tensorrt.backends import BACKENDS, load
from nextvit_exporters.tensorrt.builder import parsed
from nextvit_exporters.tensorrt.network import Network, snapshot

Array = NDArray[np.generic]
Shape = Sequence[int | str]
RTX: Final = BACKENDS["tensorrt-rtx"]
FLOAT: Final = int(TensorProto.FLOAT)
HALF: Final = int(TensorProto.FLOAT16)


def make(
    op: str, inputs: Sequence[str], outputs: Sequence[str], name: str = "", **attributes: object
) -> onnx.NodeProto:
    """A node; ``helper.make_node`` for attributes that come from a table."""
    made = helper.make_node(op, inputs, outputs, name)
    made.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    return made


def model(
    nodes: Sequence[onnx.NodeProto],
    shape: Shape,
    constants: Mapping[str, NDArray[Any]] | None = None,
    kind: int = FLOAT,
    out: int | None = None,
    opset: int = 21,
) -> onnx.ModelProto:
    """A graph from x of ``shape`` to y, whose shape is inferred."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind if out is None else out, None)],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in (constants or {}).items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    made.ir_version = 10
    return made


def understood(made: onnx.ModelProto) -> Network:
    """TensorRT's reading of it."""
    module = load(RTX)
    with parsed(module, made.SerializeToString()) as definition:
        return snapshot(definition, module)


def execute(
    made: onnx.ModelProto, x: Array, folder: Path, mode: Mode = "exact", dtype: torch.dtype = torch.float32
) -> Array:
    """What TensorRT's reading of it makes of x."""
    path = folder / "small.onnx"
    path.write_bytes(made.SerializeToString())
    with TensorRTNetwork(path, mode, RTX, dtype) as executor:
        return executor.run({"x": x})["y"]


def onnx_runtime(made: onnx.ModelProto, x: Array) -> Array:
    """What ONNX Runtime makes of x, nothing optimised."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {"x": x})[0]
    return result


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
