"""Which TensorRT builds, and for which GPU, where the user leaves it open."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib.util import find_spec

from nextvit_exporters.cuda.driver import Device, probe_driver
from nextvit_exporters.errors import MissingExtra, UnsupportedSpec
from nextvit_exporters.tensorrt.backends import BACKENDS, DEFAULT_GPU, GPUS, Backend, backend, gpu, sm


@dataclass(frozen=True, slots=True)
class Choice:
    """Names in ``BACKENDS`` and of a GPU as ``backends.gpu`` reads them."""

    backend: str
    gpu: str


def choose(name: str, gpu_name: str | None) -> Choice:
    """The backend of that name; for ``auto`` TensorRT where it and a GPU are, else TensorRT-RTX, which needs none.

    TensorRT builds for the GPU at hand, TensorRT-RTX for a T4 unless told otherwise. Raises UnsupportedSpec for an
    unknown name, or where the GPU asked for is not the one at hand; MissingExtra where nothing is installed.
    """
    devices = probe_driver().devices
    chosen = _auto(devices) if name == "auto" else backend(name)
    if not chosen.builds_on_cpu and not devices:
        raise UnsupportedSpec(
            f"{chosen.name} builds on the GPU it builds for, and there is no CUDA driver with one here; use --backend "
            "tensorrt-rtx, or finish on the GPU's machine what --kit DIR prepares here"
        )
    if not _is_installed(chosen):
        _check_platform(chosen)
        raise MissingExtra(f"the {chosen.name} backend", chosen.extra)
    if chosen.builds_on_cpu:
        return Choice(chosen.name, gpu_name or DEFAULT_GPU)
    at_hand = devices[0]
    if gpu_name is not None and gpu(gpu_name).capability != at_hand.capability:
        raise UnsupportedSpec(
            f"{chosen.name} builds for the GPU at hand, {at_hand.name} ({sm(at_hand.capability)}), not for {gpu_name}; "
            "drop --gpu or use --backend tensorrt-rtx"
        )
    return Choice(chosen.name, gpu_name or _name_of(at_hand))


def _auto(devices: tuple[Device, ...]) -> Backend:
    """What builds for the GPU at hand, where that and a GPU are here; else what needs none."""
    beside_gpu, on_cpu = (next(b for b in BACKENDS.values() if b.builds_on_cpu is cpu) for cpu in (False, True))
    return beside_gpu if devices and _is_installed(beside_gpu) else on_cpu


def _check_platform(which: Backend) -> None:
    """Raise UnsupportedSpec where NVIDIA has no wheels of it, so that no pip line helps."""
    wheels = sys.platform in {"linux", "win32"} and platform.machine() in {"x86_64", "AMD64"}
    if not wheels:
        raise UnsupportedSpec(
            f"there is no {which.name} for {platform.system()} on {platform.machine()}; run this on x86-64 Linux or "
            "Windows, or write the ONNX file here: nextvit-export onnx --fp16 --for tensorrt-10"
        )


def _is_installed(which: Backend) -> bool:
    return find_spec(which.module) is not None


def _name_of(device: Device) -> str:
    """Its own name in the list, or any of its compute capability."""
    named = [name for name, each in GPUS.items() if each.capability == device.capability and each.title in device.name]
    return max(named, key=lambda name: len(GPUS[name].title), default=sm(device.capability).lower())
