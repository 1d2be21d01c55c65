"""``trt``: a checkpoint, or an ONNX file that is there already, as a TensorRT engine."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from nextvit_deploy import terminal as t
from nextvit_deploy.cli import int8 as q
from nextvit_deploy.cli import options as o
from nextvit_deploy.cli.ending import ending
from nextvit_deploy.cli.grouped import grouped


class BackendChoice(str, Enum):
    """Which TensorRT builds."""

    AUTO = "auto"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


class IoChoice(str, Enum):
    """What the engine reads and returns."""

    FP32 = "fp32"
    FP16 = "fp16"


Fp16 = Annotated[bool, typer.Option("--fp16", help="FP16 inside; meant where no precision is given.")]
Fp32 = Annotated[bool, typer.Option("--fp32", help="Float32 inside, without TF32.")]
Int8 = Annotated[bool, typer.Option("--int8", help="INT8, calibrated here, or the quantized graph that --onnx gives.")]
Io = Annotated[IoChoice, typer.Option("--io", help="Type of the output and of a normalised input.")]
SizeRange = Annotated[str | None, typer.Option("--size", metavar="N|HxW|MIN:OPT:MAX", help="Input size in pixels.")]
BatchRange = Annotated[str | None, typer.Option("--batch", metavar="N|MIN:OPT:MAX", help="Images at a time.")]
Nhwc = Annotated[bool, typer.Option("--uint8-nhwc", help="Raw pixels as (B, H, W, 3); short for --input uint8-nhwc.")]
Backend = Annotated[BackendChoice, typer.Option("--backend", help="Which TensorRT builds; RTX needs no GPU.")]
Gpu = Annotated[
    str | None, typer.Option("--gpu", metavar="NAME", help="t4 (the default), a10, l4, rtx4090, ..., or sm75.")
]
OnnxFile = Annotated[
    Path | None, typer.Option("--onnx", metavar="FILE", help="Build this file; CKPT is then what it is held against.")
]
PassSet = Annotated[
    str | None, typer.Option("--pass-set", metavar="NAME", help="fewest-kernels (the default) or fewest-macs.")
]
OptLevel = Annotated[int | None, typer.Option("--opt-level", metavar="0-5", help="How hard TensorRT optimises.")]
Workspace = Annotated[int | None, typer.Option("--workspace", metavar="MIB", help="Most scratch memory.")]
TimingCache = Annotated[
    Path | None, typer.Option("--timing-cache", metavar="FILE", help="Timings to reuse and add to.")
]
Kit = Annotated[Path | None, typer.Option("--kit", metavar="DIR", help="Write a kit that ends the proof on the GPU.")]
Triton = Annotated[Path | None, typer.Option("--triton", metavar="DIR", help="Write a Triton model repository.")]


@grouped(q.Int8Options)
def trt(  # noqa: PLR0913 - one parameter per option
    checkpoint: o.Ckpt = None,
    *,
    output: o.Output = Path("exports"),
    fp16: Fp16 = False,
    fp32: Fp32 = False,
    int8: Int8 = False,
    io: Io = IoChoice.FP32,
    size: SizeRange = None,
    batch: BatchRange = None,
    reads: o.Reads = o.InputChoice.NORMALIZED,
    uint8_nhwc: Nhwc = False,
    backend: Backend = BackendChoice.AUTO,
    gpu: Gpu = None,
    onnx_file: OnnxFile = None,
    pass_set: PassSet = None,
    opt_level: OptLevel = None,
    workspace: Workspace = None,
    timing_cache: TimingCache = None,
    kit: Kit = None,
    triton: Triton = None,
    int8_options: q.Int8Options,
    skip: o.Skip = None,
    ema: o.Ema = False,
    images: o.Images = None,
    count: o.Count = 8,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Build a TensorRT engine, without a GPU too, and verify what TensorRT understood against PyTorch."""
    precision, said = _precision({"fp16": fp16, "fp32": fp32, "int8": int8})
    kind = _input(reads, nhwc=uint8_nhwc)
    with t.guard(), t.progress(quiet=quiet or as_json) as on_step:
        from nextvit_deploy import request as r
        from nextvit_deploy.given import export_given
        from nextvit_deploy.pipeline import export
        from nextvit_exporters.engine_spec import Range
        from nextvit_exporters.spec import InputKind, Precision

        sizes = None if batch is None else Range.from_text(batch), o.parse_size_range(size)
        engine = r.EngineRequest(backend.value, gpu, *sizes, workspace, opt_level, timing_cache, kit, triton)
        asked = r.Request(
            output=output,
            checkpoint=checkpoint,
            ema=ema,
            precision=Precision(precision),
            images=images,
            count=count,
            input=InputKind(kind),
            skip=tuple(skip or ()),
            io=Precision(io.value),
            pass_set=pass_set,
            said=said,
        )
        wanted = int8_options.request(wanted=int8 and onnx_file is None)
        request = r.with_engine(r.with_quantize(asked, wanted), engine)
        manifest = export(request, on_step) if onnx_file is None else export_given(request, onnx_file, on_step)
    ending(manifest, as_json=as_json, quiet=quiet, verbose=verbose)


def _input(reads: o.InputChoice, *, nhwc: bool) -> str:
    """What the engine reads; raises BadParameter where two things are asked for."""
    short = o.InputChoice.UINT8_NHWC
    if nhwc and reads not in {o.InputChoice.NORMALIZED, short}:
        msg = f"--uint8-nhwc and --input {reads.value} exclude each other; give one"
        raise typer.BadParameter(msg, param_hint="the input")
    return short.value if nhwc else reads.value


def _precision(asked: dict[str, bool]) -> tuple[str, tuple[str, ...]]:
    """The one precision asked for; FP16 where none is, with a note that says so."""
    chosen = o.one_precision(asked)
    return (chosen, ()) if chosen else ("fp16", ("no precision given: the engine is built in FP16",))
