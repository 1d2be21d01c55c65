"""The CUDA driver and its GPUs, asked through the driver's own library.

It is asked before anything of TensorRT's runtime is touched: without a driver the runtime is handed out and then
crashes the interpreter at its first use. Neither torch nor any CUDA package is imported.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from nextvit_exporters.errors import BuildFailed, NotExecutable

_NAME_LENGTH: Final = 256
_MAJOR: Final = 75
_MINOR: Final = 76
"""The driver's numbers for the two halves of the compute capability."""


class CudaFailed(BuildFailed, NotExecutable):
    """CUDA refused or broke off: an old driver, memory in use; whether the engine is right stays unknown."""


class NoDevice(NotExecutable):
    """There is no CUDA driver with a GPU; the message begins with ``no CUDA driver``."""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU: the name it gives itself, and its compute capability as (major, minor)."""

    name: str
    capability: tuple[int, int]

    @property
    def sm(self) -> str:
        """``SM75`` for 7.5."""
        return f"SM{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True, slots=True)
class Driver:
    """The driver's CUDA version as (major, minor), None where it tells none; its GPUs; and why there is none."""

    version: tuple[int, int] | None
    devices: tuple[Device, ...] = ()
    problem: str | None = None

    def __str__(self) -> str:
        if self.version is None:
            return self.problem or "none"
        version = f"CUDA {self.version[0]}.{self.version[1]}"
        if self.problem is not None:
            return f"{version}, {self.problem}"
        listed = ", ".join(f"{each.name} ({each.sm})" for each in self.devices)
        return f"{version}: {listed}" if listed else f"{version}, no device"

    def first(self) -> Device:
        """The GPU that is used; raises NoDevice where there is none."""
        if not self.devices:
            raise NoDevice(f"no CUDA driver with a GPU is here ({self}); run it on a machine that has one")
        return self.devices[0]


def probe_driver(load: Callable[[str], Any] = ctypes.CDLL) -> Driver:
    """Ask the driver what it is and which GPUs it has; ``load`` opens a shared library by its name.

    Never raises: what is missing is told in the answer. A GPU that does not answer is left out.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        library = load(name)
    except OSError:
        return Driver(None, problem=f"none ({name} is not on this machine)")
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return Driver(None, problem=f"{name} is there but does not tell its version")
    version = number.value // 1000, number.value % 1000 // 10
    if status := library.cuInit(0):
        return Driver(version, problem=f"but it does not start (cuInit gave {status})")
    return Driver(version, tuple(_devices(library)))


def _devices(library: Any) -> Iterator[Device]:
    count = ctypes.c_int()
    if library.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return
    for index in range(count.value):
        handle, text = ctypes.c_int(), ctypes.create_string_buffer(_NAME_LENGTH)
        if library.cuDeviceGet(ctypes.byref(handle), index) != 0:
            continue
        named = library.cuDeviceGetName(text, len(text), handle) == 0
        capability = [_attribute(library, each, handle) for each in (_MAJOR, _MINOR)]
        if named and None not in capability:
            yield Device(text.value.decode(errors="replace"), (capability[0] or 0, capability[1] or 0))


def _attribute(library: Any, attribute: int, handle: ctypes.c_int) -> int | None:
    value = ctypes.c_int()
    status = library.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
    return None if status else value.value
