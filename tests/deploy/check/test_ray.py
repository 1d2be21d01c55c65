"""Cells on a real Ray cluster come to the same as here: each in a process of its own, a crash a row among others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nextvit_deploy.check.run import RESULT, CheckRequest, check
from tests.deploy.check.support_check import acting, cell, runs
from tests.deploy.support_ray import ROOT, ray_cluster

NAMES = ("fine-1", "segfault", "kill", "mend", "missing", "slow", "fine-2")
CODE = (
    "import sys\nfrom pathlib import Path\n"
    "from nextvit_deploy.check.run import CheckRequest, check\n"
    "from tests.deploy.check.support_check import cell\n"
    "cells = tuple(map(cell, sys.argv[3:]))\n"
    "check(CheckRequest(cells, Path(sys.argv[1]), ray=sys.argv[2], timeout=4), lambda *_: None)\n"
)


def told(folder: Path) -> list[dict[str, Any]]:
    """Every row's verdict and what it is because of, without times and places."""
    rows: list[dict[str, Any]] = json.loads((folder / RESULT).read_text())["rows"]
    return [
        {"name": row["cell"]["name"], "verdict": row["verdict"], "problems": row["problems"], "cached": row["cached"]}
        for row in rows
    ]


def test_a_ray_cluster_comes_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = acting(monkeypatch, tmp_path)
    check(CheckRequest(tuple(map(cell, NAMES)), tmp_path / "here", timeout=4), lambda *_: None)
    here = json.loads(json.dumps(told(tmp_path / "here")).replace(str(tmp_path / "here"), str(tmp_path / "there")))
    assert [row["verdict"] for row in here].count("failed") == 4
    with ray_cluster(tmp_path / "site") as cluster:
        for again in (False, True):
            command = [sys.executable, "-c", CODE, str(tmp_path / "there"), cluster.address, *NAMES]
            done = subprocess.run(
                command, cwd=ROOT, env=os.environ | cluster.environment, capture_output=True, text=True, check=False
            )
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            kept = {"fine-1", "fine-2"} if again else set()
            assert told(tmp_path / "there") == [row | {"cached": row["name"] in kept} for row in here]
    assert (runs(ran, "fine-1"), runs(ran, "segfault")) == (2, 3)
