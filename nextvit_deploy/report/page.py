"""The report: what a folder holds, as one HTML file that loads nothing, runs nothing and reads on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from markupsafe import Markup

from nextvit_deploy import __version__
from nextvit_deploy.outputs import check_writable
from nextvit_deploy.report import charts
from nextvit_deploy.report.charts import by_block, series_of
from nextvit_deploy.report.collect import collect
from nextvit_deploy.report.facts import COST, NETWORK, Check, Collected, Item
from nextvit_deploy.report.html import fill
from nextvit_deploy.report.marks import LANE_COLOURS, Chart
from nextvit_deploy.report.trade_off import timed, trade_off
from nextvit_deploy.verdict import Verdict
from nextvit_exporters.files import atomic_write

REPORT: Final = "report.html"
"""Its name in the folder, where nobody says otherwise."""
_LAYERS: Final = 40
"""Rows of the table of blocks; the largest Next-ViT has 38."""


@dataclass(frozen=True, slots=True)
class Shown:
    """An item with everything that the template writes about it."""

    item: Item
    id: str
    open: bool
    size: str
    smaller: str
    rms: str
    error: str
    agrees: str
    network: str
    network_verdict: str
    room: str
    share: int | None
    """Percent of the tolerance, on a scale of six powers of ten."""
    decisions: str
    latency: str
    short_latency: str
    depth: Markup | None
    blocks: list[list[str]]
    headroom: Markup | None
    reaches: list[list[str]]
    plan: Markup | None
    checks: list[tuple[Check, str, tuple[str, ...]]]
    passes: list[list[str]]
    passed: str


def write_report(folder: Path, output: Path) -> Path:
    """Write the page about everything in ``folder``; returns ``output``.

    The same folder gives the same bytes. Raises DeployError where the folder holds nothing to tell, MissingExtra
    without what draws the charts, OutputNotWritten.
    """
    check_writable(output)
    atomic_write(output, page(collect(folder)).encode(errors="backslashreplace"))
    return output


def page(found: Collected) -> str:
    """The whole page; raises MissingExtra."""
    largest = max((each.made.size for each in found.items if each.made), default=0)
    shown = [_shown(f"a{number}", each, largest) for number, each in enumerate(found.items)]
    return fill(
        "report.html.j2",
        found=found,
        shown=shown,
        headline=_headline(found),
        about=_about(found),
        trade_off=_drawn(trade_off(found.items), "trade"),
        growth=_drawn(charts.growth(found.items), "growth"),
        ends=_ends(found.items),
        lanes=[lane for lane in LANE_COLOURS if any(each.lane == lane for each in found.items)],
        version=__version__,
        failed=Verdict.FAILED,
        verified=Verdict.VERIFIED,
    )


def _drawn(chart: Chart | None, name: str) -> Markup | None:
    """A chart as markup: shapes and texts that were drawn here, and nothing else."""
    return None if chart is None else Markup(chart.svg(name))  # noqa: S704 - cleaned, its texts escaped


def _headline(found: Collected) -> str:
    """How many artefacts came to what."""
    total = len(found.items)
    counts = {
        verdict: len(found.having(verdict)) for verdict in (Verdict.FAILED, Verdict.NOT_VERIFIED, Verdict.VERIFIED)
    }
    if counts[Verdict.VERIFIED] == total:
        every = "The artefact was" if total == 1 else f"All {total} artefacts were"
        return f"{every} executed and stayed within tolerance of PyTorch."
    listed = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return f"Of {total} artefact{'s' * (total > 1)}: {listed}."


def _about(found: Collected) -> list[tuple[str, str]]:
    """What all artefacts have in common, or how they differ."""
    made = [each.made for each in found.items if each.made]
    told = {
        "model": [each.model for each in made],
        "checkpoint": [value for each in made for name, value in each.provenance if name == "checkpoint"],
        "weights": [value[:12] for each in made for name, value in each.provenance if name == "weights' fingerprint"],
        "verified on": [check.inputs for each in made for check in each.checks[:1]],
        "baseline": [found.baseline] if found.baseline else [],
    }
    return [(name, "; ".join(dict.fromkeys(values))) for name, values in told.items() if values]


def _shown(name: str, item: Item, largest: int) -> Shown:
    made, check, network = item.made, item.worst_check, item.network
    size = "" if made is None else f"{made.size / 1e6:.2f} MB"
    smaller = f"{made.size / largest:.0%} of the largest" if made and made.size < largest else ""
    return Shown(
        item=item,
        id=name,
        open=item.verdict is not Verdict.VERIFIED or name == "a0",
        size=size,
        smaller=smaller,
        rms=_number(check.error) if check else "",
        error=f"{_number(check.error)} ({_db(check.sqnr_db)})" if check else "",
        agrees=_agrees(item),
        network="" if network is None else _number(network.error) or "not executed",
        network_verdict="" if network is None else str(network.verdict),
        room=_room(check),
        share=_share(check),
        decisions=_decisions(item),
        latency="; ".join(each.short + ("" if each.basis == "measured" else " (estimate)") for each in item.latencies),
        short_latency=timed(item.latencies) or next((f"{each.short} (estimate)" for each in item.latencies), ""),
        depth=_drawn(charts.depth(item.layers), f"{name}-depth") if item.layers else None,
        blocks=_blocks(item),
        headroom=_drawn(charts.headroom(made.headroom), f"{name}-room") if made and made.headroom else None,
        reaches=_reaches(item),
        plan=_drawn(charts.plan(made.plan), f"{name}-plan") if made and made.plan else None,
        checks=[_check(each) for each in made.checks] if made else [],
        passes=_passes(item),
        passed=_passed(item),
    )


def _room(check: Check | None) -> str:
    """How far inside, or outside, of the tolerance it is."""
    if check is None or check.error is None or not check.allowed:
        return ""
    if not math.isfinite(check.error):
        return "no finite answer"
    if not check.error:
        return "no difference"
    factor = check.allowed / check.error
    return f"{_times(factor)} inside the tolerance" if factor >= 1 else f"{_times(1 / factor)} beyond the tolerance"


def _times(factor: float) -> str:
    return f"{factor:.0f}x" if factor >= 10 else f"{factor:.1f}x"


def _share(check: Check | None) -> int | None:
    if check is None or check.error is None or not check.allowed:
        return None
    if not math.isfinite(check.error) or check.error > check.allowed:
        return 100
    decades = math.log10(check.allowed / check.error) if check.error else 6.0
    return round(100 * max(0.03, 1 - decades / 6))


def _decisions(item: Item) -> str:
    """How often it decides as PyTorch: over a folder where it was evaluated, else over what it was verified on."""
    seen, check = item.evaluated, item.worst_check
    if seen is not None and seen.top1 is not None:
        return f"top-1 {seen.top1[0]:.1%}, PyTorch {seen.top1[1]:.1%}, {seen.count} images"
    if seen is not None:
        return f"agrees on {seen.agreement:.1%} of {seen.count} images"
    if check is None or check.top1 is None or check.count is None:
        return ""
    flips = f", {check.can_flip} could flip" if check.can_flip else ""
    return f"agrees on {check.top1 * check.count:.0f} of {check.count} images{flips}"


def _agrees(item: Item) -> str:
    """On how many images its first class is PyTorch's."""
    seen, check = item.evaluated, item.worst_check
    if seen is not None:
        return f"{seen.agreement:.1%} of {seen.count}"
    return "" if check is None or check.top1 is None else f"{check.top1:.0%} of {check.count}"


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB" if math.isfinite(value) else f"{value} dB"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _check(check: Check) -> tuple[Check, str, tuple[str, ...]]:
    """A check, in words who was asked what, and its figures."""
    flips = "" if check.can_flip is None else f"{check.can_flip} of {check.count}"
    top1 = "" if check.top1 is None else f"{check.top1:.0%}"
    how = f"{check.executor} ({check.mode}) against {check.against}, on {check.inputs}"
    numbers = _number(check.error), _number(check.allowed), _db(check.sqnr_db), _number(check.max_abs)
    return check, how, (*numbers, top1, flips)


def _blocks(item: Item) -> list[list[str]]:
    """By block, the last error of each question."""
    known = [by_block(s) for q in (NETWORK, COST) for s in [series_of(item.layers, q)] if s is not None]
    names = list(dict.fromkeys(name for each in known for name in each))
    same, cost = ({} if (s := series_of(item.layers, q)) is None else by_block(s) for q in (NETWORK, COST))
    return [[name, _number(same.get(name)), _number(cost.get(name))] for name in names[:_LAYERS]]


def _reaches(item: Item) -> list[list[str]]:
    found = item.made.headroom if item.made else None
    if found is None:
        return []
    return [[each.name, each.kind, f"{each.largest:.4g}", f"{each.subnormal:.2%}"] for each in found.layers[:_LAYERS]]


def _passes(item: Item) -> list[list[str]]:
    """The certified table."""
    rows = []
    for each in item.made.passes if item.made else ():
        moved = [
            f"{before:,} to {after:,}" if before != after else "" for before, after in (each.nodes, each.parameters)
        ]
        macs = f"{each.macs[0] / 1e6:.2f}M to {each.macs[1] / 1e6:.2f}M" if each.macs[0] != each.macs[1] else ""
        word = "certified" if each.certified else "rolled back"
        rows.append([each.name, word, str(each.rewrites), *moved, macs, _number(each.error_float64)])
    return rows


def _passed(item: Item) -> str:
    passes = item.made.passes if item.made else ()
    certified = sum(each.certified for each in passes)
    return (
        f"{certified} of {len(passes)} certified, {sum(each.rewrites for each in passes[:-1])} rewrites"
        if passes
        else ""
    )


def _ends(items: Sequence[Item]) -> list[list[str]]:
    """For the chart of all artefacts: the largest error and where it is."""
    rows = []
    for item in items:
        series = series_of(item.layers, COST)
        known = [each for each in series.layers if each.error is not None] if series else []
        if known:
            most = max(known, key=lambda each: each.error or 0.0)
            rows.append([item.label, most.module, _number(most.error)])
    return rows
