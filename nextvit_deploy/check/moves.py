"""What moved between two manifests of what was asked for alike, and whether it moved further than is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from nextvit_deploy.check import figures
from nextvit_deploy.check.baseline import BaselineEntry
from nextvit_deploy.check.limits import Regression
from nextvit_deploy.check.result import Move

NOT_MEASURED: Final = "not measured"
_ABSENT: Final = "absent"
_DIGITS: Final = 12
"""Of a fingerprint."""
_ROUNDING: Final = 1e-9
"""A product of a figure and a ratio is off by less, so that exactly as much as is allowed is allowed."""


def moves(
    manifest: Mapping[str, Any], before: BaselineEntry, allowed: Regression, latency: float | None = None
) -> tuple[Move, ...]:
    """Errors, size, kernels and latency beside the baseline's, then what else is different.

    The former are there whether they moved or not. A figure that the baseline has and now is missing reads ``not
    measured``, with the limit that can't be held against it.
    """
    return (
        *_errors(manifest, before, allowed),
        *_sizes(manifest, before, allowed),
        *_latency(latency, before, allowed),
        *_counts(manifest, before),
        *_others(manifest, before),
    )


def _errors(manifest: Mapping[str, Any], before: BaselineEntry, allowed: Regression) -> Iterator[Move]:
    then, now = figures.errors(before.manifest), figures.errors(manifest)
    for question in dict.fromkeys([*then, *now]):
        pair = then.get(question), now.get(question)
        yield from _move(f"error, {question}", pair, allowed.error_ratio, figures.ERROR, allowed.error_floor)


def _sizes(manifest: Mapping[str, Any], before: BaselineEntry, allowed: Regression) -> Iterator[Move]:
    sizes = figures.size(before.manifest), figures.size(manifest)
    yield from _move("size", sizes, allowed.size_ratio, figures.SIZE)
    counts = figures.kernels(before.manifest), figures.kernels(manifest)
    yield from _move(str(manifest["unit"]), counts, allowed.kernels_ratio, (_whole,))


def _latency(latency: float | None, before: BaselineEntry, allowed: Regression) -> Iterator[Move]:
    yield from _move("latency over PyTorch's", (before.latency, latency), allowed.latency_ratio, figures.RATIO)


def _move(
    what: str,
    pair: tuple[float | None, float | None],
    ratio: float | None,
    texts: Sequence[Callable[[float], str]],
    floor: float = 0.0,
) -> Iterator[Move]:
    """One figure; nothing where it is on neither side. What is new has nothing to be held against."""
    then, now = pair
    if then is None and now is None:
        return
    limit = None if ratio is None or then is None else max(then * ratio, floor)
    text = figures.telling_apart(texts, then, now, limit)
    told = (NOT_MEASURED if each is None else text(each) for each in pair)
    allowed = None if limit is None else f"at most {text(limit)}"
    yield Move(what, next(told), next(told), allowed, limit is not None and now is not None and _beyond(now, limit))


def _beyond(now: float, limit: float) -> bool:
    """Whether a figure is past its limit; NaN always is, unless the baseline is NaN, too."""
    if math.isnan(now) or math.isnan(limit):
        return math.isnan(now) and not math.isnan(limit)
    return now > limit * (1 + _ROUNDING)


def _counts(manifest: Mapping[str, Any], before: BaselineEntry) -> Iterator[Move]:
    """Every kind of operation whose count changed."""
    then, now = before.manifest["ops"], manifest["ops"]
    for kind in sorted({*then, *now}):
        counts = int(then.get(kind, 0)), int(now.get(kind, 0))
        if counts[0] != counts[1]:
            yield Move(f"{manifest['unit']}, {kind}", str(counts[0]), str(counts[1]))


def _others(manifest: Mapping[str, Any], before: BaselineEntry) -> Iterator[Move]:
    """Versions and weights that are other ones."""
    then, now = before.manifest["versions"], manifest["versions"]
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            yield Move(f"version of {name}", str(then.get(name, _ABSENT)), str(now.get(name, _ABSENT)))
    weights = before.fingerprint, str(manifest["checkpoint"]["fingerprint"])
    if weights[0] != weights[1]:
        yield Move("weights, sha256", weights[0][:_DIGITS], weights[1][:_DIGITS])


def _whole(count: float) -> str:
    return str(math.floor(count * (1 + _ROUNDING)))
