"""What people read of a check: within 80 columns, nothing cut off, and on a terminal alone while it runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from threading import Thread

import pytest
from rich.console import Console

from nextvit_deploy import render_check
from nextvit_deploy.check.cells import Cell
from nextvit_deploy.check.limits import Limits, Regression
from nextvit_deploy.check.result import CheckResult, Outcome, Row
from nextvit_deploy.render_check import live, show_check
from tests.deploy.check.support_rows import CELL, HOSTILE, judged, manifest, outcome, result, rows_of_every_kind


def shown(found: CheckResult, width: int = 80) -> str:
    written = StringIO()
    show_check(Console(file=written, width=width, emoji=False), found)
    return written.getvalue()


def test_one_table_then_problems_then_the_count() -> None:
    out = shown(result(rows_of_every_kind(), notes=("a note",)))
    lines = out.splitlines()
    assert lines[0] == "note: a note"
    assert lines[-1] == "1 verified, 4 failed, 1 not verified; 1 min 15 s, 2 jobs"
    rows = [re.split(r"  +", line.strip()) for line in lines if re.search(r" (verified|failed)$", line)]
    assert rows[0] == ["demo-onnx-fp16", "4.0e-04", "1.7 MB", "70", "3.5 s", "verified"]
    assert [row[-1] for row in rows] == ["verified", "failed", "not verified", "failed", "failed", "failed"]
    bad = "demo-onnx-fp16-bad: same-network: same network on 8 digits: relative rms 2.0e-03 of logits, allowed 1e-05"
    assert f"{bad} (onnxruntime 1.32 cpu) [features.3.mlp.conv1]" in lines
    assert "dead: crash: killed by SIGSEGV; log: /w/x.log" in lines
    assert "demo-trt-fp16: not-verified: precision cost: no CUDA driver" in lines


def test_the_table_fits_a_plain_terminal() -> None:
    name = "nextvit_small_imagenet_1k_6m_384-coreml-int8-384x512-b32-none"
    rows = [
        replace(judged(outcome(seconds=3599.4)), cell=replace(CELL, name=f"{name}-{number}"), cached=number == 1)
        for number in range(3)
    ]
    out = shown(result(rows))
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert out.count("verified") == 4
    assert "59 min 59 s" in out
    assert "cached" in out


def test_what_moved_is_told_row_by_row() -> None:
    limits = Limits(regression=Regression(error_ratio=1.2, size_ratio=1.0))
    now = manifest(cost=6e-4, Versions={"torch": "2.15.0.dev20261101+cpu", "onnx": "1.23.2"})
    out = shown(result([judged(outcome(now), before=outcome(), limits=limits)], baseline="/old/check.json"))
    assert "Moved since the baseline /old/check.json" in out
    told = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    assert ["error, precision cost", "4.0e-04", "6.0e-04", "4.8e-04", "regression"] in told
    assert ["version of torch", "2.14.1", "2.15.0.dev20261101+cpu"] in told
    assert not any(row[0] == "size" for row in told)
    table = out.partition("Moved since")[2]
    assert max(map(len, table.splitlines())) <= 80
    same = shown(result([judged(outcome(), before=outcome())], baseline="/old"))
    assert "nothing moved since the baseline /old" in same


def test_names_are_no_markup() -> None:
    name = "[red]:boom:[/]"
    row = judged(outcome(error=HOSTILE), cell=replace(CELL, name=name), before=outcome(manifest(cost=1.0)))
    row = replace(row, problems=tuple(replace(each, module=name) for each in row.problems))
    out = shown(result([row], baseline=name, notes=(HOSTILE,)), width=140)
    assert out.count(name) == 5  # the table, the problem and its module, the baseline, the moves
    assert "\x1b[31m" not in out


def terminal(height: int = 24) -> tuple[Console, StringIO]:
    written = StringIO()
    return Console(file=written, force_terminal=True, width=80, height=height, color_system=None), written


def picture(found: render_check.Shown, height: int = 24) -> list[str]:
    """The live table as it stands."""
    console, written = terminal(height)
    found.console = console
    console.print(found)
    return [line.rstrip() for line in written.getvalue().splitlines()]


def cells(count: int) -> list[Cell]:
    return [Cell(f"cell-{number}", lane="onnx", precision="fp16") for number in range(count)]


def done(name: str, *, failed: bool = False, cached: bool = False) -> Row:
    made = Outcome(error="refused") if failed else outcome()
    return replace(judged(made, cell=replace(CELL, name=name)), cached=cached)


def test_rows_go_from_waiting_to_their_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("nextvit_deploy.render_check.time.monotonic", lambda: now[0])
    with live(cells(4), quiet=True) as found:
        found.event("cell-0", "running", None)
        found.event("cell-1", "running", None)
        found.event("cell-3", "done", done("cell-3", cached=True))
        now[0] += 61.0
        found.event("cell-1", "done", done("cell-1", failed=True))
        now[0] += 10.0
        lines = [re.split(r"  +", line) for line in picture(found)]
    assert lines == [
        ["cell-0", "1 min 11 s", "running"],
        ["cell-1", "1 min 01 s", "failed"],
        ["cell-2", "waiting"],
        ["cell-3", "cached", "verified"],
        ["2 of 4 done, 1 running, 1 waiting"],
    ]


def test_a_small_terminal_shows_what_runs_and_what_is_wrong() -> None:
    with live(cells(30), quiet=True) as found:
        for number in range(20):
            found.event(f"cell-{number}", "running", None)
        for number in range(18):
            found.event(f"cell-{number}", "done", done(f"cell-{number}", failed=number == 17))
        lines = picture(found, height=8)
    assert [line.split()[0] for line in lines[:-1]] == ["cell-0", "cell-17", "cell-18", "cell-19"]
    assert lines[-1] == "18 of 30 done, 2 running, 10 waiting"


@pytest.mark.parametrize("quiet", [True, False])
def test_it_is_silent_where_nobody_looks(*, quiet: bool) -> None:
    console, written = terminal()
    plain = Console(file=written, force_terminal=False)
    with live(cells(2), console if quiet else plain, quiet=quiet) as found:
        found.event("cell-0", "running", None)
    assert written.getvalue() == ""


def test_events_of_many_threads_are_all_seen_on_a_terminal() -> None:
    console, written = terminal(height=60)
    names = [cell.name for cell in cells(40)]

    def work(mine: Sequence[str]) -> None:
        for name in mine:
            found.event(name, "running", None)
            found.event(name, "done", done(name))

    with live(cells(40), console) as found:
        threads = [Thread(target=work, args=(names[start::4],)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "40 of 40 done, 0 running, 0 waiting" in written.getvalue()
    assert "cell-39" in written.getvalue()
    assert picture(found, height=60)[-1] == "40 of 40 done, 0 running, 0 waiting"
