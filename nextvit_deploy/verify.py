"""Execute a saved artefact and say how far it is from PyTorch.

Two questions, kept apart because one hides the other. *Same network*: the saved constants in exact arithmetic,
against PyTorch carrying the same rounded constants; those come from the checkpoint through the passes, never from
the artefact. *Precision cost*: the stored precision, rounding included, against the checkpoint's own model in
float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import fx, nn

from nextvit_deploy.compare import Comparison, compare
from nextvit_deploy.data import ImageSet, noise_images
from nextvit_exporters import graph as g
from nextvit_exporters import targets
from nextvit_exporters.engine_spec import EngineSpec
from nextvit_exporters.errors import DeployError, MissingExtra, NotExecutable, VerificationFailed
from nextvit_exporters.executors.base import Array, Executor
from nextvit_exporters.executors.onnx_runtime import OnnxRuntime
from nextvit_exporters.spec import ExportSpec, InputKind, Precision, Tolerance

_OUTPUT: Final = "logits"
_AT_A_TIME: Final = 4
"""Images per PyTorch batch: enough to be quick, little enough to leave peak memory alone."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What is right: who says so, and its outputs, one array for each case."""

    against: str
    outputs: Sequence[Array]


_MOST: Final = 32
"""Images of the largest batch that is verified on."""
_NOT_RUN: Final = (NotExecutable, MissingExtra)
"""Errors that say nothing of an artefact."""

Cases = Sequence[tuple[str, ImageSet]]
"""Inputs to verify on, each with its name."""

Answer = list[Array] | DeployError
"""An executor's outputs, one per case, or why it could not run."""


class Verdict(str, Enum):
    """What is known of an artefact; nothing else is ever said."""

    VERIFIED = "verified"
    FAILED = "failed"
    NOT_VERIFIED = "not verified"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Names:
    """What the artefact calls its input and its output."""

    input: str
    output: str


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


def cases_for(spec: ExportSpec, images: ImageSet) -> tuple[tuple[str, ImageSet], ...]:
    """The inputs to verify on: the images, and for open axes noise at other sizes, an odd one among them.

    An engine is verified at the ends of its ranges and between them.
    """
    cases = [(images.source, images)]
    h, w = spec.height, spec.width
    if spec.engine is not None:
        return (*cases, *_cases_in(spec.engine, images))
    if spec.dynamic_batch:
        cases.append(("noise, batch 3", _noise(images, 3, h, w)))
    if spec.dynamic_size:
        count = 2 if spec.dynamic_batch else 1
        cases.append((f"noise, {h + 33}x{w + 5}", _noise(images, count, h + 33, w + 5)))
        cases.append((f"noise, {w}x{2 * h}", _noise(images, count, w, 2 * h)))
    return tuple(cases)


def _cases_in(engine: EngineSpec, images: ImageSet) -> Iterator[tuple[str, ImageSet]]:
    """Noise at the ends of an engine's ranges, and at a size between; of the largest batch no more than 32 images."""
    if not engine.batch.fixed:
        for batch in sorted({engine.batch.minimum, max(engine.batch.minimum, min(engine.batch.maximum, _MOST))}):
            yield f"noise, batch {batch}", _noise(images, batch, engine.height.optimum, engine.width.optimum)
    if engine.height.fixed and engine.width.fixed:
        return
    ranges = engine.height, engine.width
    between = [min(each.maximum, (each.minimum + each.maximum) // 2 | 1) for each in ranges]
    sizes = [(each.minimum for each in ranges), between, (each.maximum for each in ranges)]
    for height, width in dict.fromkeys(tuple(size) for size in sizes):
        yield f"noise, {height}x{width}", _noise(images, engine.batch.minimum, height, width)


def artefact_inputs(spec: ExportSpec, images: ImageSet) -> Array:
    """The images as the artefact wants them: (N, 3, H, W) normalised, in ``spec.io``, or raw float32 or uint8.

    Where it reads ``uint8-nhwc``, (N, H, W, 3).
    """
    if spec.input is InputKind.NORMALIZED:
        return images.normalised().astype(np.float16 if spec.io is Precision.FP16 else np.float32, copy=False)
    if spec.input is InputKind.UINT8_NHWC:
        return np.ascontiguousarray(images.pixels.transpose(0, 2, 3, 1))
    return images.pixels if spec.input is InputKind.UINT8 else images.pixels.astype(np.float32)


def predict(model: nn.Module, inputs: Array) -> Array:
    """PyTorch's output for ``inputs``, a few images at a time; one (N, ...) array."""
    parts = [
        g.execute(model, torch.tensor(inputs[i : i + _AT_A_TIME]))[0].numpy()  # a copy: pictures are read-only
        for i in range(0, len(inputs), _AT_A_TIME)
    ]
    return np.concatenate(parts)


def original_outputs(model: nn.Module, cases: Iterable[tuple[str, ImageSet]]) -> Reference:
    """The checkpoint's own float32 answers."""
    return Reference("PyTorch float32", [predict(model, images.normalised()) for _, images in cases])


def rounded_outputs(spec: ExportSpec, graph: fx.GraphModule, cases: Iterable[tuple[str, ImageSet]]) -> Reference:
    """The answers of PyTorch carrying the artefact's constants; ``graph`` is the float64 graph behind the passes."""
    reference = targets.load(spec.target).reference(spec, graph)
    outputs = [predict(reference, _widened(artefact_inputs(spec, images))) for _, images in cases]
    g.release(reference)
    return Reference(f"PyTorch, {spec.precision} constants", outputs)


def onnx_outputs(spec: ExportSpec, path: Path, cases: Cases, names: Names) -> Reference:
    """What an ONNX file of unknown making says, unrounded: what another reading of it is held against.

    Raises BuildFailed where ONNX Runtime can't execute it.
    """
    with OnnxRuntime(path, "unrounded") as executor:
        outputs = [_run_batched(spec, executor, artefact_inputs(spec, images), names) for _, images in cases]
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
    answers: dict[str, Answer] = {}
    target = targets.load(spec.target)
    for question, executor in target.executors(spec, path).items():
        tolerance = target.TOLERANCES[question][spec.precision]
        reference = references.get(targets.PRECISION_COST if question == targets.ON_DEVICE else question)
        against = reference.against if reference else f"PyTorch, {spec.precision} constants"
        blank = Check(question, executor.name, executor.mode, against, cases[0][0], Verdict.NOT_VERIFIED, "", ())
        if reference is None:
            checks.append(replace(blank, why="the file doesn't say which passes and rounding made it"))
            continue
        if executor.mode not in answers:
            answers[executor.mode] = _execute(spec, executor, cases, names)
        checks += _judge(answers[executor.mode], cases, reference.outputs, tolerance, blank)
    return tuple(checks)


def overall(checks: Sequence[Check]) -> Verdict:
    """Failed when any check failed, verified when all are, not verified otherwise."""
    verdicts = {check.verdict for check in checks}
    if Verdict.FAILED in verdicts:
        return Verdict.FAILED
    return Verdict.VERIFIED if verdicts == {Verdict.VERIFIED} else Verdict.NOT_VERIFIED


def _execute(spec: ExportSpec, executor: Executor, cases: Cases, names: Names) -> Answer:
    try:
        with executor as running:
            return [_run_batched(spec, running, artefact_inputs(spec, images), names) for _, images in cases]
    except DeployError as error:
        return error


def _judge(
    answer: Answer,
    cases: Cases,
    expected: Sequence[Array],
    tolerance: Tolerance,
    blank: Check,
) -> list[Check]:
    if isinstance(answer, DeployError):
        verdict = Verdict.NOT_VERIFIED if isinstance(answer, _NOT_RUN) else Verdict.FAILED
        return [replace(blank, verdict=verdict, why=str(answer))]
    return [
        _judge_case(actual, want, tolerance, replace(blank, inputs=name))
        for (name, _), actual, want in zip(cases, answer, expected, strict=True)
    ]


def _judge_case(actual: Array, expected: Array, tolerance: Tolerance, blank: Check) -> Check:
    try:
        comparisons = compare({_OUTPUT: actual}, {_OUTPUT: expected}, tolerance)
    except DeployError as error:
        return replace(blank, verdict=Verdict.FAILED, why=str(error))
    wrong = [str(c) for c in comparisons if not c]
    verdict = Verdict.FAILED if wrong else Verdict.VERIFIED
    return replace(blank, verdict=verdict, why="; ".join(wrong), comparisons=comparisons)


def _run_batched(spec: ExportSpec, executor: Executor, inputs: Array, names: Names) -> Array:
    """Feed a static batch in full: the last one is filled up by repeating images, and cut again.

    Raises VerificationFailed when the artefact returns something else than one row for each image.
    """
    batch = _batch_for(spec, len(inputs))
    parts: list[Array] = []
    for start in range(0, len(inputs), batch):
        chunk = inputs[start : start + batch]
        missing = batch - len(chunk)
        filled = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)]) if missing else chunk
        parts.append(_rows(executor, names, np.ascontiguousarray(filled))[: len(chunk)])
    return np.concatenate(parts)


def _batch_for(spec: ExportSpec, images: int) -> int:
    """How many images to feed at a time: what the file takes and, of an engine's range, what is nearest."""
    if not spec.dynamic_batch:
        return spec.batch
    if spec.engine is None:
        return images
    return min(max(images, spec.engine.batch.minimum), spec.engine.batch.maximum)


def _rows(executor: Executor, names: Names, inputs: Array) -> Array:
    outputs = executor.run({names.input: inputs})
    if names.output not in outputs:
        raise VerificationFailed(f"the file returns {', '.join(outputs)}, not '{names.output}'")
    output = outputs[names.output]
    if output.shape[:1] != (len(inputs),):
        raise VerificationFailed(f"the file returns shape {output.shape} for {len(inputs)} images")
    return output


def _widened(inputs: Array) -> Array:
    """FP16 inputs in float32, the arithmetic of the reference."""
    return inputs.astype(np.float32) if inputs.dtype == np.float16 else inputs


def _noise(images: ImageSet, count: int, height: int, width: int) -> ImageSet:
    return noise_images(count, (height, width), images.preprocessing, seed=height * 1000 + width)
