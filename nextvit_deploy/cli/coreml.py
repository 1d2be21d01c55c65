"""``coreml``: a checkpoint as a Core ML package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nextvit_deploy import terminal as t
from nextvit_deploy.cli import int8 as q
from nextvit_deploy.cli import options as o
from nextvit_deploy.cli.ending import ending
from nextvit_deploy.cli.grouped import grouped

if TYPE_CHECKING:
    from nextvit_deploy.manifest import Manifest
    from nextvit_deploy.request import CoreMLRequest, Request
    from nextvit_deploy.sweep import Sweep


class PrecisionChoice(str, Enum):
    """Numbers the package stores and computes in."""

    FP16 = "fp16"
    FP32 = "fp32"


class PictureChoice(str, Enum):
    """What the package reads."""

    IMAGE = "image"
    TENSOR = "tensor"


class WeightChoice(str, Enum):
    """How weights are compressed."""

    INT8 = "int8"
    LUT8 = "lut8"
    LUT6 = "lut6"
    LUT4 = "lut4"


class ActivationChoice(str, Enum):
    """How activations are compressed."""

    INT8 = "int8"


Ios = Annotated[int, typer.Option("--ios", metavar="15|16|17|18|26", help="Oldest iOS that shall run it.")]
PrecisionOption = Annotated[PrecisionChoice, typer.Option("--precision", help="Numbers inside.")]
Picture = Annotated[
    PictureChoice, typer.Option("--input", help="An RGB picture, normalised inside, or a normalised tensor.")
]
Enumerated = Annotated[
    str | None, typer.Option("--enumerated-sizes", metavar="N,HxW,...", help="Several sizes; the first is the default.")
]
Flexible = Annotated[
    str | None, typer.Option("--flexible", metavar="MIN:MAX", help="Every size with sides in this range.")
]
Labels = Annotated[
    Path | None, typer.Option("--labels", metavar="FILE", help="Class names, one a line; the checkpoint's if left out.")
]
Logits = Annotated[bool, typer.Option("--logits", help="Return logits, without softmax and labels.")]
Features = Annotated[bool, typer.Option("--features", help="Return the four feature maps.")]
Weights = Annotated[WeightChoice | None, typer.Option("--weights", help="Compress the weights.")]
Activations = Annotated[
    ActivationChoice | None, typer.Option("--activations", help="Compute with int8 activations and weights; iOS 17.")
]
Method = Annotated[q.MethodChoice, typer.Option("--method", help="INT8: how steps are taken from what values were.")]
SweepAll = Annotated[bool, typer.Option("--sweep", help="Build every compression; print size against error.")]
KeepFp32 = Annotated[bool, typer.Option(help="Keep in float32 what would overflow FP16 on the images.")]
Swift = Annotated[Path | None, typer.Option("--swift", metavar="DIR", help="Write a self-test for the app.")]
Author = Annotated[str, typer.Option("--author", help="Shown by Xcode.")]
Licence = Annotated[str, typer.Option("--license", help="Shown by Xcode.")]
ModelVersion = Annotated[str, typer.Option("--model-version", help="Shown by Xcode.")]
Description = Annotated[str, typer.Option("--description", help="Shown by Xcode.")]


@dataclass(frozen=True, slots=True)
class Shown:
    """What Xcode shows."""

    author: Author = ""
    licence: Licence = ""
    model_version: ModelVersion = ""
    description: Description = ""


@dataclass(frozen=True, slots=True)
class Int8Options:
    """How int8 activations are calibrated, and what a compression leaves out."""

    calibration: q.Calibration = None
    calibration_size: q.Size = 128
    method: Method = q.MethodChoice.MINMAX
    equalize: q.Equalize = True
    plan: q.Plan = None

    def told(self, asked: CoreMLRequest, *, sweep: bool) -> CoreMLRequest:
        """``asked`` with these; raises BadParameter for options of a compression that isn't asked for."""
        if not sweep and asked.activations is None and replace(self, plan=None) != Int8Options():
            msg = "how int8 activations are calibrated says nothing of others; add --activations int8"
            raise typer.BadParameter(msg, param_hint="the calibration")
        if not sweep and asked.activations is None and asked.weights is None and self.plan is not None:
            msg = "--precision-plan keeps blocks from a compression; add --activations int8"
            raise typer.BadParameter(msg, param_hint="the plan")
        return replace(
            asked,
            plan=self.plan,
            calibration=self.calibration,
            calibration_size=self.calibration_size,
            method=self.method.value,
            equalize=self.equalize,
        )


@grouped(Shown, Int8Options)
def coreml(  # noqa: PLR0913 - one parameter per option
    checkpoint: o.Ckpt = None,
    *,
    output: o.Output = Path("exports"),
    ios: Ios = 16,
    precision: PrecisionOption = PrecisionChoice.FP16,
    reads: Picture = PictureChoice.IMAGE,
    size: o.Size = None,
    enumerated_sizes: Enumerated = None,
    flexible: Flexible = None,
    batch: o.Batch = 1,
    labels: Labels = None,
    logits: Logits = False,
    features: Features = False,
    weights: Weights = None,
    activations: Activations = None,
    int8_options: Int8Options,
    sweep: SweepAll = False,
    keep_fp32: KeepFp32 = True,
    swift: Swift = None,
    shown: Shown,
    skip: o.Skip = None,
    ema: o.Ema = False,
    images: o.Images = None,
    count: o.Count = 8,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Export a Core ML package for iPhone and verify the saved package against PyTorch, without a Mac."""
    head = _head(logits=logits, features=features)
    with t.guard(), t.progress(quiet=quiet or as_json) as on_step:
        from nextvit_deploy import request as r
        from nextvit_exporters.coreml_spec import About
        from nextvit_exporters.spec import InputKind, Precision

        sizes, sides = o.parse_sizes(enumerated_sizes), o.parse_sides(flexible)
        about = About(shown.author, shown.licence, shown.model_version, shown.description)
        asked = r.CoreMLRequest(
            ios, head, sizes, sides, _value(weights), _value(activations), keep_fp32, about, labels, swift
        )
        asked = int8_options.told(asked, sweep=sweep)
        request = r.Request(
            output=output,
            checkpoint=checkpoint,
            ema=ema,
            precision=Precision(precision.value),
            size=o.parse_size(size),
            batch=batch,
            images=images,
            count=count,
            input=InputKind.IMAGE if reads is PictureChoice.IMAGE else InputKind.NORMALIZED,
            skip=tuple(skip or ()),
        )
        made = _make(r.with_coreml(request, asked), on_step, sweep=sweep)
    _tell(made, as_json=as_json, quiet=quiet, verbose=verbose)


def _value(choice: Enum | None) -> str | None:
    return None if choice is None else str(choice.value)


def _make(request: Request, on_step: Callable[[str], None], *, sweep: bool) -> Manifest | Sweep:
    """One package, or one of each compression."""
    from nextvit_deploy.pipeline import export
    from nextvit_deploy.sweep import sweep as export_all

    return export_all(request, on_step) if sweep else export(request, on_step)


def _tell(made: Manifest | Sweep, *, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Print what was made; leaves with its verdict's status, with 3 where a sweep can recommend nothing."""
    from nextvit_deploy.manifest import Manifest

    if isinstance(made, Manifest):
        ending(made, as_json=as_json, quiet=quiet, verbose=verbose)
        return
    if as_json:
        t.print_json(made.as_dict())
    elif not quiet:
        from nextvit_deploy.render_coreml import show_sweep

        with t.printing() as console:
            show_sweep(console, made)
    if made.recommended is None:
        t.fail(made.because, t.FAILED)


def _head(*, logits: bool, features: bool) -> str:
    """What the package returns; raises BadParameter where two things are asked for."""
    if logits and features:
        raise typer.BadParameter("--logits and --features exclude each other; give one", param_hint="the output")
    if logits:
        return "logits"
    return "features" if features else "classify"
