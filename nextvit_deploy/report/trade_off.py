"""The chart of all artefacts: how much smaller, how much further from PyTorch, and how fast where that was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from nextvit_deploy.report import svg
from nextvit_deploy.report.facts import Item, Latency
from nextvit_deploy.report.marks import Chart, Padding, cut, error_axis, given, lane_colour, layer, title
from nextvit_deploy.report.scales import bounded, decades, height_of, place, value_at
from nextvit_deploy.verdict import Verdict

_SHAPES: Final = {"onnx": "circle", "trt": "square", "coreml": "triangle-up"}
_LABELLED: Final = 24
"""Points with a label each; beyond that those on the front and those that failed."""
_LINE: Final = 15
_PADDING: Final[Padding] = (28, 14, 44, 46)


@dataclass(frozen=True, slots=True)
class Point:
    """An artefact on the chart: its size in MB, its error as the axis can show it."""

    item: Item
    size: float
    error: float


@dataclass(frozen=True, slots=True)
class _Plot:
    """The plot's scales; sizes from 0 to ``most`` MB, errors from ``low`` to ``high``, the rest in pixels."""

    most: float
    low: float
    high: float
    width: float
    height: int

    def x(self, field: str = "size") -> dict[str, Any]:
        """Sizes."""
        scale = {"domain": [0, self.most], "nice": False}
        return {"field": field, "type": "quantitative", "scale": scale, "axis": {"title": None, "tickCount": 5}}

    def both(self) -> dict[str, Any]:
        """Both axes."""
        return {"x": self.x(), "y": error_axis("error", self.low, self.high)}

    def pixels(self, point: Point) -> tuple[float, float]:
        """Where a point is."""
        return point.size / self.most * self.width, height_of(point.error, self.low, self.high, self.height)

    def values(self, left: float, top: float) -> tuple[float, float]:
        """What size and error would be there."""
        return left / self.width * self.most, value_at(top, self.low, self.high, self.height)


def trade_off(items: Sequence[Item]) -> Chart | None:
    """Size against precision cost, the latency in the label where it was measured; None where nothing was executed."""
    points = [
        Point(each, each.made.size / 1e6, bounded(each.error))
        for each in items
        if each.made is not None and each.error is not None
    ]
    if not points:
        return None
    front = best_of(points)
    shown = [p for p in points if len(points) <= _LABELLED or p in front or _failed(p)]
    plot = _Plot(
        max(p.size for p in points) * 1.08 or 1.0,
        *decades(p.error for p in points),
        svg.WIDTH - _PADDING[1] - _PADDING[3],
        max(210, 30 + _LINE * len(shown)),
    )
    layers = [
        _front(plot, front),
        *_labels(plot, shown, points),
        _marks(plot, points),
        _rings(plot, points),
        title("precision cost, relative rms", -42, -16),
        title("size, MB", plot.width, plot.height + 34, "right"),
    ]
    return Chart(svg.spec(plot.height, layers, _PADDING), _told(points))


def best_of(points: Iterable[Point]) -> list[Point]:
    """Of the verified those that no other beats in size and error at once, the smallest first."""
    best: list[Point] = []
    known = (p for p in points if p.item.verdict is Verdict.VERIFIED)
    for each in sorted(known, key=lambda p: (p.size, p.error)):
        if not best or each.error < best[-1].error:
            best.append(each)
    return best


def timed(latencies: Iterable[Latency]) -> str:
    """What was measured first, short; nothing where nothing was."""
    return next((each.short for each in latencies if each.basis == "measured"), "")


def _failed(point: Point) -> bool:
    return point.item.verdict is Verdict.FAILED


def _told(points: Sequence[Point]) -> str:
    worst, smallest = max(points, key=lambda p: p.error), min(points, key=lambda p: p.size)
    return (
        f"Size against precision cost of {len(points)} artefacts. Smallest: {smallest.item.label} with "
        f"{smallest.size:.1f} MB. Largest error: {worst.item.label} with {worst.error:.1e}."
    )


def _front(plot: _Plot, front: Sequence[Point]) -> dict[str, object]:
    mark = {"type": "line", "interpolate": "step-after", "color": "var(--line)", "strokeWidth": 3}
    return layer(mark, [{"size": p.size, "error": p.error} for p in front], plot.both())


def _marks(plot: _Plot, points: Sequence[Point]) -> dict[str, object]:
    scale = {"domain": list(_SHAPES), "range": list(_SHAPES.values())}
    shape = {"field": "lane", "type": "nominal", "scale": scale, "legend": None}
    rows = [{"size": p.size, "error": p.error, "lane": p.item.lane, "colour": lane_colour(p.item.lane)} for p in points]
    mark = {"type": "point", "filled": True, "size": 80, "opacity": 1}
    return layer(mark, rows, {**plot.both(), "color": given("colour"), "shape": shape})


def _rings(plot: _Plot, points: Sequence[Point]) -> dict[str, object]:
    """Around those that failed."""
    mark = {"type": "point", "size": 220, "color": "var(--bad)", "strokeWidth": 2}
    return layer(mark, [{"size": p.size, "error": p.error} for p in points if _failed(p)], plot.both())


def _labels(plot: _Plot, shown: Sequence[Point], points: Sequence[Point]) -> list[dict[str, object]]:
    """Each point's name where nothing else is, and a thin line to it where that is not beside the point."""
    texts, dots = [_words(p) for p in shown], [plot.pixels(p) for p in points]
    lines: list[dict[str, object]] = []
    sides: tuple[list[dict[str, object]], list[dict[str, object]]] = ([], [])
    places = place([plot.pixels(p) for p in shown], texts, dots, (plot.width, plot.height))
    for p, text, at in zip(shown, texts, places, strict=True):
        size, error = plot.values(at.left, at.top)
        colour = "var(--bad)" if _failed(p) else "var(--ink)"
        sides[at.right].append({"size": size, "error": error, "text": text, "colour": colour})
        if abs(at.top - plot.pixels(p)[1]) > 5:
            lines.append({"size": p.size, "error": p.error, "to": size, "at": error})
    rule = {"type": "rule", "color": "var(--soft)", "strokeWidth": 0.75}
    layers = [layer(rule, lines, {**plot.both(), "x2": {"field": "to"}, "y2": {"field": "at"}})] if lines else []
    for rows, align in zip(sides, ("right", "left"), strict=True):
        mark = {"type": "text", "align": align, "baseline": "middle"}
        layers.append(layer(mark, rows, {**plot.both(), "text": {"field": "text"}, "color": given("colour")}))
    return layers


def _words(point: Point) -> str:
    """Its name, its latency where that was measured, and whether it failed."""
    time, failed = timed(point.item.latencies), ["✕"] if _failed(point) else []
    return " ".join([cut(point.item.label, 24), *([f"· {time}"] if time else []), *failed])
