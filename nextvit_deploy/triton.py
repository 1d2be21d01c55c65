"""A model repository for NVIDIA's Triton Inference Server around a finished engine.

::

    REPOSITORY/
      nextvit_small/
        config.pbtxt        what Triton has to know, in protobuf's text format
        labels.txt          one class a line, where the checkpoint names its classes
        warmup/image.bin    raw input that every instance runs before it serves
        1/model.plan        the engine (TensorRT), or 1/model.onnx (TensorRT-RTX)
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from nextvit_deploy.folders import Kind, check_place, is_filled, published_folder
from nextvit_deploy.tensors import Images, check_images, engine_of, input_dtype, output_dtype
from nextvit_exporters.engine_spec import EngineSpec, Range
from nextvit_exporters.errors import DeployError, OutputNotWritten, UnsupportedSpec
from nextvit_exporters.spec import ExportSpec, Precision
from nextvit_exporters.tensorrt.backends import backend
from nextvit_exporters.to_onnx import INPUT, OUTPUT

_HEADER: Final = "# Written by nextvit-deploy."
_CONFIG: Final = "config.pbtxt"
_LABELS: Final = "labels.txt"
_WARMUP: Final = f"{INPUT}.bin"
_PLAN: Final = "model.plan"
_ONNX: Final = "model.onnx"
_TYPES: Final = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8"}
_WHY_ONNX: Final = (
    "# Triton's TensorRT backend can't load engines of TensorRT-RTX. So this model is the ONNX file that the engine",
    "# was built from, and ONNX Runtime's TensorRT accelerator builds an engine from it for the GPU it finds. Its",
    "# engine cache is off: set trt_engine_cache_enable and trt_engine_cache_path to keep engines between starts.",
)
_WHY_UNBATCHED: Final = (
    "# Triton's batcher would also send batches smaller than this engine takes, so it is off: a request brings a",
    "# whole batch.",
)
_ESCAPES: Final = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def write_triton(
    folder: Path, spec: ExportSpec, engine: Path, onnx: Path, labels: Sequence[str], sample: Images
) -> None:
    """Write the model into the repository ``folder``, whole or not at all; one of the same name is replaced.

    ``sample`` holds one image or more as the artefact reads them, (N, 3, H, W) or (N, H, W, 3), and warms the model
    up. ``labels`` are the classes' names, none where they are unknown; a line break in one is written as a space.
    Raises OutputNotWritten where ``folder`` holds something else than models of this program, UnsupportedSpec where
    labels or sample don't fit the spec, and DeployError where the file to serve is missing.
    """
    asked = engine_of(spec)
    _check_name(spec.model)
    check_images(spec, sample, "warm-up samples")
    lines = _label_lines(spec, labels)
    plan = backend(asked.backend).plan_for_triton
    served = engine if plan else onnx
    if not served.is_file():
        raise DeployError(f"{served} is no file, and Triton needs it; export again")
    config = _config(spec, asked, sample.shape[1:], plan=plan, labelled=bool(labels))
    _check_repository(folder)
    with published_folder(folder / spec.model, _MODEL) as model:
        for each in (model / "1", model / "warmup"):
            each.mkdir()
        shutil.copyfile(served, model / "1" / (_PLAN if plan else _ONNX))
        if labels:
            (model / _LABELS).write_bytes(lines)
        count = 1 if _batched(asked.batch) else asked.batch.optimum
        (model / "warmup" / _WARMUP).write_bytes(_exactly(sample, count).tobytes())
        (model / _CONFIG).write_text(config, encoding="utf-8", newline="\n")


def check_triton_place(folder: Path, spec: ExportSpec) -> None:
    """Raise where ``write_triton`` would write no model of ``spec`` into ``folder``, before any work.

    OutputNotWritten where something else is in the way or the system refuses, UnsupportedSpec where the spec can't
    be served. Leaves nothing behind.
    """
    engine_of(spec)
    _check_name(spec.model)
    _label_lines(spec, spec.labels)
    _check_repository(folder)
    check_place(folder / spec.model, _MODEL)


def quoted(text: str) -> str:
    """A string literal of protobuf's text format; raises UnsupportedSpec for what no UTF-8 can say."""
    _encoded(text)
    return (
        '"' + "".join(_ESCAPES.get(c) or (f"\\{ord(c):03o}" if ord(c) < 32 or ord(c) == 127 else c) for c in text) + '"'
    )


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        broken = text[max(0, error.start - 20) : error.end + 20]
        raise UnsupportedSpec(f"{broken!r} can't be written as UTF-8; rename it") from error


def _label_lines(spec: ExportSpec, labels: Sequence[str]) -> bytes:
    if labels and len(labels) != spec.num_classes:
        raise UnsupportedSpec(f"{len(labels)} labels don't name {spec.num_classes} classes; give one for each, or none")
    return _encoded("".join(" ".join(label.splitlines()) + "\n" for label in labels))


def _check_name(model: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", model):
        raise UnsupportedSpec(f"'{model}' can't name a Triton model; use letters, digits, '_', '-' and '.'")


def _batched(batch: Range) -> bool:
    """Whether Triton may form batches itself: it sends any size from one image to the largest."""
    return not batch.fixed and batch.minimum == 1


def _config(spec: ExportSpec, engine: EngineSpec, sample: tuple[int, ...], *, plan: bool, labelled: bool) -> str:
    """The text of config.pbtxt; ``sample`` is the shape of one image."""
    batch = engine.batch
    height, width = (side.optimum if side.fixed else -1 for side in (engine.height, engine.width))
    image = spec.shape_at((1, height, width))[1:]
    lead = () if _batched(batch) else (batch.optimum if batch.fixed else -1,)
    kind, labels = _TYPES[input_dtype(spec)], (f"label_filename: {quoted(_LABELS)}",) if labelled else ()
    result = (f"data_type: {_TYPES[output_dtype(spec)]}", f"dims: {_dims(*lead, spec.num_classes)}", *labels)
    batcher = f"dynamic_batching {{ preferred_batch_size: {_dims(batch.optimum)} }}"
    lines = [
        _HEADER,
        *(() if plan else _WHY_ONNX),
        *(_WHY_UNBATCHED if lead == (-1,) else ()),
        f"name: {quoted(spec.model)}",
        'platform: "tensorrt_plan"' if plan else 'backend: "onnxruntime"',
        f"max_batch_size: {batch.maximum if _batched(batch) else 0}",
        *_block("input", f"name: {quoted(INPUT)}", f"data_type: {kind}", f"dims: {_dims(*lead, *image)}"),
        *_block("output", f"name: {quoted(OUTPUT)}", *result),
        *_block("instance_group", "kind: KIND_GPU", "count: 1", *(('profile: [ "0" ]',) if plan else ())),
        *((batcher,) if _batched(batch) else ()),
        *(() if plan else _accelerator(spec, engine)),
        *_warmup(kind, sample, batch),
    ]
    return "\n".join(lines) + "\n"


def _accelerator(spec: ExportSpec, engine: EngineSpec) -> list[str]:
    """ONNX Runtime's TensorRT; without a precision it takes the file's own types, which is what INT8 needs."""
    settings = {"precision_mode": "FP16"} if spec.precision is Precision.FP16 else {}
    if engine.workspace is not None:
        settings["max_workspace_size_bytes"] = str(engine.workspace << 20)
    if engine.opt_level is not None:
        settings["trt_builder_optimization_level"] = str(engine.opt_level)
    if not (engine.batch.fixed and engine.height.fixed and engine.width.fixed):
        for name, size in (("min", engine.minimum), ("opt", engine.optimum), ("max", engine.maximum)):
            settings[f"trt_profile_{name}_shapes"] = f"{INPUT}:" + "x".join(map(str, spec.shape_at(size)))
    return [
        "optimization { execution_accelerators { gpu_execution_accelerator [ {",
        '  name: "tensorrt"',
        *(f"  parameters {{ key: {quoted(key)} value: {quoted(value)} }}" for key, value in settings.items()),
        "} ] } }",
    ]


def _warmup(kind: str, sample: tuple[int, ...], batch: Range) -> list[str]:
    """One request with the sample; where Triton batches, it repeats one image to the size the engine is tuned for."""
    dims, size = (sample, batch.optimum) if _batched(batch) else ((batch.optimum, *sample), 1)
    told = f"data_type: {kind} dims: {_dims(*dims)} input_data_file: {quoted(_WARMUP)}"
    return [
        "model_warmup [ {",
        '  name: "sample"',
        f"  batch_size: {size}",
        f"  inputs {{ key: {quoted(INPUT)} value {{ {told} }} }}",
        "} ]",
    ]


def _block(name: str, *fields: str) -> list[str]:
    return [f"{name} [ {{", *(f"  {field}" for field in fields), "} ]"]


def _dims(*sizes: int) -> str:
    return f"[ {', '.join(map(str, sizes))} ]"


def _exactly(images: Images, count: int) -> Images:
    """The first ``count`` images, the last one repeated where there are fewer."""
    taken = images[:count]
    return np.concatenate([taken, np.repeat(taken[-1:], count - len(taken), axis=0)])


def _is_model(folder: Path) -> bool:
    """Whether ``write_triton`` wrote this model's folder."""
    try:
        with (folder / _CONFIG).open(encoding="utf-8") as config:
            return config.readline().rstrip("\n") == _HEADER
    except (OSError, UnicodeDecodeError):
        return False


_MODEL: Final = Kind("Triton model", _is_model, (_CONFIG, _LABELS, f"warmup/{_WARMUP}", f"1/{_PLAN}", f"1/{_ONNX}"))


def _check_repository(folder: Path) -> None:
    """Raise OutputNotWritten unless every entry is a model of ours; neighbours stay whatever they hold besides."""
    what = "Triton repository"
    if is_filled(folder, what) and not all(map(_is_model, folder.iterdir())):
        raise OutputNotWritten(f"{folder} is there and is no {what} of this program; empty it or choose another")
