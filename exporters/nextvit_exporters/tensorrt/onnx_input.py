"""What goes into the builder: an ONNX file's bytes, whole, with what TensorRT would take wrongly or not at all refused.

TensorRT's own parser lets some of this pass: an empty file, an opset it has never heard of, float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import onnx
from onnx import TensorProto, numpy_helper

from nextvit_exporters.errors import BuildFailed, UnsupportedSpec, first_line
from nextvit_exporters.executors.onnx_float import tensor_types
from nextvit_exporters.spec import Precision
from nextvit_exporters.tensorrt.backends import Backend

_ONNX: Final = frozenset({"", "ai.onnx"})
_QUANTIZED: Final = frozenset({TensorProto.INT8, TensorProto.UINT8})


def read_onnx(path: Path) -> onnx.ModelProto:
    """The file with its external data inside; raises BuildFailed in one line for whatever is wrong with it."""
    if not path.is_file():
        raise BuildFailed(f"there is no file {path}; give the path of an ONNX file")
    try:
        model = onnx.load(str(path), load_external_data=False)
        nodes = len(model.graph.node)
    except Exception as error:  # protobuf's own errors share no public base class
        raise BuildFailed(f"{path.name} is not an ONNX file: {first_line(error)}") from error
    if not nodes:
        raise BuildFailed(f"{path.name} is not an ONNX file, or holds no operations")
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # the checker's, the system's, or numpy's
        raise BuildFailed(f"the data beside {path.name} can't be read: {first_line(error)}") from error
    _check_filled(model, path.name)
    return model


def check_onnx(model: onnx.ModelProto, name: str, backend: Backend, version: str, precision: Precision) -> None:
    """Refuse what this TensorRT takes wrongly or not at all; raises BuildFailed or UnsupportedSpec in one line."""
    opset = max((each.version for each in model.opset_import if each.domain in _ONNX), default=0)
    newest = backend.newest_opset(version)
    if opset > newest:
        raise UnsupportedSpec(f"{name} is in opset {opset}, {backend.name} {version} is known to read up to {newest}")
    _check_domains(model, name)
    types = tensor_types(model)
    doubles = [each for each, kind in types.items() if kind == TensorProto.DOUBLE]
    if doubles:
        raise BuildFailed(f"{name} computes in float64, first {doubles[0]}; TensorRT does not: export it in float32")
    quantizers = [node for node in model.graph.node if node.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    if precision is Precision.INT8:
        if not quantizers:
            raise UnsupportedSpec(
                f"{name} holds no QuantizeLinear, so nothing in it is INT8; quantize it, or use --fp16"
            )
        _check_quantizers(model, name, quantizers)
    elif quantizers:
        raise UnsupportedSpec(f"{name} holds {quantizers[0].op_type}, so it is an INT8 graph; ask for --int8")


def _check_domains(model: onnx.ModelProto, name: str) -> None:
    """TensorRT reads an operation by its name alone: another domain's Relu would be taken for ONNX's own."""
    own = {(function.domain, function.name) for function in model.functions}
    for node in model.graph.node:
        if node.domain not in _ONNX and (node.domain, node.op_type) not in own:
            raise BuildFailed(
                f"{name}: {node.name or node.output[0]} is {node.op_type} of {node.domain}, not of ONNX, and TensorRT "
                "may take it for another; export it with ONNX's own operations"
            )


def _check_quantizers(model: onnx.ModelProto, name: str, quantizers: Iterable[onnx.NodeProto]) -> None:
    """TensorRT's rules: int8, symmetric, and the bias left in floating point."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in quantizers:
        source = constants.get(node.input[0])
        if node.op_type == "DequantizeLinear" and source is not None and source.data_type == TensorProto.INT32:
            raise BuildFailed(
                f"{name}: {node.name or node.output[0]} dequantizes an int32 bias, which TensorRT refuses; quantize "
                "with QuantizeBias=False"
            )
        point = constants.get(node.input[2]) if len(node.input) > 2 else None
        kind = TensorProto.UINT8 if len(node.input) < 3 else (point.data_type if point is not None else 0)
        if kind == TensorProto.UINT8 and _is_quantized(node, model):
            raise BuildFailed(
                f"{name}: {node.name or node.output[0]} is uint8, TensorRT takes int8 only; quantize with "
                "signed activations"
            )
        if point is not None and numpy_helper.to_array(point).any():
            raise BuildFailed(
                f"{name}: {node.name or node.output[0]} has a zero point other than 0, TensorRT takes symmetric "
                "quantization only"
            )


def _is_quantized(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    """Whether a node without or with a uint8 zero point really writes or reads uint8."""
    if len(node.input) > 2:
        return True
    if node.op_type == "QuantizeLinear":
        return not any(a.name == "output_dtype" and a.i == TensorProto.INT8 for a in node.attribute)
    source = next((t for t in model.graph.initializer if t.name == node.input[0]), None)
    return source is not None and source.data_type == TensorProto.UINT8


def _check_filled(model: onnx.ModelProto, name: str) -> None:
    """Every constant has as many numbers as its shape says; TensorRT would read past the end."""
    for tensor in model.graph.initializer:
        try:
            numpy_helper.to_array(tensor)
        except Exception as error:  # numpy's and onnx's own, of many kinds
            shape = list(tensor.dims)
            raise BuildFailed(f"{name}: the numbers of {tensor.name} do not fill its shape {shape}") from error
