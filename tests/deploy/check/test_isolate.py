"""Whatever becomes of a cell's process, it is an outcome, and nothing of it goes on."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Thread

import psutil  # type: ignore[import-untyped]  # it ships no types
import pytest

from nextvit_deploy.check.isolate import Isolated, Running
from nextvit_deploy.check.result import Outcome
from tests.deploy.check.support_check import acting, cell


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Isolated:
    acting(monkeypatch, tmp_path)
    return Isolated(tmp_path / "output", threads=3, timeout=60)


def log_of(outcome: Outcome) -> str:
    assert outcome.log is not None
    return Path(outcome.log).read_text(encoding="utf-8")


def test_an_answer_comes_back_and_prints_go_to_the_log(work: Isolated) -> None:
    outcome = work(cell("fine"))
    assert outcome.finished
    assert outcome.manifest is not None
    assert outcome.manifest["verdict"] == "verified"
    assert outcome.artefact == str(work.output / "fine" / "x.onnx")
    assert outcome.no_latency == "3"  # what the process was told of threads
    assert sorted(log_of(outcome).splitlines()) == ["doing fine", "on stderr"]
    assert outcome.seconds > 0


def test_a_segfault_is_told_with_the_stack(work: Isolated) -> None:
    outcome = work(cell("segfault"))
    assert outcome.crash == "killed by SIGSEGV"
    assert not outcome.finished
    assert "Segmentation fault" in log_of(outcome)
    assert "string_at" in log_of(outcome)


def test_a_killed_one_is_told(work: Isolated) -> None:
    outcome = work(cell("kill"))
    assert outcome.crash == "killed by SIGKILL"
    assert outcome.manifest is None


def test_a_bug_keeps_its_traceback(work: Isolated) -> None:
    outcome = work(cell("raise"))
    assert outcome.crash == "exit status 1: with a second line"
    assert "Traceback" in log_of(outcome)
    assert "ValueError: a bug" in log_of(outcome)


def test_one_that_leaves_without_a_word_crashed(work: Isolated) -> None:
    assert work(cell("exit")).crash == "it ended without an answer"


def test_what_can_be_mended_is_one_line(work: Isolated) -> None:
    outcome = work(cell("mend"))
    assert (outcome.error, outcome.crash, outcome.missing) == ("give another --size", "", False)


def test_a_slow_one_is_ended(work: Isolated) -> None:
    start = time.perf_counter()
    outcome = Isolated(work.output, 1, timeout=2)(cell("slow"))
    assert outcome.timed_out
    assert time.perf_counter() - start < 30
    ours = [p.info["cmdline"] or () for p in psutil.process_iter(["cmdline"])]
    assert not [line for line in ours if str(work.output) in " ".join(line)]


def test_what_a_cell_leaves_running_is_ended_too(work: Isolated) -> None:
    assert work(cell("fork")).finished
    sleeping = [p for p in psutil.process_iter(["cmdline"]) if any("fork" in w for w in p.info["cmdline"] or ())]
    assert not [p for p in sleeping if "nextvit_deploy.check.child" in " ".join(p.info["cmdline"])]


def test_a_long_log_is_kept_from_its_end(work: Isolated) -> None:
    outcome = work(cell("chatty"))
    assert outcome.finished
    assert len(log_of(outcome).splitlines()) == 2000
    assert "x" not in log_of(outcome).splitlines()[0]


def test_all_can_be_stopped_at_once(work: Isolated) -> None:
    running, found = Running(), list[Outcome]()
    thread = Thread(target=lambda: found.append(work.run(cell("slow"), running)))
    thread.start()
    while not running.processes:
        time.sleep(0.01)
    running.stop()
    thread.join(30)
    assert found[0].crash == "killed by SIGKILL"
    assert work.run(cell("fine"), running).crash == "stopped before it began"


def test_a_log_that_finds_no_room_is_left_out(work: Isolated) -> None:
    work.output.write_text("a file, where the folder would be")
    outcome = work(cell("mend"))
    assert (outcome.error, outcome.log) == ("give another --size", None)
