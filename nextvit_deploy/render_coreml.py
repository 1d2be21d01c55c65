"""Tables for Core ML packages: a sweep over compressions, and what the linter found."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.markup import escape

from nextvit_deploy.render import STYLE, table
from nextvit_deploy.sweep import Sweep, Trial
from nextvit_exporters.coreml.lint import Finding


def show_sweep(console: Console, swept: Sweep) -> None:
    """Size against error, and the one to take."""
    shown = table("What compression saves and costs, on the images")
    shown.add_column("weights", no_wrap=True)
    for name in ("size", "of fp16", "rel. rms", "SQNR", "top-1", "can flip", "verdict"):
        shown.add_column(name, justify="right", no_wrap=True)
    whole = swept.trials[0].size
    for each in swept.trials:
        shown.add_row(*_row(each, whole))
    console.print(shown)
    for each in swept.trials:
        if each.why:
            console.print(f"  {each.name}: {escape(each.why)}", soft_wrap=True)
    console.print(
        f"recommended: {escape(swept.because)}" if swept.recommended else escape(swept.because), soft_wrap=True
    )
    if swept.recommended is not None and swept.recommended.manifest is not None:
        console.print(escape(str(swept.recommended.manifest.artifact.path)), soft_wrap=True)


def show_findings(console: Console, name: str, findings: Sequence[Finding]) -> None:
    """What the linter found, by rule; its sources, and that it is a heuristic."""
    if not findings:
        console.print(f"{escape(name)}: nothing in it is known to leave the Neural Engine", soft_wrap=True)
    for rule, found in groupby(findings, lambda each: each.rule):
        console.print(f"[bold]{escape(rule)}[/]")
        for each in found:
            place = f"{each.module}: " if each.module else ""
            console.print(f"  {escape(place + each.message)}  [dim]({escape(each.source)})[/]", soft_wrap=True)
    console.print("Heuristics: only a measurement on the device tells whether one of them matters.", style="dim")


def _row(trial: Trial, whole: int) -> tuple[str, ...]:
    cost = trial.cost
    if trial.manifest is None or cost is None:
        return (trial.name, *[""] * 6, "not built")
    verdict = trial.manifest.verdict
    return (
        trial.name,
        f"{trial.size / 1e6:.1f} MB",
        f"{trial.size / whole:.0%}" if whole else "",
        f"{cost.relative_rms:.1e}",
        f"{cost.sqnr_db:.0f} dB",
        "" if cost.top1 is None else f"{cost.top1:.0%}",
        "" if cost.can_flip is None else f"{cost.can_flip} of {cost.count}",
        f"[{STYLE[verdict]}]{verdict}[/]",
    )
