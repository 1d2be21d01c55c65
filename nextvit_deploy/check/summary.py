"""A check as GitHub's Markdown, for the summary of a workflow's step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from nextvit_deploy.check import figures
from nextvit_deploy.check.result import CheckResult, Move, Row
from nextvit_deploy.verdict import Verdict

_MOST: Final = 900_000
"""Bytes: GitHub refuses summaries beyond a megabyte."""
_MARKS: Final = re.compile(r"([\\`*_\[\]|~])")
"""What means something in the middle of a line; texts never begin one."""
_ENTITIES: Final = (
    ("&", "&amp;"),
    ("<", "&lt;"),
    (">", "&gt;"),
    ("$", "&#36;"),
    ("://", "&#58;//"),
    ("www.", "www&#46;"),
)
"""What a backslash doesn't disarm: HTML, formulas and addresses."""
_SIGNS: Final = {Verdict.VERIFIED: "✅", Verdict.FAILED: "❌", Verdict.NOT_VERIFIED: "⚠️"}


def summary(result: CheckResult) -> str:
    """Verdict, table of rows, problems, and what moved since the baseline; no file's name can break out of it."""
    parts, size = [], 0
    for part in _parts(result):
        size += len(part.encode())
        if size > _MOST:
            parts.append("\nThere is more than GitHub shows; `check.json` has all of it.\n")
            break
        parts.append(part)
    return "".join(parts)


def _parts(result: CheckResult) -> Iterator[str]:
    """Lines that belong together, in their order."""
    counts = [(sum(row.verdict is verdict for row in result.rows), verdict) for verdict in Verdict]
    told = ", ".join(f"{count} {verdict}" for count, verdict in counts if count)
    yield f"### {_SIGNS[result.verdict]} nextvit-export check: {result.verdict}\n\n"
    yield f"{told or 'no rows'}, in {figures.seconds_text(result.seconds)}\n\n"
    yield "| cell | precision cost | size | kernels | time | verdict |\n|---|---:|---:|---:|---:|---|\n"
    for row in result.rows:
        yield f"| {' | '.join(_cells(row))} |\n"
    problems = [row for row in result.rows if row.problems]
    if problems:
        yield "\n#### Problems\n\n"
    for row in problems:
        for each in row.problems:
            module = f", module {escaped(each.module)}" if each.module else ""
            yield f"- **{escaped(row.cell.name)}**, {each.kind}{module}: {escaped(each.message)}\n"
    if result.notes:
        yield "\n#### Notes\n\n"
    for note in result.notes:
        yield f"- {escaped(note)}\n"
    yield from _moved(result)
    yield "\n"


def _cells(row: Row) -> Iterator[str]:
    manifest = row.outcome.manifest
    yield escaped(row.cell.name)
    if manifest is None:
        yield from ("", "", "")
    else:
        yield escaped(figures.error_text(figures.precision_cost(manifest)))
        yield figures.size_text(figures.size(manifest))
        yield escaped(f"{figures.kernels(manifest) or '?'} {manifest['unit']}")
    yield "cached" if row.cached else figures.seconds_text(row.outcome.seconds)
    yield f"{_SIGNS[row.verdict]} {row.verdict}"


def _moved(result: CheckResult) -> Iterator[str]:
    """What moved, row by row, folded in."""
    if result.baseline is None:
        return
    rows = [(row, moved) for row in result.rows if (moved := changed(row.moves))]
    if not rows:
        yield f"\nNothing moved since the baseline {escaped(result.baseline)}.\n"
        return
    count = sum(len(moved) for _, moved in rows)
    # GitHub reads Markdown inside, so HTML's own rules don't apply to what stands in the table
    yield f"\n<details><summary>{count} figures moved since the baseline</summary>\n\n"
    yield "| cell | figure | before | now | allowed | |\n|---|---|---:|---:|---:|---|\n"
    for row, moved in rows:
        for each in moved:
            texts = (row.cell.name, each.what, each.before, each.after, each.allowed or "")
            sign = f"{_SIGNS[Verdict.FAILED]} regression" if each.regression else ""
            yield f"| {' | '.join(map(escaped, texts))} | {sign} |\n"
    yield "\n</details>\n"


def changed(moved: Sequence[Move]) -> tuple[Move, ...]:
    """Those whose figure is another than before."""
    return tuple(each for each in moved if each.before != each.after)


def escaped(text: str) -> str:
    """Text as text, on one line, whatever Markdown or HTML there is in it."""
    told = _MARKS.sub(r"\\\1", figures.one_line(text))
    for mark, entity in _ENTITIES:
        told = told.replace(mark, entity)
    return told
