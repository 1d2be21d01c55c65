"""Which ONNX opset to write, by who reads the file."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from nextvit_exporters.errors import UnsupportedSpec

OLDEST_OPSET: Final = 17
NEWEST_OPSET: Final = 22
DEFAULT_OPSET: Final = 18
"""Written by torch's exporter without conversion, and read by every runtime since early 2023."""
TENSORRT_OPSET: Final = 20
"""For engines: read by every TensorRT from 10.0 on; 18, 20 and 22 give the same engine, byte for byte."""
OLDEST_INT8_OPSET: Final = 19
"""The first whose QuantizeLinear takes steps in FP16."""
CONSUMERS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "tensorrt-8.6": 17,
        "tensorrt-10": 20,  # 10.0's parser; later 10.x read more
        "tensorrt-11": 25,
        "tensorrt-rtx-1": 25,  # measured with 1.7; newer ones are parsed in silence
        "onnxruntime-1.14": 18,
        "onnxruntime-1.15": 19,
        "onnxruntime-1.17": 20,
        "onnxruntime-1.18": 21,
        "onnxruntime-1.21": 22,
    }
)
"""Newest opset each consumer reads, from its own release notes."""


def newest_opset(consumer: str) -> int:
    """The newest opset that ``consumer`` reads; raises UnsupportedSpec for an unknown one."""
    if consumer not in CONSUMERS:
        raise UnsupportedSpec(
            f"no opset is known for '{consumer}'; choose one of {', '.join(CONSUMERS)}, or give --opset"
        )
    return CONSUMERS[consumer]


def opset_for(consumer: str | None, asked: int | None = None) -> int:
    """The opset asked for, or the newest that ``consumer`` reads and this tool writes.

    Raises UnsupportedSpec for an unknown consumer, or for an opset newer than it reads.
    """
    if consumer is None:
        return asked or DEFAULT_OPSET
    newest = newest_opset(consumer)
    if asked is not None and asked > newest:
        raise UnsupportedSpec(f"{consumer} reads up to opset {newest}, not {asked}; drop --opset")
    return asked or min(newest, NEWEST_OPSET)
