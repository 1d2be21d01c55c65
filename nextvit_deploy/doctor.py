"""What this machine has, which lanes work on it, and the line that installs what is missing.

Only package metadata is read: no framework is imported, so the answer comes at once and a broken install cannot
stop it.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Final

from nextvit_exporters.cuda.driver import Driver, probe_driver

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
    "jinja2",
)
HUB: Final = ("huggingface_hub",)
TRT: Final = ("tensorrt-cu12", "cuda-bindings")
TRT_RTX: Final = ("tensorrt-rtx-cu12",)
PYCUDA: Final = ("pycuda",)
COREML: Final = ("coremltools",)
REPORT: Final = ("vl-convert-python",)
RAY: Final = ("ray",)
MODELOPT: Final = ("nvidia-modelopt", "lief", "onnx-graphsurgeon", "onnxslim")
EXTRAS: Final = (*HUB, *TRT_RTX, *TRT, *PYCUDA, *COREML, *REPORT, *RAY, *MODELOPT)
"""What the lanes beyond the core ask for."""
OTHERS: Final = ("timm",)
"""Not needed by any lane, but worth knowing when checkpoints come from it."""
RIVALS: Final = ("onnxruntime-gpu",)
"""What overwrites files of a package of the core: ``nvidia-modelopt[onnx]`` brings it."""


@dataclass(frozen=True, slots=True)
class Tested:
    """What a version of coremltools says it was tested with, and the Pythons it has wheels for."""

    torch: str
    pythons: tuple[str, str]


COREMLTOOLS: Final[Mapping[str, Tested]] = {"9.0": Tested("2.7.0", ("3.9", "3.13"))}
"""Tested versions by coremltools' version: kept here, for importing it takes seconds."""


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


def machine(driver: Driver | None = None) -> tuple[Fact, ...]:
    """Python, the platform and the CUDA driver, which is asked where it is not given."""
    return (
        Fact("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        Fact("platform", f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores"),
        Fact("cuda driver", str(driver or probe_driver())),
    )


def packages(versions: Mapping[str, str | None]) -> tuple[Fact, ...]:
    """The version of each package, or that it is not installed."""
    return tuple(Fact(name, version or "not installed") for name, version in versions.items())


def core_ml(versions: Mapping[str, str | None], system: str = sys.platform) -> tuple[Fact, ...]:
    """How coremltools fits what is here, and whether Core ML itself can be asked; nothing where it is missing."""
    version = versions.get("coremltools")
    if version is None:
        return ()
    tested, torch = COREMLTOOLS.get(version), versions.get("torch") or "not installed"
    if tested is None:
        fits = f"what it was tested with is not known here; torch is {torch}"
    else:
        fits = f"tested by Apple up to torch {tested.torch}, with wheels for Python {' to '.join(tested.pythons)}"
        if _numbers(torch) > _numbers(tested.torch):
            fits += f"; torch {torch} is newer"
    runs = "can be asked on this Mac" if system == "darwin" else "runs on macOS only"
    return (
        Fact("coremltools fits", f"{fits}; conversions go through torch.export, and every package is verified"),
        Fact("core ml", f"{runs}; packages are executed in PyTorch everywhere"),
    )


def installed_versions(names: tuple[str, ...] = (*CORE, *EXTRAS, *OTHERS, *RIVALS)) -> dict[str, str | None]:
    """Distribution name to installed version, None where there is none."""
    return {name: _version(name) for name in names}


def lanes(
    versions: Mapping[str, str | None],
    driver: Driver | None = None,
    system: str = sys.platform,
    processor: str | None = None,
) -> tuple[Lane, ...]:
    """Which lanes work with ``versions``, as ``installed_versions`` gives them, on ``system`` as Python names it.

    The CUDA driver is asked where it is not given, and so is the ``processor``: ``x86_64``.
    """
    driver = driver or probe_driver()
    rtx = "builds TensorRT-RTX engines without a GPU"
    if not driver.devices:
        rtx += "; running one needs a CUDA driver with a GPU"
    elif not any(versions.get(name) for name in ("cuda-bindings", *PYCUDA)):
        rtx += "; running one needs cuda-bindings or pycuda as well"
    trt = _lane("trt", "builds, runs and times TensorRT engines", TRT, versions, "trt")
    return (
        _lane("onnx", "exports ONNX and verifies it with ONNX Runtime on the CPU", CORE, versions),
        _lane("hub", "loads checkpoints by their hub id", HUB, versions, "hub"),
        _elsewhere(_lane("trt-rtx", rtx, TRT_RTX, versions, "trt-rtx"), system),
        _elsewhere(_on_gpu(trt, driver), system),
        _elsewhere(
            _on_gpu(_lane("pycuda", "runs engines by pycuda, without CUDA graphs", PYCUDA, versions, "pycuda"), driver),
            system,
        ),
        _with_wheels(_lane("coreml", _core_ml(system), COREML, versions, "coreml"), system, processor),
        _lane("report", "draws the charts of reports", REPORT, versions, "report"),
        _ray(_lane("ray", "shares the work among a Ray cluster's machines", RAY, versions, "ray"), system, processor),
        _alone(
            _lane("modelopt", "quantizes with NVIDIA's ModelOpt, on the CPU", MODELOPT, versions, "modelopt"), versions
        ),
    )


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


def _on_gpu(lane: Lane, driver: Driver) -> Lane:
    """The lane, which works only beside a GPU; what is not installed is told first, then that there is none."""
    if driver.devices:
        return lane
    needs = "a CUDA driver with a GPU"
    reason = f"it needs {needs}" if lane.works else f"{lane.reason}, and it needs {needs}"
    return replace(lane, works=False, reason=reason)


def _elsewhere(lane: Lane, system: str) -> Lane:
    """The lane, which is closed where there is no TensorRT for the system; nothing can be installed then."""
    if system in {"linux", "win32"}:
        return lane
    name = "macOS" if system == "darwin" else system
    return replace(lane, works=False, reason=f"there is no TensorRT for {name}; use Linux or Windows", remedy=None)


def _core_ml(system: str) -> str:
    asked = "asks Core ML itself as well" if system == "darwin" else "Core ML itself runs on macOS only"
    return f"exports Core ML packages and verifies them on the CPU; {asked}"


def _with_wheels(lane: Lane, system: str, processor: str | None) -> Lane:
    """The Core ML lane, which is closed where there are no wheels of coremltools, unless somebody built it."""
    processor = processor or platform.machine()
    if lane.works or system == "darwin" or (system == "linux" and processor == "x86_64"):
        return lane
    name = {"win32": "Windows", "linux": f"Linux on {processor}"}.get(system, system)
    return replace(lane, reason=f"there is no coremltools for {name}; use macOS, or Linux on x86-64", remedy=None)


def _ray(lane: Lane, system: str, processor: str | None) -> Lane:
    """The lane of Ray, which has no wheels for Macs with Intel's processors."""
    if lane.works or system != "darwin" or (processor or platform.machine()) == "arm64":
        return lane
    reason = "there is no ray for Macs with Intel's processors; use --workers"
    return replace(lane, reason=reason, remedy=None)


def _alone(lane: Lane, versions: Mapping[str, str | None]) -> Lane:
    """ModelOpt's lane, which is closed where its extra for ONNX put another ONNX Runtime over the one of the core."""
    (rival,) = RIVALS
    if lane.works and versions.get(rival):
        reason = f"{rival} {versions[rival]} lies over onnxruntime's files, as nvidia-modelopt[onnx] wants it"
        remedy = f"pip uninstall -y {rival} && pip install --force-reinstall --no-deps onnx onnxruntime"
        return replace(lane, works=False, reason=reason, remedy=remedy)
    return lane


def _numbers(version: str) -> tuple[int, ...]:
    """``2.14.1+cpu`` as (2, 14, 1); what is no number ends it."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)
