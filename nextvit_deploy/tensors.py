"""What an engine reads and returns, for everything that stands around one: its types, and images that fit it."""

from __future__ import annotations

from nextvit_exporters.engine_spec import EngineSpec
from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.executors.base import Array
from nextvit_exporters.spec import ExportSpec, InputKind, Precision

Images = Array
"""As the artefact reads them; ``check_images`` holds type and shape against the spec."""


def engine_of(spec: ExportSpec) -> EngineSpec:
    """What the spec asks of TensorRT; raises UnsupportedSpec when that is nothing."""
    if spec.engine is None:
        raise UnsupportedSpec("this export makes no engine; use the trt command")
    return spec.engine


def input_dtype(spec: ExportSpec) -> str:
    """NumPy's name of what the artefact reads."""
    if spec.input.is_uint8:
        return "uint8"
    return "float16" if spec.input is InputKind.NORMALIZED and spec.io is Precision.FP16 else "float32"


def output_dtype(spec: ExportSpec) -> str:
    """NumPy's name of what the artefact returns."""
    return "float16" if spec.io is Precision.FP16 else "float32"


def check_images(spec: ExportSpec, images: Images, what: str) -> None:
    """Raise UnsupportedSpec unless the engine reads ``images``, (N, 3, H, W) or (N, H, W, 3) with at least one.

    ``what`` names them in the error. Their number is free: batches are made of them later.
    """
    engine, expected = engine_of(spec), input_dtype(spec)
    nhwc = spec.input is InputKind.UINT8_NHWC
    channels, size = (images.shape[-1:], images.shape[1:-1]) if nhwc else (images.shape[1:2], images.shape[2:])
    shaped = images.ndim == 4 and len(images) > 0 and channels == (3,)
    if not shaped or size[0] not in engine.height or size[1] not in engine.width or str(images.dtype) != expected:
        order = "N, H, W, 3" if nhwc else "N, 3, H, W"
        raise UnsupportedSpec(
            f"{what} of shape {images.shape} and type {images.dtype} don't fit the engine, which reads ({order}) "
            f"{expected}, height {engine.height}, width {engine.width}"
        )
