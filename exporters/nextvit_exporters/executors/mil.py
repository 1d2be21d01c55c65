"""A saved Core ML package, executed in PyTorch on CPU: what is in the package, without a Mac.

Its program runs operation by operation as the specification describes it, never fused or reordered, in one of four
modes:

* *exact*: the saved constants widened, float32 (or float64) everywhere between. Says whether it is the same network.
* *emulated*: every float16 tensor is rounded where it is stored, the sums inside an operation are in float32. Says what
  the precision costs, and fails where float16 overflows.
* *pessimistic*: as emulated, and where convolutions and products give float16 their running sums are rounded to it
  every 32 products. Says how much hangs on what a device does inside an operation, which is not published.
* *unrounded*: exact, and activations pass quantize and dequantize as real numbers: a number at a step's edge falls to
  either side in two sound executors, and a deep network carries the difference on.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from nextvit_exporters.coreml.headroom import Meter
from nextvit_exporters.coreml.program import Feature, Operation, Package, modules_of
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.errors import NotExecutable, UnsupportedSpec, VerificationFailed
from nextvit_exporters.executors import base
from nextvit_exporters.executors.base import LOGITS, PROBABILITIES, Array, Arrays
from nextvit_exporters.executors.mil_ops import SUMS_OF_PRODUCTS
from nextvit_exporters.executors.mil_program import ProgramReference, See
from nextvit_exporters.executors.mil_rounding import PRODUCTS_BETWEEN_ROUNDINGS, Arithmetic
from nextvit_exporters.executors.mil_types import check_types

if TYPE_CHECKING:
    from typing_extensions import Self

Mode = Literal["exact", "emulated", "pessimistic", "unrounded"]


class MilReference:
    """Executes a saved package; needs no Apple device.

    ``path`` is the package, or what was read of one. With ``double`` real numbers are computed in float64; ``labels``
    are those that a classifier has to have, in order. Entering it reads the package: BuildFailed where that is damaged,
    NotExecutable where it holds an operation that is not known, VerificationFailed where a cast is missing or a
    classifier's labels are not one for each, or others than ``labels``.
    """

    def __init__(
        self, path: Path | Package, mode: Mode, *, double: bool = False, labels: tuple[str, ...] | None = None
    ) -> None:
        self.mode = mode
        self._wanted = labels
        self._path = path
        rounds = mode in {"emulated", "pessimistic"}
        chunk = PRODUCTS_BETWEEN_ROUNDINGS if mode == "pessimistic" else 0
        dtype = torch.float64 if double else torch.float32
        self._arithmetic = Arithmetic(dtype, rounds=rounds, steps=mode != "unrounded", chunk=chunk)
        self._package: Package | None = None
        self._program: ProgramReference | None = None
        self._labels: tuple[str, ...] = ()
        self._meter: Meter | None = None
        self._picked: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What it is."""
        return "mil-reference in float64" if self._arithmetic.dtype is torch.float64 else "mil-reference"

    @property
    def labels_of_last_run(self) -> tuple[str, ...]:
        """A classifier's label for each picture of the last run; empty before, and where it is no classifier."""
        return self._picked

    @property
    def findings(self) -> Mapping[str, object]:
        """JSON-ready: ``headroom``, where float16 was rounded; empty before anything ran."""
        return {} if self._meter is None or not self._meter.runs else {"headroom": self._meter.headroom.as_dict()}

    def __enter__(self) -> Self:
        package = self._path if isinstance(self._path, Package) else read_package(self._path)
        modules = modules_of(package)
        self._meter = Meter(modules, SUMS_OF_PRODUCTS) if self._arithmetic.rounds else None
        self._program = ProgramReference(package.program, self._arithmetic, modules, self._meter)
        check_types(package.program, modules)
        classifier = self._program.classifier
        self._labels = () if classifier is None else _labels(classifier, self._program, package)
        if classifier is not None and self._wanted is not None:
            _check_labels(self._labels, self._wanted)
        self._package, self._picked = package, ()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._package, self._program = None, None

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """Outputs by name; the executor must have been entered.

        An image is uint8 (1, H, W, 3) in RGB, whatever the package's colour order, or (1, H, W) where it is grey. A
        tensor has the described shape, and any real type where it is described as real. Tensors come out under their
        own names, real ones in float32 (float64 with ``double``). A classifier gives ``probabilities`` (1, classes) in
        the order of its labels, and ``logits``, what goes into the softmax in front, where there is one.

        Raises UnsupportedSpec for inputs that the package is not described to take, VerificationFailed where the
        program is not what it declares or overflows float16, NotExecutable where a parameter is not known.
        """
        return self._run(inputs, None)

    def observe(self, inputs: Arrays, see: See) -> None:
        """Run, and call ``see`` with the name and value of every input and every result while it is there.

        Nothing is kept longer than for ``run``, which says what is raised.
        """
        self._run(inputs, see)

    def steps(self) -> tuple[base.Step, ...]:
        """Every operation that is executed, constants and ``classify`` left out."""
        if self._program is None:
            raise RuntimeError("the executor is closed; use it in a with statement")
        return self._program.steps

    def trace(self, inputs: Arrays, see: base.See) -> None:
        """Run, and call ``see`` with each input and each result, in order. Raises as ``run`` does."""
        self._run(inputs, lambda name, values: see(name, np.asarray(values.contiguous().numpy())))

    def _run(self, inputs: Arrays, see: See | None) -> dict[str, Array]:
        if self._package is None or self._program is None:
            raise RuntimeError("the executor is closed; use it in a with statement")
        found = self._program.run(self._fed(self._package, inputs), see)
        if self._meter is not None:
            self._meter.runs += 1
        classifier = self._program.classifier
        if classifier is None:
            return {name: _given_out(found[name]) for name in self._program.outputs}
        return self._classified(found, classifier)

    def _classified(self, found: dict[str, Tensor], classifier: Operation) -> dict[str, Array]:
        assert self._program is not None  # noqa: S101 - run has looked
        name = str(classifier.inputs["probabilities"][0])
        probabilities = found[name]
        if probabilities.numel() != len(self._labels):
            raise VerificationFailed(
                f"classify {classifier.name} has {len(self._labels)} labels for {probabilities.numel()} probabilities"
            )
        probabilities = probabilities.reshape(1, -1)
        self._picked = tuple(self._labels[int(index)] for index in probabilities.argmax(1))
        outputs = {each: _given_out(found[each]) for each in self._program.program.outputs if each in found}
        outputs[PROBABILITIES] = _given_out(probabilities)
        if self._program.logits is not None:
            outputs[LOGITS] = _given_out(found[self._program.logits])
        return outputs

    def _fed(self, package: Package, inputs: Arrays) -> dict[str, Tensor]:
        described = {feature.name: feature for feature in package.inputs}
        if set(inputs) != set(described):
            names = (", ".join(sorted(each)) for each in (described, inputs))
            raise UnsupportedSpec("{} reads {}, not {}".format(package.path.name, *names))
        fed = {}
        for name, feature in described.items():
            read = _picture if feature.kind == "image" else _tensor
            values = read(feature, inputs[name], package.path.name)
            fed[name] = values.to(self._arithmetic.dtype) if values.is_floating_point() else values
        return fed


def _picture(feature: Feature, given: Array, package: str) -> Tensor:
    """A picture as the program reads it: (1, channels, H, W), real numbers from 0 to 255, channels in its order."""
    if feature.color not in {"RGB", "BGR", "GRAYSCALE"}:
        raise NotExecutable(f"{package} reads {feature.name} as a picture in {feature.color}, which is not known here")
    gray = feature.color == "GRAYSCALE"
    wanted = "(1, H, W)" if gray else "(1, H, W, 3)"
    if given.dtype != np.uint8 or given.ndim != (3 if gray else 4) or (not gray and given.shape[3] != 3):
        got = f"{given.dtype} {given.shape}"
        raise UnsupportedSpec(f"{package} reads {feature.name} as a picture, uint8 {wanted}, not as {got}")
    pixels = torch.from_numpy(np.array(given)).float()
    pixels = pixels.unsqueeze(1) if gray else pixels.permute(0, 3, 1, 2)
    _taken(feature, tuple(pixels.shape), package)
    return pixels.flip(1) if feature.color == "BGR" else pixels


def _tensor(feature: Feature, given: Array, package: str) -> Tensor:
    """A tensor as it is described: whole numbers in their own type, real ones in any."""
    real = feature.dtype in {"float16", "float32", "float64"}
    if given.dtype.kind != "f" if real else str(given.dtype) != feature.dtype:
        raise UnsupportedSpec(f"{package} reads {feature.name} as {feature.dtype}, not as {given.dtype}")
    _taken(feature, tuple(given.shape), package)
    return torch.from_numpy(np.array(given))


def _taken(feature: Feature, shape: tuple[int, ...], package: str) -> None:
    """Nothing, where the description allows the shape; UnsupportedSpec with what it allows otherwise."""
    if feature.takes(shape):
        return
    if feature.allowed:
        allowed = " or ".join(_size(each) for each in feature.allowed)
    elif feature.ranges:
        allowed = " x ".join(str(low) if low == high else f"{low}..{high}" for low, high in feature.ranges)
    else:
        allowed = _size(feature.shape)
    raise UnsupportedSpec(f"{package} reads {feature.name} as {allowed}, not as {_size(shape)}")


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _labels(classifier: Operation, program: ProgramReference, package: Package) -> tuple[str, ...]:
    """The labels that ``classify`` holds; raises VerificationFailed where two are the same or the description differs.

    An app gets the probabilities in a dictionary, where the later of two equal labels replaces the earlier.
    """
    bound = classifier.inputs.get("classes", ())
    if len(bound) != 1:
        raise VerificationFailed(f"classify {classifier.name} lacks its classes")
    values = program.constants.array(bound[0]) if isinstance(bound[0], str) else bound[0].data
    labels = tuple(str(each) for each in values.reshape(-1).tolist())
    twice = sorted({label for label in labels if labels.count(label) > 1}) if len(set(labels)) < len(labels) else []
    if twice:
        raise VerificationFailed(f"classify {classifier.name} has the label {twice[0]!r} more than once")
    if package.labels and package.labels != labels:
        raise VerificationFailed(f"classify {classifier.name} has other labels than the package is described with")
    left = set(classifier.inputs) - {"probabilities", "classes"}
    if left:
        raise NotExecutable(f"classify {classifier.name} has parameters {', '.join(sorted(left))}, not known here")
    return labels


def _check_labels(found: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    """Raise VerificationFailed where two labels changed places, or one is another: an app finds the wrong number."""
    pairs = enumerate(zip_longest(found, wanted))
    wrong = next(((number, *pair) for number, pair in pairs if pair[0] != pair[1]), None)
    if wrong is not None:
        raise VerificationFailed("the label of class {} is {!r}, and {!r} was asked for".format(*wrong))


def _given_out(values: Tensor) -> Array:
    """A copy, since what is given out may be a view of what was given in."""
    return np.array(values.contiguous().numpy())
