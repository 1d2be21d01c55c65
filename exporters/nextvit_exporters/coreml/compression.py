"""Compress the weights of a coremltools model; the numbers are those of ``precision.compress``, never others.

What goes in was converted from the graph that ``precision.compress.for_conversion`` names: for tables the weights are
table values already, and each weight's distinct values are listed and numbered here; for ``int8`` they are plain FP16
weights, and coremltools computes the same steps and whole numbers as ``precision.compress`` does.

iOS 16 and 17 keep them in ``constexpr_affine_dequantize`` and ``constexpr_lut_to_dense`` with packed indices, iOS 18
in ``constexpr_blockwise_shift_scale`` and its own ``constexpr_lut_to_dense``; all of them give FP16 values back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import redirect_stderr
from io import StringIO
from math import prod
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nextvit_exporters.coreml.convert import known
from nextvit_exporters.coreml.loading import heard, part
from nextvit_exporters.coreml.program import SPECIFICATION
from nextvit_exporters.coreml_spec import OLDEST_FOR_WEIGHTS, WEIGHTS
from nextvit_exporters.errors import BuildFailed, InvariantError, UnsupportedSpec
from nextvit_exporters.precision.compress import TABLES, THRESHOLD
from nextvit_exporters.precision.tables import distinct
from nextvit_exporters.quantize.placement import block_of

WEIGHTED: Final = ("conv", "linear")
"""Operations whose weights are compressed: what nn.Linear, nn.Conv1d and nn.Conv2d become."""

Packer = Callable[[NDArray[np.float16]], tuple[NDArray[np.float16], NDArray[np.uint8]]]


def compress_weights(model: Any, scheme: str, keep: Collection[str] = ()) -> Any:
    """A coremltools MLModel with its FP16 weights of more than ``THRESHOLD`` elements compressed; ``model`` stays.

    Those of the operations named in ``keep`` stay FP16. Raises UnsupportedSpec for an unknown scheme, and where the
    model is for iOS 15 or has such a weight in float32; InvariantError for a weight of more values than the table has;
    BuildFailed where coremltools refuses or leaves a weight out.
    """
    if scheme not in WEIGHTS:
        raise UnsupportedSpec(f"there is no weight compression {scheme}; choose one of {', '.join(WEIGHTS)}")
    spec = model.get_spec()
    if spec.specificationVersion < SPECIFICATION[OLDEST_FOR_WEIGHTS]:
        raise UnsupportedSpec(f"{scheme} weights need iOS {OLDEST_FOR_WEIGHTS}; ask for --ios 16 or more")
    if other := _weights(spec, half=False):
        raise UnsupportedSpec(f"the weight {other[0]} is in float32, and {scheme} decompresses to FP16; ask for fp16")
    run, chosen = _method(scheme)
    config = part("optimize.coreml").OptimizationConfig(
        op_type_configs=dict.fromkeys(WEIGHTED, chosen), op_name_configs=dict.fromkeys(keep)
    )
    with heard() as said, redirect_stderr(StringIO()):  # where its progress bars go
        try:
            compressed = run(model, config)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise BuildFailed(f"coremltools refused to compress to {scheme}: {str(error).splitlines()[0]}") from error
    left = _weights(compressed.get_spec(), half=True, keep=keep)
    if left:
        reason = next((line for line in said if left[0] in line), "it gave no reason")
        raise BuildFailed(f"coremltools left {len(left)} weights out of {scheme}, first {left[0]}: {reason}")
    return compressed


def maps_of(model: Any, modules: Mapping[str, str], blocks: Collection[str]) -> tuple[str, ...]:
    """Names of the convolutions and linear maps of a coremltools MLModel that belong to one of ``blocks``.

    ``modules`` are those of ``Converted``.
    """
    if not blocks:
        return ()
    found = []
    for each in operations_of(model.get_spec()):
        if each.type in WEIGHTED:
            names = name_of(each), each.inputs["weight"].arguments[0].name
            module = next((module for module in (known(name, modules) for name in names) if module), "")
            if block_of(module) in blocks:
                found.append(name_of(each))
    return tuple(found)


def _method(scheme: str) -> tuple[Callable[[Any, Any], Any], Any]:
    """The function of coremltools for a scheme, and its settings for one kind of operation."""
    tools = part("optimize.coreml")
    if scheme == "int8":
        return tools.linear_quantize_weights, tools.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype="int8", granularity="per_channel", weight_threshold=THRESHOLD
        )
    return tools.palettize_weights, tools.OpPalettizerConfig(
        mode="custom", lut_function=packer(TABLES[scheme]), granularity="per_tensor", weight_threshold=THRESHOLD
    )


def packer(size: int) -> Packer:
    """What coremltools calls for each weight: its distinct values, ascending, as a table of ``size``, and indices.

    Where there are fewer values the last one fills the table. The mode ``unique`` of coremltools gives the same values
    by sorting the weight as rows: 3 s for a million numbers against 0.015 s.
    """

    def pack(weight: NDArray[np.float16]) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        values, _ = distinct(weight)
        if len(values) > size:
            raise InvariantError(f"a weight {weight.shape} has {len(values)} values, and its table holds {size}")
        table = np.concatenate([values, np.repeat(values[-1:], size - len(values))])
        places = np.zeros(1 << 16, np.uint8)
        places[values.view(np.uint16)] = np.arange(len(values))
        return table, places[weight.view(np.uint16).reshape(-1)]

    return pack


def _weights(spec: Any, *, half: bool, keep: Collection[str] = ()) -> tuple[str, ...]:
    """Names of the plain constants above the threshold that are weights, in float16 or in any other type."""
    operations = operations_of(spec)
    float16 = part("proto.MIL_pb2").FLOAT16
    constants = {each.outputs[0].name: each.outputs[0].type.tensorType for each in operations if each.type == "const"}
    read = [each for each in operations if each.type in WEIGHTED and name_of(each) not in keep]
    return tuple(
        name
        for name in dict.fromkeys(each.inputs["weight"].arguments[0].name for each in read)
        if name in constants
        and (constants[name].dataType == float16) is half
        and prod(each.constant.size for each in constants[name].dimensions) > THRESHOLD
    )


def operations_of(spec: Any) -> tuple[Any, ...]:
    """The operations of a model's protobuf message."""
    (function,) = spec.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    return tuple(block.operations)


def name_of(operation: Any) -> str:
    """The name of an operation of a protobuf message."""
    (name,) = operation.attributes["name"].immediateValue.tensor.strings.values
    return str(name)
