"""A check as JUnit XML: a suite for each target, a case for each cell.

What is not verified is an error there, for readers of JUnit take anything else for a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from nextvit_deploy.check import figures
from nextvit_deploy.check.result import CheckResult, Kind, Problem, Row
from nextvit_deploy.verdict import Verdict

_NAME: Final = "nextvit-export check"
_BROKEN: Final = (Kind.ERROR, Kind.CRASH, Kind.TIMEOUT, Kind.NOT_VERIFIED)
"""Errors in JUnit's words; the rest are failures."""


def junit(result: CheckResult) -> str:
    """The whole file as text."""
    root = Element("testsuites", {"name": _NAME})
    _count(root, result.rows)
    root.set("time", f"{result.seconds:.3f}")
    lanes = [figures.lane_and_precision(row.cell, row.outcome.manifest)[0] or "artefact" for row in result.rows]
    for lane in dict.fromkeys(lanes):
        rows = [row for row, own in zip(result.rows, lanes, strict=True) if own == lane]
        suite = SubElement(root, "testsuite", {"name": _text(lane)})
        _count(suite, rows)
        suite.set("time", f"{sum(_seconds(row) for row in rows):.3f}")
        for row in rows:
            _case(suite, row, lane)
    indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _count(element: Element, rows: Sequence[Row]) -> None:
    worst = [_worst(row) for row in rows]
    broken = sum(each is not None and each.kind in _BROKEN for each in worst)
    failed = sum(each is not None for each in worst) - broken
    for name, count in (("tests", len(rows)), ("failures", failed), ("errors", broken), ("skipped", 0)):
        element.set(name, str(count))


def _case(suite: Element, row: Row, lane: str) -> None:
    case = SubElement(
        suite,
        "testcase",
        {"classname": _text(f"{_NAME}.{lane}"), "name": _text(row.cell.name), "time": f"{_seconds(row):.3f}"},
    )
    properties = SubElement(case, "properties")
    for name, value in (*figures.about(row.cell, row.outcome.manifest), ("cached", str(row.cached).lower())):
        SubElement(properties, "property", {"name": _text(name), "value": _text(value)})
    worst = _worst(row)
    if worst is not None:
        told = SubElement(case, "error" if worst.kind in _BROKEN else "failure")
        told.set("type", str(worst.kind))
        told.set("message", _text(_said(worst)))
        told.text = _text("\n".join(f"{each.kind}: {_said(each)}" for each in row.problems))
    if row.outcome.log:
        SubElement(case, "system-out").text = _text(f"log: {row.outcome.log}")


def _worst(row: Row) -> Problem | None:
    """The problem that the case is called by: one that fails it, where there is one, else the first."""
    failing = [each for each in row.problems if each.verdict is Verdict.FAILED]
    return next(iter(failing or row.problems), None)


def _said(problem: Problem) -> str:
    return problem.message + (f" (module {problem.module})" if problem.module else "")


def _seconds(row: Row) -> float:
    """What it took now."""
    return 0.0 if row.cached else row.outcome.seconds


def _text(value: str) -> str:
    return figures.clean(value)
