"""What a bisection found, as data: read by the table, the JSON, the page and the bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

SCHEMA: Final = 1


@dataclass(frozen=True, slots=True)
class Layer:
    """One operation of the artefact that has a counterpart in PyTorch, in the order of execution.

    ``module`` is the model's, ``operation`` the artefact's own name for it, ``error`` the relative root mean square
    error against PyTorch of what it gives, whatever came before; None where it has no counterpart.
    """

    module: str
    operation: str
    kind: str
    error: float | None


@dataclass(frozen=True, slots=True)
class Parting:
    """Where the artefact leaves PyTorch: what goes in agrees, what comes out doesn't.

    ``operations`` are the artefact's own, from the last agreement to the first difference. ``carries`` are modules of
    the model that were folded into this one, such as a norm in front.
    """

    module: str
    operations: tuple[str, ...]
    kind: str
    error: float
    """Relative root mean square of what comes out."""
    input_error: float
    """The largest of what goes in."""
    carries: tuple[str, ...] = ()
    why: str = ""
    """What was seen, in one line."""


@dataclass(frozen=True, slots=True)
class Series:
    """One question's answer at every depth: ``same network``, or ``precision cost``."""

    question: str
    executor: str
    against: str
    tolerance: float
    """Beyond which two tensors have parted."""
    layers: tuple[Layer, ...]
    partings: tuple[Parting, ...]
    """In the order of execution; empty where nothing parts."""


@dataclass(frozen=True, slots=True)
class Bisection:
    """Both questions, layer by layer; ``why`` says what could not be answered."""

    artefact: str
    sha256: str
    series: tuple[Series, ...]
    notes: tuple[str, ...] = ()

    @property
    def parting(self) -> Parting | None:
        """The first place where they part; that of the network where both questions have one."""
        return next((each for series in self.series for each in series.partings), None)

    def as_dict(self) -> dict[str, object]:
        """JSON-ready; ``from_dict`` reads it back. Errors that are no number are strings."""
        from nextvit_deploy.manifest import plain

        fields = {"schema": SCHEMA, **asdict(self)}
        return {key: plain(value) for key, value in fields.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Bisection:
        """Read what ``as_dict`` wrote; raises KeyError, TypeError or ValueError when it is something else."""
        return cls(
            artefact=values["artefact"],
            sha256=values["sha256"],
            series=tuple(_series(each) for each in values["series"]),
            notes=tuple(values["notes"]),
        )


def layers_path(artefact: Path) -> Path:
    """Where what ``bisect`` found is kept: beside the artefact, its name with ``.layers.json`` added."""
    return artefact.with_name(artefact.name + ".layers.json")


def _series(values: Mapping[str, Any]) -> Series:
    return Series(
        question=values["question"],
        executor=values["executor"],
        against=values["against"],
        tolerance=float(values["tolerance"]),
        layers=tuple(
            Layer(**{**each, "error": None if each["error"] is None else float(each["error"])})
            for each in values["layers"]
        ),
        partings=tuple(
            Parting(
                **{
                    **each,
                    "operations": tuple(each["operations"]),
                    "carries": tuple(each["carries"]),
                    "error": float(each["error"]),
                    "input_error": float(each["input_error"]),
                }
            )
            for each in values["partings"]
        ),
    )
