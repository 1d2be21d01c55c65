"""What is done to a whole ONNX graph behind torch's exporter: simplified, and written in an older opset."""

from __future__ import annotations

from typing import Final

import onnx
import onnxsim

from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.opsets import DEFAULT_OPSET

_JOINS: Final = ("fuse_qkv", "fuse_matmul_add_bias_into_gemm_batched")
"""Rewrites of onnx-simplifier that join maps with each other, or with what is around them."""


def simplify(model: onnx.ModelProto, *, apart: bool) -> onnx.ModelProto:
    """onnx-simplifier, without its own check: the result is verified like everything else.

    Where maps are kept ``apart`` each stays a node of its own, which is found again by its name. Raises BuildFailed.
    """
    try:
        simplified, _ = onnxsim.simplify(model, check_n=0, skipped_optimizers=list(_JOINS) if apart else None)
    except Exception as error:  # it raises whatever its C++ half throws
        msg = f"onnx-simplifier refused the graph: {str(error).splitlines()[0]}; try --no-simplify"
        raise BuildFailed(msg) from error
    result: onnx.ModelProto = simplified
    return result


def downgrade(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Opset 18 as 17: in this graph only ReduceMean differs, whose axes become an attribute again.

    Raises BuildFailed.
    """
    try:
        result = onnx.version_converter.convert_version(model, opset)
    except (onnx.version_converter.ConvertError, RuntimeError) as error:
        msg = (
            f"the graph can't be written in opset {opset}: {str(error).splitlines()[0]}; choose {DEFAULT_OPSET} or more"
        )
        raise BuildFailed(msg) from error
    for node in result.graph.node:
        kept = [a for a in node.attribute if a.name != "noop_with_empty_axes"]
        if node.op_type == "ReduceMean" and len(kept) != len(node.attribute):
            del node.attribute[:]
            node.attribute.extend(kept)
    return result
