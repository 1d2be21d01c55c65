"""What a Core ML package is asked to be, as frozen data without frameworks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.quantize_spec import METHODS

RELEASES: Final = (15, 16, 17, 18, 26)
"""Minimum deployment targets, as iOS releases."""
HEADS: Final = ("classify", "logits", "features")
"""What a package returns: label and probabilities, plain logits, or the four feature maps."""
WEIGHTS: Final = ("int8", "lut8", "lut6", "lut4")
"""Weight compressions: whole numbers with a scale per output channel, or a table of 256, 64 or 16 values."""
OLDEST_FOR_WEIGHTS: Final = 16
"""The release that reads compressed weights."""
OLDEST_FOR_ACTIVATIONS: Final = 17
"""The release that computes with int8 activations."""

Shape = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True, slots=True)
class About:
    """What Xcode shows of a package; empty texts are filled in from the checkpoint."""

    author: str = ""
    licence: str = ""
    version: str = ""
    description: str = ""


@dataclass(frozen=True, slots=True)
class CoreMLSpec:
    """Everything beside the graph that changes a package.

    ``sizes`` are further enumerated sizes beside the spec's own, ``flexible`` the smallest and the largest side of a
    range; at most one of both is given. ``keep_fp32`` names the modules, and operations between them, that are computed
    in float32 in an FP16 package; with ``audit`` they are found on images. ``keep`` names the blocks (``features.3``)
    that a compression leaves in FP16.

    For int8 activations channels are rescaled before with ``equalize``, exactly; ``method`` is how scales are taken
    from what values were on the calibration images. ``calibration`` is the fingerprint of those images,
    ``calibration_size`` how many there were; 0 where they are the ones that the package was first verified on.
    """

    ios: int = 16
    head: str = "classify"
    sizes: tuple[Shape, ...] = ()
    flexible: tuple[int, int] | None = None
    weights: str | None = None
    activations: str | None = None
    audit: bool = True
    keep_fp32: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    equalize: bool = False
    method: str = "minmax"
    calibration: str | None = None
    calibration_size: int = 0
    about: About = About()

    def __post_init__(self) -> None:
        for what, value, known in (
            ("target iOS", self.ios, RELEASES),
            ("head", self.head, HEADS),
            ("weight compression", self.weights, (None, *WEIGHTS)),
            ("activation compression", self.activations, (None, "int8")),
            ("calibration method", self.method, METHODS),
        ):
            if value not in known:
                choices = ", ".join(str(each) for each in known if each is not None)
                raise UnsupportedSpec(f"there is no {what} {value}; choose one of {choices}")
        self._check_compression()
        self._check_sizes()

    def _check_compression(self) -> None:
        if self.weights is not None and self.ios < OLDEST_FOR_WEIGHTS:
            raise UnsupportedSpec(f"{self.weights} weights need iOS {OLDEST_FOR_WEIGHTS}; ask for --ios 16 or more")
        if self.activations is not None and self.ios < OLDEST_FOR_ACTIVATIONS:
            raise UnsupportedSpec(f"int8 activations need iOS {OLDEST_FOR_ACTIVATIONS}; ask for --ios 17 or more")
        if self.activations is not None and self.weights not in {None, "int8"}:
            raise UnsupportedSpec(f"int8 activations go with int8 weights, not {self.weights}; leave --weights out")
        if self.equalize and self.activations is None:
            raise UnsupportedSpec("channels are rescaled for int8 activations alone; ask for --activations int8")
        if self.keep and self.compression is None:
            raise UnsupportedSpec(
                "blocks are kept from a compression, which isn't asked for; ask for --activations int8"
            )

    def _check_sizes(self) -> None:
        if self.sizes and self.flexible:
            raise UnsupportedSpec("enumerated sizes and a range of sizes exclude each other; give one")
        if self.flexible is not None and not self.flexible[0] < self.flexible[1]:
            raise UnsupportedSpec(f"{self.flexible[0]}:{self.flexible[1]} is no range of sizes; write MIN:MAX")

    @property
    def compression(self) -> str | None:
        """``w8a8`` for weights and activations in int8, else how weights are compressed; None where nothing is."""
        return "w8a8" if self.activations else self.weights

    @property
    def stem(self) -> str:
        """What of it goes into the file name."""
        return "_".join(each for each in (f"ios{self.ios}", self.compression) if each is not None)

    def sizes_in_name(self, own: str) -> str:
        """What the file name says of sizes: ``64-80-96`` for a range, ``80+64+96`` for enumerated ones.

        ``own`` is the spec's own size as text, 80 here.
        """
        if self.flexible is not None:
            return f"{self.flexible[0]}-{own}-{self.flexible[1]}"
        return "+".join([own, *(f"{h}" if h == w else f"{h}x{w}" for h, w in self.sizes)])

    def as_dict(self) -> dict[str, object]:
        """JSON-ready; ``from_dict`` reads it back."""
        return asdict(self) | {
            "sizes": [list(size) for size in self.sizes],
            "flexible": self.flexible and list(self.flexible),
            "keep_fp32": list(self.keep_fp32),
            "keep": list(self.keep),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> CoreMLSpec:
        """Read what ``as_dict`` wrote; raises KeyError, TypeError or ValueError when it is something else."""
        values = dict(fields) | {
            "sizes": tuple((int(h), int(w)) for h, w in fields["sizes"]),  # type: ignore[attr-defined]  # see above
            "flexible": fields["flexible"] and tuple(int(side) for side in fields["flexible"]),  # type: ignore[attr-defined]  # see above
            "keep_fp32": tuple(fields["keep_fp32"]),  # type: ignore[arg-type]  # see above
            "keep": tuple(fields.get("keep", ())),  # type: ignore[arg-type]  # see above; older packages kept none
            "about": About(**fields["about"]),  # type: ignore[arg-type]  # see above
        }
        return cls(**values)  # type: ignore[arg-type]  # see above
