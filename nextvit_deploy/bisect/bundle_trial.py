"""One piece of an artefact, cut into a file and executed from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from nextvit_exporters import to_coreml, to_onnx, to_tensorrt
from nextvit_exporters.cutting.coreml import cut_coreml
from nextvit_exporters.cutting.onnx import cut_onnx, stand_in
from nextvit_exporters.cutting.piece import Edge, Piece
from nextvit_exporters.errors import BuildFailed, UnsupportedSpec, VerificationFailed
from nextvit_exporters.executors.base import Array, Arrays, Executor
from nextvit_exporters.executors.mil import MilReference
from nextvit_exporters.executors.onnx_runtime import OnnxRuntime
from nextvit_exporters.executors.tensorrt_network import TensorRTNetwork
from nextvit_exporters.targets import COST_AT_WORST, SAME_NETWORK
from nextvit_exporters.tensorrt.backends import backend
from nextvit_exporters.tensorrt.header import read_header

Mode = Literal["emulated", "pessimistic", "unrounded"]
FACTOR: Final = 4.0
"""An error that is smaller than the whole artefact's by more than this is another error."""
_BROKEN: Final = (BuildFailed, VerificationFailed)
"""Errors that say that the piece can't be executed, which is a failure of it."""


@dataclass(frozen=True, slots=True)
class Way:
    """How pieces of one artefact are cut and executed. ``source`` is cut, the artefact or the ONNX file beside it."""

    kind: Literal["onnx", "tensorrt", "coreml"]
    source: Path
    name: str
    """Of the file that holds the piece."""
    mode: Mode
    executor: Callable[[Path, Mode], Executor]
    module: str = ""
    """TensorRT's, by its name in Python."""

    def cut(self, source: Path, inputs: Sequence[str], outputs: Sequence[str], out: Path, given: Arrays) -> Piece:
        """Cut what lies between two sets of tensors out of ``source``; ``given`` are numbers that fit the inputs."""
        if self.kind == "coreml":
            shapes = {name: given[name].shape for name in inputs if name in given}
            return cut_coreml(source, inputs, outputs, out, shapes)
        return cut_onnx(source, inputs, outputs, out)


def way_for(artefact: Path, question: str) -> Way:
    """How pieces of this artefact are cut, and executed as ``question`` asks.

    Raises UnsupportedSpec for a file of another format, and what ``to_tensorrt.source`` does where an engine's ONNX
    file is missing or another's.
    """
    mode: Mode = "pessimistic" if question == COST_AT_WORST else "emulated"
    mode = "unrounded" if question == SAME_NETWORK else mode
    if artefact.suffix == to_onnx.SUFFIX:
        return Way("onnx", artefact, "cut.onnx", mode, OnnxRuntime)
    if artefact.suffix == to_coreml.SUFFIX:
        double = mode == "unrounded"
        return Way("coreml", artefact, "cut.mlpackage", mode, lambda path, way: MilReference(path, way, double=double))
    if artefact.suffix == to_tensorrt.SUFFIX:
        chosen = backend(read_header(artefact).backend)

        def network(path: Path, way: Mode) -> Executor:
            return TensorRTNetwork(path, "emulated" if way == "pessimistic" else way, chosen)

        return Way("tensorrt", to_tensorrt.source(artefact), "cut.onnx", mode, network, chosen.module)
    raise UnsupportedSpec(f"{artefact.name} is no ONNX file, engine or Core ML package; nothing can be cut out of it")


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A piece in its file, what it was given, and what it gave.

    ``times`` is how often it runs, each time on an equal share of every array's first axis. ``error`` is the largest
    relative root mean square of its outputs, infinite where it can't be executed, which ``broken`` tells; None where
    nothing is expected.
    """

    path: Path
    piece: Piece
    times: int
    inputs: Arrays
    expected: Arrays
    got: Arrays
    error: float | None
    broken: str = ""


def run(way: Way, path: Path, piece: Piece, inputs: Arrays, expected: Arrays, mode: Mode | None = None) -> Trial:
    """Execute a piece from its file, and hold it against what is expected.

    Raises NotExecutable or MissingExtra where that says nothing of the piece.
    """
    mode = mode or way.mode
    fed = {edge.name: _fitted(way, path, edge, inputs[edge.name], mode) for edge in piece.inputs}
    times = _times(piece.inputs, fed)
    try:
        with way.executor(path, mode) as executor:
            parts = [executor.run(each) for each in shares(fed, times)]
    except _BROKEN as error:
        said = " ".join(str(error).replace(f"{path.parent}/", "").split())
        return Trial(path, piece, times, fed, expected, {}, float("inf"), said)
    got = {name: np.concatenate([each[name] for each in parts]) if times > 1 else parts[0][name] for name in parts[0]}
    return Trial(path, piece, times, fed, expected, got, _error(got, expected))


def shares(arrays: Arrays, times: int) -> list[dict[str, Array]]:
    """Equal shares of every array's first axis."""
    if times == 1:
        return [dict(arrays)]
    split = {name: np.split(values, times) for name, values in arrays.items()}
    return [{name: np.ascontiguousarray(each[index]) for name, each in split.items()} for index in range(times)]


def relative_rms(got: Array, expected: Array) -> float:
    """Of the difference, against the expected's; infinite where shapes differ, or either is no number."""
    if got.shape != expected.shape:
        return float("inf")
    actual, wanted = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if not (np.isfinite(actual).all() and np.isfinite(wanted).all()):
        return float("inf")
    difference, size = np.sqrt(np.mean((actual - wanted) ** 2)), np.sqrt(np.mean(wanted**2))
    if not difference:
        return 0.0
    return float(difference / size) if size else float("inf")


def limit_of(tolerance: float, error: float) -> float:
    """Beyond which a piece's error is the failure that the whole artefact had."""
    return max(tolerance, error / FACTOR) if np.isfinite(error) else tolerance


def _error(got: Arrays, expected: Mapping[str, Array]) -> float | None:
    return max((relative_rms(got[name], expected[name]) for name in expected), default=None)


def _fitted(way: Way, path: Path, edge: Edge, values: Array, mode: Mode) -> Array:
    """Numbers in the type that the piece reads; in exact arithmetic real ones stay as wide as they are."""
    wide = mode == "unrounded" and edge.dtype == "float16" and values.dtype.kind == "f"
    if wide and (way.kind != "onnx" or stand_in(path, mode) is not None):
        return values
    return values.astype(edge.dtype)


def _times(edges: Sequence[Edge], given: Arrays) -> int:
    """How many of the piece's fixed batches the arrays hold; 1 where that is not one number for all."""
    counts = set()
    for edge in edges:
        size = edge.shape[0] if edge.shape else None
        held = given[edge.name].shape[:1]
        counts.add(held[0] // size if size and held and held[0] % size == 0 else 1)
    return counts.pop() if len(counts) == 1 else 1
