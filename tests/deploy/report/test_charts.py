"""Charts: what they show, that no text of a folder becomes more than text, and that none lies on another."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextvit_deploy.bisect.record import Layer
from nextvit_deploy.precision.record import PrecisionPlan
from nextvit_deploy.report import charts, scales
from nextvit_deploy.report.collect import collect
from nextvit_deploy.report.facts import Headroom, Item, Reach, ordered
from nextvit_deploy.report.marks import Chart
from nextvit_deploy.report.scales import Box
from nextvit_deploy.report.trade_off import Point, best_of, trade_off
from nextvit_deploy.verdict import Verdict
from nextvit_exporters.errors import MissingExtra
from tests.deploy.report.support_report import EVIL, bisection, checked, digest, plan, whole


def parsed(drawn: str) -> ET.Element:
    return ET.fromstring(drawn)  # noqa: S314 - drawn here


def texts(drawn: str) -> list[str]:
    return [each.text or "" for each in parsed(drawn).iter("text")]


def svg(chart: Chart | None, name: str = "c") -> str:
    assert chart is not None
    return chart.svg(name)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> tuple[Item, ...]:
    return collect(checked(tmp_path_factory.mktemp("checked"))).items


def test_the_trade_off_names_all_artefacts_with_measured_times(items: tuple[Item, ...]) -> None:
    shown = texts(svg(trade_off(items)))
    assert "demo-nano_int8.onnx · 0.71x PyTorch ✕" in shown
    assert "nano_fp16.engine · 0.412 ms" in shown
    assert "nano_fp16.mlpackage" in shown
    assert {"size, MB", "precision cost, relative rms", "1e-3", "1e-2"} <= set(shown)
    assert trade_off([each for each in items if each.made is None]) is None


def test_what_failed_is_never_the_best(items: tuple[Item, ...]) -> None:
    good, bad = (next(each for each in items if each.verdict is v) for v in (Verdict.VERIFIED, Verdict.FAILED))
    points = [Point(good, 3.0, 1e-3), Point(good, 2.0, 1e-2), Point(good, 4.0, 1e-2), Point(bad, 1.0, 1e-9)]
    assert best_of(points) == [points[1], points[0]]


def test_depth_shows_both_questions_and_the_parting() -> None:
    found = bisection("a", digest("a"), parted=True)
    chart = charts.depth(found)
    assert chart is not None
    assert "parts from PyTorch at features.1.e_mhsa.q" in chart.told
    drawn = svg(chart)
    assert "features.1.e_mhsa.q" in texts(drawn)
    assert drawn.count("var(--cost)") == drawn.count("var(--same)") == 2
    unknown = replace(found.series[0], layers=(Layer("a", "a", "Conv", None),), partings=())
    assert charts.depth(replace(found, series=(unknown,))) is None


def test_errors_that_no_axis_has_are_drawn_at_its_ends() -> None:
    found = bisection("a", digest("a"))
    layers = tuple(
        replace(each, error=error)
        for each, error in zip(
            found.series[0].layers, (float("inf"), float("nan"), 0.0, 1e-300, 1e300, None), strict=True
        )
    )
    drawn = svg(charts.depth(replace(found, series=(replace(found.series[0], layers=layers),))))
    assert "NaN" not in drawn
    assert "Infinity" not in drawn


def test_growth_needs_something_to_compare(items: tuple[Item, ...]) -> None:
    chart = charts.growth(items)
    assert "nano_fp16.engine" in texts(svg(chart))
    assert charts.growth([each for each in items if each.layers][:1]) is None


def test_headroom_and_plan() -> None:
    layers = (Reach("features.1.e_mhsa", "matmul", 70_000.0, 0.0), Reach("stem", "conv", 3.0, 0.0))
    found = Headroom(65504.0, 32768.0, "", 2, 0.0, layers)
    drawn = svg(charts.headroom(found))
    assert {"features.1.e_mhsa  7e+04", "stem  3", "FP16 holds 65504"} <= set(texts(drawn))
    assert charts.headroom(replace(found, layers=())) is None
    told = texts(svg(charts.plan(PrecisionPlan.from_dict(plan()))))
    assert {"10%, 55.0 dB", "0%, no noise", "90%, 47.0 dB, fp16", "features.1"} <= set(told)


def test_texts_stay_texts_and_nothing_else_is_in_a_chart(items: tuple[Item, ...]) -> None:
    evil = ordered([replace(each, title=f"{EVIL}{at}", layers=None) for at, each in enumerate(items)])
    found = bisection("a", digest("a"), parted=True)
    parting = replace(found.series[0].partings[0], module=EVIL)
    for chart in (
        trade_off(evil),
        charts.depth(replace(found, series=(replace(found.series[0], partings=(parting,)),))),
        charts.headroom(Headroom(1.0, 1.0, "", 1, 0.0, (Reach(EVIL, EVIL, 3.0, 0.0),))),
    ):
        root = parsed(svg(chart))
        assert {each.tag for each in root.iter()} <= {
            "svg",
            "g",
            "path",
            "line",
            "rect",
            "circle",
            "text",
            "defs",
            "clipPath",
        }
        assert not [name for each in root.iter() for name in each.attrib if name.startswith("on") or "href" in name]
        assert any(each.text and "<img" in each.text for each in root.iter("text"))


def test_a_charts_bytes_hang_on_nothing_but_what_it_shows(items: tuple[Item, ...]) -> None:
    """Vega counts its clip paths over a process's life."""
    assert svg(trade_off(items), "one") == svg(trade_off(items), "one")
    ids = [
        each.get("id")
        for name in ("one", "two")
        for each in parsed(svg(charts.growth(items), name)).iter()
        if each.get("id")
    ]
    assert len(ids) == len(set(ids))


def test_many_artefacts(items: tuple[Item, ...]) -> None:
    executed = [each for each in items if each.made is not None]
    many = ordered([replace(each, title=f"{each.title}-{at}") for at in range(20) for each in executed])
    assert len(texts(svg(trade_off(many)))) < 60
    assert svg(charts.growth(many))


@given(st.lists(st.tuples(st.floats(0, 300), st.floats(0, 200)), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_labels_lie_on_nothing(points: list[tuple[float, float]]) -> None:
    names = [f"label {at:02}" for at in range(len(points))]
    places = scales.place(points, names, points, (300, 400))
    long = 6.6 * len("label 10")
    boxes = [
        Box(p.left if p.right else p.left - long, p.top - 7, p.left + long if p.right else p.left, p.top + 7)
        for p in places
    ]
    assert not any(a.covers(b) for a, b in combinations(boxes, 2))


@given(st.lists(st.floats(0, 200), max_size=12))
@settings(max_examples=60, deadline=None)
def test_spread_keeps_the_order_and_the_distance(places: list[float]) -> None:
    found = scales.spread(places, 15, 200)
    order = sorted(range(len(places)), key=lambda at: (places[at], at))
    moved = [found[at] for at in order]
    assert all(b - a >= 15 - 1e-9 for a, b in pairwise(moved))
    assert all(-1e-9 <= each <= 200 + 1e-9 for each in found)


def test_decades_and_ticks() -> None:
    assert scales.decades([3e-4]) == pytest.approx((1e-5, 1e-3))
    assert scales.decades([2e-7, 5e-3]) == pytest.approx((1e-7, 1e-2))
    assert scales.decades([1e-3]) == pytest.approx((1e-4, 1e-2))
    assert scales.decades([0.0, 2e-7, 5e-5]) == pytest.approx((1e-7, 1e-4))
    assert scales.decades([0.0]) == pytest.approx((1e-18, 1e-16))
    assert scales.ticks(1e-17, 1e3)[0] == pytest.approx(1e-17)
    assert len(scales.ticks(1e-17, 1e3)) <= 7


def test_without_what_draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    chart = trade_off(collect(whole(tmp_path)).items)
    assert chart is not None
    with pytest.raises(MissingExtra, match=r"pip install 'nextvit-deploy\[report\]'"):
        chart.svg("c")
