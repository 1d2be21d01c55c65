"""A real Ray cluster on this machine."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_CODE = (
    "import logging, sys, ray\n"
    "started = ray.init(address='local', num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)\n"
    "print('at', started.address_info['gcs_address'], flush=True)\n"
    "sys.stdin.read()\n"
)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where a Ray cluster is, and the environment of those that it lets in."""

    address: str
    environment: dict[str, str]


@contextmanager
def ray_cluster(*importable: Path) -> Iterator[Cluster]:
    """Two processors, which end with their starter's standard input; with a token that nobody else has."""
    pytest.importorskip("ray", reason="Ray has no wheels for this Python or system")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    path = os.pathsep.join(map(str, (*importable, ROOT)))
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _CODE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | token | {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"},
    ) as process:
        assert process.stdout is not None
        address = next((line.split()[1] for line in process.stdout if line.startswith("at ")), "")
        assert address, "no cluster came up"
        yield Cluster(address, token)
        process.communicate(timeout=120)
