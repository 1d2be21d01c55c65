"""The Core ML target: an ML program as a package, for iPhone and Mac, and the log of its conversion beside it.

The saved package is executed by ``executors.mil``; on macOS Core ML itself is asked as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx

from nextvit_exporters import graph as g
from nextvit_exporters import targets
from nextvit_exporters.coreml.activations import quantize_activations
from nextvit_exporters.coreml.compression import compress_weights, maps_of
from nextvit_exporters.coreml.convert import INPUT, Converted, labels_of, of_spec, to_model
from nextvit_exporters.coreml.loading import heard
from nextvit_exporters.coreml.offer import check_offer
from nextvit_exporters.coreml.overflow import overflowing
from nextvit_exporters.coreml.package import write_package
from nextvit_exporters.coreml.program import MANIFEST
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.coreml.report import describe, dtypes_of
from nextvit_exporters.coreml_spec import About
from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.executors.base import FEATURES, LOGITS, Array, Executor
from nextvit_exporters.executors.coreml_device import devices, why_not_here
from nextvit_exporters.executors.mil import MilReference, Mode
from nextvit_exporters.files import atomic_path, atomic_write
from nextvit_exporters.passes.base import Pass
from nextvit_exporters.passes.equalize_channels import EqualizeChannels
from nextvit_exporters.passes.normalize_input import MEAN, NormalizeInput
from nextvit_exporters.passes.sets import NEURAL_ENGINE
from nextvit_exporters.precision.compress import check_blocks, compress_graph, for_conversion
from nextvit_exporters.precision.fp16 import round_constants
from nextvit_exporters.spec import MIN_SIDE, Artifact, ExportSpec, InputKind, Precision, Tolerance
from nextvit_exporters.targets import Examples, Saved

if TYPE_CHECKING:
    from nextvit_exporters.coreml.program import Package

SUFFIX: Final = ".mlpackage"
PRECISIONS: Final[tuple[Precision, ...]] = (Precision.FP32, Precision.FP16)
OUTPUT: Final = None
WRITERS: Final = ("nextvit-deploy", "torch", "numpy", "coremltools")
PASSES: Final[tuple[Pass, ...]] = NEURAL_ENGINE
_INPUTS: Final = (InputKind.IMAGE, InputKind.NORMALIZED)
_INT8: Final = "int8"
"""The scheme of the weights that go with int8 activations."""

SAME_NETWORK: Final[Mapping[Precision, Tolerance]] = MappingProxyType(
    {
        Precision.FP32: Tolerance(1e-9, "float64 on both sides: 3e-16 (nano) to 6e-15 (large at 384)"),
        Precision.FP16: Tolerance(1e-9, "the same arithmetic on the package's constants, compressed ones too"),
    }
)
PRECISION_COST: Final[Mapping[Precision, Tolerance]] = MappingProxyType(
    {
        Precision.FP32: Tolerance(1e-5, "folds rounded once from float64: 1.5e-7 (nano) to 1e-6 (large at 384)"),
        Precision.FP16: Tolerance(
            1e-2, "emulated storage: 3.7e-4 (trained nano) to 1.5e-3 (probabilities of large, random weights)"
        ),
    }
)
COST_AT_WORST: Final[Mapping[Precision, Tolerance]] = MappingProxyType(
    {
        Precision.FP16: Tolerance(
            2e-2, "running sums rounded every 32 products: 5.5e-4 (trained nano) to 3.5e-3 (small at 384)"
        )
    }
)
ON_DEVICE: Final[Mapping[Precision, Tolerance]] = MappingProxyType(
    {
        Precision.FP32: Tolerance(1e-2, "Core ML may compute float32 in another order; no device's figure yet"),
        Precision.FP16: Tolerance(2e-2, "as emulated at worst; no device's figure yet"),
    }
)
TOLERANCES: Final[Mapping[str, Mapping[Precision, Tolerance]]] = MappingProxyType(
    {
        targets.SAME_NETWORK: SAME_NETWORK,
        targets.PRECISION_COST: PRECISION_COST,
        targets.COST_AT_WORST: COST_AT_WORST,
        targets.ON_DEVICE: ON_DEVICE,
    }
)
COMPRESSED: Final[Mapping[str, Tolerance]] = MappingProxyType(
    {
        "int8": Tolerance(1e-1, "3.8e-3 (trained nano), 3.2e-2 (probabilities of small, random weights)"),
        "lut8": Tolerance(1e-1, "2.4e-3 (trained nano), 2.2e-2 (probabilities of small, random weights)"),
        "lut6": Tolerance(3e-1, "1.5e-2 (trained nano), 8e-2 to 1.5e-1 (small and large, random weights)"),
        "lut4": Tolerance(7e-1, "7.8e-2 (trained nano), 5.7e-1 (probabilities of small, random weights)"),
        "w8a8": Tolerance(1e-1, "9.4e-3 (trained nano), 3.4e-2 (probabilities of small, random weights)"),
    }
)
"""What compression may cost, by scheme; it takes the place of the precision's own."""


def log_of(path: Path) -> Path:
    """Everything coremltools said, beside the package."""
    return path.with_name(f"{path.name}.log")


def check_spec(spec: ExportSpec) -> None:
    """Raise UnsupportedSpec for what this target can't build, with what it can."""
    asked = of_spec(spec)
    if spec.precision not in PRECISIONS:
        raise UnsupportedSpec(f"coreml can't build {spec.precision}; choose one of {', '.join(map(str, PRECISIONS))}")
    if spec.input not in _INPUTS or spec.io is not Precision.FP32:
        raise UnsupportedSpec(f"a package reads pictures or normalised float32 tensors, not {spec.input} in {spec.io}")
    if spec.precision is Precision.FP32 and asked.compression is not None:
        raise UnsupportedSpec(f"{asked.compression} decompresses to FP16; ask for --precision fp16")
    names = {each.name for each in PASSES}
    if unknown := [name for name in spec.skip if name not in names]:
        raise UnsupportedSpec(f"no pass is called '{unknown[0]}'; the passes are {', '.join(sorted(names))}")
    _check_batch(spec)
    _check_labels(spec)
    _check_sizes(spec)


def _check_batch(spec: ExportSpec) -> None:
    if spec.batch == 1:
        return
    if spec.input is InputKind.IMAGE:
        raise UnsupportedSpec("Core ML reads pictures one at a time; ask for --batch 1 or --input tensor")
    if of_spec(spec).head == "classify":
        raise UnsupportedSpec("Core ML classifies one picture at a time; ask for --batch 1 or --logits")


def _check_labels(spec: ExportSpec) -> None:
    if of_spec(spec).head != "classify":
        return
    labels = labels_of(spec)
    if len(labels) != spec.num_classes:
        raise UnsupportedSpec(f"{len(labels)} labels for {spec.num_classes} classes; give one label per class")
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UnsupportedSpec(f"the label '{twice}' is there twice, and Core ML returns one probability for each label")


def _check_sizes(spec: ExportSpec) -> None:
    asked = of_spec(spec)
    sides = [side for size in asked.sizes for side in size] + list(asked.flexible or ())
    if min(sides, default=MIN_SIDE) < MIN_SIDE:
        raise UnsupportedSpec(f"every size must be {MIN_SIDE} or more")
    if spec.dynamic_size and not asked.sizes and asked.flexible is None:
        raise UnsupportedSpec("one size alone is no choice; enumerate more, or give it as --size")
    if asked.flexible is not None:
        low, high = asked.flexible
        if not low <= min(spec.height, spec.width) <= max(spec.height, spec.width) <= high:
            size = f"{spec.height}x{spec.width}"
            raise UnsupportedSpec(f"{size} lies outside {low}:{high}; give a --size within, or another range")


def passes_for(spec: ExportSpec) -> tuple[Pass, ...]:
    """The passes of this target in order, with what ``spec`` adds and leaves out."""
    paying = tuple(each for each in PASSES if each.name not in spec.skip)
    if of_spec(spec).equalize:
        paying = (*paying, EqualizeChannels())
    if spec.input is not InputKind.IMAGE:
        return paying
    return (*paying, NormalizeInput(spec.preprocessing.mean, spec.preprocessing.std, uint8=False))


def tolerance_for(spec: ExportSpec, question: str) -> Tolerance:
    """By question and precision, and where something is compressed by that."""
    compression = of_spec(spec).compression
    if compression is not None and question != targets.SAME_NETWORK:
        return COMPRESSED[compression]
    kind = targets.ON_DEVICE if question.startswith(targets.ON_DEVICE) else question
    return TOLERANCES[kind][spec.precision]


def settle(spec: ExportSpec, graph: fx.GraphModule, examples: Array) -> ExportSpec:
    """``spec`` with the modules that would overflow in FP16, to be kept in float32, and what it is calibrated on.

    Raises UnsupportedSpec where something is to be kept in float32 in a compressed package, and for a block to keep in
    FP16 that is not there.
    """
    asked = of_spec(spec)
    check_blocks(graph, asked.keep)
    if asked.activations is not None and asked.calibration is None:
        asked = replace(asked, calibration=sha256(examples.tobytes()).hexdigest())
    if spec.precision is Precision.FP16 and asked.audit:
        asked = replace(asked, keep_fp32=overflowing(graph, examples))
    if asked.keep_fp32 and asked.compression is not None:
        raise UnsupportedSpec(
            f"{asked.keep_fp32[0]} would overflow FP16 and has to stay in float32, which a compressed package can't "
            "do; leave the compression out"
        )
    return replace(spec, coreml=asked)


def lower(spec: ExportSpec, graph: fx.GraphModule) -> fx.GraphModule:
    """The float64 graph in float32, with the values that the package will hold, ready for conversion.

    Raises UnsupportedSpec when pictures were asked for and the graph doesn't normalise them.
    """
    if spec.input is InputKind.IMAGE and not hasattr(graph, MEAN):
        raise UnsupportedSpec("normalize-input was refused or rolled back; ask for --input tensor")
    scheme = _scheme(spec)
    rounded = _rounded(spec, graph)
    return rounded if scheme is None else for_conversion(graph, rounded, scheme)


def reference(spec: ExportSpec, graph: fx.GraphModule) -> fx.GraphModule:
    """The float64 graph carrying the constants that the package will compute with, in float64 arithmetic.

    So is the package executed that is held against it: what then differs is another network, not another order of
    sums.
    """
    rounded = _rounded(spec, graph)
    exact = g.cast(rounded, torch.float64)
    g.release(rounded)
    return exact


def _rounded(spec: ExportSpec, graph: fx.GraphModule) -> fx.GraphModule:
    """A float32 copy of the float64 graph with the constants that the package will compute with."""
    if spec.precision is Precision.FP32:
        return g.cast(graph, torch.float32)
    scheme = _scheme(spec)
    if scheme is None:
        return round_constants(graph, keep=of_spec(spec).keep_fp32)
    return compress_graph(graph, scheme, of_spec(spec).keep)[0]


def _scheme(spec: ExportSpec) -> str | None:
    """How weights are compressed, those beside int8 activations too."""
    asked = of_spec(spec)
    return _INT8 if asked.activations else asked.weights


def build(
    spec: ExportSpec,
    module: fx.GraphModule,
    path: Path,
    provenance: Mapping[str, object],
    on_step: Callable[[str], None],
    examples: Examples | None = None,
) -> Artifact:
    """Write the package and its log; ``examples``, as the package reads them, are what activations are calibrated on.

    They are read a batch at a time.

    Raises BuildFailed when torch's exporter or coremltools refuses, MissingExtra without coremltools.
    """
    with heard() as said:
        on_step("coremltools: convert")
        converted = _compressed(spec, to_model(spec, module), examples, on_step)
        on_step("write the package")
        metadata = {MANIFEST: json.dumps(provenance, sort_keys=True)}
        with atomic_path(path) as sibling:
            sibling.mkdir()
            write_package(converted, sibling, _about(spec), _descriptions(spec), metadata)
    atomic_write(log_of(path), "\n".join([*said, ""]).encode("utf-8", "backslashreplace"))
    return Artifact.of(path)


def _compressed(
    spec: ExportSpec, converted: Converted, examples: Examples | None, on_step: Callable[[str], None]
) -> Converted:
    """The model with activations, then weights, in what was asked for."""
    model, asked = converted.model, of_spec(spec)
    kept = maps_of(model, converted.modules, asked.keep)
    if asked.activations is not None:
        if examples is None:
            raise ValueError("int8 activations need images to calibrate on")
        on_step("calibrate activations")
        batches = ({INPUT: examples[at : at + spec.batch]} for at in _starts(spec, examples))
        model = quantize_activations(model, batches, keep=kept, method=asked.method)
    scheme = _scheme(spec)
    if scheme is not None:
        on_step(f"compress weights to {scheme}")
        model = compress_weights(model, scheme, kept)
    return replace(converted, model=model)


def _starts(spec: ExportSpec, examples: Examples) -> range:
    """Where whole batches begin."""
    return range(0, len(examples) - spec.batch + 1, spec.batch)


def _about(spec: ExportSpec) -> About:
    """What Xcode shows, with what the user left empty filled in."""
    about = of_spec(spec).about
    told = f"{spec.model}, {spec.num_classes} classes, {spec.numbers}, exported by nextvit-deploy"
    return replace(about, description=about.description or told)


def _descriptions(spec: ExportSpec) -> dict[str, str]:
    """Texts for inputs and outputs, by name."""
    wanted = spec.preprocessing
    cover = " x ".join(str(math.floor(side / wanted.crop_pct)) for side in (spec.width, spec.height))
    steps = (
        f"resized to just cover {cover} pixels ({wanted.interpolation}), centre crop of {spec.width} x {spec.height}"
    )
    normal = "RGB; mean and standard deviation are applied inside"
    if spec.input is InputKind.NORMALIZED:
        normal = f"(B, 3, H, W), RGB as (value / 255 - mean) / std, mean {wanted.mean}, std {wanted.std}"
    return {
        INPUT: f"{steps}; {normal}",
        "classLabel": "the class of the highest probability",
        "classLabel_probs": "the probability of each class; they add up to one",
        LOGITS: f"(B, {spec.num_classes}), before the softmax",
        **{name: f"feature map of stage {at}, stride {2 ** (at + 1)}" for at, name in enumerate(FEATURES, 1)},
    }


def source(path: Path) -> Path:
    """The package itself."""
    return path


def adopt(spec: ExportSpec, path: Path) -> ExportSpec:
    """The spec as it is recorded; raises UnsupportedSpec where that is another target's."""
    if spec.target != "coreml" or spec.coreml is None or spec.input not in _INPUTS:
        raise UnsupportedSpec(f"the manifest inside {path.name} tells of no Core ML package; export it again")
    return spec


def remarks(path: Path) -> tuple[str, ...]:
    """What was kept in float32 or FP16, what activations were calibrated on, and why Core ML itself was not asked."""
    recorded: Any = read(path).provenance or {}
    asked = (recorded.get("spec") or {}).get("coreml") or {}
    notes = []
    if kept := asked.get("keep_fp32"):
        notes.append(
            f"kept in float32, for FP16 would overflow: {', '.join(kept)}; the Neural Engine computes in FP16 only"
        )
    if kept := asked.get("keep"):
        notes.append(f"kept in FP16, and out of the compression: {', '.join(kept)}")
    if asked.get("activations") and not asked.get("calibration_size"):
        notes.append(
            "activation scales were taken from the images that the package was first verified on; no question but the "
            "precision's cost sees a scale that is off"
        )
    if why := why_not_here():
        notes.append(f"Core ML itself was not asked: {why}")
    return tuple(notes)


def executors(spec: ExportSpec, path: Path) -> Mapping[str, Executor]:
    """The reference executor in the modes that answer each question; on macOS Core ML on each of its units as well.

    Raises BuildFailed where the package is damaged, or offers an app something else than ``spec`` says.
    """
    package = read_package(path)
    if MANIFEST in package.metadata:  # the spec of other tools' packages is told by the package alone
        check_offer(spec, package)
    units = () if why_not_here() else devices(path)
    return {**_here(spec, package), **{f"{targets.ON_DEVICE}, {each.unit}": each for each in units}}


def _here(spec: ExportSpec, package: Package) -> Mapping[str, Executor]:
    mode: Mode = "unrounded" if of_spec(spec).activations else "exact"
    labels = labels_of(spec) if of_spec(spec).head == "classify" else None
    same = MilReference(package, mode, double=True, labels=labels)
    if spec.precision is Precision.FP32:
        return {targets.SAME_NETWORK: same, targets.PRECISION_COST: MilReference(package, mode, labels=labels)}
    return {
        targets.SAME_NETWORK: same,
        targets.PRECISION_COST: MilReference(package, "emulated", labels=labels),
        targets.COST_AT_WORST: MilReference(package, "pessimistic", labels=labels),
    }


def read(path: Path) -> Saved:
    """The package's operations, types and description; provenance where this tool wrote it. Raises BuildFailed."""
    package = read_package(path)
    entry = package.metadata.get(MANIFEST)
    return Saved(
        json.loads(entry) if entry else None,
        package.program.count(),
        dtypes_of(package),
        "operations",
        facts=describe(package),
    )
