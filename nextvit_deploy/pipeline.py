"""From a checkpoint to a proven artefact: the whole story in one function."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import nn

from nextvit_deploy import references as r
from nextvit_deploy import verify as v
from nextvit_deploy.data import ImageSet, load_images, noise_images
from nextvit_deploy.handover import check_places, hand_over, withheld
from nextvit_deploy.manifest import CheckpointInfo, Manifest, manifest_of, manifest_path, provenance
from nextvit_deploy.origin import check_same_model, differences, read, recorded_spec, strangers_spec
from nextvit_deploy.outputs import published
from nextvit_deploy.quantization import (
    calibration_pictures,
    forget_plan,
    in_int8,
    knows_steps,
    pictures_for,
    quantize_again,
    remember,
)
from nextvit_deploy.request import Request, check_names, notes_for, notes_on_images, spec_for
from nextvit_deploy.strangers import strange_package
from nextvit_exporters import graph as g
from nextvit_exporters import targets
from nextvit_exporters.errors import CheckpointMismatch, NotExecutable
from nextvit_exporters.passes.base import PassRecord, run_passes
from nextvit_exporters.spec import Artifact, ExportSpec
from nextvit_exporters.targets import PRECISION_COST, SAME_NETWORK, Saved
from nextvit_models.checkpoint import Checkpoint, load_checkpoint
from nextvit_models.demo import DEMO_CHECKPOINT, DEMO_IMAGES
from nextvit_models.nextvit import backbone_of

OnStep = Callable[[str], None]
_SEED: Final = 20220712


def export(request: Request, on_step: OnStep) -> Manifest:
    """Load, rewrite, build, execute, compare, write: an artefact and its manifest, or neither.

    An artefact outside its tolerance is still written, its manifest marked ``failed``. Raises a DeployError for
    anything the user can mend.
    """
    clock, target = Clock(on_step), targets.load(request.target)
    check_names(request)
    with clock.step("load the checkpoint"):
        checkpoint = open_checkpoint(request.checkpoint, ema=request.ema)
        spec = spec_for(request, checkpoint)
        target.check_spec(spec)
        path = request.output / (spec.stem + target.SUFFIX)
        check_places(request, spec, path)
        images = judged_images(request, spec, checkpoint)
        cases = v.cases_for(spec, images)
        pictures = calibration_pictures(request, spec)
        info = describe(checkpoint)
        notes = (*notes_for(request, spec, checkpoint), *notes_on_images(request))
    with clock.step("PyTorch reference"):
        original = original_outputs(spec, checkpoint, cases)
    with clock.step("certify passes"):
        graph, passes = rewrite(spec, checkpoint, on_step)
        del checkpoint
    with clock.step("settle what stays in floating point"):
        made = in_int8(request, spec, graph, pictures, on_step)
        spec = target.settle(made.spec, made.graph, r.graph_inputs(spec, images))
    references = {PRECISION_COST: original}
    if knows_steps(spec):
        with clock.step("PyTorch with rounded constants"):
            references[SAME_NETWORK] = r.rounded_outputs(spec, made.graph, cases)
    with published(path) as draft:
        with clock.step(f"build {request.target}"):
            module = target.lower(spec, made.graph)
            g.release(made.graph)
            examples = made.examples(images)
            built = target.build(spec, module, draft, provenance(spec, info, passes), on_step, examples)
            g.release(module)
            remember(made, draft)
        with clock.step("verify the saved file"):
            names = v.Names(target.INPUT, target.OUTPUT)
            if not knows_steps(spec) and target.source(draft) != draft:
                references[SAME_NETWORK] = v.onnx_outputs(spec, target.source(draft), cases, names)
            checks = v.verify(spec, built.path, cases, references, names)
            saved = target.read(built.path)
            notes = (*notes, *made.notes, *target.remarks(built.path), *withheld(request, checks))
        notes, built = (*notes, *_rolled_back(passes)), replace(built, path=path)
        manifest = manifest_of(spec, info, built, passes, saved, checks, notes, clock.seconds)
        if made.plan is not None:
            manifest = replace(manifest, precision_plan=made.plan.as_dict())
        manifest.write(manifest_path(draft))
        check_places(request, spec, path)  # something may have come in the way meanwhile
    forget_plan(made, path)
    hand_over(request, manifest, images, original.outputs[0], on_step)
    return manifest


def verify_saved(path: Path, request: Request, on_step: OnStep) -> Manifest:
    """Execute a saved artefact again and compare it with its checkpoint; nothing is written.

    An artefact of this tool names its spec, and the same passes and rounding are applied to the checkpoint afresh. For
    any other ONNX file or package only the precision's cost is measured, and the other question stays ``not verified``;
    an engine built from one is held against ONNX Runtime's reading of it. A wrong artefact is a verdict; one that can't
    belong to the checkpoint, or isn't a classifier's, raises a DeployError.
    """
    clock, target = Clock(on_step), targets.of_file(path)
    with clock.step("load the checkpoint"):
        saved = read(target, path)
        recorded, source = saved.provenance, target.source(path)
        checkpoint = open_checkpoint(request.checkpoint, ema=request.ema)
        made, names = identify(path, saved, request, checkpoint)
        spec = target.adopt(made, path)
        images = open_images(request.images, request.count, (spec.height, spec.width), checkpoint)
        cases = v.cases_for(spec, images)
        info = describe(checkpoint)
        notes = (*notes_for(request, spec, checkpoint), *notes_on_images(request))
    with clock.step("PyTorch reference"):
        references = {PRECISION_COST: original_outputs(spec, checkpoint, cases)}
    passes: tuple[PassRecord, ...] = ()
    if source != path and not (recorded and knows_steps(made)):
        references[SAME_NETWORK] = v.onnx_outputs(spec, source, cases, names)
    if recorded:
        with clock.step("certify passes"):
            exact, passes, why = exact_reference(made, checkpoint, source, cases, on_step)
            references |= {} if exact is None else {SAME_NETWORK: exact}
        notes = (*notes, *why, *differences(path, recorded, made, checkpoint, passes), *_rolled_back(passes))
    with clock.step("verify the saved file"):
        checks = v.verify(spec, path, cases, references, names)
        notes = (*notes, *target.remarks(path))
    return manifest_of(spec, info, Artifact.of(path), passes, saved, checks, notes, clock.seconds)


def exact_reference(
    made: ExportSpec, checkpoint: Checkpoint, source: Path, cases: r.Cases, on_step: OnStep
) -> tuple[r.Reference | None, tuple[PassRecord, ...], tuple[str, ...]]:
    """PyTorch carrying the constants that the spec of an artefact gives, the passes, and why it is None where it is.

    ``source`` is the artefact, beside which an INT8 one's calibration lies.
    """
    graph, passes = rewrite(made, checkpoint, on_step)
    meant = graph
    try:
        meant = graph if made.quantize is None else quantize_again(made, graph, source)
        reference = r.rounded_outputs(made, meant, cases)
    except NotExecutable as error:  # a verdict of one question, not the end of the others
        return None, passes, (str(error),)
    finally:
        for each in (graph, meant):
            g.release(each)
    return reference, passes, ()


def identify(path: Path, saved: Saved, request: Request, checkpoint: Checkpoint) -> tuple[ExportSpec, v.Names]:
    """The spec behind an artefact, as it records or a stranger's shows, and what its input and output are called.

    ``saved`` is what ``origin.read`` found in it. Raises CheckpointMismatch where it can't belong to ``checkpoint``,
    UnsupportedSpec where it is no classifier of images.
    """
    target = targets.of_file(path)
    if saved.provenance:
        made = recorded_spec(saved.provenance)
        check_same_model(path, made, checkpoint)
        return made, v.Names(target.INPUT, target.OUTPUT)
    source = target.source(path)
    stranger = strange_package if source.is_dir() else strangers_spec
    return stranger(source, spec_for(request, checkpoint))


def certify(request: Request, on_step: OnStep) -> tuple[ExportSpec, tuple[PassRecord, ...], tuple[str, ...]]:
    """The certified table for a checkpoint, and the notes that go with it; nothing is written."""
    check_names(request)
    checkpoint = open_checkpoint(request.checkpoint, ema=request.ema)
    spec = spec_for(request, checkpoint)
    targets.load(spec.target).check_spec(spec)
    passes = rewrite(spec, checkpoint, on_step)[1]
    return spec, passes, (*notes_for(request, spec, checkpoint), *_rolled_back(passes))


def open_checkpoint(source: str | None, *, ema: bool) -> Checkpoint:
    """The user's checkpoint, or the demo's."""
    return load_checkpoint(DEMO_CHECKPOINT if source is None else source, ema=ema)


def open_images(folder: Path | None, count: int, size: tuple[int, int], checkpoint: Checkpoint) -> ImageSet:
    """The user's images, or the demo's, or seeded noise where the demo's were not installed; never zeros."""
    if folder is not None:
        return load_images(folder, count, size, checkpoint.preprocessing)
    if not DEMO_IMAGES.is_dir():
        return noise_images(count, size, checkpoint.preprocessing, _SEED)
    images = load_images(DEMO_IMAGES, count, size, checkpoint.preprocessing)
    return replace(images, source=f"{len(images)} of the demo's digits")


def judged_images(request: Request, spec: ExportSpec, checkpoint: Checkpoint) -> ImageSet:
    """The images to verify a new artefact on: those asked for, and of the demo's none that it is calibrated on."""
    if request.quantize is not None and request.images is None:
        _, others = pictures_for(request, spec)
        if others is not None:
            images = others.read(0, request.count)
            return replace(images, source=f"{len(images)} of the demo's digits")
    return open_images(request.images, request.count, (spec.height, spec.width), checkpoint)


def model_of(spec: ExportSpec, checkpoint: Checkpoint) -> nn.Module:
    """The classifier, or its backbone where the four feature maps are asked for."""
    features = spec.coreml is not None and spec.coreml.head == "features"
    return backbone_of(checkpoint.model) if features else checkpoint.model


def original_outputs(spec: ExportSpec, checkpoint: Checkpoint, cases: r.Cases) -> r.Reference:
    """The checkpoint's own float32 answers; raises CheckpointMismatch when they hold NaN or infinity."""
    reference = r.original_outputs(spec, model_of(spec, checkpoint), cases)
    if not all(np.isfinite(output).all() for outputs in reference.outputs for output in outputs.values()):
        raise CheckpointMismatch(
            f"{checkpoint.name}: PyTorch itself answers NaN or infinity on these images, so no export of it can be "
            "verified; check the weights, and the preprocessing that goes with them"
        )
    return reference


def rewrite(
    spec: ExportSpec, checkpoint: Checkpoint, on_step: OnStep
) -> tuple[torch.fx.GraphModule, tuple[PassRecord, ...]]:
    """Trace the model, apply the target's passes, and return the graph and the certified table.

    Each pass is certified on one image of at most 191 pixels a side, with the remainder by 128 of the spec's
    size, so that maps are odd and tokens are dropped where they are at the full size. The last row holds all passes
    together at the full size. Open axes get a second input of another size and batch.
    """
    sizes = [(1, _small(spec.height), _small(spec.width))]
    if spec.dynamic_size:
        sizes.append((2, sizes[0][1] + 33, sizes[0][2] + 5))
    elif spec.dynamic_batch:
        sizes.append((2, *sizes[0][1:]))
    return run_passes(
        g.trace(model_of(spec, checkpoint)),
        targets.load(spec.target).passes_for(spec),
        [_probe(spec, *size) for size in sizes],
        lambda name: on_step(f"certify {name}"),
        whole=_probe(spec, 1, spec.height, spec.width),
        consume=True,
    )


def describe(checkpoint: Checkpoint) -> CheckpointInfo:
    """The checkpoint as the manifest records it."""
    return CheckpointInfo(
        checkpoint.name, checkpoint.sha256, checkpoint.fingerprint, checkpoint.layout, checkpoint.found
    )


def _small(side: int) -> int:
    """A side that leaves the same remainders as ``side`` wherever a stage halves it, and is quick to certify on."""
    return side if side < 192 else side % 128 + (128 if side % 128 < 64 else 0)


def _probe(spec: ExportSpec, batch: int, height: int, width: int) -> torch.Tensor:
    """Seeded whole pixels, normalised in float64, so that raw-pixel inputs can be certified on the same image."""
    images = noise_images(batch, (height, width), spec.preprocessing, _SEED)
    mean, std = (
        torch.tensor(c, dtype=torch.float64).view(1, 3, 1, 1) for c in (spec.preprocessing.mean, spec.preprocessing.std)
    )
    return (torch.tensor(images.pixels).double() / 255.0 - mean) / std


def _rolled_back(passes: tuple[PassRecord, ...]) -> tuple[str, ...]:
    return tuple(
        f"pass {each.name} moved the outputs by {each.error_float64:.1e} and was rolled back"
        for each in passes
        if not each.certified
    )


@dataclass(slots=True)
class Clock:
    """Seconds per step, and the step's name to whoever shows progress."""

    on_step: OnStep
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a block under its name."""
        self.on_step(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
