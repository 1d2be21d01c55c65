"""A Ray cluster that is there already; its machines read the same files, and have the same nextvit-deploy installed."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from typing import Any, Final, TextIO, cast

from nextvit_deploy.pool.pool import Deaths, Done, Failure, Result, Task, attempt
from nextvit_exporters.errors import DeployError, MissingExtra, first_line

_AUTO: Final = "auto"
_PATIENCE: Final = 5.0
"""Seconds in which a cluster's port must answer."""
_LOOK: Final = 1.0
"""Seconds between two looks at what has finished."""

_LET_IN: Final = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN where it wants a token"


@dataclass(frozen=True, slots=True)
class RayCluster:
    """The cluster at ``address``: ``auto`` for one on this machine, host:port, or ray://host:port.

    At most ``workers`` tasks run at a time; 0 leaves that to the cluster's processors.
    """

    address: str
    workers: int = 0

    def run(self, work: Callable[[Task], Result], tasks: Sequence[Task]) -> Generator[tuple[int, Result], None, None]:
        """See ``Pool``."""
        with _connected(self.address) as ray:
            processors = int(ray.cluster_resources().get("CPU", 0))
            if processors < 1:
                raise DeployError(f"the Ray cluster at {self.address} has no processors to work on; start it with some")
            at_once = self.workers or processors
            remote, shared = ray.remote(num_cpus=1, max_retries=0)(attempt), ray.put(work)
            waiting, deaths, running = deque(range(len(tasks))), Deaths(tasks), dict[Any, int]()
            try:
                while waiting or running:
                    while waiting and len(running) < at_once:
                        index = waiting.popleft()
                        running[remote.remote(shared, tasks[index])] = index
                    for reference in ray.wait(list(running), timeout=_LOOK)[0]:
                        index = running.pop(reference)
                        answer = self._answer(ray, reference, index, deaths)
                        if answer is None:
                            waiting.appendleft(index)
                        else:
                            yield index, answer.result
            finally:
                for reference in running:
                    with suppress(ray.exceptions.RayError):
                        ray.cancel(reference, force=True)

    def _answer(self, ray: Any, reference: Any, index: int, deaths: Deaths) -> Done[Any] | None:
        """A task's result; None where its worker died and it is to be begun anew."""
        try:
            answer: Done[Any] | Failure = ray.get(reference)
        except ray.exceptions.RayTaskError as error:  # ``attempt`` lets nothing through, so it was never reached
            raise DeployError(
                f"the Ray cluster at {self.address} can't do this work: {_last_line(error)}; install the same "
                "nextvit-deploy on its machines"
            ) from error
        except ray.exceptions.RayError as error:  # the worker, its machine or what it answered is gone
            deaths.add(index, f"Ray says: {first_line(error)}")
            return None
        if isinstance(answer, Failure):
            raise answer.error()
        return answer


def check_installed() -> None:
    """Raise MissingExtra where Ray isn't installed."""
    if find_spec("ray") is None:
        raise MissingExtra("--ray", "ray")


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster; a connection that was there before stays. Raises DeployError."""
    check_installed()
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # read on import; what goes wrong is raised as well
    ray: Any = importlib.import_module("ray")
    if ray.is_initialized():
        yield ray
        return
    _check_answers(address)
    with redirect_stdout(cast("TextIO", _WithoutRay(sys.stdout))):  # until Ray's threads have ended
        try:
            with _own_signals(), _silent(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of changes in Ray to come
                ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        except (OSError, RuntimeError, ValueError, AssertionError, ImportError) as error:
            raise DeployError(f"{_unreachable(address, first_line(error))}, or {_LET_IN}") from error
        try:
            yield ray
        finally:
            with redirect_stdout(StringIO()):  # it says what it held back
                ray.shutdown()


class _WithoutRay:
    """Stdout without what Ray's own threads say on it of workers that died: results go there, and this is no result."""

    def __init__(self, real: TextIO) -> None:
        self._real = real

    def write(self, text: str) -> int:
        """Characters taken."""
        return len(text) if threading.current_thread().name.startswith("ray_") else self._real.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what Ray's C++ half writes to stderr while it connects."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def _check_answers(address: str) -> None:
    """Raise DeployError where nobody listens, which Ray itself takes minutes to say."""
    if address == _AUTO:
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 1 << 16):
        raise DeployError(f"'{address}' is no address of a Ray cluster; write auto, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except OSError as error:
        raise DeployError(_unreachable(address, error.strerror or str(error))) from error
    if os.environ.get("RAY_USE_TLS", "0") == "0" and find_spec("grpc") is not None:
        _check_talks(address, f"{host}:{port}")


def _check_talks(address: str, port: str) -> None:
    """Raise DeployError where something else than Ray listens, which doesn't talk as Ray does."""
    grpc: Any = importlib.import_module("grpc")
    with grpc.insecure_channel(port) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_PATIENCE)
        except grpc.FutureTimeoutError as error:
            raise DeployError(_unreachable(address, "what listens there is no Ray")) from error


def _unreachable(address: str, why: str) -> str:
    return f"no Ray cluster can be reached at {address}: {why.rstrip('.')}; start one with: ray start --head"


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this program's answer to a request to stop, which Ray replaces by its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
