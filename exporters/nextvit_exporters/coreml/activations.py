"""Activations in int8: scales from pictures, put into a coremltools model by coremltools itself.

Every input and every result of a convolution or linear map, behind its ReLU where it has one, passes ``quantize`` and
``dequantize`` with one symmetric scale each: with r the largest magnitude in all the pictures, rounded to FP16,
fp16(2r / 254). Methods other than ``minmax`` clip at a smaller r, see ``quantize.histograms``. So maps read and write
whole numbers. The rest stays FP16:

- what additions, poolings, products and softmax compute, until a map reads it. Attention's scores and shares have
  their information in small differences;
- the input and result of the last map, which nothing else weighs: 255 steps would tie classes that differ;
- what the maps of kept blocks read and write. A result of another map that one of them reads stays FP16 for everybody,
  but for maps in int8, which bring it onto steps for themselves.

Measured on the bundled demo, 16 pictures to calibrate and 16 others, logits against float32: int8 weights alone move
them by 0.27 % of their root mean square, with these activations 0.77 %, with the last map's as well 1.09 %, with those
of additions and poolings too, coremltools' default, 1.13 %. With 60 pictures to calibrate and 120 others it is 0.93 %,
with channels rescaled before 0.94 %; from there the clips of ``mse`` make it 0.90 %, keeping ``features.6`` 0.78 %, and
both with ``features.5`` kept as well 0.58 %. Every picture is still named rightly.

coremltools finds the ranges by running the model on a Mac. Here the reference executor runs it, and the least and the
largest of each tensor are gathered picture by picture. (coremltools 9.0 itself keeps those of the last picture only,
and gives what a concatenation joins one range, which without int8 sums around it only makes scales coarser.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import Tensor

from nextvit_exporters.coreml.compression import WEIGHTED, name_of, operations_of
from nextvit_exporters.coreml.loading import heard, part
from nextvit_exporters.coreml.program import SPECIFICATION, Operation, Package, Program
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.coreml_spec import OLDEST_FOR_ACTIVATIONS
from nextvit_exporters.errors import BuildFailed, InvariantError, UnsupportedSpec
from nextvit_exporters.executors.base import Arrays
from nextvit_exporters.executors.mil import MilReference
from nextvit_exporters.quantize.histograms import LEVELS, Histogram, step

LARGEST: Final = float(np.finfo(np.float16).max) / 2
"""The largest magnitude with a scale: FP16 has to hold twice as much on the way."""
_SMALLEST: Final = 127 * 2.0**-24
_MODULE: Final = "optimize.coreml._post_training_quantization"
_CALIBRATE: Final = "_get_activation_calibration_stats"
_PASSES: Final = ("relu", "reshape", "transpose", "expand_dims", "squeeze", "split", "slice_by_index")
"""Operations that hand on what they read, moved about or rectified."""

Range = tuple[float, float]
"""The least and the largest value."""


def quantize_activations(
    model: Any, samples: Iterable[Arrays], *, keep: Collection[str] = (), method: str = "minmax"
) -> Any:
    """A coremltools MLModel with int8 activations; ``model`` and its weights stay, to be compressed afterwards.

    ``samples`` are inputs as the reference executor takes them, one call each. ``keep`` names the operations that read
    and write FP16. Raises UnsupportedSpec without any sample and where the model is for less than iOS 17,
    InvariantError for a value that has no scale, BuildFailed where coremltools refuses, and what the executor raises.
    """
    if model.get_spec().specificationVersion < SPECIFICATION[OLDEST_FOR_ACTIVATIONS]:
        raise UnsupportedSpec(f"int8 activations need iOS {OLDEST_FOR_ACTIVATIONS}; ask for --ios 17 or more")
    with tempfile.TemporaryDirectory() as folder, heard(), redirect_stderr(StringIO()):  # progress bars go there
        saved = Path(folder, "model.mlpackage")
        model.save(str(saved))
        package = read_package(saved)
        found = ranges(package, samples, method)
        left = frozenset((*last_maps(package.program), *keep))
        config = _settings(left, read_by(package.program, keep) - left)
        try:
            with _calibrated(found):
                quantized = part("optimize.coreml").linear_quantize_activations(model, config, [])
        except (ValueError, RuntimeError, NotImplementedError, KeyError) as error:
            raise BuildFailed(f"coremltools refused int8 activations: {str(error).splitlines()[0]}") from error
    _check_kept(quantized, keep)
    return quantized


def ranges(package: Package, samples: Iterable[Arrays], method: str = "minmax") -> dict[str, Range]:
    """Least and largest value of every real tensor of the program over all samples, by name.

    With another method than ``minmax``, what maps read and write, behind their ReLUs, is clipped as that says. The
    arithmetic is float32 on the saved constants. One sample's tensors are in memory at a time, and of those what is
    still to be read. One that is next to zero in all of them gets the range of the smallest scale, for zero is none.
    Raises InvariantError for a value that is not finite or beyond ``LARGEST``, UnsupportedSpec without any sample.
    """
    found: dict[str, Range] = {}
    counted = {} if method == "minmax" else {name: Histogram(name) for name in _around_maps(package.program)}

    def see(name: str, value: Tensor) -> None:
        if not value.is_floating_point() or not value.numel():
            return
        low, high = (float(each) for each in value.aminmax())
        if not -LARGEST <= low <= high <= LARGEST:
            raise InvariantError(f"{name} reaches {low:.6g} to {high:.6g}; an int8 scale needs it within {LARGEST:.0f}")
        least, most = found.get(name, (low, high))
        found[name] = (min(least, low), max(most, high))
        if name in counted:
            counted[name].add(value)

    with MilReference(package, "exact") as executor:
        for sample in samples:
            executor.observe(sample, see)
    if not found:
        raise UnsupportedSpec("int8 activations need pictures to take their scales from; give some with --images")
    for name, histogram in counted.items():
        clip = step(histogram, method) * LEVELS
        found[name] = (max(found[name][0], -clip), min(found[name][1], clip))
    return {name: (low, high if -low > _SMALLEST else max(high, _SMALLEST)) for name, (low, high) in found.items()}


def _around_maps(program: Program) -> frozenset[str]:
    """The names of what convolutions and linear maps read and write, and of what their ReLUs do."""
    maps = {output.name for each in program.operations if each.kind in WEIGHTED for output in each.outputs}
    rectified = {each.outputs[0].name for each in program.operations if each.kind == "relu" and _read(each) in maps}
    return frozenset(maps | rectified | {_read(each) for each in program.operations if each.kind in WEIGHTED})


def read_by(program: Program, names: Collection[str]) -> frozenset[str]:
    """The convolutions and linear maps whose results the operations of these names read, but for moves and ReLUs."""
    makers = {output.name: each for each in program.operations for output in each.outputs}
    found = set()
    for each in program.operations:
        maker = makers.get(_read(each)) if each.name in names else None
        while maker is not None and maker.kind in _PASSES:
            maker = makers.get(_read(maker))
        if maker is not None and maker.kind in WEIGHTED:
            found.add(maker.name)
    return frozenset(found)


def _read(operation: Operation) -> str:
    return str(operation.inputs["x"][0])


def _settings(left: Collection[str], unrounded: Collection[str]) -> Any:
    """Maps in int8, but for those in ``left``; those in ``unrounded`` write FP16.

    For the latter coremltools has no word: it asks twice what is to become of a map, before it puts steps in front and
    before it puts them behind. The second time it gets another answer.
    """
    tools = part("optimize.coreml")
    chosen, base = tools.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8"), tools.OptimizationConfig

    def answer(self: Any, operation: Any) -> Any:
        if operation.name in unrounded and operation.inputs["x"].op.op_type == "dequantize":
            return None
        return base._get_op_config(self, operation)  # noqa: SLF001 - there is no other place to say so

    settings = type("Settings", (base,), {"_get_op_config": answer})
    return settings(op_type_configs=dict.fromkeys(WEIGHTED, chosen), op_name_configs=dict.fromkeys(left))


def _check_kept(model: Any, keep: Collection[str]) -> None:
    """Raise BuildFailed where a map that is to read FP16 was given steps all the same."""
    operations = operations_of(model.get_spec())
    whole = {output.name for each in operations if each.type == "dequantize" for output in each.outputs}
    for each in operations:
        if each.type in WEIGHTED and name_of(each) in keep and each.inputs["x"].arguments[0].name in whole:
            raise BuildFailed(
                f"coremltools gave {name_of(each)} int8 activations all the same; install coremltools 9.0"
            )


def last_maps(program: Program) -> tuple[str, ...]:
    """Names of the convolutions and linear maps whose result reaches no other one."""
    reaches: set[str] = set()
    last = []
    for each in reversed(program.operations):
        read = {name for bindings in each.inputs.values() for name in bindings if isinstance(name, str)}
        weighs = each.kind in WEIGHTED
        results = {output.name for output in each.outputs}
        if weighs and not results & reaches:
            last.append(each.name)
        if weighs or results & reaches:
            reaches |= read
    return tuple(reversed(last))


@contextmanager
def _calibrated(found: Mapping[str, Range]) -> Iterator[None]:
    """Let coremltools take ``found`` where it would run the model."""
    module = part(_MODULE)
    own: Callable[..., Any] | None = getattr(module, _CALIBRATE, None)
    if own is None:
        raise BuildFailed(f"this coremltools has no {_CALIBRATE} to give activation ranges to; install coremltools 9.0")
    stats = {name: {"rmin": low, "rmax": high} for name, (low, high) in found.items()}
    setattr(module, _CALIBRATE, lambda *_: stats)
    try:
        yield
    finally:
        setattr(module, _CALIBRATE, own)
