"""What TensorRT's parser made of an ONNX file, copied out of its network into plain data.

TensorRT's objects die with the builder and can't be compared or pickled; ``snapshot`` keeps everything of them that
says what is computed: layers with their attributes and constant weights, tensors with dtype and shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nextvit_exporters.errors import BuildFailed, NotExecutable

Array = NDArray[np.generic]
Value = bool | int | float | str | tuple[int, ...] | None


class UnknownLayer(BuildFailed, NotExecutable):
    """A layer, or an attribute's value, that can't be read or executed here: the network can't be verified."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """``dtype`` is TensorRT's own name, such as ``HALF``; an open axis of ``shape`` is -1."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer: ``kind`` is TensorRT's own name, such as ``CONVOLUTION``; enumerations are their members' names.

    An optional input that isn't there is None, and so are dimensions that an input gives instead. ``metadata`` names
    the ONNX node it was made from, where there is one. ``weights`` are flat, and empty where there are none.
    """

    name: str
    kind: str
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    metadata: str
    attributes: Mapping[str, Value]
    weights: Mapping[str, Array]

    @property
    def where(self) -> str:
        """How messages name it: kind, name, and the ONNX node where that has another name."""
        origin = self.metadata.strip()
        return f"{self.kind} {self.name}" + (f" {origin}" if origin and self.name not in origin else "")

    def dims(self, name: str) -> tuple[int, ...]:
        """An attribute that is a tuple of integers; raises TypeError when it is something else."""
        value = self.attributes[name]
        if not isinstance(value, tuple):
            raise TypeError(f"{name} of {self.where} is {value!r}, not a tuple")
        return value

    def integer(self, name: str) -> int:
        """An attribute that is an integer or a bit mask; raises TypeError when it is something else."""
        value = self.attributes[name]
        if not isinstance(value, int):
            raise TypeError(f"{name} of {self.where} is {value!r}, not an integer")
        return value

    def number(self, name: str) -> float:
        """An attribute that is a real number; raises TypeError when it is something else."""
        value = self.attributes[name]
        if not isinstance(value, float | int):
            raise TypeError(f"{name} of {self.where} is {value!r}, not a number")
        return float(value)

    def unknown(self, name: str) -> UnknownLayer:
        """The error to raise where the attribute has a value that isn't implemented."""
        return UnknownLayer(f"{self.where} has {name} {self.attributes[name]}, which can't be executed here")


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """Names of inputs and outputs, every tensor by name, and the layers in TensorRT's order.

    That order is the one they were added in: a layer may stand in front of one whose output it reads.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: Mapping[str, TensorInfo]
    layers: tuple[Layer, ...]


@dataclass(frozen=True, slots=True)
class _Reader:
    """Of one kind of layer: TensorRT's class for it, and which of its properties say what is computed."""

    cls: str
    attributes: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()


_PADDING: Final = ("padding_mode", "pre_padding", "post_padding", "stride_nd")
_READERS: Final[Mapping[str, _Reader]] = MappingProxyType(
    {
        "ACTIVATION": _Reader("IActivationLayer", ("type", "alpha", "beta")),
        "CAST": _Reader("ICastLayer", ("to_type",)),
        "CONCATENATION": _Reader("IConcatenationLayer", ("axis",)),
        "CONSTANT": _Reader("IConstantLayer", ("shape",), ("weights",)),
        "CONVOLUTION": _Reader(
            "IConvolutionLayer",
            ("num_output_maps", "kernel_size_nd", "num_groups", "dilation_nd", *_PADDING),
            ("kernel", "bias"),
        ),
        "DEQUANTIZE": _Reader("IDequantizeLayer", ("axis", "to_type")),
        "ELEMENTWISE": _Reader("IElementWiseLayer", ("op",)),
        "GATHER": _Reader("IGatherLayer", ("axis", "mode", "num_elementwise_dims")),
        "IDENTITY": _Reader("IIdentityLayer"),
        "MATRIX_MULTIPLY": _Reader("IMatrixMultiplyLayer", ("op0", "op1")),
        "POOLING": _Reader("IPoolingLayer", ("type", "window_size_nd", "average_count_excludes_padding", *_PADDING)),
        "QUANTIZE": _Reader("IQuantizeLayer", ("axis", "to_type")),
        "REDUCE": _Reader("IReduceLayer", ("op", "axes", "keep_dims")),
        "SCALE": _Reader("IScaleLayer", ("mode", "channel_axis"), ("scale", "shift", "power")),
        "SELECT": _Reader("ISelectLayer"),
        "SHAPE": _Reader("IShapeLayer"),
        "SHUFFLE": _Reader(
            "IShuffleLayer", ("first_transpose", "reshape_dims", "second_transpose", "zero_is_placeholder")
        ),
        "SLICE": _Reader("ISliceLayer", ("mode", "start", "shape", "stride", "axes")),
        "SOFTMAX": _Reader("ISoftMaxLayer", ("axes",)),
        "SQUEEZE": _Reader("ISqueezeLayer"),
        "UNARY": _Reader("IUnaryLayer", ("op",)),
        "UNSQUEEZE": _Reader("IUnsqueezeLayer"),
    }
)
_NOTHING: Final = _Reader("ILayer")


def snapshot(definition: Any, module: Any) -> Network:
    """Copy a parsed ``INetworkDefinition`` out of TensorRT; nothing in the result belongs to it any more.

    ``module`` is the TensorRT that ``definition`` comes from, imported. Layers of other kinds than the ones that can be
    executed here are kept without attributes. Raises UnknownLayer where weights have a type NumPy lacks, BuildFailed
    where a tensor has no shape or is written twice.
    """
    tensors: dict[str, TensorInfo] = {}
    inputs = [_tensor(definition.get_input(index)) for index in range(definition.num_inputs)]
    tensors.update((tensor.name, tensor) for tensor in inputs)
    layers = []
    for index in range(definition.num_layers):
        layer, written = _layer(definition.get_layer(index), module)
        for tensor in written:
            if tensor.name in tensors:
                raise BuildFailed(f"{layer.where} writes {tensor.name}, which is there already")
            tensors[tensor.name] = tensor
        layers.append(layer)
    outputs = tuple(str(definition.get_output(index).name) for index in range(definition.num_outputs))
    names = tuple(tensor.name for tensor in inputs)
    return Network(names, outputs, MappingProxyType(tensors), tuple(layers))


def _tensor(tensor: Any) -> TensorInfo:
    try:
        shape = tuple(int(size) for size in tensor.shape)
    except (TypeError, ValueError) as error:  # dimensions of a negative rank
        raise BuildFailed(f"TensorRT can't tell the shape of {tensor.name}") from error
    return TensorInfo(str(tensor.name), str(tensor.dtype.name), shape)


def _layer(layer: Any, module: Any) -> tuple[Layer, list[TensorInfo]]:
    """One layer and the tensors it writes; the object changes its class, as TensorRT's Python asks for."""
    kind = str(module.ILayer.type.fget(layer).name)  # some kinds have a ``type`` of their own
    read = [layer.get_input(index) for index in range(layer.num_inputs)]
    written = [_tensor(layer.get_output(index)) for index in range(layer.num_outputs)]
    name, metadata = str(layer.name), str(layer.metadata)
    reader = _READERS.get(kind, _NOTHING)
    layer.__class__ = getattr(module, reader.cls)
    attributes: dict[str, Value] = {key: _value(getattr(layer, key)) for key in reader.attributes}
    weights = {key: _weights(getattr(layer, key), f"{key} of {kind} {name}") for key in reader.weights}
    return Layer(
        name,
        kind,
        tuple(None if tensor is None else str(tensor.name) for tensor in read),
        tuple(tensor.name for tensor in written),
        metadata,
        MappingProxyType(attributes),
        MappingProxyType(weights),
    ), written


def _value(value: Any) -> Value:
    """A property as plain data: an enumeration as its member's name, dimensions and permutations as tuples."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    name = getattr(value, "name", None)
    return str(name) if name is not None else tuple(int(each) for each in value)


def _weights(value: Any, what: str) -> Array:
    if isinstance(value, np.ndarray):
        return value.copy()
    if value.size:  # bfloat16 and what is smaller than a byte
        raise UnknownLayer(f"{what} are {value.dtype.name}, a type that can't be executed here")
    return np.zeros(0, np.float32)
