"""What leaves with an engine: a kit that finishes the proof on the GPU's own machine, a Triton model repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nextvit_deploy.data import ImageSet
from nextvit_deploy.folders import check_replaceable
from nextvit_deploy.kit.build import is_kit, write_kit
from nextvit_deploy.manifest import Manifest, manifest_path
from nextvit_deploy.outputs import check_writable
from nextvit_deploy.request import Request
from nextvit_deploy.triton import write_triton
from nextvit_deploy.verify import Verdict, artefact_inputs
from nextvit_exporters import targets
from nextvit_exporters.executors.base import Array


def check_places(request: Request, artefact: Path) -> None:
    """Raise OutputNotWritten where the artefact, its manifest, the kit or the model repository can't be written."""
    check_writable(artefact)
    check_writable(manifest_path(artefact))
    if request.engine is None:
        return
    for folder in (request.engine.kit, request.engine.triton):
        if folder is not None:
            check_writable(folder / "file")
    if request.engine.kit is not None:
        check_replaceable(request.engine.kit, "kit", is_kit)


def hand_over(
    request: Request, manifest: Manifest, images: ImageSet, expected: Array, on_step: Callable[[str], None]
) -> None:
    """Write the kit and the model repository that were asked for; nothing of an artefact that failed is handed on.

    ``expected`` is float32 PyTorch's answer to ``images``, (N, classes). Raises OutputNotWritten.
    """
    spec, path = manifest.spec, manifest.artifact.path
    if request.engine is None or manifest.verdict is Verdict.FAILED:
        return
    target = targets.load(spec.target)
    inputs, onnx = artefact_inputs(spec, images), target.source(path)
    if request.engine.kit is not None:
        on_step("write the kit")
        tolerance = target.TOLERANCES[targets.PRECISION_COST][spec.precision]
        beside = manifest_path(path)
        write_kit(request.engine.kit, onnx, spec, inputs, expected, tolerance, manifest.as_dict(), beside)
    if request.engine.triton is not None:
        on_step("write the Triton model repository")
        write_triton(request.engine.triton, spec, path, onnx, spec.labels, inputs)
