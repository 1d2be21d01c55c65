"""What the user asks for, checked by name, and filled in from the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from nextvit_exporters import targets
from nextvit_exporters.coreml_spec import About, CoreMLSpec
from nextvit_exporters.engine_spec import ONE, EngineSpec, Range
from nextvit_exporters.errors import MissingExtra, UnsupportedSpec
from nextvit_exporters.opsets import CONSUMERS, TENSORRT_OPSET, opset_for
from nextvit_exporters.passes.sets import TENSORRT
from nextvit_exporters.quantize_spec import QuantizeSpec
from nextvit_exporters.spec import ExportSpec, InputKind, Precision
from nextvit_exporters.tensorrt.backends import BACKENDS, gpu, plain_name
from nextvit_exporters.tensorrt.choice import choose
from nextvit_models.checkpoint import Checkpoint
from nextvit_models.demo import DEMO_IMAGES


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What is asked of TensorRT beyond the graph; None means: as the backend, the GPU at hand or the checkpoint says.

    ``batch`` and ``size`` (height, width) are ranges where an axis shall stay open; the workspace is in MiB.
    """

    backend: str = "auto"
    gpu: str | None = None
    batch: Range | None = None
    size: tuple[Range, Range] | None = None
    workspace: int | None = None
    opt_level: int | None = None
    timing_cache: Path | None = None
    kit: Path | None = None
    triton: Path | None = None


@dataclass(frozen=True, slots=True)
class CoreMLRequest:
    """What is asked of Core ML beyond the graph.

    ``sizes`` are all enumerated sizes, (height, width), the first of which is the package's own where no size is given.
    ``labels`` is a file of one class name a line, ``swift`` the folder of a self-test for the app. Without ``audit``
    nothing is kept in float32. ``plan`` is a file with the blocks that a compression leaves in FP16.

    For int8 activations ``calibration`` is a folder of pictures to calibrate on, ``calibration_size`` how many of them;
    ``method`` and ``equalize`` are as in ``CoreMLSpec``.
    """

    ios: int = 16
    head: str = "classify"
    sizes: tuple[tuple[int, int], ...] = ()
    flexible: tuple[int, int] | None = None
    weights: str | None = None
    activations: str | None = None
    audit: bool = True
    about: About = field(default_factory=About)
    labels: Path | None = None
    swift: Path | None = None
    plan: Path | None = None
    calibration: Path | None = None
    calibration_size: int = 128
    method: str = "minmax"
    equalize: bool = True


@dataclass(frozen=True, slots=True)
class QuantizeRequest:
    """What is asked of INT8 beyond the graph.

    ``calibration`` is a folder of pictures to calibrate on, ``size`` how many of them. ``budget`` is what accuracy may
    be lost, as text; ``plan`` is a file with the blocks to keep, in its place. A plan is measured on ``judged``
    pictures, ``workers`` and ``ray`` are who measures. Without a ``method`` it is mse, and with ModelOpt minmax.
    """

    calibration: Path | None = None
    size: int = 128
    method: str | None = None
    rounding: str = "nearest"
    equalize: bool = True
    correct_bias: bool = True
    quantizer: str = "onnxruntime"
    budget: str | None = None
    plan: Path | None = None
    judged: int = 64
    workers: int | None = None
    ray: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What the user typed. None means: as the checkpoint says (size), the demo's (checkpoint, images).

    For an engine, ``batch`` and ``size`` are what its ranges are tuned for.
    """

    output: Path
    target: str = "onnx"
    checkpoint: str | None = None
    ema: bool = False
    precision: Precision = Precision.FP32
    size: tuple[int, int] | None = None
    batch: int = 1
    images: Path | None = None
    count: int = 8
    input: InputKind = InputKind.NORMALIZED
    consumer: str | None = None
    opset: int | None = None
    dynamic_batch: bool = False
    dynamic_size: bool = False
    simplify: bool = True
    skip: tuple[str, ...] = ()
    io: Precision = Precision.FP32
    pass_set: str | None = None
    engine: EngineRequest | None = None
    coreml: CoreMLRequest | None = None
    quantize: QuantizeRequest | None = None
    said: tuple[str, ...] = ()
    """What was assumed on the way here, to be told with the rest."""


def with_engine(request: Request, engine: EngineRequest) -> Request:
    """``request`` for the TensorRT target, with what follows from the engine's ranges."""
    size, batch = engine.size, engine.batch or ONE
    return replace(
        request,
        target="tensorrt",
        opset=TENSORRT_OPSET,
        size=None if size is None else (size[0].optimum, size[1].optimum),
        batch=batch.optimum,
        dynamic_batch=not batch.fixed,
        dynamic_size=size is not None and not (size[0].fixed and size[1].fixed),
        engine=engine,
    )


def with_coreml(request: Request, asked: CoreMLRequest) -> Request:
    """``request`` for the Core ML target, with what follows from the sizes that are asked for."""
    return replace(
        request,
        target="coreml",
        size=request.size or (asked.sizes[0] if asked.sizes else None),
        dynamic_size=bool(asked.sizes or asked.flexible),
        coreml=asked,
    )


def with_quantize(request: Request, asked: QuantizeRequest | None) -> Request:
    """``request`` in INT8, or as it is for None; a file for anybody is in the opset that engines are built from."""
    if asked is None:
        return request
    anybody = request.opset is None and request.consumer is None
    return replace(
        request,
        precision=Precision.INT8,
        opset=TENSORRT_OPSET if anybody else request.opset,
        quantize=asked,
    )


def check_names(request: Request) -> None:
    """Raise UnsupportedSpec for an unknown name of anything, with the nearest one, before anything is loaded."""
    passes = sorted(each.name for each in targets.load(request.target).PASSES)
    for name in request.skip:
        _check_known("pass", name, passes)
    if request.consumer is not None:
        _check_known("consumer", request.consumer, tuple(CONSUMERS))
    if request.pass_set is not None:
        _check_known("pass set", request.pass_set, tuple(TENSORRT))
    if request.engine is not None:
        _check_known("backend", request.engine.backend, ("auto", *BACKENDS))
        if request.engine.gpu is not None:
            gpu(request.engine.gpu)


def spec_for(request: Request, checkpoint: Checkpoint) -> ExportSpec:
    """The request with everything the checkpoint decides filled in."""
    side = checkpoint.preprocessing.image_size
    height, width = request.size or (side, side)
    engine = None if request.engine is None else engine_for(request.engine, (height, width))
    asked = request.coreml
    return ExportSpec(
        model=checkpoint.model.config.name,
        num_classes=checkpoint.num_classes,
        target=request.target,
        precision=request.precision,
        height=height,
        width=width,
        batch=request.batch,
        opset=opset_for(request.consumer, request.opset),
        preprocessing=checkpoint.preprocessing,
        labels=checkpoint.labels if asked is None else _labels(asked, checkpoint),
        input=request.input,
        dynamic_batch=request.dynamic_batch,
        dynamic_size=request.dynamic_size,
        simplify=request.simplify,
        consumer=request.consumer,
        skip=request.skip,
        io=request.io,
        pass_set=request.pass_set,
        engine=engine,
        coreml=None if asked is None else coreml_for(asked, (height, width)),
        quantize=None if request.quantize is None else quantize_for(request.quantize, request),
    )


def quantize_for(asked: QuantizeRequest, request: Request) -> QuantizeSpec:
    """What is asked of INT8: what TensorRT reads has FP16 beside it, what others read float32."""
    for_tensorrt = request.target == "tensorrt" or (request.consumer or "").startswith("tensorrt")
    return QuantizeSpec(
        rest="fp16" if for_tensorrt else "fp32",
        method=asked.method or ("mse" if asked.quantizer == "onnxruntime" else "minmax"),
        rounding=asked.rounding,
        equalize=asked.equalize,
        correct_bias=asked.correct_bias and asked.quantizer == "onnxruntime",
        quantizer=asked.quantizer,
        size=asked.size,
    )


def coreml_for(request: CoreMLRequest, size: tuple[int, int]) -> CoreMLSpec:
    """What is asked of Core ML; ``size`` is (height, width), the package's own.

    Raises UnsupportedSpec for labels where nothing is classified, MissingExtra without coremltools.
    """
    if request.labels is not None and request.head == "features":
        raise UnsupportedSpec("feature maps have no labels; leave --labels out")
    if find_spec("coremltools") is None:
        raise MissingExtra("the Core ML lane", "coreml")
    others = tuple(dict.fromkeys(each for each in request.sizes if each != size))
    return CoreMLSpec(
        ios=request.ios,
        head=request.head,
        sizes=request.sizes if request.flexible else others,  # which exclude each other, whatever the sizes are
        flexible=request.flexible,
        weights=None if request.activations and request.weights == "int8" else request.weights,  # they imply it
        activations=request.activations,
        audit=request.audit,
        equalize=request.equalize and request.activations is not None,
        method=request.method if request.activations is not None else "minmax",
        about=request.about,
    )


def _labels(request: CoreMLRequest, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The labels of the file that is given, else the checkpoint's."""
    if request.labels is None:
        return checkpoint.labels
    labels = read_labels(request.labels)
    if len(labels) != checkpoint.num_classes:
        raise UnsupportedSpec(f"{len(labels)} labels for {checkpoint.num_classes} classes; give one label per class")
    return labels


def read_labels(path: Path) -> tuple[str, ...]:
    """Class names, one a line, blank lines left out.

    Raises UnsupportedSpec where the file can't be read or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UnsupportedSpec(f"{path} can't be read: {error.strerror}; give a text file, one label a line") from error
    except UnicodeDecodeError as error:
        raise UnsupportedSpec(f"{path} is not text in UTF-8; give a text file, one label a line") from error
    labels = tuple(line.strip() for line in lines if line.strip())
    if not labels:
        raise UnsupportedSpec(f"{path} holds no label; give a text file, one label a line")
    return labels


def engine_for(request: EngineRequest, size: tuple[int, int]) -> EngineSpec:
    """What is asked of TensorRT, with backend and GPU chosen; ``size`` is (height, width) where no range is given.

    Raises UnsupportedSpec or MissingExtra where no backend can do it.
    """
    chosen = choose(request.backend, request.gpu)
    height, width = request.size or (Range.of(size[0]), Range.of(size[1]))
    return EngineSpec(
        backend=chosen.backend,
        gpu=plain_name(chosen.gpu),  # files are named so
        batch=request.batch or ONE,
        height=height,
        width=width,
        workspace=request.workspace,
        opt_level=request.opt_level,
        timing_cache=request.timing_cache,
    )


def notes_for(request: Request, spec: ExportSpec, checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the user should know before trusting the result."""
    notes = list(request.said)
    if request.checkpoint is None:
        notes.append("no checkpoint given: the bundled demo is used (nextvit_nano trained on digits)")
    for stage, tokens in checkpoint.model.config.dropped_tokens(spec.height, spec.width).items():
        notes.append(
            f"at {spec.height}x{spec.width} the attention of stage {stage} leaves {tokens} tokens unread, "
            "as the trained model itself does at this size"
        )
    notes += [line for line in checkpoint.found if line.startswith("norms")]
    return (*notes, *_notes_on_engine(spec))


def _notes_on_engine(spec: ExportSpec) -> tuple[str, ...]:
    """For whom it is built, and what is to be known of that."""
    if spec.engine is None:
        return ()
    chosen, target = BACKENDS[spec.engine.backend], gpu(spec.engine.gpu)
    notes = [f"built by {chosen.name} for {target.title} ({target.sm}), in {spec.precision}"]
    if remark := chosen.remarks.get(target.capability, {}).get(spec.precision):
        notes.append(remark)
    if spec.engine.opt_level is not None and chosen.without_levels:
        notes.append(f"--opt-level {spec.engine.opt_level} has no effect with {chosen.name}: {chosen.without_levels}")
    return tuple(notes)


def notes_on_images(request: Request) -> tuple[str, ...]:
    """What the user should know of the pictures that a file is verified on."""
    if request.images is not None or (request.checkpoint is None and DEMO_IMAGES.is_dir()):
        return ()
    pictures = "the demo's digits" if DEMO_IMAGES.is_dir() else "noise"
    return (f"no --images given: verified on {pictures}, not on pictures of your task",)


def _check_known(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UnsupportedSpec(f"no {what} is called '{name}'; {hint}choose one of {', '.join(known)}")
