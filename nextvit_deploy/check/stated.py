"""The limits that a configuration states: tolerances, budgets, how far figures may move."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

from nextvit_deploy.check.cells import LANES, PRECISIONS
from nextvit_deploy.check.limits import Budget, Limits, Regression
from nextvit_deploy.check.tables import Table, shown
from nextvit_exporters.targets import COST_AT_WORST, ON_DEVICE, PRECISION_COST, SAME_NETWORK

_LIKE_FLOAT: Final = {SAME_NETWORK: 1e-5, PRECISION_COST: 1e-5}
OWN_TOLERANCES: Final[Mapping[tuple[str, str], Mapping[str, float]]] = MappingProxyType(
    {
        ("onnx", "fp32"): _LIKE_FLOAT,
        ("onnx", "fp16"): {SAME_NETWORK: 1e-5, PRECISION_COST: 1e-2},
        ("onnx", "int8"): {SAME_NETWORK: 1e-5, PRECISION_COST: 1e-1},
        ("trt", "fp32"): _LIKE_FLOAT | {ON_DEVICE: 1e-4},
        ("trt", "fp16"): {SAME_NETWORK: 1e-5, PRECISION_COST: 1e-2, ON_DEVICE: 1e-2},
        ("trt", "int8"): {SAME_NETWORK: 1e-5, PRECISION_COST: 1e-1, ON_DEVICE: 1e-1},
        ("coreml", "fp32"): {SAME_NETWORK: 1e-9, PRECISION_COST: 1e-5, ON_DEVICE: 1e-2},
        ("coreml", "fp16"): {SAME_NETWORK: 1e-9, PRECISION_COST: 1e-2, COST_AT_WORST: 2e-2, ON_DEVICE: 2e-2},
        ("coreml", "int8"): {SAME_NETWORK: 1e-9, PRECISION_COST: 1e-1, COST_AT_WORST: 1e-1, ON_DEVICE: 1e-1},
    }
)
"""The targets' own, by question: importing the targets takes seconds, so they are repeated here and a test holds the
two together."""

_UNITS: Final = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_AMOUNT: Final = re.compile(r"(\d{1,9}(?:\.\d{1,6})?) *([A-Za-z]{1,3})", re.ASCII)
_MOST: Final = 10**15
_BUDGET: Final = ("size", "kernels", "latency-ratio")
_GROWTH: Final = ("error-ratio", "size-ratio", "kernels-ratio", "latency-ratio")
_REGRESSION: Final = (*_GROWTH, "error-floor")


def limits_of(root: Table, *, latency: bool) -> Limits:
    """What ``[tolerance.…]``, ``[budget.…]`` and ``[regression]`` say; raises BadConfig.

    ``latency`` is whether it is measured; a limit to what isn't would never be exceeded.
    """
    tolerances = {where: _tolerances(table, where) for where, table in by_lane(root, "tolerance")}
    budgets = {where: _budget(table, latency=latency) for where, table in by_lane(root, "budget")}
    return Limits(tolerances, budgets, _regression(root.table("regression"), latency=latency))


def by_lane(root: Table, section: str) -> Iterator[tuple[tuple[str, str], Table]]:
    """The tables of ``[section.LANE]``, by lane and precision."""
    lanes = root.table(section)
    if lanes is None:
        return
    lanes.only("target", LANES)
    for lane in lanes.values:
        precisions = lanes.table(lane)
        if precisions is None:
            continue
        precisions.only("precision", PRECISIONS)
        for precision in precisions.values:
            if (table := precisions.table(precision)) is not None:
                if not table.values:
                    raise precisions.bad(f"{precision} states nothing; leave it out", precision)
                yield (lane, precision), table


def question_key(question: str) -> str:
    """How a question is written as a key: ``precision-cost-at-worst``."""
    return re.sub(r"[ ,]+", "-", question)


def _tolerances(table: Table, where: tuple[str, str]) -> dict[str, float]:
    """The worst relative root mean square error by question; refuses what is looser than the target's own."""
    own = {question_key(question): (question, least) for question, least in OWN_TOLERANCES[where].items()}
    what = f"question about {where[0]} in {where[1]}"
    table.only(what, tuple(own))
    found = {}
    for key in table.values:
        question, least = own[key]
        value = table.ratio(key, least / 2, 0.0, "give the worst relative error, above 0")
        if value is None:
            continue
        if value > least:
            raise table.bad(
                f"{key} of {shown(value)} is looser than {where[0]}'s own, {least}, which stays in force; "
                f"give {least} or less",
                key,
            )
        found[question] = value
    return found


def _budget(table: Table, *, latency: bool) -> Budget:
    table.only("budget", _BUDGET)
    _check_measured(table, latency=latency)
    return Budget(
        size=_bytes(table),
        kernels=table.whole("kernels", 132, _MOST),
        latency_ratio=table.ratio("latency-ratio", 1.0, 0.0, "give a share of PyTorch's latency, above 0"),
    )


def _bytes(table: Table) -> int | None:
    """``64 MB``, or a whole number of bytes."""
    if isinstance(table.values.get("size"), int):
        return table.whole("size", 64_000_000, _MOST)
    text = table.text("size", "64 MB")
    if text is None:
        return None
    found = _AMOUNT.fullmatch(text.strip())
    unit = None if found is None else _UNITS.get(found[2].lower())
    size = 0 if found is None or unit is None else int(float(found[1]) * unit)
    if found is None or unit is None or size < 1:
        raise table.bad(f'size is {shown(text)}; write for example "64 MB" or "61.5 MiB", or bytes as a number', "size")
    return size


def _regression(table: Table | None, *, latency: bool) -> Regression:
    if table is None:
        return Regression()
    table.only("limit", _REGRESSION)
    _check_measured(table, latency=latency)
    growth = {key: table.ratio(key, 1.2, 1.0, "give 1.0, which allows no growth, or more") for key in _GROWTH}
    floor = table.ratio("error-floor", 1e-6, 0.0, "give the error below which nothing counts, above 0")
    if floor is not None and growth["error-ratio"] is None:
        raise table.bad("error-floor says where error-ratio begins to count, which isn't there; add it", "error-floor")
    return Regression(
        error_ratio=growth["error-ratio"],
        error_floor=floor or 0.0,
        size_ratio=growth["size-ratio"],
        kernels_ratio=growth["kernels-ratio"],
        latency_ratio=growth["latency-ratio"],
    )


def _check_measured(table: Table, *, latency: bool) -> None:
    if "latency-ratio" in table.values and not latency:
        raise table.bad("latency-ratio limits what isn't measured; add latency = true to [check]", "latency-ratio")
