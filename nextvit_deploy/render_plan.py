"""A precision plan for people: a table for the terminal, and a bar chart as one SVG file."""

from __future__ import annotations

import math
from typing import Final
from xml.sax.saxutils import escape as xml

from rich.console import Console
from rich.markup import escape

from nextvit_deploy.precision.record import PrecisionPlan
from nextvit_deploy.render import show_notes, table
from nextvit_exporters.spec import Precision

_BAR: Final = 20
"""Characters of a bar that is all of the noise."""
_ROW, _LEFT, _WIDTH, _RIGHT, _TOP = 22, 110, 420, 130, 56
"""Of the chart, in its own units: a row's height, and the widths of names, bars and figures; where rows begin."""
_STYLE: Final = (
    ".nvplan{--ink:#1f2328;--quiet:#656d76;--int8:#0969da;--kept:#bc4c00;--rail:#eaeef2}"
    "@media(prefers-color-scheme:dark){.nvplan{--ink:#e6edf3;--quiet:#8d96a0;--int8:#58a6ff;--kept:#f0883e;"
    "--rail:#21262d}}.nvplan text{font:13px system-ui,sans-serif;fill:var(--ink)}.nvplan .quiet{fill:var(--quiet)}"
    ".nvplan .end{text-anchor:end}.nvplan .rail{fill:var(--rail)}.nvplan .int8{fill:var(--int8)}"
    ".nvplan .kept{fill:var(--kept)}"
)
"""Under a class of its own, so that a page which holds the chart keeps its looks."""


def show_plan(console: Console, plan: PrecisionPlan) -> None:
    """What INT8 costs in each block alone, what was chosen for it, and what that costs together."""
    shown = table(f"Precision plan for {plan.budget}, noise of each block in INT8 alone")
    shown.add_column("block", no_wrap=True)
    shown.add_column("SQNR", justify="right", no_wrap=True)
    shown.add_column("share of noise", no_wrap=True)
    shown.add_column("", justify="right", no_wrap=True)
    for name in ("maps", "MACs", "precision"):
        shown.add_column(name, justify="right", no_wrap=True)
    for each in plan.blocks:
        style = "" if each.precision == str(Precision.INT8) else "yellow"
        shown.add_row(
            escape(each.block),
            _db(each.sqnr_db),
            _bar(each.share),
            f"{each.share:.0%}",
            str(each.maps),
            f"{each.macs / 1e6:.0f}M",
            each.precision,
            style=style,
        )
    console.print(shown)
    console.print(escape(_summary(plan)), soft_wrap=True)
    show_notes(console, plan.notes)


def plan_svg(plan: PrecisionPlan) -> str:
    """The plan as one self-contained SVG document: a bar per block, its length the block's share of the noise.

    It follows the reader's light or dark theme, loads nothing and runs no script.
    """
    height = _TOP + _ROW * len(plan.blocks) + 12
    width = _LEFT + _WIDTH + _RIGHT
    title = f"Noise that INT8 adds, block by block: {plan.model}, {plan.size[0]}x{plan.size[1]}"
    longest = max((each.share for each in plan.blocks), default=0.0) or 1.0
    rows = []
    for index, each in enumerate(plan.blocks):
        y, kept = _TOP + _ROW * index, each.precision != str(Precision.INT8)
        bar = min(1.0, max(0.0, each.share / longest)) * _WIDTH
        told = f"{each.share:.0%}, {_db(each.sqnr_db)}" + (f", {each.precision}" if kept else "")
        rows.append(
            f'<text class="end" x="{_LEFT - 8}" y="{y + 13}">{xml(each.block)}</text>'
            f'<rect class="rail" x="{_LEFT}" y="{y + 2}" width="{_WIDTH}" height="{_ROW - 6}" rx="2"/>'
            f'<rect class="{"kept" if kept else "int8"}" x="{_LEFT}" y="{y + 2}" width="{bar:.1f}" height="{_ROW - 6}" '
            f'rx="2"/><text class="quiet" x="{_LEFT + _WIDTH + 8}" y="{y + 13}">{xml(told)}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'class="nvplan" role="img"><title>{xml(title)}</title><desc>{xml(_summary(plan))}</desc>'
        f"<style>{_STYLE}</style>"
        f'<text x="8" y="20">{xml(title)}</text><text class="quiet" x="8" y="40">{xml(_summary(plan))}</text>'
        + "".join(rows)
        + "</svg>\n"
    )


def _summary(plan: PrecisionPlan) -> str:
    """What was decided and what it costs, in one line."""
    kept = f"{len(plan.keep)} of {len(plan.blocks)} blocks kept"
    parts = [f"{kept} within {plan.budget}: {_db(plan.sqnr_db)} ({_db(plan.predicted_db)} predicted)"]
    if plan.top1 is not None and plan.float_top1 is not None:
        parts.append(f"top-1 {plan.top1:.1%} (PyTorch {plan.float_top1:.1%})")
    return f"{', '.join(parts)}, {plan.count} images"


def _db(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else "no noise"


def _bar(share: float) -> str:
    """A bar of eighths of a character."""
    eighths = round(8 * _BAR * min(1.0, max(0.0, share)))
    return "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")
