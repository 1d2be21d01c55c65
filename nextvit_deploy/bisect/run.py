"""Where a saved artefact and its checkpoint part: the whole story in one function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import fx

from nextvit_deploy import references as r
from nextvit_deploy.bisect.attempt import Attempt, attempt
from nextvit_deploy.bisect.cut import Cut
from nextvit_deploy.bisect.depth import anchors, largest_jump, layers
from nextvit_deploy.bisect.known import Known, carried_by, record
from nextvit_deploy.bisect.match import Match, apart, match
from nextvit_deploy.bisect.partings import partings
from nextvit_deploy.bisect.places import Evidence
from nextvit_deploy.bisect.record import Bisection, Layer, Parting, Series
from nextvit_deploy.bisect.steps import wrong_steps
from nextvit_deploy.bisect.traced import Traced
from nextvit_deploy.data import ImageSet
from nextvit_deploy.manifest import versions
from nextvit_deploy.origin import other_source, read
from nextvit_deploy.pipeline import identify, model_of, open_checkpoint, open_images, rewrite
from nextvit_deploy.quantization import quantize_again
from nextvit_deploy.request import Request
from nextvit_deploy.verify import Names
from nextvit_exporters import graph as g
from nextvit_exporters import targets
from nextvit_exporters.errors import DeployError, NotExecutable
from nextvit_exporters.executors.base import FEATURES, LOGITS, PROBABILITIES, Array, Executor
from nextvit_exporters.quantize.quantized import map_steps
from nextvit_exporters.spec import Artifact, ExportSpec, InputKind
from nextvit_exporters.targets import PRECISION_COST, SAME_NETWORK, Target
from nextvit_models.checkpoint import Checkpoint

OnStep = Callable[[str], None]
_NAMED: Final = "features"


@dataclass(frozen=True, slots=True, eq=False)
class _Subject:
    """An artefact, what it was made as and is executed as, and the images, (runs, batch, ...) each as it reads them."""

    path: Path
    target: Target
    made: ExportSpec
    spec: ExportSpec
    names: Names
    checkpoint: Checkpoint
    images: tuple[ImageSet, ...]
    executors: Mapping[str, Executor]

    @property
    def inputs(self) -> list[Array]:
        """As the artefact reads them."""
        return [np.ascontiguousarray(r.artefact_inputs(self.spec, each)) for each in self.images]

    @property
    def results(self) -> tuple[str, ...]:
        """What the model's results are called, in its order."""
        head = "logits" if self.spec.coreml is None else self.spec.coreml.head
        if head == _NAMED:
            return FEATURES
        return (LOGITS,) if head == "logits" else (LOGITS, PROBABILITIES)

    def tolerance(self, question: str) -> float:
        """The relative root mean square that is allowed."""
        return self.target.tolerance_for(self.spec, question).relative_rms


def bisect(path: Path, request: Request, on_step: OnStep) -> tuple[Bisection, tuple[Cut, ...]]:
    """Layer by layer, how far a saved artefact is from its checkpoint, where they part, and the tensors around that.

    An artefact of this tool is held against PyTorch carrying the same constants, then, with its own rounding, against
    PyTorch without. Of any other the second is asked alone. Raises a DeployError where it can't belong to the
    checkpoint, or nothing of it can be executed.
    """
    on_step("load the checkpoint")
    subject, recorded = _open(path, request)
    if recorded:
        other = [*other_source(recorded, subject.made, subject.checkpoint), *_other_writers(recorded, subject.made)]
        series, cuts, notes = _of_our_own(subject, on_step)
    else:
        other = []
        series, cuts, notes = _of_strangers(subject, on_step)
    found = Bisection(path.name, Artifact.of(path).sha256, series, (*other, *notes))
    return found, cuts


def _other_writers(recorded: Mapping[str, object], made: ExportSpec) -> list[str]:
    """A note where the artefact was written by other versions than are here: the fault may be theirs."""
    wrote, here = recorded.get("versions"), versions(made.target)
    if not isinstance(wrote, Mapping):
        return []
    others = [
        f"{name} {wrote[name]} (here {here.get(name)})" for name in sorted(wrote) if wrote[name] != here.get(name)
    ]
    return [f"the file was written by other versions than are here: {', '.join(others)}"] if others else []


def layers_of(path: Path, request: Request, on_step: OnStep) -> Bisection:
    """What ``bisect`` finds, on as few images as the artefact takes."""
    return bisect(path, replace(request, count=1), on_step)[0]


def _open(path: Path, request: Request) -> tuple[_Subject, Mapping[str, object]]:
    """The artefact and what it records of its making, nothing where another tool made it."""
    target = targets.of_file(path)
    saved = read(target, path)
    checkpoint = open_checkpoint(request.checkpoint, ema=request.ema)
    made, names = identify(path, saved, request, checkpoint)
    spec = target.adopt(made, path)
    images = _batches(request, spec, checkpoint)
    executors = target.executors(spec, path)
    return _Subject(path, target, made, spec, names, checkpoint, images, executors), saved.provenance or {}


def _batches(request: Request, spec: ExportSpec, checkpoint: Checkpoint) -> tuple[ImageSet, ...]:
    """The images in full batches, repeated where they don't fill the last one."""
    batch = spec.batch
    if spec.dynamic_batch:
        least, most = (1, request.count) if spec.engine is None else _ends(spec)
        batch = min(max(request.count, least), most)
    count = math.ceil(request.count / batch) * batch
    images = open_images(request.images, count, (spec.height, spec.width), checkpoint)
    order = [at % len(images) for at in range(count)]
    return tuple(_some(images, order[start : start + batch]) for start in range(0, count, batch))


def _ends(spec: ExportSpec) -> tuple[int, int]:
    assert spec.engine is not None  # noqa: S101 - the caller has looked
    return spec.engine.batch.minimum, spec.engine.batch.maximum


def _some(images: ImageSet, order: Sequence[int]) -> ImageSet:
    return replace(
        images,
        pixels=images.pixels[list(order)],
        names=tuple(images.names[at] for at in order),
        labels=tuple(images.labels[at] for at in order),
    )


def _of_our_own(subject: _Subject, on_step: OnStep) -> tuple[tuple[Series, ...], tuple[Cut, ...], tuple[str, ...]]:
    """Both questions of an artefact that tells which passes and rounding made it."""
    on_step("rewrite the model")
    original = g.trace(model_of(subject.made, subject.checkpoint))
    graph, _ = rewrite(subject.made, subject.checkpoint, on_step)
    carried = carried_by(original, graph)
    g.release(original)
    on_step("PyTorch with the artefact's constants, layer by layer")
    exact, meant, notes = _exact(subject, graph, carried)
    series, cuts, anchored = list[Series](), tuple[Cut, ...](), dict[str, str]()
    if exact is not None:
        on_step("execute the artefact, layer by layer")
        same, cuts, anchored, more = _same_network(subject, exact, meant)
        series.append(same)
        notes = (*notes, *more)
    del exact
    on_step("what the precision costs, layer by layer")
    floats = g.cast(graph, torch.float32)
    runs = [r.graph_inputs(subject.made, each) for each in subject.images]
    known = record(floats, runs, "PyTorch float32, rewritten as the artefact is", subject.results, carried)
    for each in (floats, graph, *([] if meant is None else [meant])):
        g.release(each)
    try:
        cost, more = _cost(subject, known, anchored, parted=bool(series and series[0].partings))
        series.append(cost)
        notes = (*notes, *more)
    except DeployError as error:
        if not series:
            raise
        notes = (*notes, f"the precision's cost can't be told: {error}")
    return tuple(series), cuts, notes


def _exact(
    subject: _Subject, graph: fx.GraphModule, carried: Mapping[str, tuple[str, ...]]
) -> tuple[Known | None, fx.GraphModule | None, tuple[str, ...]]:
    """PyTorch carrying the artefact's constants, in INT8 the graph on its steps, and why there is none."""
    meant = None
    try:
        if subject.made.quantize is not None:
            meant = quantize_again(subject.made, graph, subject.target.source(subject.path))
    except NotExecutable as error:
        return None, None, (f"whether it is the same network can't be told: {error}",)
    reference = targets.load(subject.made.target).reference(subject.made, graph if meant is None else meant)
    runs = [r.graph_inputs(subject.made, each) for each in subject.images]
    against = f"PyTorch, {subject.made.numbers} constants"
    known = record(reference, runs, against, subject.results, carried)
    g.release(reference)
    return known, meant, ()


def _tried(subject: _Subject, executor: Executor, known: Known) -> tuple[Attempt, Known]:
    """The artefact's tensors, and PyTorch's on as many runs as came to an end."""
    tried = attempt(executor, subject.target.source(subject.path), subject.names.input, subject.inputs)
    return tried, known if tried.traced is None else known.of_first(tried.traced.runs)


def _same_network(
    subject: _Subject, known: Known, meant: fx.GraphModule | None
) -> tuple[Series, tuple[Cut, ...], dict[str, str], tuple[str, ...]]:
    executor, tolerance = subject.executors[SAME_NETWORK], subject.tolerance(SAME_NETWORK)
    tried, known = _tried(subject, executor, known)
    if tried.traced is None:
        series = Series(SAME_NETWORK, executor.name, known.against, tolerance, (), tried.partings)
        return series, (), {}, tried.notes
    traced = tried.traced
    matches = match(traced, known, tolerance)
    cuts = partings(Evidence.of(traced, known, matches, named=True), tolerance, named=True)
    anchored = anchors(traced, known, matches)
    found = [*tried.partings, *(cut.parting for cut in cuts)]
    if meant is not None:
        told = {each.module for each in found}
        source = subject.target.source(subject.path)
        found += [each for each in wrong_steps(source, map_steps(meant)) if each.module not in told]
        found = _in_order(found, traced)
    if not found:
        found += _wrong_result(subject, executor, known, tolerance)
    series = Series(
        SAME_NETWORK, traced.executor, known.against, tolerance, layers(traced, known, anchored), tuple(found)
    )
    return series, cuts, anchored, tried.notes


def _in_order(found: list[Parting], traced: Traced) -> list[Parting]:
    places = {step.operation: at for at, step in enumerate(traced.steps)}
    return sorted(found, key=lambda each: min((places.get(name, -1) for name in each.operations), default=-1))


def _wrong_result(subject: _Subject, executor: Executor, known: Known, tolerance: float) -> list[Parting]:
    """What the artefact returns, where all its layers agree."""
    found = []
    with executor as running:
        outputs = [running.run({subject.names.input: each}) for each in subject.inputs]
    called = {LOGITS: subject.names.output} if subject.names.output else {name: name for name in known.outputs}
    for name, own in called.items():
        node = known.nodes[known.outputs[name]]
        values = [each[own] for each in outputs if own in each]
        error = apart(np.stack(values), node.value) if len(values) == len(outputs) else math.inf
        if error > tolerance:
            why = f"every layer agrees, and what is returned as {own} does not"
            found.append(Parting(node.module, (), "output", error, 0.0, known.carried.get(node.module, ()), why))
    return found


def _cost(
    subject: _Subject, known: Known, anchored: Mapping[str, str], *, parted: bool
) -> tuple[Series, tuple[str, ...]]:
    """How the error grows where the artefact rounds as it does; nothing parts here that has parted before."""
    executor, tolerance = subject.executors[PRECISION_COST], subject.tolerance(PRECISION_COST)
    tried, known = _tried(subject, executor, known)
    if tried.traced is None:
        raise NotExecutable(tried.partings[0].why)
    traced = tried.traced
    anchored = anchors(traced, known, {}) | dict(anchored)
    found = layers(traced, known, anchored)
    beyond = () if parted else _beyond(found, known, tolerance)
    series = Series(PRECISION_COST, traced.executor, known.against, tolerance, found, beyond)
    return series, _on_jump(found)


def _on_jump(found: tuple[Layer, ...]) -> tuple[str, ...]:
    jump = largest_jump(found)
    if jump is None or jump[1] <= 0:
        return ()
    return (f"{PRECISION_COST}: the error grows most at {jump[0].module}, by {jump[1]:.1e}",)


def _beyond(found: tuple[Layer, ...], known: Known, tolerance: float) -> tuple[Parting, ...]:
    """The first layer that is further off than the precision may cost."""
    before = 0.0
    for layer in found:
        if layer.error is None:
            continue
        if layer.error > tolerance or not math.isfinite(layer.error):
            why = f"rounding alone may cost {tolerance:.0e}" if math.isfinite(layer.error) else "NaN or infinity"
            carries = known.carried.get(layer.module, ())
            return (Parting(layer.module, (layer.operation,), layer.kind, layer.error, before, carries, why),)
        before = layer.error
    return ()


def _of_strangers(subject: _Subject, on_step: OnStep) -> tuple[tuple[Series, ...], tuple[Cut, ...], tuple[str, ...]]:
    """The precision's cost of another tool's artefact, by the numbers of the model's own layers."""
    on_step("PyTorch, layer by layer")
    graph = g.trace(model_of(subject.spec, subject.checkpoint))
    floats = g.cast(graph, torch.float32)
    g.release(graph)
    normal = replace(subject.spec, input=InputKind.NORMALIZED)
    runs = [r.graph_inputs(normal, each) for each in subject.images]
    known = record(floats, runs, "PyTorch float32", subject.results, {})
    g.release(floats)
    on_step("execute the artefact, layer by layer")
    executor, tolerance = subject.executors[PRECISION_COST], subject.tolerance(PRECISION_COST)
    tried, known = _tried(subject, executor, known)
    note = (
        "the file doesn't say which passes and rounding made it: layers are told by their numbers, "
        f"within {tolerance:.0e}, and whether it is the same network can't be told"
    )
    if tried.traced is None:
        series = Series(PRECISION_COST, executor.name, known.against, tolerance, (), tried.partings)
        return (series,), (), (note, *tried.notes)
    matches: Mapping[str, Match] = match(tried.traced, known, tolerance)
    evidence = Evidence.of(tried.traced, known, matches, named=False)
    cuts = partings(evidence, tolerance, named=False)
    anchored = anchors(tried.traced, known, matches)
    # a name alone tells nothing of what passes may have rewritten, unless something is missing there
    anchored = {name: tensor for name, tensor in anchored.items() if tensor in matches or name not in evidence.sound}
    found = layers(tried.traced, known, anchored)
    parted = (*tried.partings, *(cut.parting for cut in cuts))
    series = Series(PRECISION_COST, tried.traced.executor, known.against, tolerance, found, parted)
    return (series,), cuts, (note, *tried.notes, *_on_jump(found))
