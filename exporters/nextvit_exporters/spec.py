"""What a user asks for, as frozen data without frameworks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from nextvit_exporters.coreml_spec import CoreMLSpec
from nextvit_exporters.engine_spec import EngineSpec
from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.files import sha256_of, size_of
from nextvit_exporters.quantize_spec import QuantizeSpec
from nextvit_models.preprocessing import Preprocessing

MIN_SIDE: Final = 32


class Precision(str, Enum):
    """Numbers the artefact stores and computes in."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"

    def __str__(self) -> str:
        return self.value


class InputKind(str, Enum):
    """What the artefact reads: a normalised float tensor, raw RGB pixels from 0 to 255, or a picture of the system's.

    All are (B, 3, H, W) but ``uint8-nhwc``, which is (B, H, W, 3) as cameras and decoders give it, and ``image``: one
    picture, (1, H, W, 3), in an order of colours that the artefact names itself.
    """

    NORMALIZED = "normalized"
    FLOAT = "float"
    UINT8 = "uint8"
    UINT8_NHWC = "uint8-nhwc"
    IMAGE = "image"

    @property
    def is_uint8(self) -> bool:
        """Whether it reads tensors of eight bits."""
        return self in {InputKind.UINT8, InputKind.UINT8_NHWC}

    @property
    def channels_last(self) -> bool:
        """Whether colours come last."""
        return self in {InputKind.UINT8_NHWC, InputKind.IMAGE}

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """Everything that changes the artefact; two equal specs on one checkpoint give the same bytes.

    Sizes are in pixels. ``dynamic_batch`` and ``dynamic_size`` leave those axes open in the file; ``height``,
    ``width`` and ``batch`` are then what it is verified at first. ``consumer`` names who reads the file, None for
    anybody; ``skip`` names passes that are left out, ``pass_set`` the target's list of them where it has several.
    ``io`` is the type of the output and of a normalised input; ``engine`` and ``coreml`` are what TensorRT or Core ML
    is asked beyond the graph, ``quantize`` is how a graph in INT8 came to be.
    """

    model: str
    num_classes: int
    target: str
    precision: Precision
    height: int
    width: int
    batch: int
    opset: int
    preprocessing: Preprocessing
    labels: tuple[str, ...] = ()
    input: InputKind = InputKind.NORMALIZED
    dynamic_batch: bool = False
    dynamic_size: bool = False
    simplify: bool = True
    consumer: str | None = None
    skip: tuple[str, ...] = ()
    task: str = "classify"
    io: Precision = Precision.FP32
    pass_set: str | None = None
    engine: EngineSpec | None = None
    coreml: CoreMLSpec | None = None
    quantize: QuantizeSpec | None = None

    def __post_init__(self) -> None:
        if min(self.height, self.width) < MIN_SIDE:
            size = f"{self.height}x{self.width}"
            msg = f"{size} is too small; Next-ViT halves an image five times, use {MIN_SIDE} or more"
            raise UnsupportedSpec(msg)
        if self.batch < 1:
            msg = f"a batch of {self.batch} is empty; use --batch 1 or more"
            raise UnsupportedSpec(msg)

    @property
    def stem(self) -> str:
        """File name without suffix: model, task, size, batch, precision, input and consumer."""
        parts = [self.model, self.coreml.head if self.coreml else self.task, *self._sizes(), str(self.precision)]
        if self.quantize is not None:
            parts += self.quantize.stem
        if self.input is not InputKind.NORMALIZED:
            parts.append(str(self.input))
        if self.io is not Precision.FP32:
            parts.append(f"io-{self.io}")
        gpu = None if self.engine is None else self.engine.gpu
        phone = None if self.coreml is None else self.coreml.stem
        parts += [each for each in (self.consumer, self.pass_set, gpu, phone) if each is not None]
        return "_".join(parts)

    def _sizes(self) -> tuple[str, str]:
        """Size and batch, and of an engine the ranges of both."""
        if self.engine is not None:
            batch, height, width = (
                str(each).replace(":", "-") for each in (self.engine.batch, self.engine.height, self.engine.width)
            )
            return height if height == width else f"{height}x{width}", f"b{batch}"
        size = f"{self.height}" if self.height == self.width else f"{self.height}x{self.width}"
        if self.coreml is not None and self.dynamic_size:
            return self.coreml.sizes_in_name(size), f"b{self.batch}"
        return f"{size}dyn" if self.dynamic_size else size, "bdyn" if self.dynamic_batch else f"b{self.batch}"

    @property
    def numbers(self) -> str:
        """What constants are stored in: the precision, and what is beside INT8 or how weights are compressed."""
        beside = self.quantize.rest if self.quantize else None if self.coreml is None else self.coreml.compression
        return str(self.precision) if beside is None else f"{self.precision}, {beside}"

    @property
    def rest(self) -> Precision:
        """What everything beside INT8 is stored and computed in; without INT8 the precision itself."""
        return self.precision if self.quantize is None else Precision(self.quantize.rest)

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """The shape the artefact is built at: (B, 3, H, W), or (B, H, W, 3) where it reads that."""
        return self.shape_at((self.batch, self.height, self.width))

    def shape_at(self, size: tuple[int, int, int]) -> tuple[int, int, int, int]:
        """The input's shape at another (B, H, W)."""
        batch, height, width = size
        return (batch, height, width, 3) if self.input.channels_last else (batch, 3, height, width)

    def as_dict(self) -> dict[str, object]:
        """JSON-ready; ``from_dict`` reads it back."""
        fields = asdict(self)
        return fields | {
            "precision": str(self.precision),
            "input": str(self.input),
            "preprocessing": self.preprocessing.as_dict(),
            "labels": list(self.labels),
            "skip": list(self.skip),
            "io": str(self.io),
            "engine": self.engine and self.engine.as_dict(),
            "coreml": self.coreml and self.coreml.as_dict(),
            "quantize": self.quantize and self.quantize.as_dict(),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> ExportSpec:
        """Read what ``as_dict`` wrote; raises UnsupportedSpec when it is something else."""
        try:
            values = dict(fields) | {
                "precision": Precision(fields["precision"]),
                "input": InputKind(fields["input"]),
                "preprocessing": Preprocessing.from_dict(fields["preprocessing"]),
                "labels": tuple(fields["labels"]),  # type: ignore[arg-type]  # a wrong type is the error below
                "skip": tuple(fields["skip"]),  # type: ignore[arg-type]  # as above
                "io": Precision(fields.get("io", Precision.FP32)),
                "engine": EngineSpec.from_dict(fields["engine"]) if fields.get("engine") else None,  # type: ignore[arg-type]
                "coreml": CoreMLSpec.from_dict(fields["coreml"]) if fields.get("coreml") else None,  # type: ignore[arg-type]
                "quantize": QuantizeSpec.from_dict(fields["quantize"]) if fields.get("quantize") else None,  # type: ignore[arg-type]
            }
            return cls(**values)  # type: ignore[arg-type]  # as above
        except (KeyError, TypeError, ValueError) as error:
            msg = f"the manifest's spec is not one this version reads: {error}; export again"
            raise UnsupportedSpec(msg) from error


def quantize_of(spec: ExportSpec) -> QuantizeSpec:
    """How the spec's graph is quantized; raises ValueError where it isn't."""
    if spec.quantize is None:
        raise ValueError("the spec asks for no INT8")
    return spec.quantize


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far an output may be from its reference: the worst relative root mean square error."""

    relative_rms: float
    measured: str
    """How the figure was arrived at; shown in tables and manifests."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file or folder that exists; the hash was taken after the last write."""

    path: Path
    sha256: str
    size: int
    """Bytes."""

    @classmethod
    def of(cls, path: Path) -> Artifact:
        """What is at ``path`` now."""
        return cls(path, sha256_of(path), size_of(path))
