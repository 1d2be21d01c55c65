"""What an INT8 artefact is asked to be, as frozen data without frameworks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

from nextvit_exporters.errors import UnsupportedSpec

METHODS: Final = ("minmax", "entropy", "percentile", "mse")
"""How an activation's step is taken from what its values were on the calibration images."""
ROUNDINGS: Final = ("nearest", "gptq")
"""How weights are brought onto their steps: each to the nearest, or with the error of one fed into the next."""
QUANTIZERS: Final = ("onnxruntime", "modelopt")
"""Who puts QuantizeLinear and DequantizeLinear into the graph."""
MODELOPT_METHODS: Final = ("minmax", "entropy")
RESTS: Final = ("fp16", "fp32")
"""What computes beside INT8."""


@dataclass(frozen=True, slots=True)
class QuantizeSpec:
    """Everything beside the graph that changes an INT8 artefact.

    ``rest`` is the type of what isn't INT8. ``keep`` names the blocks (``features.3``) that stay in it. With
    ``equalize`` channels are rescaled before, exactly; with ``correct_bias`` biases make up for what rounded weights
    move the outputs by on average. ``images`` and ``calibration`` are the SHA-256 of the calibration images and of what
    was found on them; None until they were looked at.
    """

    rest: str = "fp16"
    method: str = "mse"
    rounding: str = "nearest"
    equalize: bool = True
    correct_bias: bool = True
    quantizer: str = "onnxruntime"
    keep: tuple[str, ...] = ()
    size: int = 128
    """Calibration images."""
    images: str | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        for what, value, known in (
            ("calibration method", self.method, METHODS),
            ("rounding", self.rounding, ROUNDINGS),
            ("quantizer", self.quantizer, QUANTIZERS),
            ("type beside int8", self.rest, RESTS),
        ):
            if value not in known:
                raise UnsupportedSpec(f"there is no {what} {value}; choose one of {', '.join(known)}")

        self._check_modelopt()

    def _check_modelopt(self) -> None:
        if self.quantizer != "modelopt":
            return
        if self.method not in MODELOPT_METHODS:
            raise UnsupportedSpec(f"ModelOpt calibrates by {' or '.join(MODELOPT_METHODS)}, not {self.method}")
        if self.rounding != "nearest":
            raise UnsupportedSpec(f"ModelOpt rounds weights by itself; leave --rounding {self.rounding} out")

    @property
    def own_steps(self) -> bool:
        """Whether the steps are this tool's own, so that it can say what every number in the file has to be."""
        return self.quantizer == "onnxruntime"

    @property
    def stem(self) -> tuple[str, ...]:
        """What of it goes into the file name."""
        told = {"gptq": self.rounding == "gptq", "modelopt": self.quantizer == "modelopt"}
        return tuple(name for name, is_so in told.items() if is_so)

    def as_dict(self) -> dict[str, object]:
        """JSON-ready; ``from_dict`` reads it back."""
        return asdict(self) | {"keep": list(self.keep)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> QuantizeSpec:
        """Read what ``as_dict`` wrote; raises KeyError, TypeError or ValueError when it is something else."""
        values = dict(fields) | {"keep": tuple(fields["keep"])}  # type: ignore[arg-type]  # see above
        return cls(**values)  # type: ignore[arg-type]  # see above
