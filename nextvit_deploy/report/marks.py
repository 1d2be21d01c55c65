"""What all charts are made of: layers of marks with their own data, axes, and texts at fixed places.

Texts of the folder are data of a spec, never part of an expression or a field's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from nextvit_deploy.report import svg
from nextvit_deploy.report.scales import ticks

Spec = dict[str, object]
Padding = tuple[int, int, int, int]
"""Top, right, bottom, left; pixels."""

LANE_COLOURS: Final = {"onnx": "var(--onnx)", "trt": "var(--trt)", "coreml": "var(--coreml)"}
LINE: Final = 15
"""Pixels between two labels."""
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


def db(value: float) -> str:
    """A ratio of powers, in words where there is no noise."""
    return f"{value:.1f} dB" if math.isfinite(value) else "no noise"


def cut(text: str, long: int) -> str:
    """A text in at most so many characters."""
    return text if len(text) <= long else f"{text[: long - 1]}…"


def layer(
    mark: Mapping[str, object], rows: Sequence[Mapping[str, object]], encoding: Mapping[str, object]
) -> dict[str, object]:
    """One mark with its own data."""
    return {"mark": dict(mark), "data": {"values": [dict(row) for row in rows]}, "encoding": dict(encoding)}


def given(field: str) -> dict[str, Any]:
    """A colour that the data names."""
    return {"field": field, "type": "nominal", "scale": None}


def log_axis(field: str, low: float, high: float, values: Sequence[float]) -> dict[str, Any]:
    """Logarithmic, a line at each of ``values``."""
    axis = {"title": None, "values": list(values), "format": "~s", "gridOpacity": 0.6}
    return {"field": field, "type": "quantitative", "scale": {"type": "log", "domain": [low, high]}, "axis": axis}


def error_axis(field: str, low: float, high: float) -> dict[str, Any]:
    """Logarithmic, a line at some of the powers of ten."""
    axis = {"title": None, "values": ticks(low, high), "format": ".0e"}
    scale = {"type": "log", "domain": [low, high], "nice": False, "clamp": True}
    return {"field": field, "type": "quantitative", "scale": scale, "axis": axis}


def title(text: str, left: float, top: float, align: str = "left") -> dict[str, object]:
    """What an axis shows, written beside it; places are pixels in the plot."""
    mark = {"type": "text", "align": align, "baseline": "middle", "color": "var(--soft)"}
    return layer(mark, [{"text": text}], {"x": {"value": left}, "y": {"value": top}, "text": {"field": "text"}})


def places(field: str, count: int) -> dict[str, Any]:
    """Places in the order of execution, without an axis."""
    scale = {"domain": [0, max(1, count - 1)], "nice": False}
    return {"field": field, "type": "quantitative", "scale": scale, "axis": None}


def pixels(field: str, height: float) -> dict[str, Any]:
    """A field that holds pixels from the top of the plot."""
    scale = {"domain": [0, height], "range": [0, height], "nice": False}
    return {"field": field, "type": "quantitative", "scale": scale, "axis": None}


def marks_below(blocks: Sequence[str], low: float, high: float, padding: Padding) -> list[dict[str, object]]:
    """Where stem and blocks begin, below the plot; as many names as there is room for."""
    width, spare = svg.WIDTH - padding[1] - padding[3], 0 if padding[1] > _NAME else 0.5
    starts = [at for at, name in enumerate(blocks) if at == 0 or name != blocks[at - 1]]
    apart = max(1, len(blocks) - 1) * _NAME / width
    shown: list[int] = []
    for at in starts:
        if not shown or (at - shown[-1] >= apart and len(blocks) - 1 - at >= apart * spare):
            shown.append(at)
    rows = [{"at": at, "error": low, "name": _brief(blocks[at])} for at in shown]
    x, y = places("at", len(blocks)), error_axis("error", low, high)
    text = {"type": "text", "baseline": "top", "align": "center", "color": "var(--soft)", "clip": False}
    tick = {"type": "tick", "orient": "vertical", "size": 6, "thickness": 1, "yOffset": 4, "color": "var(--soft)"}
    return [
        layer(tick, rows, {"x": x, "y": y}),
        layer({**text, "dy": 10}, rows, {"x": x, "y": y, "text": {"field": "name"}}),
    ]


def _brief(block: str) -> str:
    """``f.2`` of ``features.2``."""
    return cut(block.replace("features.", "f.").replace("proj_", ""), 8)


def lane_colour(lane: str) -> str:
    """That of a lane; of none a quiet one."""
    return LANE_COLOURS.get(lane, "var(--soft)")
