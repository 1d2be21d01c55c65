"""One cell that crashes, hangs or is killed takes none of the others with it, and nothing is done twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nextvit_deploy.check.result import Kind, Row
from nextvit_deploy.check.run import RESULT, CheckRequest, check
from nextvit_deploy.verdict import Verdict
from nextvit_exporters.errors import DeployError, OutputNotWritten
from tests.deploy.check.support_check import acting, cell, runs

NAMES = ("fine-1", "segfault", "kill", "fine-2", "raise", "mend", "missing", "slow", "fine-3")


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return acting(monkeypatch, tmp_path)


def quiet(_name: str, _state: str, _row: Row | None) -> None:
    pass


def request(tmp_path: Path, *names: str, **more: Any) -> CheckRequest:
    return CheckRequest(tuple(map(cell, names)), tmp_path / "output", **more)


@pytest.mark.parametrize("jobs", [1, 4])
def test_every_cell_has_its_row(jobs: int, ran: Path, tmp_path: Path) -> None:
    events: list[tuple[str, str]] = []
    result = check(
        request(tmp_path, *NAMES, jobs=jobs, timeout=4),
        lambda name, state, _row: events.append((name, state)),
    )
    assert [row.cell.name for row in result.rows] == list(NAMES)
    found = {row.cell.name: row for row in result.rows}
    assert [name for name, row in found.items() if row.verdict is Verdict.VERIFIED] == ["fine-1", "fine-2", "fine-3"]
    assert [name for name, row in found.items() if row.verdict is Verdict.NOT_VERIFIED] == ["missing"]
    kinds = {name: row.problems[0].kind for name, row in found.items() if row.problems}
    assert kinds == {
        "segfault": Kind.CRASH,
        "kill": Kind.CRASH,
        "raise": Kind.CRASH,
        "mend": Kind.ERROR,
        "missing": Kind.NOT_VERIFIED,
        "slow": Kind.TIMEOUT,
    }
    assert "SIGSEGV" in found["segfault"].problems[0].message
    assert "SIGKILL" in found["kill"].problems[0].message
    assert result.verdict is Verdict.FAILED
    assert json.loads((tmp_path / "output" / RESULT).read_text()) == result.as_dict()
    assert Counter(events) == Counter((name, state) for name in NAMES for state in ("running", "done"))
    assert {runs(ran, name) for name in NAMES} == {1}


def test_what_is_finished_is_not_done_again(ran: Path, tmp_path: Path) -> None:
    check(request(tmp_path, "fine-1", "mend"), quiet)
    result = check(request(tmp_path, "fine-1", "mend", "fine-2"), quiet)
    assert [row.cached for row in result.rows] == [True, False, False]
    assert (runs(ran, "fine-1"), runs(ran, "mend"), runs(ran, "fine-2")) == (1, 2, 1)
    assert result.rows[0].verdict is Verdict.VERIFIED
    check(request(tmp_path, "fine-1", fresh=True), quiet)
    assert runs(ran, "fine-1") == 2


def test_cells_are_done_at_the_same_time(ran: Path, tmp_path: Path) -> None:
    start = time.perf_counter()
    result = check(request(tmp_path, "slow-1", "slow-2", "slow-3", jobs=3, timeout=3), quiet)
    assert time.perf_counter() - start < 8
    assert all(row.outcome.timed_out for row in result.rows)
    assert runs(ran, "slow-1") == 1


def test_an_interrupted_check_goes_on(ran: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom nextvit_deploy import terminal as t\n"
        "from nextvit_deploy.check.run import CheckRequest, check\n"
        "from tests.deploy.check.support_check import cell\n"
        "with t.guard('it goes on'):\n"
        "    cells = tuple(map(cell, sys.argv[2:]))\n"
        "    check(CheckRequest(cells, Path(sys.argv[1]), jobs=1), lambda *_: None)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "output"), "fine-1", "slow", "fine-2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not runs(ran, "slow"):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert "interrupted; it goes on" in error
    assert not (tmp_path / "output" / RESULT).exists()
    result = check(request(tmp_path, "fine-1", "fine-2"), quiet)
    assert [row.cached for row in result.rows] == [True, False]


def test_where_nothing_can_be_written_nothing_is_done(ran: Path, tmp_path: Path) -> None:
    (tmp_path / "output").write_text("a file")
    with pytest.raises(OutputNotWritten, match="output can't be written: it is a file, not a folder"):
        check(request(tmp_path, "fine-1"), quiet)
    assert not runs(ran, "fine-1")


def test_a_baseline_that_is_not_there_is_told_first(ran: Path, tmp_path: Path) -> None:
    with pytest.raises(DeployError):
        check(request(tmp_path, "fine-1", baseline=tmp_path / "nowhere"), quiet)
    assert not runs(ran, "fine-1")


def test_a_cache_that_takes_nothing_is_a_note(ran: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    result = check(request(tmp_path, "fine-1"), quiet)
    assert result.verdict is Verdict.VERIFIED
    assert any("could not be kept" in note for note in result.notes)
    assert runs(ran, "fine-1") == 1
