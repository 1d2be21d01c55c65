"""From a certified graph to the same graph in INT8: calibrated, planned, and remembered beside the artefact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nextvit_deploy.calibrate import calibrate, split
from nextvit_deploy.data import Pictures, find_pictures
from nextvit_deploy.precision.budget import Budget
from nextvit_deploy.precision.plan import PrecisionPlan, ScanRequest, plan_precision, read_plan
from nextvit_deploy.render_plan import plan_svg
from nextvit_deploy.request import QuantizeRequest, Request
from nextvit_exporters.errors import NotExecutable, UnsupportedSpec
from nextvit_exporters.files import atomic_write
from nextvit_exporters.quantize.calibration import Calibration
from nextvit_exporters.quantize.quantized import quantize_graph
from nextvit_exporters.quantize_spec import QuantizeSpec
from nextvit_exporters.spec import ExportSpec, Precision
from nextvit_models.demo import DEMO_CHECKPOINT, DEMO_IMAGES

if TYPE_CHECKING:
    from torch import fx

OnStep = Callable[[str], None]
_SUFFIX: Final = ".calibration.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A float64 graph in INT8, its spec with what was found, and how it came to be."""

    spec: ExportSpec
    graph: fx.GraphModule
    found: Calibration
    notes: tuple[str, ...]
    plan: PrecisionPlan | None


def calibration_of(path: Path) -> Path:
    """What an artefact's steps and weights were taken from, beside it."""
    return path.with_name(f"{path.stem}{_SUFFIX}")


def pictures_for(request: Request, spec: ExportSpec) -> tuple[Pictures, Pictures | None]:
    """The pictures to calibrate on, and those to judge on where the user named none.

    With the demo's checkpoint the demo's pictures are both, no picture in both. Raises UnsupportedSpec where nothing is
    there to calibrate on.
    """
    asked = _asked(request)
    size, steps = (spec.height, spec.width), spec.preprocessing
    if asked.calibration is not None:
        return find_pictures(asked.calibration, asked.size, size, steps), None
    if not DEMO_IMAGES.is_dir() or request.checkpoint not in {None, str(DEMO_CHECKPOINT)}:
        raise UnsupportedSpec(
            "INT8 needs pictures of your task to calibrate on; give a folder of 128 or more with --calibration DIR"
        )
    return split(find_pictures(DEMO_IMAGES, None, size, steps), asked.size)


def quantize(request: Request, spec: ExportSpec, graph: fx.GraphModule, on_step: OnStep) -> Quantized:
    """Calibrate ``graph``, decide what stays in floating point, and bring the rest onto steps.

    ``graph`` is the float64 graph behind the passes. Raises a DeployError for anything the user can mend.
    """
    asked, (pictures, others) = _asked(request), pictures_for(request, spec)
    found, notes = calibrate(spec, graph, pictures, on_step)
    settled = replace(_quantize_spec(spec), images=found.images, calibration=found.digest)
    plan = _plan(request, replace(spec, quantize=settled), graph, found, others, on_step)
    if plan is not None:
        settled = replace(settled, keep=plan.keep)
    if asked.calibration is None:
        notes = ("no --calibration given: calibrated on pictures of the demo that nothing is judged on", *notes)
    notes = tuple(dict.fromkeys(notes))
    on_step("bring weights onto steps")
    result = quantize_graph(graph, settled, found)
    return Quantized(replace(spec, quantize=settled), result, found, notes, plan)


def remember(made: Quantized, artefact: Path) -> None:
    """Write what ``artefact`` was made from beside it, and a picture of its plan. Raises OutputNotWritten."""
    made.found.save(calibration_of(artefact))
    if made.plan is not None:
        atomic_write(artefact.with_name(f"{artefact.stem}.plan.svg"), plan_svg(made.plan).encode())


def quantize_again(spec: ExportSpec, graph: fx.GraphModule, artefact: Path) -> fx.GraphModule:
    """The graph in INT8 as it was when ``artefact`` was made, from what was remembered beside it.

    Raises NotExecutable where that is gone or another artefact's.
    """
    asked, beside = _quantize_spec(spec), calibration_of(artefact)
    if not beside.is_file():
        raise NotExecutable(f"{beside.name} is not beside {artefact.name}; bring it along, or export again")
    found = Calibration.load(beside)
    if found.digest != asked.calibration:
        raise NotExecutable(f"{beside.name} is not what {artefact.name} was made from; export again")
    return quantize_graph(graph, asked, found)


def _plan(
    request: Request,
    spec: ExportSpec,
    graph: fx.GraphModule,
    found: Calibration,
    others: Pictures | None,
    on_step: OnStep,
) -> PrecisionPlan | None:
    asked = _asked(request)
    if asked.plan is not None:
        return read_plan(asked.plan, spec, graph)
    if asked.budget is None:
        return None
    pictures = others
    if request.images is not None:
        pictures = find_pictures(request.images, asked.judged, (spec.height, spec.width), spec.preprocessing)
    if pictures is None:
        raise UnsupportedSpec(
            "--accuracy-budget needs pictures that nothing was calibrated on; give some with --images DIR"
        )
    scan = ScanRequest(request.checkpoint, request.ema, asked.workers, asked.ray)
    return plan_precision(spec, graph, found, pictures, Budget.parse(asked.budget), scan, on_step)


def _asked(request: Request) -> QuantizeRequest:
    if request.quantize is None:
        raise ValueError("the request asks for no INT8")
    return request.quantize


def _quantize_spec(spec: ExportSpec) -> QuantizeSpec:
    if spec.quantize is None or spec.precision is not Precision.INT8:
        raise ValueError("the spec asks for no INT8")
    return spec.quantize
