"""What a TensorRT engine is asked to be, as frozen data without frameworks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from nextvit_exporters.errors import UnsupportedSpec

OPT_LEVELS: Final = range(6)
"""TensorRT's builder optimisation levels."""
MOST_WORKSPACE: Final = 1 << 20
"""MiB; TensorRT counts bytes in 64 bits, and no GPU has as many."""


@dataclass(frozen=True, slots=True)
class Range:
    """Sizes of one axis: the smallest, the one the engine is tuned for, and the largest."""

    minimum: int
    optimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            sizes = f"{self.minimum}:{self.optimum}:{self.maximum}"
            raise UnsupportedSpec(f"{sizes} is no range; write MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX")

    @classmethod
    def of(cls, size: int) -> Range:
        """The range that holds one size only."""
        return cls(size, size, size)

    @property
    def fixed(self) -> bool:
        """Whether the axis has one size."""
        return self.minimum == self.maximum

    def __contains__(self, size: int) -> bool:
        return self.minimum <= size <= self.maximum

    def __str__(self) -> str:
        return str(self.minimum) if self.fixed else f"{self.minimum}:{self.optimum}:{self.maximum}"

    @classmethod
    def from_text(cls, text: str) -> Range:
        """Read ``8`` or ``1:8:32``; raises UnsupportedSpec for anything else."""
        found = re.fullmatch(r"(\d{1,6})(?::(\d{1,6}):(\d{1,6}))?", text, re.ASCII)
        if found is None:
            raise UnsupportedSpec(f"'{text}' is no range; write one number, or MIN:OPT:MAX such as 1:8:32")
        first = int(found[1])
        return cls(first, int(found[2]), int(found[3])) if found[2] else cls.of(first)


ONE: Final = Range.of(1)


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Everything beside the ONNX graph that changes an engine.

    ``backend`` is a name in ``tensorrt.backends.BACKENDS``, ``gpu`` one in ``tensorrt.backends.GPUS``. Sizes are in
    images and pixels, the workspace in MiB; None leaves TensorRT's own default. ``timing_cache`` is a file of earlier
    timings; artefacts record its name alone, so that their bytes don't depend on a folder.
    """

    backend: str
    gpu: str
    batch: Range
    height: Range
    width: Range
    workspace: int | None = None
    opt_level: int | None = None
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.opt_level is not None and self.opt_level not in OPT_LEVELS:
            raise UnsupportedSpec(f"there is no optimisation level {self.opt_level}; choose 0 to {OPT_LEVELS[-1]}")
        if self.workspace is not None and self.workspace < 1:
            raise UnsupportedSpec(f"a workspace of {self.workspace} MiB is none; give 1 or more")
        if self.workspace is not None and self.workspace > MOST_WORKSPACE:
            raise UnsupportedSpec(f"no GPU has a workspace of {self.workspace} MiB; give {MOST_WORKSPACE} or less")

    @property
    def minimum(self) -> tuple[int, int, int]:
        """(B, H, W), the smallest the engine takes."""
        return self.batch.minimum, self.height.minimum, self.width.minimum

    @property
    def optimum(self) -> tuple[int, int, int]:
        """(B, H, W) the engine is tuned for."""
        return self.batch.optimum, self.height.optimum, self.width.optimum

    @property
    def maximum(self) -> tuple[int, int, int]:
        """(B, H, W), the largest the engine takes."""
        return self.batch.maximum, self.height.maximum, self.width.maximum

    def as_dict(self) -> dict[str, object]:
        """JSON-ready; ``from_dict`` reads it back."""
        ranges = {axis: str(getattr(self, axis)) for axis in ("batch", "height", "width")}
        return asdict(self) | ranges | {"timing_cache": self.timing_cache and self.timing_cache.name}

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> EngineSpec:
        """Read what ``as_dict`` wrote; raises UnsupportedSpec, TypeError or KeyError when it is something else."""
        ranges = {axis: Range.from_text(str(fields[axis])) for axis in ("batch", "height", "width")}
        cache = fields["timing_cache"]
        paths = {"timing_cache": None if cache is None else Path(str(cache))}
        return cls(**(dict(fields) | ranges | paths))  # type: ignore[arg-type]  # a wrong type is the caller's error
