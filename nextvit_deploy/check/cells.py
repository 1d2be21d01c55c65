"""One row of a check: what is made, or which artefact is verified, and in what."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Final

LANES: Final = ("onnx", "trt", "coreml")
"""As the commands are called; ``onnx`` of targets.names() is ``onnx``, ``trt`` is ``tensorrt``."""
PRECISIONS: Final = ("fp32", "fp16", "int8")
PASSES: Final = ("all", "none")


@dataclass(frozen=True, slots=True)
class Cell:
    """What one process does: export a checkpoint and verify the saved file, or verify an artefact that is there.

    Everything in it is plain data, and everything that changes the result is in it. None means: as the checkpoint
    says (``size``), the demo (``checkpoint``), the demo's pictures (``images``, ``calibration``). ``artefact`` is the
    path of a saved artefact to verify; lane, precision and the rest are then the artefact's own and empty here.
    Paths are absolute.
    """

    name: str
    """Unique in a check, and the name of its folder below the output: ``demo-onnx-fp16-64-b1``."""
    checkpoint: str | None = None
    ema: bool = False
    artefact: str | None = None
    lane: str = ""
    precision: str = ""
    size: tuple[int, int] | None = None
    batch: int = 1
    passes: str = "all"
    """``none`` leaves every pass of the target out."""
    gpu: str | None = None
    """Of an engine: who it is built for."""
    ios: int | None = None
    """Of a package: the oldest iOS; None for 16, and for 17 where activations are in int8."""
    images: str | None = None
    count: int = 8
    calibration: str | None = None
    calibration_size: int = 128
    layers: bool = True
    """Whether each layer's error is measured as well."""
    pictures: int | None = None
    """How many pictures a made artefact is evaluated over, for their worst ones and its accuracy; None for none."""
    latency: bool = False
    """Whether the latency on this machine's CPU is measured, as a ratio to PyTorch's."""

    def __str__(self) -> str:
        return self.name

    def as_dict(self) -> dict[str, object]:
        """JSON-ready; ``from_dict`` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> Cell:
        """Read what ``as_dict`` wrote."""
        known = {each.name for each in fields(cls)}
        size = values.get("size")
        given = {key: value for key, value in values.items() if key in known}
        return cls(**given | {"size": tuple(size) if isinstance(size, list | tuple) else None})  # type: ignore[arg-type]  # JSON's own types
