"""``onnx``: a checkpoint as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nextvit_deploy import terminal as t
from nextvit_deploy.cli import int8 as q
from nextvit_deploy.cli import options as o
from nextvit_deploy.cli.ending import ending
from nextvit_deploy.cli.grouped import grouped


def _consumers(incomplete: str) -> list[str]:
    from nextvit_exporters.opsets import CONSUMERS

    return [name for name in CONSUMERS if name.startswith(incomplete)]


@grouped(q.Int8Options)
def onnx(  # noqa: PLR0913 - one parameter per option
    checkpoint: o.Ckpt = None,
    *,
    output: o.Output = Path("exports"),
    fp16: Annotated[bool, typer.Option("--fp16", help="FP16 inside, float32 at input and output.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="INT8 with explicit steps, calibrated here.")] = False,
    size: o.Size = None,
    batch: o.Batch = 1,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Leave the batch open.")] = False,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="Leave height and width open.")] = False,
    reads: o.Reads = o.InputChoice.NORMALIZED,
    consumer: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="NAME",
            help="Who reads the file, such as tensorrt-10; sets the opset.",
            autocompletion=_consumers,
        ),
    ] = None,
    opset: Annotated[int | None, typer.Option("--opset", min=1, help="ONNX opset, in place of --for's or 18.")] = None,
    simplify: Annotated[bool, typer.Option(help="Run onnx-simplifier.")] = True,
    int8_options: q.Int8Options,
    skip: o.Skip = None,
    ema: o.Ema = False,
    images: o.Images = None,
    count: o.Count = 8,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Export to ONNX and verify the saved file against PyTorch."""
    precision = o.one_precision({"fp16": fp16, "int8": int8}) or "fp32"
    with t.guard(), t.progress(quiet=quiet or as_json) as on_step:
        from nextvit_deploy.pipeline import export
        from nextvit_deploy.request import Request, with_quantize
        from nextvit_exporters.spec import InputKind, Precision

        request = Request(
            output=output,
            checkpoint=checkpoint,
            ema=ema,
            precision=Precision(precision),
            size=o.parse_size(size),
            batch=batch,
            images=images,
            count=count,
            input=InputKind(reads.value),
            consumer=consumer,
            opset=opset,
            dynamic_batch=dynamic_batch,
            dynamic_size=dynamic_size,
            simplify=simplify,
            skip=tuple(skip or ()),
        )
        manifest = export(with_quantize(request, int8_options.request(wanted=int8)), on_step)
    ending(manifest, as_json=as_json, quiet=quiet, verbose=verbose)
