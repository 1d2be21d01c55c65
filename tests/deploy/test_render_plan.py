"""A plan for people: its rows, and a picture that any browser shows."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from dataclasses import replace
from io import StringIO

from rich.console import Console

from nextvit_deploy.precision.record import BlockPlan, PrecisionPlan
from nextvit_deploy.render_plan import plan_svg, show_plan

SVG = "{http://www.w3.org/2000/svg}"
PLAN = PrecisionPlan(
    model="nextvit_nano",
    size=(64, 96),
    budget="30dB",
    method="mse",
    images="0" * 64,
    count=48,
    blocks=(
        BlockPlan("stem.0", math.inf, 0.0, 1, 12_000_000, "int8"),
        BlockPlan("features.3", 12.5, 0.75, 4, 2_000_000, "fp16"),
        BlockPlan("features.4", 17.0, 0.25, 4, 2_600_000, "int8"),
    ),
    predicted_db=31.0,
    sqnr_db=30.5,
    float_top1=1.0,
    top1=47 / 48,
    steps=(),
    notes=("a [note]",),
)


def shown(plan: PrecisionPlan) -> list[str]:
    out = StringIO()
    show_plan(Console(file=out, width=80, emoji=False), plan)
    return out.getvalue().splitlines()


def test_the_table_has_a_row_for_every_block() -> None:
    lines = shown(PLAN)
    assert max(map(len, lines[:6])) <= 80
    rows = [line.split() for line in lines if line.startswith(("stem.", "features."))]
    assert rows == [
        ["stem.0", "no", "noise", "0%", "1", "12M", "int8"],
        ["features.3", "12.5", "dB", "█" * 15, "75%", "4", "2M", "fp16"],
        ["features.4", "17.0", "dB", "█" * 5, "25%", "4", "3M", "int8"],
    ]
    assert lines[-2:] == [
        "1 of 3 blocks kept within 30dB: 30.5 dB (31.0 dB predicted), top-1 97.9% (PyTorch 100.0%), 48 images",
        "note: a [note]",
    ]


def test_without_classes_there_is_no_top1() -> None:
    assert "top-1" not in "\n".join(shown(replace(PLAN, top1=None, float_top1=None)))


def test_a_bar_is_as_long_as_its_share() -> None:
    for share, bar in ((0.5, "█" * 10), (0.00625, "▏"), (0.0, ""), (1.0, "█" * 20), (0.1 + 0.0125, "██▎")):
        block = replace(PLAN.blocks[1], share=share)
        (row,) = (line for line in shown(replace(PLAN, blocks=(block,))) if line.startswith("features.3"))
        assert [word for word in row.split() if not word.isascii()] == ([bar] if bar else [])


def test_the_chart_is_one_whole_document() -> None:
    root = ET.fromstring(plan_svg(PLAN))  # noqa: S314 - our own
    assert root.tag == f"{SVG}svg"
    title, about = root.findtext(f"{SVG}title"), root.findtext(f"{SVG}desc")
    assert title == "Noise that INT8 adds, block by block: nextvit_nano, 64x96"
    assert about is not None
    assert about.startswith("1 of 3 blocks kept within 30dB: 30.5 dB")
    bars = [each for each in root.iter(f"{SVG}rect") if each.get("class") != "rail"]
    assert [each.get("class") for each in bars] == ["int8", "kept", "int8"]
    widths = [float(each.attrib["width"]) for each in bars]
    assert widths[0] == 0.0
    assert abs(widths[1] / widths[2] - 3.0) <= 1e-3
    edges = [float(each.attrib["x"]) + float(each.attrib["width"]) for each in root.iter(f"{SVG}rect")]
    assert max(edges) < float(root.attrib["width"])
    texts = [each.text for each in root.iter(f"{SVG}text")]
    assert texts[-2:] == ["features.4", "25%, 17.0 dB"]
    assert "75%, 12.5 dB, fp16" in texts
    assert "prefers-color-scheme:dark" in (root.findtext(f"{SVG}style") or "")
    assert "script" not in {each.tag.removeprefix(SVG) for each in root.iter()}


def test_names_can_not_break_out_of_the_chart() -> None:
    hostile = '</text><script>alert("1")</script>&'
    blocks = (replace(PLAN.blocks[0], block=hostile), *PLAN.blocks[1:])
    root = ET.fromstring(plan_svg(replace(PLAN, model=hostile, budget=hostile, blocks=blocks)))  # noqa: S314 - our own
    assert {each.tag.removeprefix(SVG) for each in root.iter()} == {"svg", "title", "desc", "style", "text", "rect"}
    assert hostile in [each.text for each in root.iter(f"{SVG}text")]
    assert hostile in "\n".join(shown(replace(PLAN, budget=hostile)))


def test_a_plan_without_noise_has_bars_of_no_length() -> None:
    silent = replace(PLAN, blocks=(PLAN.blocks[0],), sqnr_db=math.inf, predicted_db=math.inf)
    root = ET.fromstring(plan_svg(silent))  # noqa: S314 - our own
    assert [each.get("width") for each in root.iter(f"{SVG}rect") if each.get("class") == "int8"] == ["0.0"]
    assert "no noise" in plan_svg(silent)
