"""What the tables, the files for CI and the judgement read out of a manifest, and how it is written in one line."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from nextvit_deploy.check.cells import Cell
from nextvit_exporters.targets import PRECISION_COST

_LANES: Final[Mapping[str, str]] = {"tensorrt": "trt"}
"""Targets that are called otherwise than their command."""
_NOT_TEXT: Final = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML has no place for, and the control characters that terminals obey."""


def number(value: object) -> float:
    """A figure of a manifest, where those that JSON has no word for are text; raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def errors(manifest: Mapping[str, Any]) -> dict[str, float | None]:
    """The worst relative root mean square error of each question; None where nothing was compared."""
    found: dict[str, float | None] = {}
    for check in manifest["checks"]:
        worst, seen = found.get(check["question"]), worst_of(check)
        found[check["question"]] = seen if worst is None else worst if seen is None else larger(worst, seen)
    return found


def worst_of(check: Mapping[str, Any]) -> float | None:
    """The worst error of one check over its outputs, NaN if one is; None where nothing was compared."""
    worst: float | None = None
    for comparison in check["comparisons"]:
        seen = number(comparison["relative_rms"])
        worst = seen if worst is None else larger(worst, seen)
    return worst


def larger(one: float, other: float) -> float:
    """The larger of two errors; NaN is larger than anything."""
    return other if other > one or math.isnan(other) else one


def precision_cost(manifest: Mapping[str, Any]) -> float | None:
    """The error of the stored precision; None where it wasn't measured."""
    return errors(manifest).get(PRECISION_COST)


def size(manifest: Mapping[str, Any]) -> int:
    """The artefact's bytes."""
    return int(manifest["artifact"]["bytes"])


def kernels(manifest: Mapping[str, Any]) -> int | None:
    """How many kernels, nodes or operations there are; None where they could not be counted."""
    return sum(int(count) for count in manifest["ops"].values()) or None


def lane_and_precision(cell: Cell, manifest: Mapping[str, Any] | None) -> tuple[str, str]:
    """What limits go by: the cell's own, or of an artefact that was there what its manifest says.

    A package with int8 activations is an INT8 one, whatever else is in it.
    """
    if cell.artefact is None or manifest is None:
        return cell.lane, cell.precision
    spec = manifest["spec"]
    target = str(spec["target"])
    int8 = target == "coreml" and (spec.get("coreml") or {}).get("activations") == "int8"
    return _LANES.get(target, target), "int8" if int8 else str(spec["precision"])


def about(cell: Cell, manifest: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Figures of a row by name, as text: for the files that a CI reads."""
    if manifest is None:
        return
    lane, precision = lane_and_precision(cell, manifest)
    yield from {"target": lane, "precision": precision}.items()
    for question, error in errors(manifest).items():
        yield f"error, {question}", "not measured" if error is None else repr(error)
    yield "size in bytes", str(size(manifest))
    yield f"{manifest['unit']}", str(kernels(manifest) or "not counted")
    yield "sha256", str(manifest["artifact"]["sha256"])
    yield "checkpoint", str(manifest["checkpoint"]["fingerprint"])


def error_text(error: float | None) -> str:
    """An error for a table; nothing where there is none."""
    return "" if error is None else f"{error:.1e}"


def size_text(count: float) -> str:
    """Bytes for a table."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _bytes(count: float) -> str:
    return f"{count:.0f} bytes"


ERROR: Final[tuple[Callable[[float], str], ...]] = ("{:.1e}".format, "{:.3e}".format, "{:.6e}".format)
SIZE: Final[tuple[Callable[[float], str], ...]] = (size_text, _bytes)
RATIO: Final[tuple[Callable[[float], str], ...]] = ("{:.2f}".format, "{:.4f}".format)
"""How a figure is written, with more and more digits."""


def telling_apart(texts: Sequence[Callable[[float], str]], *values: float | None) -> Callable[[float], str]:
    """The shortest way to write the values in which different ones look different; the longest where none does."""
    different = {each for each in values if each is not None and not math.isnan(each)}
    return next((text for text in texts if len({text(each) for each in different}) == len(different)), texts[-1])


def seconds_text(seconds: float) -> str:
    """A duration for a table."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{seconds:.1f} s" if seconds < 60 else f"{minutes} min {rest:02d} s"


def clean(text: str) -> str:
    """Without what XML forbids and terminals obey: names of files may hold anything."""
    return _NOT_TEXT.sub("", text)


def one_line(text: str) -> str:
    """The same on one line."""
    return " ".join(clean(text).split())
