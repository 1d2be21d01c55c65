"""What is right: PyTorch's answers, in the names and the shapes that an artefact gives its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch import Tensor, fx, nn

from nextvit_deploy.data import ImageSet
from nextvit_exporters import graph as g
from nextvit_exporters import targets
from nextvit_exporters.executors.base import FEATURES, LOGITS, PROBABILITIES, Array, Arrays
from nextvit_exporters.quantize.quantized import MapSteps, map_steps
from nextvit_exporters.spec import ExportSpec, InputKind, Precision

_AT_A_TIME: Final = 4
"""Images per PyTorch batch: enough to be quick, little enough to leave peak memory alone."""

Cases = Sequence[tuple[str, ImageSet]]
"""Inputs to verify on, each with its name."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What is right: who says so, its outputs by name for each case, and what INT8 maps hold, by module."""

    against: str
    outputs: Sequence[Arrays]
    steps: Mapping[str, MapSteps] = field(default_factory=dict)


def artefact_inputs(spec: ExportSpec, images: ImageSet) -> Array:
    """The images as the artefact wants them: (N, 3, H, W) normalised, in ``spec.io``, or raw float32 or uint8.

    Where it reads ``uint8-nhwc`` or pictures, (N, H, W, 3) uint8.
    """
    if spec.input is InputKind.NORMALIZED:
        return images.normalised().astype(np.float16 if spec.io is Precision.FP16 else np.float32, copy=False)
    if spec.input.channels_last:
        return np.ascontiguousarray(images.pixels.transpose(0, 2, 3, 1))
    return images.pixels if spec.input is InputKind.UINT8 else images.pixels.astype(np.float32)


def graph_inputs(spec: ExportSpec, images: ImageSet) -> Array:
    """The images as the rewritten graph wants them, which does without the system's pictures and without FP16."""
    if spec.input is InputKind.IMAGE:
        return images.pixels.astype(np.float32)
    inputs = artefact_inputs(spec, images)
    return inputs.astype(np.float32) if inputs.dtype == np.float16 else inputs


def predict(spec: ExportSpec, model: nn.Module, inputs: Array, dtype: torch.dtype = torch.float32) -> dict[str, Array]:
    """PyTorch's outputs for ``inputs`` by name, (N, ...) each, a few images at a time.

    ``dtype`` is what the model computes in; whole pixels are left as they are.
    """
    parts = []
    for start in range(0, len(inputs), _AT_A_TIME):
        some = torch.tensor(inputs[start : start + _AT_A_TIME])  # a copy: pictures are read-only
        parts.append(_named(spec, g.execute(model, some.to(dtype) if some.is_floating_point() else some)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def original_outputs(spec: ExportSpec, model: nn.Module, cases: Iterable[tuple[str, ImageSet]]) -> Reference:
    """The checkpoint's own float32 answers."""
    return Reference("PyTorch float32", [predict(spec, model, images.normalised()) for _, images in cases])


def rounded_outputs(spec: ExportSpec, graph: fx.GraphModule, cases: Iterable[tuple[str, ImageSet]]) -> Reference:
    """The answers of PyTorch carrying the artefact's constants; ``graph`` is the float64 graph behind the passes."""
    reference = targets.load(spec.target).reference(spec, graph)
    dtype = next((p.dtype for p in reference.parameters()), torch.float32)
    outputs = [predict(spec, reference, graph_inputs(spec, images), dtype) for _, images in cases]
    g.release(reference)
    return Reference(f"PyTorch, {spec.numbers} constants", outputs, map_steps(graph))


def expected_of(reference: Reference, answered: Iterable[Mapping[str, object]], *, on_device: bool) -> list[Arrays]:
    """What an executor's answers are held against.

    The real runtime returns what an app sees; of those outputs none may be missing from the reference. Ours return
    the logits behind probabilities as well, which say more where probabilities saturate.
    """
    if not on_device:
        return list(reference.outputs)
    pairs = zip(reference.outputs, answered, strict=True)
    return [{name: array for name, array in wanted.items() if name in given} for wanted, given in pairs]


def _named(spec: ExportSpec, tensors: tuple[Tensor, ...]) -> dict[str, Array]:
    """A model's results under the names that the artefact gives them."""
    head = "logits" if spec.coreml is None else spec.coreml.head
    if head == "features":
        return {name: tensor.numpy() for name, tensor in zip(FEATURES, tensors, strict=True)}
    logits = tensors[0]
    if head == "logits":
        return {LOGITS: logits.numpy()}
    return {LOGITS: logits.numpy(), PROBABILITIES: torch.softmax(logits.double(), -1).to(logits.dtype).numpy()}
