"""What this machine has, which lanes work on it, and the line that installs what is missing.

Only package metadata is read: no framework is imported, so the answer comes at once and a broken install cannot
stop it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

CORE: Final = (
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "onnxsim",
    "safetensors",
    "typer",
    "rich",
    "pillow",
)
HUB: Final = ("huggingface_hub",)
OTHERS: Final = ("timm",)
"""Not needed by any lane, but worth knowing when checkpoints come from it."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing about this machine: its name and what was found."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Lane:
    """One thing this project can do: whether it works here, why, and the pip line where it does not."""

    name: str
    works: bool
    reason: str
    remedy: str | None = None


def machine() -> tuple[Fact, ...]:
    """Python, the platform and the CUDA driver."""
    return (
        Fact("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        Fact("platform", f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores"),
        Fact("cuda driver", cuda_driver()),
    )


def packages(versions: Mapping[str, str | None]) -> tuple[Fact, ...]:
    """The version of each package, or that it is not installed."""
    return tuple(Fact(name, version or "not installed") for name, version in versions.items())


def installed_versions(names: tuple[str, ...] = (*CORE, *HUB, *OTHERS)) -> dict[str, str | None]:
    """Distribution name to installed version, None where there is none."""
    return {name: _version(name) for name in names}


def lanes(versions: Mapping[str, str | None]) -> tuple[Lane, ...]:
    """Which lanes work with ``versions``, as ``installed_versions`` gives them."""
    return (
        _lane("onnx", "exports ONNX and verifies it with ONNX Runtime on the CPU", CORE, versions),
        _lane("hub", "loads checkpoints by their hub id", HUB, versions, "hub"),
    )


def cuda_driver(load: Callable[[str], Any] = ctypes.CDLL) -> str:
    """The CUDA driver and its devices, asked through the driver's own library; torch is not imported."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = load(name)
    except OSError:
        return f"none ({name} is not on this machine)"
    number = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return f"{name} is there but does not tell its version"
    version = f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"
    if status := driver.cuInit(0):
        return f"{version}, but it does not start (cuInit gave {status})"
    names = _device_names(driver)
    return f"{version}: {', '.join(names)}" if names else f"{version}, no device"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _lane(
    name: str, purpose: str, needs: tuple[str, ...], versions: Mapping[str, str | None], extra: str | None = None
) -> Lane:
    missing = [need for need in needs if versions.get(need) is None]
    if not missing:
        return Lane(name, works=True, reason=purpose)
    wanted = f"'nextvit-deploy[{extra}]'" if extra else " ".join(missing)
    return Lane(name, works=False, reason=f"{', '.join(missing)} not installed", remedy=f"pip install {wanted}")


def _device_names(driver: Any) -> list[str]:
    count = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    names: list[str] = []
    for index in range(count.value):
        text = ctypes.create_string_buffer(256)
        if driver.cuDeviceGetName(text, len(text), index) == 0:
            names.append(text.value.decode(errors="replace"))
    return names
