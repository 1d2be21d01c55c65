"""What kit.json and verdict.json are made of, field by field: both come back from another machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from nextvit_deploy.kit.device import TRT_NAMES

Rule: TypeAlias = Callable[[object], bool]
Shape: TypeAlias = "Mapping[str, Rule | Shape]"
_LARGEST: Final = 1e300
"""Beyond any figure that check.py writes, and still a number in every JSON."""


def misfit(value: Mapping[str, Any], shape: Shape, above: str = "") -> str | None:
    """What is wrong with the first field that doesn't fit, in words, None where all do; ``above`` is where it lies."""
    for name, rule in shape.items():
        where, found = f"{above}{name}", value.get(name)
        if isinstance(rule, Mapping):
            wrong = misfit(found, rule, f"{where}.") if isinstance(found, dict) else _missing(where)
        else:
            wrong = None if rule(found) else _missing(where)
        if wrong:
            return wrong
    if value.keys() - shape.keys():
        return f"{repr(above[:-1]) if above else 'it'} has fields that check.py doesn't write"
    return None


def text(value: object) -> bool:
    """A line of printable text, maybe empty."""
    return isinstance(value, str) and value.isprintable()


def count(value: object) -> bool:
    """A whole number, none negative."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def number(value: object) -> bool:
    """A finite number, none negative."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _LARGEST


def texts(value: object) -> bool:
    """A list of texts."""
    return isinstance(value, list) and all(map(text, value))


def counts(value: object) -> bool:
    """A list of whole numbers."""
    return isinstance(value, list) and all(map(count, value))


def flag(value: object) -> bool:
    """True or false."""
    return isinstance(value, bool)


def hashes(value: object) -> bool:
    """SHA-256 by file name."""
    return isinstance(value, dict) and "model.onnx" in value and all(map(text, value.values()))


def _type_name(value: object) -> bool:
    return isinstance(value, str) and value in TRT_NAMES


def _missing(where: str) -> str:
    return f"'{where}' is missing or of another kind"


_TOLERANCE: Final[Shape] = {"relative_rms": number, "measured": text}
_END: Final[Shape] = {"name": text, "dtype": _type_name}
KIT: Final[Shape] = {
    "files": hashes,
    "manifest": lambda value: isinstance(value, str),  # a path, of whatever characters
    "input": _END,
    "output": _END,
    "gpu": {"name": text, "capability": text},
    "dtypes": {"network": texts, "engine": texts, "required": text},
    "tolerance": _TOLERANCE,
}
"""What merging reads of kit.json."""
VERDICT: Final[Shape] = {
    "schema": count,
    "kit": text,
    "files": hashes,
    "model": text,
    "date": text,
    "verdict": text,
    "why": text,
}
"""A verdict without a measurement."""
_PERCENTILES: Final[Shape] = {"p50": number, "p90": number, "p99": number}
_MEASURED: Final[Shape] = {
    "gpu": {"name": text, "capability": text, "driver": text},
    "tensorrt": text,
    "engine": {"sha256": text, "bytes": count},
    "kernels": count,
    "tolerance": _TOLERANCE,
    "latency_ms": {
        "shape": counts,
        "iterations": count,
        "without transfers": _PERCENTILES,
        "with transfers": _PERCENTILES,
    },
}
MEASURED: Final = frozenset({*_MEASURED, "dtypes", "comparison"})
"""What a verdict says more where the engine was executed."""


def measured(kit: Mapping[str, Any], comparison: object) -> Shape:
    """The shape of a verdict with a measurement; how much of ``comparison`` there is follows from what it says."""
    ends = {kit[end]["name"]: text for end in ("input", "output")}
    dtypes: Shape = {"network": texts, "engine": texts, "told by kernels": count, **ends}
    seen: Shape = {"images": count, "finite": flag}
    told = comparison if isinstance(comparison, dict) else {}
    if "shape" in told:
        seen = {"shape": counts, "expected shape": counts}
    elif told.get("finite") is not False:
        seen = {**seen, "relative_rms": number, "max_abs": number, "top1": number}
    return {**VERDICT, **_MEASURED, "dtypes": dtypes, "comparison": seen}
