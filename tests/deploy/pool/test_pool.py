"""The same answers whoever works; workers that die are replaced, those that are not needed any more are gone."""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # it ships no types
import pytest
import torch

from nextvit_deploy.pool import on_ray
from nextvit_deploy.pool.pool import Serial, pool
from nextvit_deploy.pool.processes import Processes
from nextvit_exporters.errors import DeployError, MissingExtra
from tests.deploy.pool.support_pool import Sum, pids

NUMBERS = [("add", number) for number in range(5)]


def gone(pid: int) -> bool:
    """Within a moment, for the system takes one."""
    for _ in range(200):
        if not psutil.pid_exists(pid):
            return True
        time.sleep(0.01)
    return False


def test_here_tasks_are_done_in_order_on_one_thread(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = list(pool(1).run(Sum(tmp_path), NUMBERS))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert found == [(index, (index**2, 1, 1)) for index in range(5)]
    assert pids(tmp_path) == {os.getpid()}
    assert (tmp_path / f"closed-{os.getpid()}").exists(), "what was kept is closed"


def test_here_errors_are_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="a bug"):
        list(pool(1).run(Sum(tmp_path), [("fail", 0)]))
    assert (tmp_path / f"closed-{os.getpid()}").exists()


def test_processes_give_the_same_and_one_that_dies_is_replaced(tmp_path: Path) -> None:
    found = list(pool(2).run(Sum(tmp_path), [*NUMBERS, ("die once", 5), ("add", 6)]))
    assert sorted(found) == [(index, (index**2, 1, 1)) for index in range(7)]
    workers = pids(tmp_path)
    assert len(workers) == 3
    assert os.getpid() not in workers
    assert all(gone(pid) for pid in workers)


def test_what_kills_three_workers_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=r"^\('die', 7\) can't be done: the worker died 3 times, of SIGKILL; .*mem"):
        list(pool(2).run(Sum(tmp_path), [("die", 7)]))
    assert len(list(tmp_path.glob("died-7-*"))) == 3


def test_errors_come_back(tmp_path: Path) -> None:
    with pytest.raises(MissingExtra, match=r"^this test needs .*\[nothing\]'$"):
        list(Processes(1).run(Sum(tmp_path), [("lack", 0), *NUMBERS]))
    with pytest.raises(RuntimeError, match=r"(?s)a worker failed\nTraceback.*KeyError: 'a bug'"):
        list(Processes(1).run(Sum(tmp_path), [("fail", 0)]))


def test_closing_stops_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    with closing(Processes(2).run(Sum(tmp_path), [("add", 3), ("sleep", 0), ("sleep", 1)])) as answers:
        assert next(answers) == (0, (9, 1, 1))
    assert time.monotonic() - start < 50
    assert all(gone(pid) for pid in pids(tmp_path))


def test_no_tasks_need_nobody(tmp_path: Path) -> None:
    assert list(Processes(2).run(Sum(tmp_path), [])) == []


def test_who_is_asked() -> None:
    assert pool(1) == Serial()
    assert pool(3) == Processes(3)


def test_ray_has_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"^--ray needs .* pip install 'nextvit-deploy\[ray\]'$"):
        pool(1, "auto")
