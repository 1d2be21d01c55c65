"""ONNX Runtime on CPU, with every optimisation off: what it runs is what the file says."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import onnx
import onnxruntime as ort

from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.executors.base import Array, Arrays
from nextvit_exporters.executors.onnx_float import emulate, half_tensors, widen

if TYPE_CHECKING:
    from typing_extensions import Self


class OnnxRuntime:
    """Executes a saved ONNX file; see ``onnx_float`` for what the two modes do to FP16."""

    def __init__(self, path: Path, mode: str) -> None:
        self.mode = mode
        self.name = f"onnxruntime {ort.__version__} cpu"
        self._path = path
        self._session: ort.InferenceSession | None = None

    def __enter__(self) -> Self:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(self._model(), options, providers=["CPUExecutionProvider"])
        except (ort.capi.onnxruntime_pybind11_state.Fail, RuntimeError) as error:
            msg = f"ONNX Runtime can't load {self._path.name}: {str(error).splitlines()[0]}"
            raise BuildFailed(msg) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """Outputs by name; the executor must have been entered."""
        if self._session is None:
            msg = "the executor is closed; use it in a with statement"
            raise RuntimeError(msg)
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))

    def _model(self) -> str | bytes:
        """The file itself where it holds no FP16, else the float32 graph that stands for it."""
        model = onnx.load(str(self._path))
        if not half_tensors(model):
            return str(self._path)
        stand_in = widen(model) if self.mode == "exact" else emulate(model)
        return bytes(stand_in.SerializeToString())
