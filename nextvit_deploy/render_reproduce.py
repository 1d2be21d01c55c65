"""A reproduction for people: what differs in the order of causes, and the word on each file last."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from nextvit_deploy.reproduce import Reproduction

_SHOWN = 8
"""Particulars of one difference; the others are in the JSON."""


def show_reproduction(console: Console, result: Reproduction) -> None:
    """Notes, differences with the worst of their particulars, and one line for each file."""
    for note in result.notes:
        console.print(f"note: {escape(note)}", style="yellow", soft_wrap=True)
    for each in result.differences:
        console.print(f"[bold]{each.cause}[/]: {escape(each.what)}", soft_wrap=True)
        for line in each.details[:_SHOWN]:
            console.print(f"  {escape(line)}", soft_wrap=True)
        if len(each.details) > _SHOWN:
            console.print(f"  and {len(each.details) - _SHOWN} more, all of them with --json", style="dim")
    for pair in result.files:
        word = "[green]byte-identical[/]" if pair.identical else "[red]differs[/]"
        here = "" if pair.identical else f", here {pair.rebuilt_sha256[:12]}, {pair.rebuilt_bytes} bytes"
        told = f"sha256 {pair.sha256[:12]}, {pair.bytes} bytes{here}"
        console.print(f"{escape(pair.file)}: {word}, {told}", soft_wrap=True)
    if result.kept is not None:
        console.print(f"what was built is {escape(result.kept)}", soft_wrap=True)
