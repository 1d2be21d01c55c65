"""The doctor's tables, apart from the others so that no framework is imported for them."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nextvit_deploy.doctor import Fact, Lane


def show_doctor(console: Console, facts: Iterable[Fact], works: Iterable[Lane]) -> None:
    """Machine, versions, and what works here."""
    table = Table(show_header=False, title="This machine", title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for fact in facts:
        table.add_row(fact.name, escape(fact.value))
    console.print(table)
    lanes = Table(title="What works here", title_justify="left")
    for name in ("lane", "", "why"):
        lanes.add_column(name, overflow="fold")
    for lane in works:
        word = "[green]yes[/]" if lane.works else "[yellow]no[/]"
        remedy = f"; run: {lane.remedy}" if lane.remedy else ""
        lanes.add_row(lane.name, word, escape(lane.reason + remedy))
    console.print(lanes)
