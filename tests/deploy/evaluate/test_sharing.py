"""The same bits however the work is shared, whoever dies on the way, and however often it is begun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # it ships no types
import pytest

from nextvit_deploy.evaluate.results import Rows
from nextvit_deploy.evaluate.shards import Shard
from nextvit_deploy.evaluate.work import Evaluate
from nextvit_models.demo import DEMO_IMAGES
from tests.deploy.support import Exported, call, contents, one_line, run, start
from tests.deploy.support_ray import ROOT, Cluster, ray_cluster

REAL = Evaluate.__call__


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEXTVIT_DEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def alone(half: Exported, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes of all the demo's pictures."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEXTVIT_DEPLOY_CACHE", str(folder / "cache"))
        ran = call("evaluate", half.path, DEMO_IMAGES, "--output", folder, "--workers", "1", "--quiet")
    assert ran.status == 0, ran
    return contents(folder)


def wait_for(what: Callable[[], bool]) -> None:
    for _ in range(6000):
        if what():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def kept(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.rows"))


def crew(parent: int) -> list[psutil.Process]:
    """The workers that a command started."""
    return [each for each in psutil.Process(parent).children() if "spawn_main" in command_of(each)]


def command_of(process: psutil.Process) -> str:
    """Nothing of one that has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # which a process that nobody waited for yet is too
        return ""


def test_a_worker_that_is_killed_loses_nothing(
    half: Exported, alone: dict[str, bytes], tmp_path: Path, cache: Path
) -> None:
    out = tmp_path / "out"
    process = start("evaluate", half.path, DEMO_IMAGES, "--output", out, "--workers", "2", "--json")
    wait_for(lambda: len(kept(cache)) > 0)
    victim = crew(process.pid)[0]
    victim.kill()
    wait_for(lambda: len(crew(process.pid)) == 2 and victim not in crew(process.pid))
    text, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert json.loads(text)["run"]["workers"] == 2
    assert contents(out) == alone


def test_a_request_to_stop_leaves_nobody_and_what_is_finished(half: Exported, tmp_path: Path, cache: Path) -> None:
    process = start("evaluate", half.path, DEMO_IMAGES, "--output", tmp_path / "out", "--workers", "2")
    wait_for(lambda: len(kept(cache)) > 0)
    workers = crew(process.pid)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + signal.SIGTERM, "")
    assert one_line(err) == "stopped; nothing was written"
    assert len(workers) == 2
    wait_for(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in workers))
    assert kept(cache)
    assert not (tmp_path / "out").exists()


def test_workers_leave_when_nobody_waits_for_them(half: Exported, tmp_path: Path, cache: Path) -> None:
    process = start("evaluate", half.path, DEMO_IMAGES, "--output", tmp_path / "out", "--workers", "2")
    wait_for(lambda: len(kept(cache)) > 0)
    workers = crew(process.pid)
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in workers))


def test_what_was_finished_is_not_done_again(
    half: Exported, alone: dict[str, bytes], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the fifth of ten shards; one of the four that were kept is damaged meanwhile."""
    done: list[int] = []

    def until_the_fifth(work: Evaluate, shard: Shard) -> Rows:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(shard.start)
        return REAL(work, shard)

    out = tmp_path / "out"
    command = ("evaluate", half.path, DEMO_IMAGES, "--output", out, "--workers", "1")
    monkeypatch.setattr(Evaluate, "__call__", until_the_fifth)
    ran = call(*command)
    assert (ran.status, one_line(ran.err)) == (130, "interrupted; nothing was written")
    assert not out.exists()
    files = kept(cache)
    assert len(files) == 4
    files[1].write_bytes(files[1].read_bytes()[:-1])

    first, done = done, []

    def count(work: Evaluate, shard: Shard) -> Rows:
        done.append(shard.start)
        return REAL(work, shard)

    monkeypatch.setattr(Evaluate, "__call__", count)
    ran = call(*command)
    assert ran.status == 0
    assert "note: 108 images were done by an earlier command, and not again" in ran.out
    assert done == [first[1], *range(144, 360, 36)]
    assert contents(out) == alone
    assert not contents(cache)


def test_another_checkpoint_goes_on_with_nothing(
    half: Exported, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_work: Evaluate, _shard: Shard) -> Rows:
        raise KeyboardInterrupt

    ran = call("evaluate", half.path, DEMO_IMAGES, "--output", tmp_path, "--workers", "1", "--limit", "36", "-q")
    assert ran.status == 0
    folders = []
    for limit in ("72", "71"):
        done: list[int] = []

        def one(work: Evaluate, shard: Shard, done: list[int] = done) -> Rows:
            if done:
                stop(work, shard)
            done.append(shard.start)
            return REAL(work, shard)

        monkeypatch.setattr(Evaluate, "__call__", one)
        ran = call("evaluate", half.path, DEMO_IMAGES, "--output", tmp_path, "--workers", "1", "--limit", limit)
        assert (ran.status, done) == (130, [0])
        folders.append({each.parent.name for each in kept(cache)})
    assert len(folders[1]) == 2, "other pictures are other work"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ray_cluster() as started:
        yield started


def test_a_ray_cluster_gives_the_same(
    half: Exported, alone: dict[str, bytes], cluster: Cluster, tmp_path: Path, cache: Path
) -> None:
    command = ("evaluate", half.path, DEMO_IMAGES, "--output", tmp_path / "out", "--ray", cluster.address, "--json")
    ran = run(*command, **cluster.environment)
    assert (ran.status, ran.err) == (0, "")
    assert ran.json["run"] | {"seconds": 0} == {"seconds": 0, "workers": 0, "ray": cluster.address, "resumed": 0}
    assert contents(tmp_path / "out") == alone
    assert not contents(cache)


def test_on_ray_who_dies_is_replaced_and_errors_come_back(cluster: Cluster, tmp_path: Path) -> None:
    """In a process of its own, which Ray may do with as it likes."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from nextvit_deploy.pool.pool import pool\nfrom tests.deploy.pool.support_pool import Sum\n"
        "work, ray = Sum(Path(sys.argv[1])), pool(2, sys.argv[2])\n"
        "print(sorted(ray.run(work, [('add', 1), ('die once', 2), ('add', 3)])))\n"
        "for word in ('die', 'lack', 'fail'):\n"
        "    try:\n        list(ray.run(work, [(word, 4)]))\n"
        "    except Exception as error:\n        print(type(error).__name__, ' '.join(str(error).split()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, cluster.address],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | cluster.environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 4, done.stdout
    answers, died, lacked, failed = done.stdout.splitlines()
    assert answers == "[(0, (1, 1, 1)), (1, (4, 1, 1)), (2, (9, 1, 1))]"
    assert died.startswith("DeployError ('die', 4) can't be done: the worker died 3 times, Ray says: ")
    assert len(list(tmp_path.glob("died-4-*"))) == 3
    assert lacked.startswith("MissingExtra this test needs ")
    assert failed.startswith("RuntimeError a worker failed Traceback")
    assert failed.endswith("KeyError: 'a bug'")
