"""What an artefact was calibrated on, found again by its fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nextvit_deploy.calibrate import calibrate, split
from nextvit_deploy.contents import Difference
from nextvit_deploy.coreml_int8 import Inputs
from nextvit_deploy.data import Pictures, find_pictures
from nextvit_deploy.quantization import quantize_again
from nextvit_deploy.references import graph_inputs
from nextvit_exporters.errors import NotExecutable
from nextvit_exporters.quantize.quantized import quantize_graph
from nextvit_exporters.spec import ExportSpec, quantize_of
from nextvit_models.demo import DEMO_IMAGES

if TYPE_CHECKING:
    from torch import fx

    from nextvit_exporters.targets import Examples

OnStep = Callable[[str], None]
_MOST: Final = 1024
"""Pictures that are looked through where a package doesn't say how many it was calibrated on."""


@dataclass(frozen=True, slots=True, eq=False)
class Again:
    """A graph ready to be lowered as it was, and what its builder is to calibrate on."""

    graph: fx.GraphModule
    examples: Examples | None = None
    notes: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()


def calibrated_again(
    made: ExportSpec, graph: fx.GraphModule, source: Path, folder: Path | None, on_step: OnStep
) -> Again:
    """``graph`` as it was when ``source`` was made from it, with the pictures that its builder reads.

    INT8's steps are those beside ``source``; where they are gone, pictures with the recorded fingerprint are calibrated
    on again. Those are looked for in ``folder``, or in the demo. Raises NotExecutable where they are not there.
    """
    if made.quantize is not None:
        return _in_int8(made, graph, source, folder, on_step)
    asked = made.coreml
    if asked is None or asked.activations is None:
        return Again(graph)
    if asked.calibration_size:
        pictures = _of_fingerprint(made, source, folder, asked.calibration_size, asked.calibration)
    else:
        pictures = _of_inputs(made, source, folder, asked.calibration)
    return Again(graph, Inputs(made, pictures), (_said(pictures),))


def _in_int8(made: ExportSpec, graph: fx.GraphModule, source: Path, folder: Path | None, on_step: OnStep) -> Again:
    """By the steps beside ``source``, or by others that are found again on the same pictures."""
    asked = quantize_of(made)
    try:
        return Again(quantize_again(made, graph, source))
    except NotExecutable as gone:
        try:
            pictures = _of_fingerprint(made, source, folder, asked.size, asked.images)
        except NotExecutable as error:
            raise NotExecutable(f"{gone}; and {error}") from error
    if not asked.own_steps:
        return Again(graph, Inputs(made, pictures), (_said(pictures),))
    found, _ = calibrate(made, graph, pictures, on_step)
    others = Difference("calibration", "calibrating on the same pictures again finds other steps")
    differences = () if found.digest == asked.calibration else (others,)
    return Again(quantize_graph(graph, asked, found), None, (_said(pictures),), differences)


def _said(pictures: Pictures) -> str:
    return f"calibrated on the same {len(pictures)} pictures again, in {pictures.folder.resolve().name}"


def _of_fingerprint(made: ExportSpec, source: Path, folder: Path | None, count: int, wanted: str | None) -> Pictures:
    """The pictures with the fingerprint that is recorded; raises NotExecutable where none have it."""
    for pictures in _candidates(made, folder, count):
        if pictures.fingerprint == wanted:
            return pictures
    raise _gone(source, folder)


def _candidates(made: ExportSpec, folder: Path | None, count: int) -> Iterator[Pictures]:
    """The first ``count`` pictures of the folder; of the demo those that nothing is judged on."""
    size, steps = (made.height, made.width), made.preprocessing
    if folder is not None:
        yield find_pictures(folder, count, size, steps)
    elif DEMO_IMAGES.is_dir():
        pictures = find_pictures(DEMO_IMAGES, None, size, steps)
        if made.quantize is None:
            yield Pictures(pictures.folder, pictures.paths[-count:], pictures.total, size, steps)
        elif count < len(pictures):
            yield split(pictures, count)[0]


def _of_inputs(made: ExportSpec, source: Path, folder: Path | None, wanted: str | None) -> Pictures:
    """The first so many pictures whose inputs have the recorded hash; how many they were is not recorded."""
    if folder is None and not DEMO_IMAGES.is_dir():
        raise _gone(source, folder)
    size, steps = (made.height, made.width), made.preprocessing
    pictures = find_pictures(folder or DEMO_IMAGES, _MOST, size, steps)
    digest = sha256()
    for count in range(1, len(pictures) + 1):
        digest.update(graph_inputs(made, pictures.read(count - 1, count)).tobytes())
        if digest.hexdigest() == wanted:
            return Pictures(pictures.folder, pictures.paths[:count], pictures.total, size, steps)
    raise _gone(source, folder)


def _gone(source: Path, folder: Path | None) -> NotExecutable:
    if folder is None:
        return NotExecutable(
            f"the pictures that {source.name} was calibrated on are not the demo's; give their folder with "
            "--calibration DIR"
        )
    return NotExecutable(f"the pictures in {folder} are not those that {source.name} was calibrated on")
