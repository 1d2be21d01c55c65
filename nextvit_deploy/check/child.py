"""The process of one cell: makes or verifies an artefact and answers with what came of it.

``main`` is all that it does, with the cell as JSON in its first argument. It answers in JSON on what was its stdout;
everything else that is printed goes to the log. It ends when whoever started it does.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from threading import Thread
from typing import TYPE_CHECKING, Any, Final

from nextvit_deploy.check.cells import Cell
from nextvit_deploy.check.result import Outcome
from nextvit_deploy.verdict import Verdict
from nextvit_exporters.errors import DeployError, MissingExtra, NotExecutable

if TYPE_CHECKING:
    from nextvit_deploy.manifest import Manifest
    from nextvit_deploy.request import Request

_TARGETS: Final = {"onnx": "onnx", "trt": "tensorrt", "coreml": "coreml"}
_NORM_FOLDS: Final = frozenset({"fold-conv-norm", "fold-pre-norm", "fold-head-norm"})
"""Stay where numbers are rounded: tools that write the files fold a norm themselves, behind the rounding."""
_IOS: Final = 16
_INT8_IOS: Final = 17
"""The first that computes with int8 activations."""


def main() -> None:
    """Run the cell that the command line describes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    Thread(target=_end_with_parent, daemon=True).start()
    given: dict[str, Any] = json.loads(sys.argv[1])
    outcome = run_cell(Cell.from_dict(given["cell"]), Path(given["output"]))
    with answers:
        json.dump(outcome.as_dict(), answers, allow_nan=False)


def run_cell(cell: Cell, output: Path) -> Outcome:
    """Make or verify the cell's artefact, below ``output``, and measure what else is asked for.

    What the user can mend is the outcome's ``error``; anything else is raised.
    """
    try:
        manifest, request = _made(cell, output / cell.name)
    except (MissingExtra, NotExecutable) as error:
        return Outcome(error=str(error), missing=True)
    except DeployError as error:
        return Outcome(error=str(error))
    outcome = Outcome(manifest=manifest.as_dict(), artefact=str(manifest.artifact.path))
    if cell.layers:
        outcome = _with_layers(cell, outcome, manifest, request)
    if cell.pictures is not None:
        _evaluate(cell, manifest.artifact.path, cell.pictures)
    return _with_latency(outcome, manifest, request) if cell.latency else outcome


def _made(cell: Cell, folder: Path) -> tuple[Manifest, Request]:
    """The manifest of what was made or verified, and what was asked for."""
    from nextvit_deploy.pipeline import export, verify_saved

    if cell.artefact is not None:
        path = Path(cell.artefact)
        request = _request(cell, path.parent)
        return verify_saved(path, request, _tell), request
    if folder.is_dir() and not folder.is_symlink():
        rmtree(folder)  # an earlier artefact must not be taken for this one's, should this one fail
    request = asked(cell, folder)
    return export(request, _tell), request


def _request(cell: Cell, folder: Path) -> Request:
    from nextvit_deploy.request import Request

    return Request(
        output=folder,
        checkpoint=cell.checkpoint,
        ema=cell.ema,
        size=cell.size,
        batch=cell.batch,
        images=None if cell.images is None else Path(cell.images),
        count=cell.count,
    )


def asked(cell: Cell, folder: Path) -> Request:
    """The cell as the commands would ask for it; raises a DeployError for what they would refuse."""
    from nextvit_deploy import request as r
    from nextvit_exporters import targets
    from nextvit_exporters.engine_spec import Range
    from nextvit_exporters.spec import InputKind, Precision

    calibration = None if cell.calibration is None else Path(cell.calibration)
    request = replace(_request(cell, folder), precision=Precision(cell.precision))
    if cell.passes == "none":
        passes = {each.name for each in targets.load(_TARGETS[cell.lane]).PASSES}
        kept = set() if request.precision is Precision.FP32 else _NORM_FOLDS
        request = replace(request, skip=tuple(sorted(passes - kept)))
    if cell.lane == "coreml":
        int8 = request.precision is Precision.INT8
        package = r.CoreMLRequest(
            ios=cell.ios or (_INT8_IOS if int8 else _IOS),
            activations="int8" if int8 else None,
            calibration=calibration,
            calibration_size=cell.calibration_size,
        )
        numbers = Precision.FP16 if int8 else request.precision
        return r.with_coreml(replace(request, precision=numbers, input=InputKind.IMAGE), package)
    if request.precision is Precision.INT8:
        request = r.with_quantize(request, r.QuantizeRequest(calibration=calibration, size=cell.calibration_size))
    if cell.lane == "onnx":
        return request
    size = None if cell.size is None else (Range.of(cell.size[0]), Range.of(cell.size[1]))
    return r.with_engine(request, r.EngineRequest(gpu=cell.gpu, batch=Range.of(cell.batch), size=size))


def _with_layers(cell: Cell, outcome: Outcome, manifest: Manifest, request: Request) -> Outcome:
    """Each layer's error as well, in the outcome and beside what was made here; a user's own folder is left alone."""
    from nextvit_deploy.bisect.record import layers_path
    from nextvit_deploy.bisect.run import bisect, layers_of
    from nextvit_deploy.manifest import record

    path = manifest.artifact.path
    try:
        layers = layers_of(path, request, _tell)
        if layers.parting is None and manifest.verdict is Verdict.FAILED:
            layers = bisect(path, request, _tell)[0]  # what one image hides, a channel behind a ReLU, others show
        found = layers.as_dict()
        if cell.artefact is None:
            record(layers_path(path), found)
    except DeployError as error:  # of the artefact the verdict says all that has to be said
        _tell(f"no layers: {error}")
        return outcome
    return replace(outcome, layers=found)


def _evaluate(cell: Cell, path: Path, count: int) -> None:
    """What ``evaluate`` writes, beside what was made here; it says how much, never whether."""
    from nextvit_deploy.evaluate.run import EvaluateRequest, evaluate

    folder = None if cell.images is None else Path(cell.images)
    asked = EvaluateRequest(path, folder, cell.checkpoint, cell.ema, limit=count, workers=1)
    try:
        evaluate(asked, lambda step, _done, _total: _tell(step))
    except DeployError as error:
        _tell(f"not evaluated: {error}")


def _with_latency(outcome: Outcome, manifest: Manifest, request: Request) -> Outcome:
    from nextvit_deploy.latency import cpu_ratio

    try:
        return replace(outcome, latency=cpu_ratio(manifest.spec, manifest.artifact.path, request))
    except DeployError as error:
        return replace(outcome, no_latency=str(error))


def _tell(step: str) -> None:
    sys.stderr.write(f"{step}\n")


def _end_with_parent() -> None:
    """However the parent ends, nobody works on for it: stdin is a pipe that only it holds."""
    os.read(0, 1)  # not by sys.stdin, whose lock this thread would hold at the end
    os._exit(1)
