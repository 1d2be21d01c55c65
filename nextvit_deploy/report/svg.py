"""Vega-Lite specs as static SVG that may stand in a page: nothing in it loads, runs or is called like anything else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final
from xml.etree import ElementTree as ET

from nextvit_exporters.errors import MissingExtra

WIDTH: Final = 360
"""Of every chart, in pixels: that of a small phone's page, so that its text is as large as it says."""
_SVG: Final = "{http://www.w3.org/2000/svg}"
_TAGS: Final = frozenset({"svg", "g", "path", "line", "rect", "circle", "text", "defs", "clipPath"})
_KEPT: Final = re.compile(
    r"d|[xy][12]?|[cr][xy]?|width|height|viewBox|transform|fill|stroke|opacity|id|clip-path|text-anchor|pointer-events"
    r"|(?:fill|stroke|font|stop)-[a-z]+|display"
)
_CONFIG: Final[Mapping[str, object]] = {
    "aria": False,
    "background": None,
    "font": "system-ui",
    "view": {"stroke": None},
    "axis": {
        "domain": False,
        "ticks": False,
        "gridColor": "var(--line)",
        "labelColor": "var(--soft)",
        "labelFontSize": 12,
        "labelPadding": 6,
        "titleColor": "var(--soft)",
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    },
    "text": {"color": "var(--ink)", "fontSize": 12},
    "rule": {"color": "var(--soft)"},
}


def spec(height: int, layers: list[dict[str, object]], padding: tuple[int, int, int, int]) -> dict[str, object]:
    """A Vega-Lite spec of ``WIDTH`` in all, ``padding`` (top, right, bottom, left) included: no text moves anything."""
    top, right, bottom, left = padding
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "autosize": "none",
        "width": WIDTH - left - right,
        "height": height,
        "padding": {"top": top, "right": right, "bottom": bottom, "left": left},
        "config": _CONFIG,
        "layer": layers,
    }


def render(drawn: Mapping[str, object], name: str, told: str) -> str:
    """The spec as one ``<svg>`` element: ``name`` goes before its identifiers, ``told`` is what it says in words.

    Raises MissingExtra without vl-convert-python.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise MissingExtra("a report", "report") from error
    root = ET.fromstring(vl_convert.vegalite_to_svg(dict(drawn)))  # noqa: S314 - our own chart, its texts escaped
    _clean(root, name)
    names = {
        old: f"{name}-{place}"
        for place, old in enumerate(each.get("id", "") for each in root.iter() if "id" in each.attrib)
    }
    for each in root.iter():
        if "id" in each.attrib:
            each.set("id", names[each.attrib["id"]])
        if (clip := re.fullmatch(r"url\(#(\w+)\)", each.get("clip-path", ""))) is not None:
            each.set("clip-path", f"url(#{names[clip[1]]})")
    root.set("role", "img")
    root.set("aria-label", told)
    return ET.tostring(root, encoding="unicode", short_empty_elements=True)


def _clean(element: ET.Element, name: str) -> None:
    """Keep shapes, texts and how they look."""
    for child in list(element):
        if child.tag.removeprefix(_SVG) not in _TAGS or _empty(child):
            element.remove(child)
        else:
            _clean(child, name)
    element.tag = element.tag.removeprefix(_SVG)
    for attribute in [each for each in element.attrib if _KEPT.fullmatch(each) is None]:
        del element.attrib[attribute]


def _empty(element: ET.Element) -> bool:
    """What Vega draws without showing it."""
    return element.get("display") == "none" or (element.tag == f"{_SVG}text" and not element.text)
