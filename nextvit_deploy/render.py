"""Tables for people, at home in 80 columns; everything here reads finished results and prints."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nextvit_deploy.inspection import Inspection
from nextvit_deploy.verdict import Verdict
from nextvit_exporters.passes.base import TOGETHER, PassRecord

STYLE = {Verdict.VERIFIED: "green", Verdict.FAILED: "red", Verdict.NOT_VERIFIED: "yellow"}


def show_notes(console: Console, notes: Iterable[str]) -> None:
    """One line per note."""
    for note in notes:
        console.print(f"note: {escape(note)}", style="yellow", soft_wrap=True)


def show_passes(console: Console, passes: Iterable[PassRecord], *, verbose: bool) -> None:
    """The certified table; refused matches with ``verbose``."""
    shown = table("Passes, each executed before and after")
    shown.add_column("pass", no_wrap=True)
    for name in ("rewrites", "nodes", "params", "work", "float64", "float32"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("", no_wrap=True)
    for each in passes:
        certified = "[green]certified[/]" if each.certified else "[red]rolled back[/]"
        before, after = each.parameters
        if each.name == TOGETHER:
            shown.add_section()
        shown.add_row(
            each.name,
            str(each.rewrites),
            _change(each.nodes),
            f"{(after - before) / 1e3:+.1f}k" if after != before else "0",
            _work(each.macs),
            f"{each.error_float64:.0e}",
            f"{each.error_float32:.0e}",
            certified if each.rewrites else "[dim]no match[/]",
        )
    console.print(shown)
    if verbose:
        for each in passes:
            for refusal in each.refused:
                console.print(f"  {each.name} left {escape(refusal.where)}: {escape(refusal.reason)}", style="dim")


def show_ops(console: Console, ops: Mapping[str, int], unit: str, dtypes: str) -> None:
    """The op table on one line; ``unit`` is what it counts."""
    listed = ", ".join(f"{count} {name}" for name, count in ops.items())
    console.print(f"{sum(ops.values())} {unit}: {listed}; {dtypes}", soft_wrap=True)


def show_device(console: Console, device: Mapping[str, Any]) -> None:
    """What a kit found on its GPU, on a few lines; what it could not measure is left out."""
    verdict = Verdict(device["verdict"])
    console.print(f"on the device: [{STYLE[verdict]}]{verdict}[/] {escape(device['why'])}", soft_wrap=True)
    if "gpu" not in device:
        return
    gpu, seen, times = device["gpu"], device["comparison"], device["latency_ms"]
    console.print(f"{escape(str(gpu['name']))}, TensorRT {escape(device['tensorrt'])}, {device['kernels']} kernels")
    if "relative_rms" in seen:
        allowed = device["tolerance"]["relative_rms"]
        console.print(f"relative rms {seen['relative_rms']:.1e} against PyTorch float32, allowed {allowed:.0e}")
    for how, figures in times.items():
        if isinstance(figures, Mapping):
            told = ", ".join(f"{name} {value:.3f} ms" for name, value in figures.items() if isinstance(value, float))
            console.print(f"latency {escape(how.replace('_', ' '))}: {told}")


def show_inspection(console: Console, found: Inspection) -> None:
    """A checkpoint or an artefact, as name and value."""
    table = Table(
        show_header=False,
        title=escape(found.name),
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in found.facts.items():
        table.add_row(name, escape(_text(value)))
    console.print(table)


def table(title: str) -> Table:
    """An empty table in the house style."""
    return Table(
        title=title,
        title_justify="left",
        title_style="italic",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0),
    )


def _text(value: object) -> str:
    """A fact on one line, or as many as it has entries; counts by name are listed on one."""
    if isinstance(value, Mapping):
        if all(isinstance(item, int) for item in value.values()):
            return ", ".join(f"{count} {name}" for name, count in value.items())
        return "\n".join(
            f"{name}: {item if isinstance(item, str) else json.dumps(item)}" for name, item in value.items()
        )
    return "\n".join(map(_line, value)) if isinstance(value, list) else str(value)


def _line(item: object) -> str:
    """An entry of a list on one line; a kernel by its kind, types and modules."""
    if not isinstance(item, Mapping):
        return str(item)
    where = ", ".join(item["modules"]) or item["name"]
    return f"{item['kind']}  {'/'.join(item['dtypes'])}  {where}"


def _work(macs: tuple[int, int]) -> str:
    """Change of the multiply-accumulates, at the size the pass was certified on."""
    before, after = macs
    return f"{100 * (after - before) / before:+.1f} %" if after != before else "0"


def _change(pair: tuple[int, int]) -> str:
    difference = pair[1] - pair[0]
    return f"{difference:+d}" if difference else "0"
