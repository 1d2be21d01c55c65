"""ONNX Runtime on CPU, with every optimisation off: what it runs is what the file says."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.capi import onnxruntime_pybind11_state

from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.executors.base import Array, Arrays, See, Step
from nextvit_exporters.executors.onnx_float import emulate, half_tensors, unround, widen
from nextvit_exporters.executors.onnx_trace import steps_of, trace_model

if TYPE_CHECKING:
    from typing_extensions import Self

# ONNX Runtime's exceptions (InvalidGraph, NoSuchFile, NotImplemented and a dozen more) share no base class.
_REFUSALS: Final[tuple[type[Exception], ...]] = (
    RuntimeError,
    *(
        kind
        for kind in vars(onnxruntime_pybind11_state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
)


class OnnxRuntime:
    """Executes a saved ONNX file; see ``onnx_float`` for what ``exact`` and ``emulated`` do to FP16.

    The mode ``unrounded`` is exact, and leaves the rounding of QuantizeLinear out as well. It runs on as many threads
    as torch does when it is entered: how sums are split among threads can change their last bits.
    """

    def __init__(self, path: Path, mode: str) -> None:
        self.mode = mode
        self.name = f"onnxruntime {ort.__version__} cpu"
        self._path = path
        self._session: ort.InferenceSession | None = None
        self._widened: frozenset[str] = frozenset()
        """Inputs that the file reads in FP16 and its stand-in in float32."""

    def __enter__(self) -> Self:
        self._session = self._load(self._model())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """Outputs by name; the executor must have been entered. Raises BuildFailed when the file can't be run."""
        if self._session is None:
            msg = "the executor is closed; use it in a with statement"
            raise RuntimeError(msg)
        wanted = {entry.name for entry in self._session.get_inputs()}
        if wanted != set(inputs):
            msg = f"{self._path.name} reads {', '.join(sorted(wanted))}, not {', '.join(sorted(inputs))}"
            raise BuildFailed(msg)
        names = [output.name for output in self._session.get_outputs()]
        return self._execute(self._session, inputs, names)

    def steps(self) -> tuple[Step, ...]:
        """Every node but constants; the executor needs not be entered, so that a file that can't run is told too."""
        return steps_of(self._read())

    def trace(self, inputs: Arrays, see: See) -> None:
        """Run, and call ``see`` with each input and what each node writes; the executor needs not be entered.

        Where a node can't be run, everything in front of it is seen, and BuildFailed raised.
        """

        def execute(running: onnx.ModelProto, given: Arrays, names: tuple[str, ...]) -> dict[str, Array]:
            return self._execute(self._load(bytes(running.SerializeToString())), given, list(names))

        trace_model(self._read(), inputs, lambda front: self._stand_in(front) or front, execute, see)

    def _execute(self, session: ort.InferenceSession, inputs: Arrays, names: list[str]) -> dict[str, Array]:
        fed = {name: values.astype(np.float32) if name in self._widened else values for name, values in inputs.items()}
        quiet = ort.RunOptions()
        quiet.log_severity_level = 4  # what fails is raised
        try:
            outputs = session.run(names, fed, quiet)
        except _REFUSALS as error:
            msg = f"ONNX Runtime can't run {self._path.name}: {str(error).splitlines()[0]}"
            raise BuildFailed(msg) from error
        return dict(zip(names, outputs, strict=True))

    def _load(self, model: str | bytes) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4  # what fails is raised
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except _REFUSALS as error:
            msg = f"ONNX Runtime can't load {self._path.name}: {str(error).splitlines()[0]}"
            raise BuildFailed(msg) from error

    def _read(self) -> onnx.ModelProto:
        try:
            return onnx.load(str(self._path))
        except Exception as error:  # protobuf's own errors share no public base class
            msg = f"{self._path.name} can't be read as ONNX: {str(error).splitlines()[0]}"
            raise BuildFailed(msg) from error

    def _model(self) -> str | bytes:
        """The file itself where nothing is to be rewritten, else the float32 graph that stands for it."""
        running = self._stand_in(self._read())
        return str(self._path) if running is None else bytes(running.SerializeToString())

    def _stand_in(self, model: onnx.ModelProto) -> onnx.ModelProto | None:
        """The float32 graph that stands for ``model``; None where nothing is to be rewritten."""
        self._widened = frozenset()
        unrounded = self.mode == "unrounded" and any(node.op_type == "QuantizeLinear" for node in model.graph.node)
        if not half_tensors(model) and not unrounded:
            return None
        half = onnx.TensorProto.FLOAT16
        self._widened = frozenset(i.name for i in model.graph.input if i.type.tensor_type.elem_type == half)
        stand_in = emulate(model) if self.mode == "emulated" else widen(model)
        return unround(stand_in) if unrounded else stand_in
