"""A bisection for people: what parts and where first, then the error at every depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.markup import escape

from nextvit_deploy.bisect.record import Bisection, Layer, Parting, Series
from nextvit_deploy.render import show_notes, table

_BAR: Final = 24
"""Characters of the longest bar."""
_DECADES: Final = 4
"""Below its tolerance, where a bar begins; it is full at an error of one."""


def show_bisection(console: Console, found: Bisection, *, verbose: bool) -> None:
    """The answer first, then each question's errors by depth; only modules with a bar unless ``verbose``."""
    show_notes(console, found.notes)
    for series in found.series:
        _show_series(console, series, verbose=verbose)
    console.print(verdict_of(found), style="red" if found.parting else "green", soft_wrap=True, markup=False)


def verdict_of(found: Bisection) -> str:
    """In one line: where they part first, or that they don't."""
    first = found.parting
    if first is None:
        return f"{found.artefact}: no layer parts from PyTorch"
    more = sum(len(series.partings) for series in found.series) - 1
    others = f"; {more} more behind or beside it" if more else ""
    return f"{found.artefact} parts from PyTorch at {described(first)}{others}"


def described(parting: Parting) -> str:
    """A parting in one line: module, what is folded into it, the artefact's operations, and the figures."""
    carries = f" (which carries {', '.join(parting.carries)})" if parting.carries else ""
    operations = f", {parting.operations[-1]}" if parting.operations else ""
    why = f", {parting.why}" if parting.why else ""
    errors = f"error {parting.error:.1e} behind {parting.input_error:.1e}"
    return f"{parting.module or 'the model itself'}{carries}{operations}: {errors}{why}"


def _show_series(console: Console, series: Series, *, verbose: bool) -> None:
    title = f"{series.question}: {series.executor} against {series.against}, parted beyond {series.tolerance:.0e}"
    shown = table(escape(title))
    shown.add_column("module", overflow="fold")
    shown.add_column("", no_wrap=True)
    shown.add_column("error", justify="right", no_wrap=True)
    shown.add_column("by depth", no_wrap=True)
    parted = {each.module for each in series.partings}
    told = [layer for layer in series.layers if layer.error is not None]
    for layer in told if verbose else _last_of_each(told):
        error = layer.error if layer.error is not None else math.nan
        style = "red" if layer.module in parted else ""
        shown.add_row(
            escape(layer.module or layer.operation),
            layer.kind,
            f"{error:.1e}",
            _bar(error, series.tolerance),
            style=style,
        )
    console.print(shown)
    for each in series.partings:
        console.print(f"  parts at {escape(described(each))}", soft_wrap=True, style="red", highlight=False)


def _last_of_each(layers: Sequence[Layer]) -> list[Layer]:
    """One layer of each module: the last."""
    return list({layer.module or layer.operation: layer for layer in layers}.values())


def _bar(error: float, tolerance: float) -> str:
    """A bar as long as the error's logarithm; full for what is no number."""
    if not math.isfinite(error):
        return "█" * _BAR
    span = _DECADES - math.log10(tolerance)
    length = (math.log10(error) + span) / span if error > 0.0 else 0.0
    return "█" * max(0, min(_BAR, round(_BAR * length)))
