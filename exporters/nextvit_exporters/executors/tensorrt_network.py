"""TensorRT's own parsed network, executed in PyTorch on CPU: what TensorRT understood, without a GPU.

The saved ONNX file goes through the parser that the engine's builder uses; the resulting layers are executed one by
one, never fused or reordered. Two modes, as for ONNX files:

* *exact*: the parsed constants widened, float32 (or float64) everywhere between. Says whether it is the same network.
* *emulated*: every tensor that TensorRT stores in FP16 or BF16 is rounded to it, the sums inside a layer are in
  float32. Says what the precision costs. Overflow becomes infinite.

Int8 quantisation is done in both. A third mode, *unrounded*, is exact and leaves the rounding to int8 steps out as
well: a value on a step's edge falls to either side in two sound executors, and a deep network carries the difference
on (1e-2 and more), where a wrong layer could hide. Each result is held against the shape and type that TensorRT
derived for it.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import torch
from torch import Tensor

from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.executors import base
from nextvit_exporters.executors.base import Array, Arrays, See
from nextvit_exporters.executors.tensorrt_call import FLOATS, INTEGERS, Arithmetic, Call, as_tensor
from nextvit_exporters.executors.tensorrt_ops import OPERATIONS
from nextvit_exporters.tensorrt.backends import Backend, load
from nextvit_exporters.tensorrt.builder import parsed
from nextvit_exporters.tensorrt.network import Layer, Network, TensorInfo, UnknownLayer, snapshot

if TYPE_CHECKING:
    from typing_extensions import Self

Mode = Literal["exact", "emulated", "unrounded"]
_MOVES_ONLY: Final = frozenset({"SHUFFLE", "SLICE", "GATHER", "SQUEEZE", "UNSQUEEZE", "CONCATENATION", "IDENTITY"})
"""Kinds whose numbers have all been stored before: nothing is left to round."""

_STORED: Final = MappingProxyType(
    {"HALF": "float16", "INT64": "int64", "INT32": "int32", "INT8": "int8", "UINT8": "uint8", "BOOL": "bool"}
)
"""NumPy's names of types; what it lacks is told in float32."""
_NODE: Final = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A layer, and the tensors that nobody reads any more after it."""

    layer: Layer
    done: tuple[str, ...]


def schedule(network: Network) -> tuple[Step, ...]:
    """Every layer once, each behind those it reads from, otherwise in TensorRT's order.

    Raises UnknownLayer where a layer is of a kind that can't be executed, BuildFailed where one reads what nobody
    writes or, through others, itself.
    """
    ready, ordered, waiting = set(network.inputs), list[Layer](), list(network.layers)
    for layer in waiting:
        if layer.kind not in OPERATIONS or len(layer.outputs) != 1:
            raise UnknownLayer(f"{layer.where} is of a kind that can't be executed here")
    while waiting:
        later = []
        for layer in waiting:
            if ready.issuperset(name for name in layer.inputs if name is not None):
                ordered.append(layer)
                ready.update(layer.outputs)
            else:
                later.append(layer)
        if len(later) == len(waiting):
            raise BuildFailed(f"{later[0].where} reads what is never written")
        waiting = later
    return _with_ends(ordered, network)


def _with_ends(ordered: list[Layer], network: Network) -> tuple[Step, ...]:
    readers = Counter(name for layer in ordered for name in {*layer.inputs} - {None})
    steps = []
    for layer in ordered:
        done = [name for name in layer.outputs if not readers[name]]
        for name in {*layer.inputs} - {None}:
            readers[name] -= 1
            done += [name] if name is not None and not readers[name] else []
        steps.append(Step(layer, tuple(sorted({*done} - {*network.outputs}))))
    return tuple(steps)


class TensorRTNetwork:
    """Executes what a TensorRT makes of a saved ONNX file; needs no GPU.

    ``dtype`` is float32 or float64. Real outputs have that type, whatever TensorRT stores them in.
    """

    def __init__(self, onnx_path: Path, mode: Mode, backend: Backend, dtype: torch.dtype = torch.float32) -> None:
        self.mode = mode
        self._path = onnx_path
        self._backend = backend
        self._arithmetic = Arithmetic(dtype, rounds=mode == "emulated", steps=mode != "unrounded")
        self._network: Network | None = None
        self._steps: tuple[Step, ...] = ()

    @property
    def name(self) -> str:
        """What it is, with the parser's version; raises MissingExtra where that TensorRT isn't installed."""
        module = load(self._backend)
        return f"tensorrt-network-reference ({self._backend.module} {module.__version__})"

    def __enter__(self) -> Self:
        module = load(self._backend)
        try:
            data = self._path.read_bytes()
        except OSError as error:
            raise BuildFailed(f"{self._path.name} can't be read: {error.strerror}") from error
        with parsed(module, data) as definition:
            network = snapshot(definition, module)
        self._steps = schedule(network)
        self._network = network
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._network, self._steps = None, ()

    @torch.inference_mode()
    def run(self, inputs: Arrays) -> dict[str, Array]:
        """Outputs by name; the executor must have been entered.

        Real inputs may be of any real type, integers are of the network's own. Raises BuildFailed where the inputs
        are not the network's or a layer can't be executed on them, UnknownLayer where it isn't known how.
        """
        return self._run(inputs, None)

    def steps(self) -> tuple[base.Step, ...]:
        """Every layer but constants; its module is that of the ONNX node it was made from."""
        if self._network is None:
            raise RuntimeError("the executor is closed; use it in a with statement")
        tensors = self._network.tensors
        return tuple(
            base.Step(
                operation=each.layer.name,
                kind=each.layer.kind,
                module=_module(each.layer),
                inputs=tuple(name for name in each.layer.inputs if name is not None),
                outputs=each.layer.outputs,
                stored=tuple(_STORED.get(tensors[name].dtype, "float32") for name in each.layer.outputs),
            )
            for each in self._steps
            if each.layer.kind != "CONSTANT"
        )

    @torch.inference_mode()
    def trace(self, inputs: Arrays, see: See) -> None:
        """Run, and call ``see`` with each input and each layer's result. Raises as ``run`` does."""
        self._run(inputs, see)

    def _run(self, inputs: Arrays, see: See | None) -> dict[str, Array]:
        if self._network is None:
            raise RuntimeError("the executor is closed; use it in a with statement")
        values = self._fed(self._network, inputs)
        if see is not None:
            for name in self._network.inputs:
                see(name, np.asarray(values[name].numpy()))
        for step in self._steps:
            (name,) = step.layer.outputs
            read = tuple(None if each is None else values[each] for each in step.layer.inputs)
            values[name] = self._execute(Call(step.layer, read, self._arithmetic), self._network.tensors[name])
            if see is not None and step.layer.kind != "CONSTANT":
                see(name, np.asarray(values[name].contiguous().numpy()))
            for gone in step.done:
                del values[gone]
        return {name: np.asarray(values[name].contiguous().numpy()) for name in self._network.outputs}

    def _fed(self, network: Network, inputs: Arrays) -> dict[str, Tensor]:
        if set(inputs) != set(network.inputs):
            names = (", ".join(sorted(each)) for each in (network.inputs, inputs))
            raise BuildFailed("{} reads {}, not {}".format(self._path.name, *names))
        values = {}
        for name in network.inputs:
            wanted, given = network.tensors[name], as_tensor(inputs[name])
            fits = given.is_floating_point() if wanted.dtype in FLOATS else given.dtype is INTEGERS.get(wanted.dtype)
            if not fits or not _agrees(given, wanted):
                got = f"{given.dtype} {tuple(given.shape)}"
                raise BuildFailed(f"{self._path.name} reads {name} as {wanted.dtype} {wanted.shape}, not as {got}")
            values[name] = self._arithmetic.store(given, wanted.dtype)
        return values

    def _execute(self, call: Call, wanted: TensorInfo) -> Tensor:
        """What the layer writes, held against what TensorRT derived for it."""
        layer = call.layer
        try:
            result = OPERATIONS[layer.kind](call)
        except RuntimeError as error:  # PyTorch's, where shapes do not fit
            raise BuildFailed(f"{layer.where} can't be executed: {str(error).splitlines()[0]}") from error
        stepless = wanted.dtype == "INT8" and not call.arithmetic.steps
        if layer.kind != "CAST" and not stepless and result.is_floating_point() != (wanted.dtype in FLOATS):
            raise BuildFailed(f"{layer.where} writes {wanted.dtype}, and {result.dtype} was computed")
        if not _agrees(result, wanted):
            raise BuildFailed(f"{layer.where} writes {wanted.shape}, and {tuple(result.shape)} was computed")
        return result if layer.kind in _MOVES_ONLY else self._arithmetic.store(result, wanted.dtype)


def _agrees(tensor: Tensor, wanted: TensorInfo) -> bool:
    """Whether a tensor has the shape; -1 is any size."""
    same_rank = tensor.ndim == len(wanted.shape)
    return same_rank and all(size in {-1, got} for size, got in zip(wanted.shape, tensor.shape, strict=True))


def _module(layer: Layer) -> str:
    """The module that the ONNX node behind a layer is named after; empty for what TensorRT added."""
    found = _NODE.search(layer.metadata)
    return found[1].rpartition("/")[0] if found else ""
