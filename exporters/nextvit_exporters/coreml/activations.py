"""Activations in int8: scales from pictures, put into a coremltools model by coremltools itself.

Every input and every result of a convolution or linear map, behind its ReLU where it has one, passes ``quantize`` and
``dequantize`` with one symmetric scale each: with r the largest magnitude in all the pictures, rounded to FP16,
fp16(2r / 254). So maps read and write whole numbers. The rest stays FP16:

- what additions, poolings, products and softmax compute, until a map reads it. Attention's scores and shares have
  their information in small differences;
- the input and result of the last map, which nothing else weighs: 255 steps would tie classes that differ.

Measured on the bundled demo, 16 pictures to calibrate and 16 others, logits against float32: int8 weights alone move
them by 0.27 % of their root mean square, with these activations 0.77 %, with the last map's as well 1.09 %, with those
of additions and poolings too, coremltools' default, 1.13 %.

coremltools finds the ranges by running the model on a Mac. Here the reference executor runs it, and the least and the
largest of each tensor are gathered picture by picture. (coremltools 9.0 itself keeps those of the last picture only,
and gives what a concatenation joins one range, which without int8 sums around it only makes scales coarser.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import Tensor

from nextvit_exporters.coreml.compression import WEIGHTED
from nextvit_exporters.coreml.loading import heard, part
from nextvit_exporters.coreml.program import SPECIFICATION, Package, Program
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.coreml_spec import OLDEST_FOR_ACTIVATIONS
from nextvit_exporters.errors import BuildFailed, InvariantError, UnsupportedSpec
from nextvit_exporters.executors.base import Arrays
from nextvit_exporters.executors.mil import MilReference

LARGEST: Final = float(np.finfo(np.float16).max) / 2
"""The largest magnitude with a scale: FP16 has to hold twice as much on the way."""
_SMALLEST: Final = 127 * 2.0**-24
_MODULE: Final = "optimize.coreml._post_training_quantization"
_CALIBRATE: Final = "_get_activation_calibration_stats"

Range = tuple[float, float]
"""The least and the largest value."""


def quantize_activations(model: Any, samples: Sequence[Arrays]) -> Any:
    """A coremltools MLModel with int8 activations; ``model`` and its weights stay, to be compressed afterwards.

    ``samples`` are inputs as the reference executor takes them, one call each. Raises UnsupportedSpec without any and
    where the model is for less than iOS 17, InvariantError for a value that has no scale, BuildFailed where
    coremltools refuses, and what the executor raises.
    """
    if not samples:
        raise UnsupportedSpec("int8 activations need pictures to take their scales from; give some with --images")
    if model.get_spec().specificationVersion < SPECIFICATION[OLDEST_FOR_ACTIVATIONS]:
        raise UnsupportedSpec(f"int8 activations need iOS {OLDEST_FOR_ACTIVATIONS}; ask for --ios 17 or more")
    with tempfile.TemporaryDirectory() as folder, heard(), redirect_stderr(StringIO()):  # progress bars go there
        saved = Path(folder, "model.mlpackage")
        model.save(str(saved))
        package = read_package(saved)
        found = ranges(package, samples)
        tools = part("optimize.coreml")
        chosen = tools.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8")
        config = tools.OptimizationConfig(
            op_type_configs=dict.fromkeys(WEIGHTED, chosen),
            op_name_configs=dict.fromkeys(last_maps(package.program)),
        )
        try:
            with _calibrated(found):
                quantized = tools.linear_quantize_activations(model, config, [])
        except (ValueError, RuntimeError, NotImplementedError, KeyError) as error:
            raise BuildFailed(f"coremltools refused int8 activations: {str(error).splitlines()[0]}") from error
    return quantized


def ranges(package: Package, samples: Sequence[Arrays]) -> dict[str, Range]:
    """Least and largest value of every real tensor of the program over all samples, by name.

    The arithmetic is float32 on the saved constants. One sample's tensors are in memory at a time, and of those what
    is still to be read. One that is next to zero in all of them gets the range of the smallest scale, for zero is none.
    Raises InvariantError for a value that is not finite or beyond ``LARGEST``.
    """
    found: dict[str, Range] = {}

    def see(name: str, value: Tensor) -> None:
        if not value.is_floating_point() or not value.numel():
            return
        low, high = (float(each) for each in value.aminmax())
        if not -LARGEST <= low <= high <= LARGEST:
            raise InvariantError(f"{name} reaches {low:.6g} to {high:.6g}; an int8 scale needs it within {LARGEST:.0f}")
        least, most = found.get(name, (low, high))
        found[name] = (min(least, low), max(most, high))

    with MilReference(package, "exact") as executor:
        for sample in samples:
            executor.observe(sample, see)
    return {name: (low, high if -low > _SMALLEST else max(high, _SMALLEST)) for name, (low, high) in found.items()}


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
