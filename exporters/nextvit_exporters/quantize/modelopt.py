"""Q/DQ by NVIDIA's ModelOpt: another opinion on where INT8 goes in a graph that TensorRT builds.

ModelOpt places by its own rules: like ours it leaves attention's two products and the last linear map alone; unlike
ours it quantizes inputs of averages, and one branch of an addition. It finds steps with ONNX Runtime's calibrators on
the CPU. Its ``entropy`` keeps every activation of every batch in memory, so that is for few images; on the bundled
demo it costs 4 dB against ``minmax``.

What it hands back is brought into this project's form: weights are stored as int8, where ModelOpt leaves that to
whoever builds an engine, and nodes are named after modules.
"""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from nextvit_exporters.errors import BuildFailed, MissingExtra, UnsupportedSpec, first_line
from nextvit_exporters.executors.base import Array, Arrays
from nextvit_exporters.onnx_names import name_nodes

METHODS: Final = {"minmax": "max", "entropy": "entropy"}
"""Calibration methods, by ModelOpt's own name of each."""
_LAYERS: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


class _Batches:
    """Calibration batches as ONNX Runtime's calibrators ask for them."""

    def __init__(self, batches: Sequence[Arrays]) -> None:
        self._batches = batches
        self.rewind()

    def get_next(self) -> dict[str, Array] | None:
        """The next batch, None behind the last."""
        return next(self._left, None)

    def get_first(self) -> dict[str, Array]:
        """The first batch, whatever was asked before."""
        return dict(self._batches[0])

    def rewind(self) -> None:
        """Begin again."""
        self._left: Iterator[dict[str, Array]] = map(dict, self._batches)

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> dict[str, Array]:
        return next(self._left)


def quantize_with_modelopt(
    model: onnx.ModelProto, batches: Sequence[Arrays], keep: Collection[str] = (), method: str = "minmax"
) -> onnx.ModelProto:
    """``model``, in FP16 or float32, with Q/DQ by ModelOpt; the argument is not changed.

    ``batches`` are what it is calibrated on: the file's inputs by name, in its own shapes and types. ``keep`` names
    blocks (``features.3``) that stay in the model's type, as the last linear map does. ``method`` is ``minmax`` or
    ``entropy``. The result is in opset 19 or newer, symmetric int8, with weights stored as int8.

    Raises UnsupportedSpec for another method, or for batches that the file does not read; MissingExtra without
    ModelOpt; BuildFailed where ModelOpt refuses the graph, or quantizes nothing or what was to be kept.
    """
    if method not in METHODS:
        raise UnsupportedSpec(f"ModelOpt does not calibrate by {method}; choose one of {', '.join(METHODS)}")
    _check_batches(model, batches)
    named = onnx.ModelProto()
    named.CopyFrom(model)
    names = [node.name for node in named.graph.node]
    if "" in names or len(set(names)) < len(names):
        name_nodes(named)
    layers = [node.name for node in named.graph.node if node.op_type in _LAYERS]
    kept = [name for name in layers[:-1] if any(_is_in(name, block) for block in keep)] + layers[-1:]
    made = _quantize(named, batches, kept, METHODS[method])
    _store_weights(made)
    _check_quantized(made, kept)
    del made.metadata_props[:]
    made.metadata_props.extend(model.metadata_props)
    made.graph.name = model.graph.name
    name_nodes(made)
    try:
        onnx.checker.check_model(made, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildFailed(f"the ONNX checker refused what ModelOpt made: {first_line(error)}") from error
    return made


def _check_batches(model: onnx.ModelProto, batches: Sequence[Arrays]) -> None:
    """ModelOpt invents random batches where none are given, and fails obscurely on those that don't fit."""
    if not batches:
        raise UnsupportedSpec("there is nothing to calibrate on; give calibration images")
    constants = {tensor.name for tensor in model.graph.initializer}
    wanted = {value.name: value for value in model.graph.input if value.name not in constants}
    for batch in batches:
        if set(batch) != set(wanted):
            told = ", ".join(sorted(wanted)), ", ".join(sorted(batch))
            raise UnsupportedSpec("the file reads {}, not {}; calibrate on its own inputs".format(*told))
        for name, values in batch.items():
            kind = wanted[name].type.tensor_type
            sizes = [dim.dim_value for dim in kind.shape.dim]
            fits = len(sizes) == values.ndim and all(
                size in {0, got} for size, got in zip(sizes, values.shape, strict=True)
            )
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
            if not fits or values.dtype != dtype:
                shape = "x".join(str(size or "?") for size in sizes)
                raise UnsupportedSpec(f"the file reads {name} as {shape} {dtype}, not {values.shape} {values.dtype}")


def _is_in(node: str, block: str) -> bool:
    """Whether a node named ``module/OpType`` belongs to a block."""
    return node.startswith((f"{block}.", f"{block}/"))


def _quantize(model: onnx.ModelProto, batches: Sequence[Arrays], kept: Sequence[str], method: str) -> onnx.ModelProto:
    half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
    with _quiet(), _own_folder() as folder:
        try:
            from modelopt.onnx.quantization import quantize
        except ImportError as error:
            raise MissingExtra("quantizing with ModelOpt", "modelopt") from error
        source, target = folder / "model.onnx", folder / "model.quant.onnx"
        onnx.save(model, str(source))
        try:
            quantize(
                str(source),
                quantize_mode="int8",
                calibration_data_reader=_Batches(batches),
                calibration_method=method,
                calibration_eps=["cpu"],
                output_path=str(target),
                high_precision_dtype="fp16" if half else "fp32",
                disable_mha_qdq=True,
                nodes_to_exclude=[f"{re.escape(name)}$" for name in kept],
                log_level="ERROR",
            )
            return onnx.load(str(target))
        except Exception as error:  # whatever ModelOpt, ONNX Runtime and protobuf raise
            raise BuildFailed(f"ModelOpt refused the graph: {first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """ModelOpt logs to stdout, among it that there is no GPU; neither that nor its warnings are the user's."""
    logger = logging.getLogger("modelopt")
    before = logger.propagate
    logger.propagate = False
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.propagate = before


@contextmanager
def _own_folder() -> Iterator[Path]:
    """A folder that also takes what ModelOpt leaves in the system's, and is gone afterwards."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="nextvit-modelopt-") as folder:
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before


def _store_weights(model: onnx.ModelProto) -> None:
    """Quantize constants here: in place of each goes the int8 tensor that its QuantizeLinear would write."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] not in constants:
            nodes.append(node)
            continue
        values, scale = (numpy_helper.to_array(constants[name]).astype(np.float64) for name in node.input[:2])
        axis = next((each.i for each in node.attribute if each.name == "axis"), 1)
        shape = [-1 if index == axis % values.ndim else 1 for index in range(values.ndim)]
        steps = scale.reshape(shape) if scale.ndim else scale
        codes = np.clip(np.rint(values / steps), -128, 127).astype(np.int8)
        graph.initializer.append(numpy_helper.from_array(codes, node.output[0]))
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    left = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(left)


def _check_quantized(model: onnx.ModelProto, kept: Collection[str]) -> None:
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    int8 = {node.name for node in model.graph.node if node.op_type in _LAYERS and node.input[1] in dequantized}
    if not int8:
        raise BuildFailed("ModelOpt quantized nothing in this graph; keep fewer blocks, or choose --fp16")
    wrong = sorted(int8 & set(kept))
    if wrong:
        raise BuildFailed(f"ModelOpt quantized {wrong[0]}, which was to be kept; use the other quantizer")
