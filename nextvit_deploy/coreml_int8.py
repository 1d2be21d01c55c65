"""What a Core ML package in INT8 is calibrated on, and which of its blocks stay in FP16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nextvit_deploy.data import Pictures, find_pictures
from nextvit_deploy.pictures_check import check_pictures
from nextvit_deploy.precision.plan import read_plan
from nextvit_deploy.references import artefact_inputs
from nextvit_deploy.request import Request
from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.executors.base import Array
from nextvit_exporters.spec import ExportSpec
from nextvit_models.demo import DEMO_CHECKPOINT, DEMO_IMAGES

if TYPE_CHECKING:
    from torch import fx


@dataclass(frozen=True, slots=True)
class Inputs:
    """Pictures as an artefact reads them, (N, ...), read when they are asked for; see ``artefact_inputs``."""

    spec: ExportSpec
    pictures: Pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, some: slice, /) -> Array:
        start, stop, _ = some.indices(len(self))
        return artefact_inputs(self.spec, self.pictures.read(start, stop))


def calibration_pictures(request: Request, spec: ExportSpec) -> Pictures | None:
    """The pictures that int8 activations are calibrated on; None where it is those that the package is verified on.

    With the demo's checkpoint they are pictures of the demo that nothing is judged on. Raises UnsupportedSpec where
    none is left, DeployError where the folder can't be listed.
    """
    asked = request.coreml
    if asked is None or asked.activations is None:
        return None
    size, steps = (spec.height, spec.width), spec.preprocessing
    if asked.calibration is not None:
        return find_pictures(asked.calibration, asked.calibration_size, size, steps)
    if request.checkpoint not in {None, str(DEMO_CHECKPOINT)} or not DEMO_IMAGES.is_dir():
        return None
    pictures = find_pictures(DEMO_IMAGES, None, size, steps)
    judged = request.count if request.images is None else 0
    left = pictures.paths[judged:][-asked.calibration_size :]
    if not left:
        raise UnsupportedSpec(
            f"all {len(pictures)} pictures of the demo are judged on; ask for fewer with --count, or give others to "
            "calibrate on with --calibration"
        )
    return replace(pictures, paths=left)


def with_calibration(
    request: Request, spec: ExportSpec, graph: fx.GraphModule, pictures: Pictures | None, on_step: Callable[[str], None]
) -> tuple[ExportSpec, tuple[str, ...]]:
    """``spec`` with the fingerprint of ``pictures`` and the blocks of the plan that is asked for, and what to know.

    ``graph`` is the float64 graph behind the passes. Raises DeployError for pictures that are unfit to calibrate on,
    UnsupportedSpec for a plan that is damaged or of another network.
    """
    asked, package = request.coreml, spec.coreml
    if asked is None or package is None or package.compression is None:
        return spec, ()
    notes: tuple[str, ...] = ()
    if asked.plan is not None:
        package = replace(package, keep=read_plan(asked.plan, spec, graph).keep)
    if pictures is not None:
        notes = check_pictures(pictures, on_step)
        if asked.calibration is None:
            notes = ("no --calibration given: calibrated on pictures of the demo that nothing is judged on", *notes)
        package = replace(package, calibration=pictures.fingerprint, calibration_size=len(pictures))
    return replace(spec, coreml=package), notes
