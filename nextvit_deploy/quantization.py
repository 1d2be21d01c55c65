"""From a certified graph to the same graph in INT8: calibrated, planned, and remembered beside the artefact."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nextvit_deploy.calibrate import calibrate, split
from nextvit_deploy.coreml_int8 import Inputs, with_calibration
from nextvit_deploy.coreml_int8 import calibration_pictures as int8_pictures
from nextvit_deploy.data import ImageSet, Pictures, find_pictures
from nextvit_deploy.pictures_check import check_pictures
from nextvit_deploy.precision.answers import right_answers
from nextvit_deploy.precision.budget import Budget
from nextvit_deploy.precision.plan import PrecisionPlan, ScanRequest, plan_precision, read_plan
from nextvit_deploy.references import artefact_inputs
from nextvit_deploy.render_plan import plan_svg
from nextvit_deploy.request import QuantizeRequest, Request
from nextvit_exporters import graph as g
from nextvit_exporters.errors import DeployError, InvariantError, NotExecutable, UnsupportedSpec
from nextvit_exporters.files import atomic_write
from nextvit_exporters.quantize.calibration import Calibration
from nextvit_exporters.quantize.quantized import quantize_graph
from nextvit_exporters.spec import ExportSpec, quantize_of
from nextvit_models.demo import DEMO_CHECKPOINT, DEMO_IMAGES

if TYPE_CHECKING:
    from torch import fx

    from nextvit_exporters.targets import Examples

OnStep = Callable[[str], None]
_SUFFIX: Final = ".calibration.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A float64 graph in INT8, its spec with what was found, and how it came to be.

    Where the artefact's builder chooses the steps, or nothing is in INT8, the graph is still in floating point and
    nothing is ``found``; ``pictures`` are what the builder is to calibrate on.
    """

    spec: ExportSpec
    graph: fx.GraphModule
    notes: tuple[str, ...] = ()
    pictures: Pictures | None = None
    found: Calibration | None = None
    plan: PrecisionPlan | None = None

    def examples(self, images: ImageSet) -> Examples:
        """What the builder may calibrate on: ``images`` that it is verified on, where there is nothing else."""
        return artefact_inputs(self.spec, images) if self.pictures is None else Inputs(self.spec, self.pictures)


def calibration_of(path: Path) -> Path:
    """What an artefact's steps and weights were taken from, beside it."""
    return path.with_name(f"{path.stem}{_SUFFIX}")


def knows_steps(spec: ExportSpec) -> bool:
    """Whether this tool can say what every number in the artefact has to be; not where another chose INT8's steps."""
    return spec.quantize is None or spec.quantize.own_steps


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


def calibration_pictures(request: Request, spec: ExportSpec) -> Pictures | None:
    """The pictures to calibrate on; None where nothing is calibrated, or on those that the artefact is verified on.

    Raises UnsupportedSpec where there are none, DeployError where the folder can't be listed.
    """
    return int8_pictures(request, spec) if request.quantize is None else pictures_for(request, spec)[0]


def in_int8(
    request: Request, spec: ExportSpec, graph: fx.GraphModule, pictures: Pictures | None, on_step: OnStep
) -> Quantized:
    """``graph``, the float64 graph behind the passes, in INT8 as it was asked for; as it is where nothing was.

    ``pictures`` are those of ``calibration_pictures``. Raises a DeployError for anything the user can mend.
    """
    if request.quantize is None or pictures is None:
        settled, notes = with_calibration(request, spec, graph, pictures, on_step)
        return Quantized(settled, graph, notes, pictures)
    if knows_steps(spec):
        return _on_steps(request, spec, graph, pictures, on_step)
    return _for_another(request, spec, graph, pictures, on_step)


def _on_steps(
    request: Request, spec: ExportSpec, graph: fx.GraphModule, pictures: Pictures, on_step: OnStep
) -> Quantized:
    """Calibrate ``graph``, decide what stays in floating point, and bring the rest onto steps."""
    asked = _asked(request)
    budget = None if asked.budget is None else Budget.parse(asked.budget)
    judged = None if budget is None else _judged(request, spec)
    if budget is not None and judged is not None:
        right_answers(judged, spec, budget)  # refuses what can't be judged, before minutes are spent
    plan = None if asked.plan is None else read_plan(asked.plan, spec, graph)
    found, notes = calibrate(spec, graph, pictures, on_step)
    settled = replace(quantize_of(spec), images=found.images, calibration=found.digest, size=found.count)
    if budget is not None and judged is not None:
        scan = ScanRequest(request.checkpoint, request.ema, asked.workers, asked.ray)
        plan = plan_precision(replace(spec, quantize=settled), graph, found, judged, budget, scan, on_step)
        notes = (*notes, *seen_before(judged, pictures))
    if plan is not None:
        settled = replace(settled, keep=plan.keep)
    notes = tuple(dict.fromkeys((*_said(asked), *notes)))
    on_step("bring weights onto steps")
    result = quantize_graph(graph, settled, found)
    g.release(graph)
    return Quantized(replace(spec, quantize=settled), result, notes, pictures, found, plan)


def _for_another(
    request: Request, spec: ExportSpec, graph: fx.GraphModule, pictures: Pictures, on_step: OnStep
) -> Quantized:
    """What a tool that chooses the steps itself is to be told: checked pictures, and the blocks to keep."""
    asked, settled = _asked(request), replace(quantize_of(spec), images=pictures.fingerprint, size=len(pictures))
    if asked.budget is not None:
        raise UnsupportedSpec(
            f"--accuracy-budget measures this tool's own steps, not those of {settled.quantizer}; plan without "
            "--quantizer, and give the plan with --precision-plan"
        )
    plan = None if asked.plan is None else read_plan(asked.plan, spec, graph)
    settled = replace(settled, keep=() if plan is None else plan.keep)
    notes = (*_said(asked), *check_pictures(pictures, on_step), f"the steps are those that {settled.quantizer} chose")
    return Quantized(replace(spec, quantize=settled), graph, notes, pictures, plan=plan)


def _said(asked: QuantizeRequest) -> tuple[str, ...]:
    said = "no --calibration given: calibrated on pictures of the demo that nothing is judged on"
    return (said,) if asked.calibration is None else ()


def remember(made: Quantized, artefact: Path) -> None:
    """Write what ``artefact`` was made from beside it, and a picture of its plan. Raises OutputNotWritten."""
    if made.found is not None:
        made.found.save(calibration_of(artefact))
    if made.plan is not None:
        atomic_write(_drawing_of(artefact), plan_svg(made.plan).encode())


def forget_plan(made: Quantized, artefact: Path) -> None:
    """Remove the picture of an earlier plan, where ``artefact`` is there again without one."""
    if made.spec.quantize is not None and made.plan is None:
        with suppress(OSError):
            _drawing_of(artefact).unlink()


def _drawing_of(artefact: Path) -> Path:
    return artefact.with_name(f"{artefact.stem}.plan.svg")


def bring_along(spec: ExportSpec, given: Path, artefact: Path) -> None:
    """Copy what ``given`` was made from beside an artefact that is built from it, where it is there."""
    if spec.quantize is not None and calibration_of(given).is_file():
        atomic_write(calibration_of(artefact), calibration_of(given).read_bytes())


def quantize_again(spec: ExportSpec, graph: fx.GraphModule, artefact: Path) -> fx.GraphModule:
    """The graph in INT8 as it was when ``artefact`` was made, from what was remembered beside it.

    Raises NotExecutable where that is gone or another artefact's, and where another tool chose the steps.
    """
    asked, beside = quantize_of(spec), calibration_of(artefact)
    if not asked.own_steps:
        raise NotExecutable(f"the steps in {artefact.name} are those that {asked.quantizer} chose")
    if not beside.is_file():
        raise NotExecutable(f"{beside.name} is not beside {artefact.name}; bring it along, or export again")
    try:
        found = Calibration.load(beside)
    except DeployError as error:
        raise NotExecutable(str(error)) from error
    if found.digest != asked.calibration:
        raise NotExecutable(f"{beside.name} is not what {artefact.name} was made from; export again")
    try:
        return quantize_graph(graph, asked, found)
    except InvariantError as error:
        raise NotExecutable(f"{beside.name} is of other weights: {error}") from error


def _judged(request: Request, spec: ExportSpec) -> Pictures:
    """The pictures that a budget is measured on; raises UnsupportedSpec where there are none."""
    if request.images is not None:
        return find_pictures(request.images, _asked(request).judged, (spec.height, spec.width), spec.preprocessing)
    _, pictures = pictures_for(request, spec)
    if pictures is None:
        raise UnsupportedSpec(
            "--accuracy-budget needs pictures that nothing was calibrated on; give some with --images DIR"
        )
    return pictures


def seen_before(judged: Pictures, calibrated: Pictures) -> tuple[str, ...]:
    """A note where a budget is measured on files that were calibrated on, which tell less of others."""
    known = {path.resolve() for path in calibrated.paths}
    again = sum(path.resolve() in known for path in judged.paths)
    note = f"{again} of the {len(judged)} images that the budget is measured on were calibrated on; give others"
    return (f"{note} with --images",) if again else ()


def _asked(request: Request) -> QuantizeRequest:
    if request.quantize is None:
        raise ValueError("the request asks for no INT8")
    return request.quantize
