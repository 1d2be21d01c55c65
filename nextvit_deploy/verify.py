"""Execute a saved artefact and say how far it is from PyTorch.

Two questions, kept apart because one hides the other. *Same network*: the saved constants in exact arithmetic,
against PyTorch carrying the same rounded constants; those come from the checkpoint through the passes, never from
the artefact. Of INT8, steps and whole numbers are compared as they are, too. *Precision cost*: the stored precision,
rounding included, against the checkpoint's own model in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np

from nextvit_deploy.compare import Comparison, compare
from nextvit_deploy.data import ImageSet, enlarged, noise_images
from nextvit_deploy.references import Cases, Reference, artefact_inputs, expected_of
from nextvit_deploy.verdict import Verdict, worst
from nextvit_exporters import targets
from nextvit_exporters.coreml_spec import CoreMLSpec
from nextvit_exporters.engine_spec import EngineSpec
from nextvit_exporters.errors import DeployError, MissingExtra, NotExecutable, VerificationFailed
from nextvit_exporters.executors.base import LOGITS, Array, Arrays, Executor, Observant
from nextvit_exporters.executors.onnx_runtime import OnnxRuntime
from nextvit_exporters.quantize.read_back import check_file
from nextvit_exporters.spec import ExportSpec, Precision, Tolerance

_MOST: Final = 32
"""Images of the largest batch that is verified on."""
_NOT_RUN: Final = (NotExecutable, MissingExtra)
"""Errors that say nothing of an artefact."""

Answer = list[dict[str, Array]] | DeployError
"""An executor's outputs by name for each case, or why it could not run."""


@dataclass(frozen=True, slots=True)
class Names:
    """What the artefact calls its input and its one output; None for outputs that are named as PyTorch's are."""

    input: str
    output: str | None


@dataclass(frozen=True, slots=True)
class Check:
    """One question, asked of one executor on one set of inputs, and its answer."""

    question: str
    executor: str
    mode: str
    against: str
    inputs: str
    verdict: Verdict
    why: str
    comparisons: tuple[Comparison, ...]
    findings: Mapping[str, object] = field(default_factory=dict)
    """What the executor noticed on the way, by name; JSON-ready, each told once."""


def cases_for(spec: ExportSpec, images: ImageSet) -> tuple[tuple[str, ImageSet], ...]:
    """The inputs to verify on: the images, and for open axes noise at other sizes, an odd one among them.

    An engine is verified at the ends of its ranges and between them, a Core ML package so too, or at every size it
    enumerates. INT8 steps are made for pictures, so an INT8 artefact sees the images enlarged in place of noise.
    """
    cases = [(images.source, images)]
    h, w = spec.height, spec.width
    if spec.engine is not None:
        return (*cases, *_cases_in(spec, spec.engine, images))
    if spec.coreml is not None:
        return (*cases, *_cases_of(spec, spec.coreml, images))
    if spec.dynamic_batch:
        cases.append(_case(spec, images, (3, h, w), "batch 3"))
    if spec.dynamic_size:
        count = 2 if spec.dynamic_batch else 1
        cases.append(_case(spec, images, (count, h + 33, w + 5)))
        cases.append(_case(spec, images, (count, w, 2 * h)))
    return tuple(cases)


def _cases_in(spec: ExportSpec, engine: EngineSpec, images: ImageSet) -> Iterator[tuple[str, ImageSet]]:
    """Noise at the ends of an engine's ranges, and at a size between; of the largest batch no more than 32 images."""
    if not engine.batch.fixed:
        for batch in sorted({engine.batch.minimum, max(engine.batch.minimum, min(engine.batch.maximum, _MOST))}):
            yield _case(spec, images, (batch, engine.height.optimum, engine.width.optimum), f"batch {batch}")
    if engine.height.fixed and engine.width.fixed:
        return
    ranges = engine.height, engine.width
    between = [min(each.maximum, (each.minimum + each.maximum) // 2 | 1) for each in ranges]
    sizes = [(each.minimum for each in ranges), between, (each.maximum for each in ranges)]
    for height, width in dict.fromkeys(tuple(size) for size in sizes):
        yield _case(spec, images, (engine.batch.minimum, height, width))


def _cases_of(spec: ExportSpec, asked: CoreMLSpec, images: ImageSet) -> Iterator[tuple[str, ImageSet]]:
    """Noise at the further sizes of a package: all that are enumerated, or the ends of its range and an odd one."""
    sizes = list(asked.sizes)
    if asked.flexible is not None:
        low, high = asked.flexible
        sizes = [(low, low), (low + 1, high), ((low + high) // 2 | 1, low), (high, high)]
    for height, width in dict.fromkeys(sizes):
        yield _case(spec, images, (spec.batch, height, width))


def onnx_outputs(spec: ExportSpec, path: Path, cases: Cases, names: Names) -> Reference:
    """What an ONNX file of unknown making says, unrounded: what another reading of it is held against.

    Raises BuildFailed where ONNX Runtime can't execute it.
    """
    with OnnxRuntime(path, "unrounded") as executor:
        outputs = [run_batched(spec, executor, artefact_inputs(spec, images), names) for _, images in cases]
    return Reference(f"{executor.name}, the ONNX file", outputs)


def verify(
    spec: ExportSpec,
    path: Path,
    cases: Cases,
    references: Mapping[str, Reference],
    names: Names,
) -> tuple[Check, ...]:
    """Execute the file at ``path`` on every case and compare with the references of each question.

    A question without references is answered ``not verified``. Never raises for a wrong artefact: that is a
    verdict.
    """
    checks: list[Check] = []
    answers: dict[tuple[str, str], Answer] = {}
    told: set[str] = set()
    target = targets.load(spec.target)
    for question, executor in target.executors(spec, path).items():
        on_device = question.startswith(targets.ON_DEVICE)
        reference = references.get(question if question == targets.SAME_NETWORK else targets.PRECISION_COST)
        against = reference.against if reference else f"PyTorch, {spec.numbers} constants"
        blank = Check(question, executor.name, executor.mode, against, cases[0][0], Verdict.NOT_VERIFIED, "", ())
        if reference is None:
            checks.append(replace(blank, why=_why_no_reference(spec)))
            continue
        key = executor.name, executor.mode
        if key not in answers:
            answers[key] = _execute(spec, executor, cases, names)
        answer = _wrong_steps(target, path, reference) or answers[key]
        if isinstance(answer, DeployError):
            checks.append(_unanswered(answer, blank))
            continue
        expected = expected_of(reference, answer, on_device=on_device)
        judged = _judge(answer, cases, expected, target.tolerance_for(spec, question), blank)
        new = {name: found for name, found in _findings(executor).items() if name not in told}
        told |= new.keys()
        checks += [replace(judged[0], findings=new), *judged[1:]]
    return tuple(checks)


def _wrong_steps(target: targets.Target, path: Path, reference: Reference) -> DeployError | None:
    """What the file holds otherwise than its reference says, which executing it may not show; None where nothing."""
    if not reference.steps:
        return None
    try:
        check_file(target.source(path), reference.steps)
    except DeployError as error:
        return error
    return None


def _why_no_reference(spec: ExportSpec) -> str:
    """Why PyTorch can't carry an artefact's constants."""
    if spec.quantize is None:
        return "the file doesn't say which passes and rounding made it"
    if spec.quantize.own_steps:
        return "nothing beside it tells what was found by calibrating it"
    return f"its steps are those that {spec.quantize.quantizer} chose, which nothing else tells"


def _findings(executor: Executor) -> Mapping[str, object]:
    return executor.findings if isinstance(executor, Observant) else {}


def overall(checks: Sequence[Check]) -> Verdict:
    """Failed when any check failed, verified when all are, not verified otherwise."""
    return worst(check.verdict for check in checks)


def _execute(spec: ExportSpec, executor: Executor, cases: Cases, names: Names) -> Answer:
    try:
        with executor as running:
            return [run_batched(spec, running, artefact_inputs(spec, images), names) for _, images in cases]
    except DeployError as error:
        return error


def _unanswered(error: DeployError, blank: Check) -> Check:
    """Not verified where the artefact could not be executed, failed where it was and broke down."""
    verdict = Verdict.NOT_VERIFIED if isinstance(error, _NOT_RUN) else Verdict.FAILED
    return replace(blank, verdict=verdict, why=str(error))


def _judge(
    answer: Sequence[Arrays],
    cases: Cases,
    expected: Sequence[Arrays],
    tolerance: Tolerance,
    blank: Check,
) -> list[Check]:
    return [
        _judge_case(actual, want, tolerance, replace(blank, inputs=name))
        for (name, _), actual, want in zip(cases, answer, expected, strict=True)
    ]


def _judge_case(actual: Arrays, expected: Arrays, tolerance: Tolerance, blank: Check) -> Check:
    try:
        comparisons = compare(actual, expected, tolerance)
    except DeployError as error:
        return replace(blank, verdict=Verdict.FAILED, why=str(error))
    wrong = [str(c) for c in comparisons if not c]
    verdict = Verdict.FAILED if wrong else Verdict.VERIFIED
    return replace(blank, verdict=verdict, why="; ".join(wrong), comparisons=comparisons)


def run_batched(spec: ExportSpec, executor: Executor, inputs: Array, names: Names) -> dict[str, Array]:
    """Feed a static batch in full: the last one is filled up by repeating images, and cut again.

    Raises VerificationFailed when the artefact returns something else than one row for each image.
    """
    batch = _batch_for(spec, len(inputs))
    parts: list[dict[str, Array]] = []
    for start in range(0, len(inputs), batch):
        chunk = inputs[start : start + batch]
        missing = batch - len(chunk)
        filled = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)]) if missing else chunk
        rows = _rows(executor, names, np.ascontiguousarray(filled))
        parts.append({name: row[: len(chunk)] for name, row in rows.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _batch_for(spec: ExportSpec, images: int) -> int:
    """How many images to feed at a time: what the file takes and, of an engine's range, what is nearest."""
    if not spec.dynamic_batch:
        return spec.batch
    if spec.engine is None:
        return images
    return min(max(images, spec.engine.batch.minimum), spec.engine.batch.maximum)


def _rows(executor: Executor, names: Names, inputs: Array) -> dict[str, Array]:
    outputs = executor.run({names.input: inputs})
    if names.output is not None:
        if names.output not in outputs:
            raise VerificationFailed(f"the file returns {', '.join(outputs)}, not '{names.output}'")
        outputs = {LOGITS: outputs[names.output]}
    for output in outputs.values():
        if output.shape[:1] != (len(inputs),):
            raise VerificationFailed(f"the file returns shape {output.shape} for {len(inputs)} images")
    return outputs


def _case(spec: ExportSpec, images: ImageSet, shape: tuple[int, int, int], name: str = "") -> tuple[str, ImageSet]:
    """Inputs of another shape, (B, H, W): noise, or for INT8 the images themselves."""
    count, height, width = shape
    name = name or f"{height}x{width}"
    if spec.precision is Precision.INT8:
        return f"images, {name}", enlarged(images, count, (height, width))
    return f"noise, {name}", noise_images(count, (height, width), images.preprocessing, seed=height * 1000 + width)
