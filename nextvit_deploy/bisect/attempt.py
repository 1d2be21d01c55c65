"""Tracing an artefact as far as it goes: what its runtime refuses is told by the operation it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nextvit_deploy.bisect.record import Parting
from nextvit_deploy.bisect.traced import Traced, trace
from nextvit_exporters.coreml.program import modules_of
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.errors import BuildFailed, DeployError, VerificationFailed
from nextvit_exporters.executors.base import Array, Executor
from nextvit_exporters.executors.mil import MilReference
from nextvit_exporters.executors.mil_call import where
from nextvit_exporters.executors.onnx_runtime import OnnxRuntime
from nextvit_exporters.executors.tensorrt_network import TensorRTNetwork


@dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """An artefact's tensors, and what was wrong before any was there; None where nothing could be executed."""

    traced: Traced | None
    partings: tuple[Parting, ...] = ()
    notes: tuple[str, ...] = ()


def attempt(executor: Executor, source: Path, name: str, runs: Sequence[Array]) -> Attempt:
    """Trace ``executor`` on ``runs``, which its input ``name`` reads; ``source`` is the artefact that any reader takes.

    A network that TensorRT refuses is traced in ONNX Runtime, a package with other labels without them. Raises a
    DeployError where it can't be told what is refused.
    """
    try:
        return Attempt(trace(executor, name, runs))
    except DeployError as error:
        if isinstance(executor, TensorRTNetwork) and isinstance(error, BuildFailed):
            note = f"TensorRT can't read the file, so that its layers are those of ONNX Runtime: {error}"
            mode = "exact" if executor.mode == "exact" else executor.mode
            return Attempt(trace(OnnxRuntime(source, mode), name, runs), notes=(note,))
        if isinstance(executor, MilReference) and isinstance(error, VerificationFailed):
            return _of_package(executor, source, name, runs, error)
        raise


def _of_package(
    executor: MilReference, source: Path, name: str, runs: Sequence[Array], error: VerificationFailed
) -> Attempt:
    package = read_package(source)
    modules = modules_of(package)
    blamed = [each for each in package.program.operations if str(error).startswith(where(each, modules))]
    if blamed:
        first = blamed[0]
        module = modules.get(first.outputs[0].name, "") if first.outputs else ""
        return Attempt(None, (Parting(module, (first.name,), first.kind, math.inf, 0.0, (), str(error)),))
    labels = Parting("", (), "classify", math.inf, 0.0, (), str(error))
    unlabelled = MilReference(package, executor.mode, double="float64" in executor.name)
    return Attempt(trace(unlabelled, name, runs), (labels,))
