"""An export or a verification for people: what was done, and last how far the saved file is from PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.markup import escape

from nextvit_deploy.manifest import Manifest
from nextvit_deploy.precision.record import PrecisionPlan
from nextvit_deploy.render import STYLE, show_notes, show_ops, show_passes, table
from nextvit_deploy.render_int8 import show_int8
from nextvit_deploy.render_plan import show_plan
from nextvit_deploy.verify import Check


def show_manifest(console: Console, manifest: Manifest, *, verbose: bool) -> None:
    """An export or a verification: notes, passes, and the verdict table last."""
    show_notes(console, manifest.notes)
    if verbose:
        for line in manifest.checkpoint.found:
            console.print(f"  {escape(line)}", style="dim")
    if manifest.passes:
        show_passes(console, manifest.passes, verbose=verbose)
    show_ops(console, manifest.ops, manifest.unit, manifest.dtypes)
    size = f"{manifest.artifact.size / 1e6:.1f} MB"
    seconds = f"{sum(manifest.seconds.values()):.1f} s"
    path = escape(str(manifest.artifact.path))
    console.print(f"{path}  {size}, sha256 {manifest.artifact.sha256[:12]}, {seconds}", soft_wrap=True)
    if manifest.precision_plan is not None:
        show_plan(console, PrecisionPlan.from_dict(manifest.precision_plan))
    if isinstance(int8 := manifest.built.get("int8"), Mapping):
        show_int8(console, int8, verbose=verbose)
    elif why := manifest.built.get("int8 not estimated"):
        console.print(f"INT8 on a T4: not estimated, {escape(str(why))}", soft_wrap=True)
    console.print("[bold]How far the saved file is from PyTorch[/]")
    for question, checks in groupby(manifest.checks, lambda check: check.question):
        _show_question(console, question, list(checks))
    headroom = next((check.findings["headroom"] for check in manifest.checks if "headroom" in check.findings), None)
    if isinstance(headroom, Mapping):
        _show_headroom(console, headroom)


def _show_question(console: Console, question: str, checks: list[Check]) -> None:
    """What was asked of whom, and one row for each set of inputs."""
    first = checks[0]
    title = f"{question}: {first.executor} ({first.mode}) against {first.against}"
    shown = table(escape(title))
    shown.add_column("inputs", overflow="fold")
    for name in ("max|d|", "rel. rms", "allowed", "SQNR", "top-1", "can flip", "verdict"):
        shown.add_column(name, justify="right", no_wrap=True)
    for check in checks:
        shown.add_row(*_row(check))
    console.print(shown)
    for why in dict.fromkeys(check.why for check in checks if check.why):
        console.print(f"  {escape(why)}", soft_wrap=True)


def _show_headroom(console: Console, headroom: Mapping[str, Any]) -> None:
    """How close the layers come to FP16's largest number."""
    most = headroom["layers"][0] if headroom["layers"] else None
    if most is not None:
        where = escape(most["module"] or most["operation"])
        limit = f"FP16 holds {headroom['limit']:.0f}"
        console.print(f"headroom: {where} reaches {most['largest']:.4g}, {limit}", soft_wrap=True)


def _row(check: Check) -> tuple[str, ...]:
    verdict = f"[{STYLE[check.verdict]}]{check.verdict}[/]"
    if not check.comparisons:
        return (escape(check.inputs), *[""] * 6, verdict)
    worst = max(check.comparisons, key=lambda c: c.relative_rms)
    return (
        escape(check.inputs),
        f"{worst.max_abs:.1e}",
        f"{worst.relative_rms:.1e}",
        f"{worst.tolerance.relative_rms:.0e}",
        f"{worst.sqnr_db:.0f} dB",
        "" if worst.top1 is None else f"{worst.top1:.0%}",
        "" if worst.can_flip is None else f"{worst.can_flip} of {worst.count}",
        verdict,
    )
