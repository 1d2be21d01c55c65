"""The table of what INT8 costs and saves on a T4, at home in 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console
from rich.markup import escape

from nextvit_deploy.render import table
from nextvit_exporters.tensorrt.int8_advice import DOUBTFUL, ESTIMATE, GO, NO_GO

_STYLE: Final[Mapping[str, str]] = {GO: "green", DOUBTFUL: "yellow", NO_GO: "red"}
_SHOWN: Final = 12
"""Layers in the table without ``verbose``."""


def show_int8(console: Console, int8: Mapping[str, Any], *, verbose: bool = False) -> None:
    """What a manifest tells under ``built``, ``int8``: the most expensive layers, totals, and what to do."""
    estimate = int8["estimate"]
    _show_layers(console, estimate, verbose=verbose)
    _show_totals(console, estimate)
    style = _STYLE.get(int8["recommendation"], "yellow")
    console.print(f"INT8: [{style}]{escape(int8['sentence'])}[/]", soft_wrap=True)
    for each in int8.get("missing", ()):
        console.print(f"  {escape(each)}", style="dim", soft_wrap=True)
    if int8["basis"] == ESTIMATE:
        console.print(f"  peaks: {escape(estimate['sources'])}", style="dim", soft_wrap=True)
        for note in estimate["notes"]:
            console.print(f"  {escape(note)}", style="dim", soft_wrap=True)


def _show_layers(console: Console, estimate: Mapping[str, Any], *, verbose: bool) -> None:
    layers = estimate["layers"]
    shown = table("Layers on a T4, in microseconds: an estimate")
    shown.add_column("module", overflow="fold")
    shown.add_column("kind", no_wrap=True)
    for name in ("MMACs", "groups", "FP16", "INT8 file"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("limit", no_wrap=True)
    for each in layers if verbose else layers[:_SHOWN]:
        kind = f"{each['kind']}{' int8' if each['int8'] else ''}"
        groups = f"{each['groups']}" if each["groups"] > 1 else ""
        times = f"{each['fp16_us']:.1f}", f"{each['int8_us']:.1f}"
        shown.add_row(escape(each["module"]), kind, f"{each['macs'] / 1e6:.1f}", groups, *times, each["limit"])
    console.print(shown)
    if len(layers) > _SHOWN and not verbose:
        console.print(f"  and {len(layers) - _SHOWN} more", style="dim")


def _show_totals(console: Console, estimate: Mapping[str, Any]) -> None:
    meets, islands = estimate["conversions"], estimate["islands"]
    among = sum(each["layers"] for each in islands)
    console.print(
        f"{len(meets)} places where INT8 meets floating point, {sum(each['microseconds'] for each in meets):.1f} us; "
        f"{len(islands)} regions in floating point with {among} layers",
        soft_wrap=True,
    )
    shown = table("All kernels, in microseconds")
    shown.add_column("case", no_wrap=True)
    for name in ("FP16", "INT8 file", "ratio"):
        shown.add_column(name, justify="right", no_wrap=True)
    for each in estimate["totals"]:
        half, int8 = each["fp16_us"], each["int8_us"]
        shown.add_row(each["case"], f"{half:.1f}", f"{int8:.1f}", f"{int8 / half:.2f}" if half else "")
    console.print(shown)
