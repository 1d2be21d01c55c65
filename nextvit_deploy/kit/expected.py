"""The types that an engine has to compute in, read from the ONNX file that it is built from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.spec import Precision

_PRODUCTS: Final = frozenset({"Conv", "Gemm", "MatMul", "Einsum"})
_NETWORK: Final[Mapping[str, str]] = {
    "FLOAT": "FLOAT",
    "FLOAT16": "HALF",
    "BFLOAT16": "BF16",
    "DOUBLE": "DOUBLE",
}
"""ONNX's names of types to those of TensorRT's network."""
_ENGINE: Final[Mapping[str, str]] = {"FLOAT": "Float", "HALF": "Half", "BF16": "BFloat16", "DOUBLE": "Double"}
"""The network's names to those of TensorRT's engine inspector."""
_REQUIRED: Final[Mapping[Precision, str]] = {
    Precision.FP32: "Float",
    Precision.FP16: "Half",
    Precision.INT8: "Int8",
}


def expected_types(onnx_file: Path, precision: Precision) -> dict[str, object]:
    """The types in which convolutions and matrix products may compute, and the one that some of them must.

    ``network`` holds them in the words of TensorRT's network and ``engine`` in those of its engine inspector, both
    sorted; ``required`` is one of the inspector's. A parsed INT8 network says what its steps are stored in: it
    dequantises in front of each product, and the builder fuses that away. Raises UnsupportedSpec where the file is
    none of that precision, and BuildFailed where its types can't be inferred.
    """
    found, dequantized = _products(onnx_file)
    network = sorted(_NETWORK.get(each, each) for each in found)
    quantized = {"Int8"} if dequantized else set()
    engine = sorted({_ENGINE.get(each, each) for each in network} | quantized)
    required = _REQUIRED[precision]
    if required not in engine:
        raise UnsupportedSpec(
            f"no convolution or matrix product of {onnx_file.name} computes in {precision}, and a kit proves that; "
            "export again"
        )
    return {"network": network, "engine": engine, "required": required}


def _products(path: Path) -> tuple[set[str], bool]:
    """ONNX's names of the types that products read, and whether one reads what was dequantized."""
    import onnx

    from nextvit_exporters.executors.onnx_float import tensor_types

    model = onnx.load(path, load_external_data=False)
    types = tensor_types(model)
    nodes = [node for node in model.graph.node if node.op_type in _PRODUCTS]
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    found = {onnx.TensorProto.DataType.Name(types.get(node.input[0], 0)) for node in nodes}
    return found, any(node.input[0] in dequantized for node in nodes)
