"""Which TensorRT builds, by what is installed, which GPU is here, and what was asked."""

from __future__ import annotations

import platform
import sys

import pytest

from nextvit_exporters.cuda.driver import Device, Driver
from nextvit_exporters.errors import MissingExtra, UnsupportedSpec
from nextvit_exporters.tensorrt import choice
from nextvit_exporters.tensorrt.choice import Choice, choose

T4 = Device("Tesla T4", (7, 5))
A10 = Device("NVIDIA A10", (8, 6))
ODD = Device("Some GPU", (8, 6))
ALL = frozenset({"tensorrt", "tensorrt_rtx"})


def here(monkeypatch: pytest.MonkeyPatch, *devices: Device, installed: frozenset[str] = ALL) -> None:
    monkeypatch.setattr(choice, "probe_driver", lambda: Driver((13, 0), devices))
    monkeypatch.setattr(choice, "find_spec", lambda name: object() if name in installed else None)


@pytest.mark.parametrize(
    ("devices", "installed", "asked", "gpu", "expected"),
    [
        ((), ALL, "auto", None, Choice("tensorrt-rtx", "t4")),
        ((), ALL, "auto", "l4", Choice("tensorrt-rtx", "l4")),
        ((T4,), ALL, "auto", None, Choice("tensorrt", "t4")),
        ((A10,), ALL, "tensorrt", None, Choice("tensorrt", "a10")),
        ((ODD,), ALL, "tensorrt", None, Choice("tensorrt", "sm86")),
        ((A10,), ALL, "tensorrt", "rtx3090", Choice("tensorrt", "rtx3090")),
        ((T4,), frozenset({"tensorrt_rtx"}), "auto", None, Choice("tensorrt-rtx", "t4")),
        ((A10,), ALL, "tensorrt-rtx", None, Choice("tensorrt-rtx", "t4")),
        ((Device("NVIDIA L40S", (8, 9)),), ALL, "auto", None, Choice("tensorrt", "l40s")),
        ((Device("NVIDIA B200", (10, 0)),), ALL, "auto", None, Choice("tensorrt", "sm100")),
    ],
)
def test_what_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
    devices: tuple[Device, ...],
    installed: frozenset[str],
    asked: str,
    gpu: str | None,
    expected: Choice,
) -> None:
    here(monkeypatch, *devices, installed=installed)
    assert choose(asked, gpu) == expected


@pytest.mark.parametrize(("asked", "extra"), [("auto", "trt-rtx"), ("tensorrt-rtx", "trt-rtx"), ("tensorrt", "trt")])
def test_nothing_installed_names_the_pip_line(monkeypatch: pytest.MonkeyPatch, asked: str, extra: str) -> None:
    here(monkeypatch, T4, installed=frozenset())
    with pytest.raises(MissingExtra, match=rf"pip install 'nextvit-deploy\[{extra}\]'"):
        choose(asked, None)


def test_tensorrt_without_a_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch)
    with pytest.raises(UnsupportedSpec, match=r"no CUDA driver with one here; use --backend tensorrt-rtx, or .*--kit"):
        choose("tensorrt", None)


def test_another_gpu_than_the_one_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, A10)
    with pytest.raises(UnsupportedSpec, match=r"the GPU at hand, NVIDIA A10 \(SM86\), not for t4; drop --gpu or use"):
        choose("tensorrt", "t4")


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("linux", "aarch64")])
def test_where_there_are_no_wheels_no_pip_line_is_given(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str
) -> None:
    here(monkeypatch, installed=frozenset())
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(UnsupportedSpec, match=r"there is no tensorrt-rtx for .*; run this on x86-64 Linux"):
        choose("auto", None)


def test_an_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch)
    with pytest.raises(UnsupportedSpec, match="no backend 'trt'; choose one of auto, tensorrt, tensorrt-rtx"):
        choose("trt", None)
