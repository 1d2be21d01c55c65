"""The charts of layers, headroom and precision plans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from nextvit_deploy.bisect.record import Bisection, Series
from nextvit_deploy.precision.record import PrecisionPlan
from nextvit_deploy.report import svg
from nextvit_deploy.report.facts import COST, Headroom, Item
from nextvit_deploy.report.marks import (
    LINE,
    Chart,
    cut,
    db,
    error_axis,
    given,
    lane_colour,
    layer,
    log_axis,
    marks_below,
    pixels,
    places,
    title,
)
from nextvit_deploy.report.scales import bounded, decades, height_of, spread, value_at

_LINES: Final = 24
"""Artefacts in one chart."""
_BARS: Final = 10


def growth(items: Sequence[Item]) -> Chart | None:
    """How the precision's error grows from block to block, one line for each artefact; None for fewer than two."""
    lines = [(item, by_block(series)) for item in items if (series := series_of(item.layers, COST)) is not None]
    lines = [(item, blocks) for item, blocks in lines if blocks][:_LINES]
    if len(lines) < 2:
        return None
    names = list(dict.fromkeys(name for _, blocks in lines for name in blocks))
    padding = (28, 128, 40, 46)
    height = max(210, LINE * len(lines))
    low, high = decades(error for _, blocks in lines for error in blocks.values())
    x, y = places("at", len(names)), error_axis("error", low, high)
    tops = spread([height_of(list(blocks.values())[-1], low, high, height) for _, blocks in lines], LINE, height)
    layers: list[dict[str, object]] = []
    for item, blocks in lines:
        rows = [{"at": names.index(name), "error": bounded(error)} for name, error in blocks.items()]
        dash = {"strokeDash": [5, 3]} if item.precision == "int8" else {}
        mark = {"type": "line", "color": lane_colour(item.lane), "strokeWidth": 2, "opacity": 1, **dash}
        layers.append(layer(mark, rows, {"x": x, "y": y}))
    ends = [
        {
            "at": len(names) - 1,
            "error": value_at(top, low, high, height),
            "text": cut(item.label, 17),
            "c": lane_colour(item.lane),
        }
        for (item, _), top in zip(lines, tops, strict=True)
    ]
    mark = {"type": "text", "align": "left", "baseline": "middle", "dx": 7}
    layers.append(layer(mark, ends, {"x": x, "y": y, "text": {"field": "text"}, "color": given("c")}))
    layers += [*marks_below(names, low, high, padding), title("precision cost, relative rms", -42, -16)]
    told = "Error of the precision by block. At the end: " + "; ".join(
        f"{item.label} {list(blocks.values())[-1]:.1e}" for item, blocks in lines
    )
    return Chart(svg.spec(height, layers, padding), told)


def series_of(found: Bisection | None, question: str) -> Series | None:
    """One question's answer, where it was asked."""
    return None if found is None else next((each for each in found.series if each.question == question), None)


def block_of(module: str) -> str:
    """``features.2`` of ``features.2.mlp.conv1``: what a precision plan is made of."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] in {"stem", "features"} and len(parts) > 1 else parts[0] or "other"


def by_block(series: Series) -> dict[str, float]:
    """The last error in each block, in the order of execution."""
    found: dict[str, float] = {}
    for each in series.layers:
        if each.error is not None:
            found[block_of(each.module)] = each.error
    return found


def depth(found: Bisection) -> Chart | None:
    """Both questions' error at every depth, and where the artefact parts from PyTorch; None where nothing is known."""
    series = [each for each in found.series if any(layer.error is not None for layer in each.layers)]
    if not series:
        return None
    longest = max(series, key=lambda each: len(each.layers))
    order = {each.operation: at for at, each in reversed(list(enumerate(longest.layers)))}
    errors = [e.error for each in series for e in each.layers if e.error is not None]
    tolerances = [each.tolerance for each in series if each.tolerance > 0]
    low, high = decades([*errors, *tolerances])
    padding, height = (28, 12, 40, 46), 200
    x, y = places("at", len(longest.layers)), error_axis("error", low, high)
    layers: list[dict[str, object]] = []
    for each in series:
        colour = "var(--cost)" if each.question == COST else "var(--same)"
        rows = [{"at": at, "error": bounded(error)} for at, error in _placed(each, order)]
        layers.append(layer({"type": "line", "color": colour, "strokeWidth": 2}, rows, {"x": x, "y": y}))
        rule = {"type": "rule", "color": colour, "strokeDash": [4, 4], "strokeWidth": 1}
        limit = [{"error": each.tolerance}] if each.tolerance > 0 else []
        layers.append(layer(rule, limit, {"y": y}))
    parted = [
        {
            "at": order.get(p.operations[-1] if p.operations else "", 0),
            "error": bounded(p.error),
            "text": cut(p.module, 30),
        }
        for each in series
        for p in each.partings
    ]
    layers.append(
        layer({"type": "point", "size": 160, "color": "var(--bad)", "strokeWidth": 2.5}, parted, {"x": x, "y": y})
    )
    for right in (False, True):
        some = [row for row in parted[:1] if (float(str(row["at"])) > len(longest.layers) / 2) is right]
        mark = {
            "type": "text",
            "align": "right" if right else "left",
            "dx": 8 if right else -8,
            "dy": -16,
            "color": "var(--bad)",
        }
        layers.append(layer(mark, some, {"x": x, "y": y, "text": {"field": "text"}}))
    layers += marks_below([block_of(each.module) for each in longest.layers], low, high, padding)
    layers.append(title("relative rms of each layer", -42, -16))
    return Chart(svg.spec(height, layers, padding), _depth_told(found, series))


def _placed(series: Series, order: Mapping[str, int]) -> list[tuple[float, float]]:
    """Places along the longest series and errors; an operation it doesn't have comes right after the last one."""
    places: list[tuple[float, float]] = []
    at = 0.0
    for each in series.layers:
        at = float(order.get(each.operation, at))
        if each.error is not None:
            places.append((at, each.error))
    return sorted(places, key=lambda place: place[0])


def _depth_told(found: Bisection, series: Sequence[Series]) -> str:
    ends = [
        f"{each.question}: largest {max(layer.error for layer in each.layers if layer.error is not None):.1e}"
        for each in series
    ]
    where = found.parting
    return f"Error of {len(series[0].layers)} layers. {'; '.join(ends)}. " + (
        f"It parts from PyTorch at {where.module}." if where else "Nothing parts from PyTorch."
    )


def headroom(found: Headroom) -> Chart | None:
    """The operations with the largest numbers, and float16's largest; None where nothing was stored in it."""
    top = [each for each in found.layers if each.largest > 0][:_BARS]
    if not top:
        return None
    row, padding = 32, (22, 16, 34, 4)
    height = row * len(top)
    low = 10.0 ** math.floor(math.log10(min(1.0, bounded(top[-1].largest))))
    x = log_axis("value", low, 200_000.0, [10.0**p for p in range(round(math.log10(low)), 6)])
    rows = [
        {
            "value": min(each.largest, 200_000.0),
            "low": low,
            "y": row * at + 24,
            "name_y": row * at + 9,
            "name": f"{cut(each.name, 36)}  {each.largest:.4g}",
            "colour": "var(--bad)" if each.largest > found.limit else "var(--coreml)",
        }
        for at, each in enumerate(top)
    ]
    y, names = pixels("y", height), pixels("name_y", height)
    layers: list[dict[str, object]] = [
        layer(
            {"type": "rule", "color": "var(--line)", "strokeWidth": 6, "strokeCap": "round"},
            [row | {"end": found.limit} for row in rows],
            {"x": {**x, "field": "low"}, "x2": {"field": "end"}, "y": y},
        ),
        layer(
            {"type": "rule", "strokeWidth": 6, "strokeCap": "round"},
            rows,
            {"x": {**x, "field": "low"}, "x2": {"field": "value"}, "y": y, "color": given("colour")},
        ),
        layer(
            {"type": "text", "align": "left", "baseline": "middle"},
            rows,
            {"x": {**x, "field": "low"}, "y": names, "text": {"field": "name"}},
        ),
        layer({"type": "rule", "color": "var(--bad)", "strokeWidth": 1.5}, [{"value": found.limit}], {"x": x}),
        layer(
            {"type": "text", "align": "right", "baseline": "bottom", "color": "var(--bad)", "dy": -6},
            [{"value": found.limit, "y": 0, "text": f"FP16 holds {found.limit:.0f}"}],
            {"x": x, "y": y, "text": {"field": "text"}},
        ),
    ]
    told = f"Largest numbers by operation. {top[0].name} reaches {top[0].largest:.4g}; FP16 holds {found.limit:.0f}."
    return Chart(svg.spec(height, layers, padding), told)


def plan(found: PrecisionPlan) -> Chart:
    """Each block's share of the noise, and whether it is in int8 or kept in floating point."""
    row, padding = 24, (4, 4, 4, 84)
    height, width = row * len(found.blocks), svg.WIDTH - 88
    longest = max((each.share for each in found.blocks), default=0.0) or 1.0
    rows = [
        {
            "share": min(1.0, max(0.0, each.share)),
            "y": row * at + row / 2,
            "zero": 0,
            "name": cut(each.block, 12),
            "text": f"{each.share:.0%}, {db(each.sqnr_db)}"
            + ("" if each.precision == "int8" else f", {each.precision}"),
            "colour": "var(--int8)" if each.precision == "int8" else "var(--kept)",
        }
        for at, each in enumerate(found.blocks)
    ]
    x = {
        "field": "share",
        "type": "quantitative",
        "axis": None,
        "scale": {"domain": [0, longest * width / (width - 124)]},
    }
    y, zero = pixels("y", height), {**x, "field": "zero"}
    layers = [
        layer(
            {"type": "rule", "strokeWidth": 12},
            rows,
            {"x": zero, "x2": {"field": "share"}, "y": y, "color": given("colour")},
        ),
        layer(
            {"type": "text", "align": "left", "dx": 6, "baseline": "middle", "color": "var(--soft)"},
            rows,
            {"x": x, "y": y, "text": {"field": "text"}},
        ),
        layer(
            {"type": "text", "align": "right", "dx": -8, "baseline": "middle"},
            rows,
            {"x": zero, "y": y, "text": {"field": "name"}},
        ),
    ]
    kept = ", ".join(found.keep) or "none"
    return Chart(svg.spec(height, layers, padding), f"Noise that INT8 adds by block. Kept in floating point: {kept}.")
