"""What leaves with an artefact: a kit for the GPU's own machine, a Triton model repository, an app's self-test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from nextvit_deploy.data import ImageSet
from nextvit_deploy.folders import Kind, check_place
from nextvit_deploy.kit.build import check_kit_place, write_kit
from nextvit_deploy.manifest import Manifest, manifest_path
from nextvit_deploy.outputs import check_writable
from nextvit_deploy.references import artefact_inputs
from nextvit_deploy.request import EngineRequest, Request
from nextvit_deploy.swift import check_swift_place, write_swift
from nextvit_deploy.triton import check_triton_place, write_triton
from nextvit_deploy.verdict import Verdict
from nextvit_deploy.verify import Check, overall
from nextvit_exporters import targets
from nextvit_exporters.coreml.convert import labels_of
from nextvit_exporters.coreml.program import MANIFEST_JSON, MODEL, WEIGHTS
from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.executors.base import LOGITS, Arrays
from nextvit_exporters.spec import ExportSpec

PACKAGE: Final = Kind(
    "Core ML package", lambda folder: (folder / MANIFEST_JSON).is_file(), (MANIFEST_JSON, MODEL, WEIGHTS)
)
"""What a folder of that name may hold for another export to take its place."""


def check_places(request: Request, spec: ExportSpec, artefact: Path) -> None:
    """Raise where the artefact, its manifest, or what is to go with it can't be written.

    OutputNotWritten, or UnsupportedSpec where one of them would lie in another's way.
    """
    if spec.coreml is None:
        check_writable(artefact)
    else:
        check_place(artefact, PACKAGE)
    check_writable(manifest_path(artefact))
    _check_apart(artefact, _folders(request))
    if request.coreml is not None and request.coreml.swift is not None:
        check_swift_place(request.coreml.swift, spec)
    asked = request.engine
    if asked is None:
        return
    if asked.timing_cache is not None:
        check_writable(asked.timing_cache)
    if asked.kit is not None:
        check_kit_place(asked.kit)
    if asked.triton is not None:
        check_triton_place(asked.triton, spec)


def _folders(request: Request) -> dict[str, Path]:
    """The folders that are asked for beside the artefact, by option."""
    engine, package = request.engine, request.coreml
    asked = {
        "--kit": None if engine is None else engine.kit,
        "--triton": None if engine is None else engine.triton,
        "--swift": None if package is None else package.swift,
    }
    return {option: folder for option, folder in asked.items() if folder is not None}


def _check_apart(artefact: Path, folders: Mapping[str, Path]) -> None:
    """Raise UnsupportedSpec where a folder that is written as a whole holds, or is, another output."""
    whole = {option: folder.resolve() for option, folder in folders.items()}
    places = {"--output": artefact.parent.resolve(), **whole}
    for option, folder in whole.items():
        for other, place in places.items():
            if option != other and (place == folder or folder in place.parents):
                raise UnsupportedSpec(f"{option} {folder} holds what {other} names; choose a folder of its own")
        taken = {artefact.name, f"{artefact.stem}.onnx", f"{artefact.name}.log", manifest_path(artefact).name}
        if folder.parent == places["--output"] and folder.name in taken:
            raise UnsupportedSpec(f"{option} {folder} has the name of another output; choose another")


def withheld(request: Request, checks: Sequence[Check]) -> tuple[str, ...]:
    """A note where something was to go with the artefact and the proof failed: nothing is written."""
    asked = _folders(request)
    if not asked or overall(checks) is not Verdict.FAILED:
        return ()
    return (f"the proof failed, so nothing was written for {' and '.join(asked)}; an earlier one is what it was",)


def hand_over(
    request: Request, manifest: Manifest, images: ImageSet, expected: Arrays, on_step: Callable[[str], None]
) -> None:
    """Write the folders that were asked for; nothing of an artefact that failed is handed on.

    ``expected`` is float32 PyTorch's answer to ``images``, (N, ...) by name. Raises OutputNotWritten.
    """
    if manifest.verdict is Verdict.FAILED:
        return
    if request.engine is not None:
        _hand_over_engine(request.engine, manifest, images, expected, on_step)
    if request.coreml is not None and request.coreml.swift is not None:
        on_step("write the app's self-test")
        spec, path = manifest.spec, manifest.artifact.path
        write_swift(request.coreml.swift, spec, path, images, expected, labels_of(spec))


def _hand_over_engine(
    asked: EngineRequest, manifest: Manifest, images: ImageSet, expected: Arrays, on_step: Callable[[str], None]
) -> None:
    spec, path = manifest.spec, manifest.artifact.path
    target = targets.load(spec.target)
    inputs, onnx = artefact_inputs(spec, images), target.source(path)
    if asked.kit is not None:
        on_step("write the kit")
        tolerance = target.TOLERANCES[targets.ON_DEVICE][spec.precision]
        beside = manifest_path(path)
        write_kit(asked.kit, onnx, spec, inputs, expected[LOGITS], tolerance, manifest.as_dict(), beside)
    if asked.triton is not None:
        on_step("write the Triton model repository")
        write_triton(asked.triton, spec, path, onnx, spec.labels, inputs)
