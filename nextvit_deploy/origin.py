"""Where a saved ONNX file comes from: what it records of itself, or what a stranger's inputs and outputs tell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nextvit_deploy.manifest import manifest_path, rewrites
from nextvit_deploy.verify import Names
from nextvit_exporters.errors import CheckpointMismatch, UnsupportedSpec
from nextvit_exporters.files import sha256_of
from nextvit_exporters.passes.base import PassRecord
from nextvit_exporters.spec import ExportSpec, InputKind, Precision
from nextvit_exporters.targets import Saved, Target
from nextvit_models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

_FLOAT, _UINT8, _HALF = 1, 2, 10  # onnx.TensorProto's numbers for them
FLOATS: Final = frozenset({_FLOAT, _HALF})
_KINDS: Final = {_FLOAT: InputKind.NORMALIZED, _HALF: InputKind.NORMALIZED, _UINT8: InputKind.UINT8}


def read(target: Target, path: Path) -> Saved:
    """What the file says of itself; raises UnsupportedSpec when its own record is damaged."""
    try:
        saved = target.read(path)
    except (ValueError, RecursionError) as error:  # the record is no JSON
        raise UnsupportedSpec(f"the manifest inside {path.name} is damaged: {error}; export it again") from error
    record: object = saved.provenance
    if record is not None and not isinstance(record, Mapping):
        raise UnsupportedSpec(f"the manifest inside {path.name} is damaged; export it again")
    return saved


def recorded_spec(recorded: Mapping[str, object]) -> ExportSpec:
    """The spec a file of this tool was built from; raises UnsupportedSpec when it holds none."""
    fields = recorded.get("spec")
    if not isinstance(fields, Mapping):
        raise UnsupportedSpec("the manifest inside the file holds no spec; export it again")
    return ExportSpec.from_dict(fields)


def strangers_spec(path: Path, spec: ExportSpec) -> tuple[ExportSpec, Names]:
    """``spec`` with what a file of another tool tells of itself: shape, dtype, opset, and its names.

    Raises UnsupportedSpec unless it reads one (N, 3, H, W) image batch and returns one tensor.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        what = f"{len(inputs)} inputs and {len(model.graph.output)} outputs"
        raise UnsupportedSpec(f"{path.name} has {what}; only a classifier's one image and one output can be compared")
    sizes, dtype = _shape(inputs[0]), inputs[0].type.tensor_type.elem_type
    if len(sizes) != 4 or sizes[1] not in {3, None} or dtype not in _KINDS:
        raise UnsupportedSpec(
            f"{path.name} reads {inputs[0].name} of shape {_shown(sizes)} and ONNX type {dtype}; only (N, 3, H, W) in "
            "float32, float16 or uint8 can be compared"
        )
    batch, _, height, width = sizes
    told = replace(
        spec,
        precision=Precision.FP16 if _is_half(model) else Precision.FP32,
        height=height or spec.height,
        width=width or spec.width,
        batch=batch or 1,
        opset=max((each.version for each in model.opset_import if each.domain in {"", "ai.onnx"}), default=spec.opset),
        input=_KINDS[dtype],
        io=Precision.FP16 if _HALF in {dtype, model.graph.output[0].type.tensor_type.elem_type} else Precision.FP32,
        dynamic_batch=batch is None,
        dynamic_size=height is None or width is None,
    )
    return told, Names(inputs[0].name, model.graph.output[0].name)


def check_same_model(path: Path, spec: ExportSpec, checkpoint: Checkpoint) -> None:
    """Raise CheckpointMismatch when the file records another variant or number of classes."""
    if spec.model != checkpoint.model.config.name or spec.num_classes != checkpoint.num_classes:
        raise CheckpointMismatch(
            f"{path.name} was made from a {spec.model} with {spec.num_classes} classes, {checkpoint.name} is a "
            f"{checkpoint.model.config.name} with {checkpoint.num_classes}; give its own --checkpoint"
        )


def differences(
    path: Path, recorded: Mapping[str, object], spec: ExportSpec, checkpoint: Checkpoint, passes: Sequence[PassRecord]
) -> tuple[str, ...]:
    """Notes on what would make a file of this tool differ from its checkpoint, or has changed since it was built."""
    notes = other_source(recorded, spec, checkpoint)
    if recorded.get("passes") != rewrites(passes):
        notes.append("the file was made with other passes than this version applies; export it again")
    if _changed(path):
        notes.append(f"{path.name} has changed since {manifest_path(path).name} was written")
    return tuple(notes)


def other_source(recorded: Mapping[str, object], spec: ExportSpec, checkpoint: Checkpoint) -> list[str]:
    """Notes where a file of this tool was made from another checkpoint than the one at hand."""
    notes: list[str] = []
    source = recorded.get("checkpoint")
    if not isinstance(source, Mapping) or source.get("fingerprint") != checkpoint.fingerprint:
        notes.append(
            f"the file was made from other weights than {checkpoint.name}; give its own checkpoint with --checkpoint"
        )
    if spec.preprocessing != checkpoint.preprocessing or spec.labels != checkpoint.labels:
        notes.append(f"the file records other preprocessing or class names than {checkpoint.name}")
    return notes


def _changed(path: Path) -> bool:
    """Whether a manifest lies beside the file and names other bytes."""
    try:
        recorded = json.loads(manifest_path(path).read_bytes())["artifact"]["sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return bool(recorded != sha256_of(path))


def _shape(value: ValueInfoProto) -> list[int | None]:
    """Sizes by axis; None where the file leaves one open."""
    return [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]


def _shown(sizes: Sequence[int | None]) -> str:
    return f"({', '.join('open' if size is None else str(size) for size in sizes)})"


def _is_half(model: ModelProto) -> bool:
    return any(tensor.data_type == _HALF for tensor in model.graph.initializer)
