"""The page's charts: Vega-Lite specs as plain data, and what each says in words.

Texts of the folder are data of a spec, never part of an expression or a field's name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from nextvit_deploy.bisect.record import Bisection, Series
from nextvit_deploy.precision.record import PrecisionPlan
from nextvit_deploy.report import svg
from nextvit_deploy.report.facts import COST, Headroom, Item, Latency
from nextvit_deploy.report.scales import bounded, decades, height_of, spread, ticks, value_at
from nextvit_deploy.verdict import Verdict

Spec = dict[str, object]
_Row = Mapping[str, object]

LANE_COLOURS: Final = {"onnx": "var(--onnx)", "trt": "var(--trt)", "coreml": "var(--coreml)"}
LANE_SHAPES: Final = {"onnx": "circle", "trt": "square", "coreml": "triangle-up"}
_LINE: Final = 15
"""Pixels between two labels."""
_LABELLED: Final = 24
"""Points with a label each; beyond that those on the front and those that failed."""
_BARS: Final = 10
_NAME: Final = 48
"""Pixels for a block's name."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A spec, and what it shows for those who can't see it."""

    spec: Spec
    told: str

    def svg(self, name: str) -> str:
        """One ``<svg>`` element; raises MissingExtra."""
        return svg.render(self.spec, name, self.told)


@dataclass(frozen=True, slots=True)
class _Point:
    """An artefact on the trade-off; places are pixels in the plot."""

    item: Item
    size: float
    error: float
    left: float
    top: float


def trade_off(items: Sequence[Item]) -> Chart | None:
    """Size against precision cost, the latency in the label where it was measured; None where nothing was executed."""
    seen = [each for each in items if each.made is not None and each.error is not None]
    if not seen:
        return None
    padding = (28, 14, 44, 46)
    width, height = svg.WIDTH - padding[1] - padding[3], max(210, 30 + _LINE * min(len(seen), _LABELLED))
    most = max(_megabytes(each) for each in seen) * 1.08 or 1.0
    low, high = decades(each.error or 0.0 for each in seen)
    points = [
        _Point(
            item=each,
            size=_megabytes(each),
            error=bounded(each.error or 0.0),
            left=_megabytes(each) / most * width,
            top=height_of(each.error or 0.0, low, high, height),
        )
        for each in seen
    ]
    front = best_of(points)
    x, y = _axis("size", [0, most]), _error_axis("error", low, high)
    labels = _labels([p for p in points if len(points) <= _LABELLED or p in front or _bad(p.item)], width, height)
    rows = [
        {"size": p.size, "error": p.error, "lane": p.item.lane, "colour": _colour(p.item), "verdict": p.item.verdict}
        for p in points
    ]
    layers: list[dict[str, object]] = [
        _layer(
            {"type": "line", "interpolate": "step-after", "color": "var(--line)", "strokeWidth": 3},
            [{"size": p.size, "error": p.error} for p in front],
            {"x": x, "y": y},
        ),
        *([_leader(labels, most, width, low, high, height)] if labels else []),
        _layer(
            {"type": "point", "filled": True, "size": 80, "opacity": 1},
            rows,
            {
                "x": x,
                "y": y,
                "color": _given("colour"),
                "shape": _shapes(),
            },
        ),
        _layer(
            {"type": "point", "size": 220, "color": "var(--bad)", "strokeWidth": 2},
            [row for row in rows if row["verdict"] is Verdict.FAILED],
            {"x": x, "y": y},
        ),
        *(_text(labels, side, most, width, low, high, height) for side in ("left", "right")),
    ]
    layers += [_title("precision cost, relative rms", -42, -16), _title("size, MB", width, height + 34, "right")]
    worst, smallest = max(points, key=lambda p: p.error), min(points, key=lambda p: p.size)
    told = (
        f"Size against precision cost of {len(points)} artefacts. Smallest: {smallest.item.label} with "
        f"{smallest.size:.1f} MB. Largest error: {worst.item.label} with {worst.error:.1e}."
    )
    return Chart(svg.spec(height, layers, padding), told)


def best_of(points: Sequence[_Point]) -> list[_Point]:
    """Those that nothing verified beats in size and error at once, the smallest first; what failed is none of them."""
    best: list[_Point] = []
    for each in sorted((p for p in points if not _bad(p.item)), key=lambda p: (p.size, p.error)):
        if not best or each.error < best[-1].error:
            best.append(each)
    return best


def _megabytes(item: Item) -> float:
    return item.made.size / 1e6 if item.made else 0.0


def _bad(item: Item) -> bool:
    return item.verdict is Verdict.FAILED


def _colour(item: Item) -> str:
    return LANE_COLOURS.get(item.lane, "var(--soft)")


def timed(latencies: Iterable[Latency]) -> str:
    """What was measured first, short; nothing where nothing was."""
    return next((each.short for each in latencies if each.basis == "measured"), "")


@dataclass(frozen=True, slots=True)
class _Label:
    """A text beside a point, and where: pixels in the plot; ``side`` of the point it is on."""

    text: str
    colour: str
    side: str
    left: float
    top: float
    point: _Point


def _labels(points: Sequence[_Point], width: float, height: float) -> list[_Label]:
    """On the side with more room, moved apart up and down."""
    found = []
    for side in ("left", "right"):
        here = [p for p in points if (p.left > 0.55 * width) == (side == "left")]
        tops = spread([p.top for p in here], _LINE, height)
        for p, top in zip(here, tops, strict=True):
            time = timed(p.item.latencies)
            text = " ".join(
                [_cut(p.item.label, 24), *([f"· {time}"] if time else []), *(["✕"] if _bad(p.item) else [])]
            )
            left = p.left + (-12 if side == "left" else 12)
            found.append(_Label(text, "var(--bad)" if _bad(p.item) else "var(--ink)", side, left, top, p))
    return found


def _text(
    labels: Sequence[_Label], side: str, most: float, width: float, low: float, high: float, height: float
) -> dict[str, object]:
    rows = [
        {"text": e.text, "colour": e.colour, "size": e.left / width * most, "error": value_at(e.top, low, high, height)}
        for e in labels
        if e.side == side
    ]
    mark = {"type": "text", "align": "right" if side == "left" else "left", "baseline": "middle"}
    x, y = _axis("size", [0, most]), _error_axis("error", low, high)
    return _layer(mark, rows, {"x": x, "y": y, "text": {"field": "text"}, "color": _given("colour")})


def _leader(
    labels: Sequence[_Label], most: float, width: float, low: float, high: float, height: float
) -> dict[str, object]:
    """A thin line from a point to a label that was moved away from it."""
    rows = [
        {
            "size": e.point.size,
            "error": e.point.error,
            "to": (e.left + (2 if e.side == "left" else -2)) / width * most,
            "at": value_at(e.top, low, high, height),
        }
        for e in labels
        if abs(e.top - e.point.top) > 5
    ]
    x, y = _axis("size", [0, most]), _error_axis("error", low, high)
    mark = {"type": "rule", "color": "var(--soft)", "strokeWidth": 0.75}
    return _layer(mark, rows, {"x": x, "y": y, "x2": {"field": "to"}, "y2": {"field": "at"}})


def growth(items: Sequence[Item]) -> Chart | None:
    """How the precision's error grows from block to block, one line for each artefact; None for fewer than two."""
    lines = [(item, by_block(series)) for item in items if (series := series_of(item.layers, COST)) is not None]
    lines = [(item, blocks) for item, blocks in lines if blocks][:_LABELLED]
    if len(lines) < 2:
        return None
    names = list(dict.fromkeys(name for _, blocks in lines for name in blocks))
    padding = (28, 128, 40, 46)
    height = max(210, _LINE * len(lines))
    low, high = decades(error for _, blocks in lines for error in blocks.values())
    x, y = _places("at", len(names)), _error_axis("error", low, high)
    tops = spread([height_of(list(blocks.values())[-1], low, high, height) for _, blocks in lines], _LINE, height)
    layers: list[dict[str, object]] = []
    for item, blocks in lines:
        rows = [{"at": names.index(name), "error": bounded(error)} for name, error in blocks.items()]
        dash = {"strokeDash": [5, 3]} if item.precision == "int8" else {}
        mark = {"type": "line", "color": _colour(item), "strokeWidth": 2, "opacity": 1, **dash}
        layers.append(_layer(mark, rows, {"x": x, "y": y}))
    ends = [
        {
            "at": len(names) - 1,
            "error": value_at(top, low, high, height),
            "text": _cut(item.label, 17),
            "c": _colour(item),
        }
        for (item, _), top in zip(lines, tops, strict=True)
    ]
    mark = {"type": "text", "align": "left", "baseline": "middle", "dx": 7}
    layers.append(_layer(mark, ends, {"x": x, "y": y, "text": {"field": "text"}, "color": _given("c")}))
    layers += [*_marks_below(names, low, high, padding), _title("precision cost, relative rms", -42, -16)]
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
    x, y = _places("at", len(longest.layers)), _error_axis("error", low, high)
    layers: list[dict[str, object]] = []
    for each in series:
        colour = "var(--cost)" if each.question == COST else "var(--same)"
        rows = [{"at": at, "error": bounded(error)} for at, error in _placed(each, order)]
        layers.append(_layer({"type": "line", "color": colour, "strokeWidth": 2}, rows, {"x": x, "y": y}))
        rule = {"type": "rule", "color": colour, "strokeDash": [4, 4], "strokeWidth": 1}
        limit = [{"error": each.tolerance}] if each.tolerance > 0 else []
        layers.append(_layer(rule, limit, {"y": y}))
    parted = [
        {
            "at": order.get(p.operations[-1] if p.operations else "", 0),
            "error": bounded(p.error),
            "text": _cut(p.module, 30),
        }
        for each in series
        for p in each.partings
    ]
    layers.append(
        _layer({"type": "point", "size": 160, "color": "var(--bad)", "strokeWidth": 2.5}, parted, {"x": x, "y": y})
    )
    for right in (False, True):
        some = [row for row in parted[:1] if (float(str(row["at"])) > len(longest.layers) / 2) is right]
        mark = {
            "type": "text",
            "align": "right" if right else "left",
            "dx": -12 if right else 12,
            "color": "var(--bad)",
        }
        layers.append(_layer(mark, some, {"x": x, "y": y, "text": {"field": "text"}}))
    layers += _marks_below([block_of(each.module) for each in longest.layers], low, high, padding)
    layers.append(_title("relative rms of each layer", -42, -16))
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
    x = _log_axis("value", low, 200_000.0, [10.0**p for p in range(round(math.log10(low)), 6)])
    rows = [
        {
            "value": min(each.largest, 200_000.0),
            "low": low,
            "y": row * at + 24,
            "name_y": row * at + 9,
            "name": f"{_cut(each.name, 36)}  {each.largest:.4g}",
            "colour": "var(--bad)" if each.largest > found.limit else "var(--coreml)",
        }
        for at, each in enumerate(top)
    ]
    y, names = _pixels("y", height), _pixels("name_y", height)
    layers: list[dict[str, object]] = [
        _layer(
            {"type": "rule", "color": "var(--line)", "strokeWidth": 6, "strokeCap": "round"},
            [row | {"end": found.limit} for row in rows],
            {"x": {**x, "field": "low"}, "x2": {"field": "end"}, "y": y},
        ),
        _layer(
            {"type": "rule", "strokeWidth": 6, "strokeCap": "round"},
            rows,
            {"x": {**x, "field": "low"}, "x2": {"field": "value"}, "y": y, "color": _given("colour")},
        ),
        _layer(
            {"type": "text", "align": "left", "baseline": "middle"},
            rows,
            {"x": {**x, "field": "low"}, "y": names, "text": {"field": "name"}},
        ),
        _layer({"type": "rule", "color": "var(--bad)", "strokeWidth": 1.5}, [{"value": found.limit}], {"x": x}),
        _layer(
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
            "name": _cut(each.block, 12),
            "text": f"{each.share:.0%}, {_db(each.sqnr_db)}"
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
    y, zero = _pixels("y", height), {**x, "field": "zero"}
    layers = [
        _layer(
            {"type": "rule", "strokeWidth": 12},
            rows,
            {"x": zero, "x2": {"field": "share"}, "y": y, "color": _given("colour")},
        ),
        _layer(
            {"type": "text", "align": "left", "dx": 6, "baseline": "middle", "color": "var(--soft)"},
            rows,
            {"x": x, "y": y, "text": {"field": "text"}},
        ),
        _layer(
            {"type": "text", "align": "right", "dx": -8, "baseline": "middle"},
            rows,
            {"x": zero, "y": y, "text": {"field": "name"}},
        ),
    ]
    kept = ", ".join(found.keep) or "none"
    return Chart(svg.spec(height, layers, padding), f"Noise that INT8 adds by block. Kept in floating point: {kept}.")


def _db(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else "no noise"


def _cut(text: str, long: int) -> str:
    return text if len(text) <= long else f"{text[: long - 1]}…"


def _layer(mark: Mapping[str, object], rows: Sequence[_Row], encoding: Mapping[str, object]) -> dict[str, object]:
    return {"mark": dict(mark), "data": {"values": [dict(row) for row in rows]}, "encoding": dict(encoding)}


def _given(field: str) -> dict[str, Any]:
    """A colour that the data names."""
    return {"field": field, "type": "nominal", "scale": None}


def _shapes() -> dict[str, Any]:
    scale = {"domain": list(LANE_SHAPES), "range": list(LANE_SHAPES.values())}
    return {"field": "lane", "type": "nominal", "scale": scale, "legend": None}


def _axis(field: str, domain: Sequence[float]) -> dict[str, Any]:
    scale = {"domain": list(domain), "nice": False}
    return {"field": field, "type": "quantitative", "scale": scale, "axis": {"title": None, "tickCount": 5}}


def _log_axis(field: str, low: float, high: float, values: Sequence[float]) -> dict[str, Any]:
    axis = {"title": None, "values": list(values), "format": "~s", "gridOpacity": 0.6}
    return {"field": field, "type": "quantitative", "scale": {"type": "log", "domain": [low, high]}, "axis": axis}


def _error_axis(field: str, low: float, high: float) -> dict[str, Any]:
    """Logarithmic, a line at some of the powers of ten."""
    axis = {"title": None, "values": ticks(low, high), "format": ".0e"}
    scale = {"type": "log", "domain": [low, high], "nice": False, "clamp": True}
    return {"field": field, "type": "quantitative", "scale": scale, "axis": axis}


def _title(text: str, left: float, top: float, align: str = "left") -> dict[str, object]:
    """What an axis shows, written beside it; places are pixels in the plot."""
    mark = {"type": "text", "align": align, "baseline": "middle", "color": "var(--soft)"}
    return _layer(mark, [{"text": text}], {"x": {"value": left}, "y": {"value": top}, "text": {"field": "text"}})


def _places(field: str, count: int) -> dict[str, Any]:
    scale = {"domain": [0, max(1, count - 1)], "nice": False}
    return {"field": field, "type": "quantitative", "scale": scale, "axis": None}


def _pixels(field: str, height: float) -> dict[str, Any]:
    scale = {"domain": [0, height], "range": [0, height], "nice": False}
    return {"field": field, "type": "quantitative", "scale": scale, "axis": None}


def _marks_below(
    blocks: Sequence[str], low: float, high: float, padding: tuple[int, int, int, int]
) -> list[dict[str, object]]:
    """Where stem and blocks begin, below the plot; as many names as there is room for."""
    width, spare = svg.WIDTH - padding[1] - padding[3], 0 if padding[1] > _NAME else 0.5
    starts = [at for at, name in enumerate(blocks) if at == 0 or name != blocks[at - 1]]
    apart = max(1, len(blocks) - 1) * _NAME / width
    shown: list[int] = []
    for at in starts:
        if not shown or (at - shown[-1] >= apart and len(blocks) - 1 - at >= apart * spare):
            shown.append(at)
    rows = [{"at": at, "error": low, "name": _brief(blocks[at])} for at in shown]
    x, y = _places("at", len(blocks)), _error_axis("error", low, high)
    text = {"type": "text", "baseline": "top", "align": "center", "color": "var(--soft)", "clip": False}
    tick = {"type": "tick", "orient": "vertical", "size": 6, "thickness": 1, "yOffset": 4, "color": "var(--soft)"}
    return [
        _layer(tick, rows, {"x": x, "y": y}),
        _layer({**text, "dy": 10}, rows, {"x": x, "y": y, "text": {"field": "name"}}),
    ]


def _brief(block: str) -> str:
    """``f.2`` of ``features.2``."""
    return _cut(block.replace("features.", "f.").replace("proj_", ""), 8)
