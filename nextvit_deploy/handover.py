"""What leaves with an engine: a kit that finishes the proof on the GPU's own machine, a Triton model repository."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nextvit_deploy.data import ImageSet
from nextvit_deploy.kit.build import check_kit_place, write_kit
from nextvit_deploy.manifest import Manifest, manifest_path
from nextvit_deploy.outputs import check_writable
from nextvit_deploy.references import LOGITS, artefact_inputs
from nextvit_deploy.request import Request
from nextvit_deploy.triton import check_triton_place, write_triton
from nextvit_deploy.verify import Check, Verdict, overall
from nextvit_exporters import targets
from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.executors.base import Arrays
from nextvit_exporters.spec import ExportSpec


def check_places(request: Request, spec: ExportSpec, artefact: Path) -> None:
    """Raise where the artefact, its manifest, the kit, the model repository or the timings can't be written.

    OutputNotWritten, or UnsupportedSpec where one of them would lie in another's way.
    """
    check_writable(artefact)
    check_writable(manifest_path(artefact))
    asked = request.engine
    if asked is None:
        return
    if asked.timing_cache is not None:
        check_writable(asked.timing_cache)
    _check_apart(artefact, {"--kit": asked.kit, "--triton": asked.triton})
    if asked.kit is not None:
        check_kit_place(asked.kit)
    if asked.triton is not None:
        check_triton_place(asked.triton, spec)


def _check_apart(artefact: Path, folders: Mapping[str, Path | None]) -> None:
    """Raise UnsupportedSpec where a folder that is written as a whole holds, or is, another output."""
    whole = {option: folder.resolve() for option, folder in folders.items() if folder is not None}
    places = {"--output": artefact.parent.resolve(), **whole}
    for option, folder in whole.items():
        for other, place in places.items():
            if option != other and (place == folder or folder in place.parents):
                raise UnsupportedSpec(f"{option} {folder} holds what {other} names; choose a folder of its own")
        taken = {artefact.name, f"{artefact.stem}.onnx", f"{artefact.name}.log", manifest_path(artefact).name}
        if folder.parent == places["--output"] and folder.name in taken:
            raise UnsupportedSpec(f"{option} {folder} has the name of another output; choose another")


def withheld(request: Request, checks: Sequence[Check]) -> tuple[str, ...]:
    """A note where a kit or model repository was asked for and the proof failed: none is written."""
    asked = request.engine
    if asked is None or not (asked.kit or asked.triton) or overall(checks) is not Verdict.FAILED:
        return ()
    return ("the proof failed, so no kit and no model repository was written; an earlier one is what it was",)


def hand_over(
    request: Request, manifest: Manifest, images: ImageSet, expected: Arrays, on_step: Callable[[str], None]
) -> None:
    """Write the kit and the model repository that were asked for; nothing of an artefact that failed is handed on.

    ``expected`` is float32 PyTorch's answer to ``images``, (N, ...) by name. Raises OutputNotWritten.
    """
    spec, path = manifest.spec, manifest.artifact.path
    if request.engine is None or manifest.verdict is Verdict.FAILED:
        return
    target = targets.load(spec.target)
    inputs, onnx = artefact_inputs(spec, images), target.source(path)
    if request.engine.kit is not None:
        on_step("write the kit")
        tolerance = target.TOLERANCES[targets.ON_DEVICE][spec.precision]
        beside = manifest_path(path)
        write_kit(request.engine.kit, onnx, spec, inputs, expected[LOGITS], tolerance, manifest.as_dict(), beside)
    if request.engine.triton is not None:
        on_step("write the Triton model repository")
        write_triton(request.engine.triton, spec, path, onnx, spec.labels, inputs)
