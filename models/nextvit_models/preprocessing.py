"""How an image becomes the tensor a checkpoint was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from nextvit_models.errors import DeployError

INTERPOLATIONS: Final = ("nearest", "bilinear", "bicubic", "lanczos")
_MIN_SIZE: Final = 32

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Resize the short side to ``image_size / crop_pct``, crop the centre, scale to 0-1, normalise.

    ``mean`` and ``std`` are per channel (red, green, blue) on the 0-1 scale; ``image_size`` is the side of the
    square crop in pixels. The defaults are those of ImageNet training. Values out of range raise ``DeployError``.
    """

    mean: Triple = (0.485, 0.456, 0.406)
    std: Triple = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.95
    image_size: int = 224

    def __post_init__(self) -> None:
        if wrong := self._why_not():
            raise DeployError(f"unusable preprocessing: {wrong}")

    def _why_not(self) -> str | None:
        if any(len(values) != 3 for values in (self.mean, self.std)):
            return f"mean and std need three values each, not {self.mean} and {self.std}"
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)) or min(self.std) <= 0:
            return f"mean and std must be finite and std positive, not {self.mean} and {self.std}"
        if self.interpolation not in INTERPOLATIONS:
            return f"interpolation must be one of {', '.join(INTERPOLATIONS)}, not {self.interpolation!r}"
        if not 0 < self.crop_pct <= 1:
            return f"crop_pct must lie in (0, 1], not {self.crop_pct}"
        if self.image_size < _MIN_SIZE:
            return f"image_size must be at least {_MIN_SIZE} pixels, not {self.image_size}"
        return None

    def cover(self, side: int) -> int:
        """Pixels to resize to, for a centre crop of ``side``: rounded down, as timm does."""
        return math.floor(side / self.crop_pct)

    def as_dict(self) -> dict[str, object]:
        """Field names to JSON values; ``from_dict`` reads it back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: object) -> Preprocessing:
        """Read what ``as_dict`` wrote, or a part of it: absent fields keep their defaults.

        Unknown fields and wrong types raise ``DeployError``.
        """
        if not isinstance(data, Mapping):
            raise DeployError(f"unusable preprocessing: expected an object with fields, not {data!r}")
        default = cls()
        unknown = sorted(str(key) for key in data if key not in default.as_dict())
        if unknown:
            raise DeployError(f"unusable preprocessing: unknown field {unknown[0]!r}")
        return cls(
            mean=_triple(data.get("mean", default.mean), "mean"),
            std=_triple(data.get("std", default.std), "std"),
            interpolation=str(data.get("interpolation", default.interpolation)),
            crop_pct=_number(data.get("crop_pct", default.crop_pct), "crop_pct"),
            image_size=_whole(data.get("image_size", default.image_size), "image_size"),
        )


def _number(value: object, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DeployError(f"unusable preprocessing: {field} must be a number, not {value!r}")
    return float(value)


def _whole(value: object, field: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DeployError(f"unusable preprocessing: {field} must be a whole number, not {value!r}")
    return value


def _triple(value: object, field: str) -> Triple:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3:
        raise DeployError(f"unusable preprocessing: {field} must be three numbers, not {value!r}")
    first, second, third = (_number(item, field) for item in value)
    return first, second, third
