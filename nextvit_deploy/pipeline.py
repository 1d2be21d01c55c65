"""From a checkpoint to a proven artefact: the whole story in one function."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Final

import numpy as np
import torch

from nextvit_deploy import verify as v
from nextvit_deploy.data import ImageSet, load_images, noise_images
from nextvit_deploy.manifest import CheckpointInfo, Manifest, manifest_path, provenance, versions
from nextvit_deploy.origin import check_same_model, differences, read, recorded_spec, strangers_spec
from nextvit_deploy.outputs import check_writable, published
from nextvit_exporters import graph as g
from nextvit_exporters import targets
from nextvit_exporters.errors import CheckpointMismatch, UnsupportedSpec
from nextvit_exporters.executors.base import Array
from nextvit_exporters.files import sha256_of
from nextvit_exporters.opsets import CONSUMERS, opset_for
from nextvit_exporters.passes.base import PassRecord, run_passes
from nextvit_exporters.spec import Artifact, ExportSpec, InputKind, Precision
from nextvit_exporters.targets import PRECISION_COST, SAME_NETWORK
from nextvit_models.checkpoint import Checkpoint, load_checkpoint
from nextvit_models.demo import DEMO_CHECKPOINT, DEMO_IMAGES

OnStep = Callable[[str], None]
_SEED: Final = 20220712


@dataclass(frozen=True, slots=True)
class Request:
    """What the user typed. None means: as the checkpoint says (size), the demo's (checkpoint, images)."""

    output: Path
    target: str = "onnx"
    checkpoint: str | None = None
    ema: bool = False
    precision: Precision = Precision.FP32
    size: tuple[int, int] | None = None
    batch: int = 1
    images: Path | None = None
    count: int = 8
    input: InputKind = InputKind.NORMALIZED
    consumer: str | None = None
    opset: int | None = None
    dynamic_batch: bool = False
    dynamic_size: bool = False
    simplify: bool = True
    skip: tuple[str, ...] = ()


def export(request: Request, on_step: OnStep) -> Manifest:
    """Load, rewrite, build, execute, compare, write: an artefact and its manifest, or neither.

    An artefact outside its tolerance is still written, its manifest marked ``failed``. Raises a DeployError for
    anything the user can mend.
    """
    clock, target = _Clock(on_step), targets.load(request.target)
    check_names(request)
    with clock.step("load the checkpoint"):
        checkpoint = open_checkpoint(request.checkpoint, ema=request.ema)
        spec = spec_for(request, checkpoint)
        target.check_spec(spec)
        path = request.output / (spec.stem + target.SUFFIX)
        check_writable(path)
        check_writable(manifest_path(path))
        images = open_images(request.images, request.count, (spec.height, spec.width), checkpoint)
        cases = v.cases_for(spec, images)
        info = describe(checkpoint)
        notes = (*notes_for(request, spec, checkpoint), *notes_on_images(request))
    with clock.step("PyTorch reference"):
        original = original_outputs(checkpoint, cases)
    with clock.step("certify passes"):
        graph, passes = rewrite(spec, checkpoint, on_step)
        del checkpoint
    with clock.step("PyTorch with rounded constants"):
        rounded = v.rounded_outputs(spec, graph, cases)
    with published(path) as draft:
        with clock.step(f"build {request.target}"):
            module = target.lower(spec, graph)
            g.release(graph)
            built = target.build(spec, module, draft, provenance(spec, info, passes), on_step)
            g.release(module)
        with clock.step("verify the saved file"):
            references = {SAME_NETWORK: rounded, PRECISION_COST: original}
            checks = v.verify(spec, built.path, cases, references, v.Names(target.INPUT, target.OUTPUT))
            saved = target.read(built.path)
        manifest = Manifest(
            spec=spec,
            checkpoint=info,
            artifact=replace(built, path=path),
            passes=passes,
            ops=saved.ops,
            dtypes=saved.dtypes,
            checks=checks,
            notes=(*notes, *_rolled_back(passes)),
            versions=versions(),
            seconds=clock.seconds,
        )
        manifest.write(manifest_path(draft))
    return manifest


def verify_saved(path: Path, request: Request, on_step: OnStep) -> Manifest:
    """Execute a saved artefact again and compare it with its checkpoint; nothing is written.

    A file of this tool names its spec, and the same passes and rounding are applied to the checkpoint afresh. For
    any other file only the precision's cost is measured, and the other question stays ``not verified``. A wrong file
    is a verdict; one that can't belong to the checkpoint, or isn't a classifier's, raises a DeployError.
    """
    clock, target = _Clock(on_step), targets.of_file(path)
    with clock.step("load the checkpoint"):
        saved = read(target, path)
        recorded = saved.provenance
        checkpoint = open_checkpoint(request.checkpoint, ema=request.ema)
        names = v.Names(target.INPUT, target.OUTPUT)
        if recorded:
            spec = recorded_spec(recorded)
            check_same_model(path, spec, checkpoint)
        else:
            spec, names = strangers_spec(path, spec_for(request, checkpoint))
        images = open_images(request.images, request.count, (spec.height, spec.width), checkpoint)
        cases = v.cases_for(spec, images)
        info = describe(checkpoint)
        notes = (*notes_for(request, spec, checkpoint), *notes_on_images(request))
    with clock.step("PyTorch reference"):
        references = {PRECISION_COST: original_outputs(checkpoint, cases)}
    passes: tuple[PassRecord, ...] = ()
    if recorded:
        with clock.step("certify passes"):
            graph, passes = rewrite(spec, checkpoint, on_step)
            references[SAME_NETWORK] = v.rounded_outputs(spec, graph, cases)
            g.release(graph)
        notes = (*notes, *differences(path, recorded, spec, checkpoint, passes), *_rolled_back(passes))
    with clock.step("verify the saved file"):
        checks = v.verify(spec, path, cases, references, names)
    return Manifest(
        spec=spec,
        checkpoint=info,
        artifact=Artifact(path, sha256_of(path), path.stat().st_size),
        passes=passes,
        ops=saved.ops,
        dtypes=saved.dtypes,
        checks=checks,
        notes=notes,
        versions=versions(),
        seconds=clock.seconds,
    )


def certify(request: Request, on_step: OnStep) -> tuple[ExportSpec, tuple[PassRecord, ...], tuple[str, ...]]:
    """The certified table for a checkpoint, and the notes that go with it; nothing is written."""
    check_names(request)
    checkpoint = open_checkpoint(request.checkpoint, ema=request.ema)
    spec = spec_for(request, checkpoint)
    targets.load(spec.target).check_spec(spec)
    passes = rewrite(spec, checkpoint, on_step)[1]
    return spec, passes, (*notes_for(request, spec, checkpoint), *_rolled_back(passes))


def check_names(request: Request) -> None:
    """Raise UnsupportedSpec for an unknown pass or consumer, with the nearest name, before anything is loaded."""
    passes = sorted(each.name for each in targets.load(request.target).PASSES)
    for name in request.skip:
        _check_known("pass", name, passes)
    if request.consumer is not None:
        _check_known("consumer", request.consumer, tuple(CONSUMERS))


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


def original_outputs(checkpoint: Checkpoint, cases: Iterable[tuple[str, ImageSet]]) -> list[Array]:
    """The checkpoint's own float32 answers; raises CheckpointMismatch when they hold NaN or infinity."""
    outputs = v.original_outputs(checkpoint.model, cases)
    if not all(np.isfinite(output).all() for output in outputs):
        raise CheckpointMismatch(
            f"{checkpoint.name}: PyTorch itself answers NaN or infinity on these images, so no export of it can be "
            "verified; check the weights, and the preprocessing that goes with them"
        )
    return outputs


def spec_for(request: Request, checkpoint: Checkpoint) -> ExportSpec:
    """The request with everything the checkpoint decides filled in."""
    side = checkpoint.preprocessing.image_size
    height, width = request.size or (side, side)
    return ExportSpec(
        model=checkpoint.model.config.name,
        num_classes=checkpoint.num_classes,
        target=request.target,
        precision=request.precision,
        height=height,
        width=width,
        batch=request.batch,
        opset=opset_for(request.consumer, request.opset),
        preprocessing=checkpoint.preprocessing,
        labels=checkpoint.labels,
        input=request.input,
        dynamic_batch=request.dynamic_batch,
        dynamic_size=request.dynamic_size,
        simplify=request.simplify,
        consumer=request.consumer,
        skip=request.skip,
    )


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
        g.trace(checkpoint.model),
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


def notes_for(request: Request, spec: ExportSpec, checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the user should know before trusting the result."""
    notes: list[str] = []
    if request.checkpoint is None:
        notes.append("no checkpoint given: the bundled demo is used (nextvit_nano trained on digits)")
    for stage, tokens in checkpoint.model.config.dropped_tokens(spec.height, spec.width).items():
        notes.append(
            f"at {spec.height}x{spec.width} the attention of stage {stage} leaves {tokens} tokens unread, "
            "as the trained model itself does at this size"
        )
    notes += [line for line in checkpoint.found if line.startswith("norms")]
    return tuple(notes)


def notes_on_images(request: Request) -> tuple[str, ...]:
    """What the user should know of the pictures that a file is verified on."""
    if request.images is not None or (request.checkpoint is None and DEMO_IMAGES.is_dir()):
        return ()
    pictures = "the demo's digits" if DEMO_IMAGES.is_dir() else "noise"
    return (f"no --images given: verified on {pictures}, not on pictures of your task",)


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


def _check_known(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UnsupportedSpec(f"no {what} is called '{name}'; {hint}choose one of {', '.join(known)}")


def _rolled_back(passes: tuple[PassRecord, ...]) -> tuple[str, ...]:
    return tuple(
        f"pass {each.name} moved the outputs by {each.error_float64:.1e} and was rolled back"
        for each in passes
        if not each.certified
    )


@dataclass(slots=True)
class _Clock:
    """Seconds per step, and the step's name to whoever shows progress."""

    on_step: OnStep
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.on_step(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
