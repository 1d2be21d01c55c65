"""Loaded by Python itself where this folder is on PYTHONPATH: a machine with a CUDA driver and without this project."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from typing import Any


class Driver:
    def cuInit(self, flags: int) -> int:  # noqa: N802 - CUDA's name
        assert flags == 0
        return int(os.environ["FAKE_CUINIT"])


class Loader:
    def __init__(self, real: Any) -> None:
        self.real = real

    def __call__(self, name: str, *arguments: Any, **options: Any) -> Any:
        if name != "libcuda.so.1":
            return self.real(name, *arguments, **options)
        if os.environ["FAKE_CUINIT"] == "missing":
            raise OSError(f"{name}: cannot open shared object file")
        return Driver()


class NoProject:
    """The host has no file of this project but those in the kit."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> None:
        del path, target
        if name.startswith("nextvit_"):
            raise ImportError(f"{name} is not on this machine")


if "FAKE_CUINIT" in os.environ:
    ctypes.CDLL = Loader(ctypes.CDLL)  # type: ignore[misc,assignment]  # a stand-in for the library loader
    sys.meta_path.insert(0, NoProject())
