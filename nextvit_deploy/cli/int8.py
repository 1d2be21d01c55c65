"""Options of INT8, which the commands share, and what they ask for together."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nextvit_deploy.request import QuantizeRequest


class MethodChoice(str, Enum):
    """How an activation's step is taken from its values."""

    MINMAX = "minmax"
    ENTROPY = "entropy"
    PERCENTILE = "percentile"
    MSE = "mse"


class RoundingChoice(str, Enum):
    """How weights are brought onto their steps."""

    NEAREST = "nearest"
    GPTQ = "gptq"


class QuantizerChoice(str, Enum):
    """Who puts the steps into the graph."""

    ONNXRUNTIME = "onnxruntime"
    MODELOPT = "modelopt"


Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration", metavar="DIR", help="INT8: images of your task to calibrate on; the demo has its own."
    ),
]
Size = Annotated[int, typer.Option("--calibration-size", min=1, metavar="N", help="INT8: how many of them.")]
Method = Annotated[
    MethodChoice | None,
    typer.Option("--method", help="INT8: how steps are taken from what values were; mse, with modelopt minmax."),
]
Rounding = Annotated[
    RoundingChoice, typer.Option("--rounding", help="INT8: gptq feeds the error of one weight into the next.")
]
Equalize = Annotated[bool, typer.Option(help="INT8: rescale channels before, which changes nothing in float32.")]
Biases = Annotated[
    bool, typer.Option("--correct-bias/--no-correct-bias", help="INT8: let biases make up for rounding.")
]
Quantizer = Annotated[QuantizerChoice, typer.Option("--quantizer", help="INT8: who puts the steps into the graph.")]
Budget = Annotated[
    str | None,
    typer.Option("--accuracy-budget", metavar="POINTS|dB", help="INT8: keep blocks until 0.5 (points) or 30dB is met."),
]
Plan = Annotated[
    Path | None, typer.Option("--precision-plan", metavar="FILE", help="INT8: keep the blocks of an earlier manifest.")
]
PlanImages = Annotated[
    int, typer.Option("--plan-images", min=1, metavar="N", help="INT8: how many of --images the budget is measured on.")
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, metavar="N", help="INT8: processes that look for blocks to keep.")
]
Ray = Annotated[str | None, typer.Option("--ray", metavar="ADDRESS", help="INT8: a Ray cluster that does.")]


@dataclass(frozen=True, slots=True)
class Int8Options:
    """Everything that INT8 can be told."""

    calibration: Calibration = None
    calibration_size: Size = 128
    method: Method = None
    rounding: Rounding = RoundingChoice.NEAREST
    equalize: Equalize = True
    biases: Biases = True
    quantizer: Quantizer = QuantizerChoice.ONNXRUNTIME
    budget: Budget = None
    plan: Plan = None
    plan_images: PlanImages = 64
    workers: Workers = None
    ray: Ray = None

    def request(self, *, wanted: bool) -> QuantizeRequest | None:
        """The same for the pipeline, None where nothing is quantized here.

        Raises BadParameter where two exclude each other, or one is given for nothing.
        """
        from nextvit_deploy.request import QuantizeRequest

        if not wanted and self != Int8Options():
            msg = "what INT8 is told needs --int8, and a checkpoint that is quantized here"
            raise typer.BadParameter(msg, param_hint="the precision")
        if self.budget is not None and self.plan is not None:
            msg = "--accuracy-budget and --precision-plan exclude each other; give one"
            raise typer.BadParameter(msg, param_hint="the precision")
        scanning = self.workers, self.ray, self.plan_images
        if self.budget is None and scanning != (None, None, Int8Options().plan_images):
            msg = "--workers, --ray and --plan-images look for blocks to keep; add --accuracy-budget"
            raise typer.BadParameter(msg, param_hint="the precision")
        asked = QuantizeRequest(
            calibration=self.calibration,
            size=self.calibration_size,
            method=self.method and self.method.value,
            rounding=self.rounding.value,
            equalize=self.equalize,
            correct_bias=self.biases,
            quantizer=self.quantizer.value,
            budget=self.budget,
            plan=self.plan,
            judged=self.plan_images,
            workers=self.workers,
            ray=self.ray,
        )
        return asked if wanted else None
