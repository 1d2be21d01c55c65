"""The doctor tells what is here and what to install, from metadata alone."""

from __future__ import annotations

import ctypes
import platform
import re
import subprocess
import sys
from importlib import metadata

import pytest

from nextvit_deploy import doctor

ALL: dict[str, str | None] = dict.fromkeys((*doctor.CORE, *doctor.HUB, *doctor.OTHERS), "1.0")


class FakeDriver:
    """Answers as libcuda does: a status, results through pointers."""

    def __init__(self, version: int = 13000, init: int = 0, devices: tuple[bytes, ...] = (b"Tesla T4",)) -> None:
        self.version = version
        self.init = init
        self.devices = devices

    def __call__(self, name: str) -> FakeDriver:
        assert "cuda" in name
        return self

    def cuDriverGetVersion(self, pointer: object) -> int:  # noqa: N802 - the library's name
        return _set(pointer, self.version) if self.version else 1

    def cuInit(self, flags: int) -> int:  # noqa: N802 - the library's name
        assert flags == 0
        return self.init

    def cuDeviceGetCount(self, pointer: object) -> int:  # noqa: N802 - the library's name
        return _set(pointer, len(self.devices))

    def cuDeviceGetName(self, text: ctypes.Array[ctypes.c_char], size: int, index: int) -> int:  # noqa: N802
        text.value = self.devices[index][: size - 1]
        return 0


def _set(pointer: object, value: int) -> int:
    ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0] = value  # type: ignore[arg-type]
    return 0


@pytest.mark.parametrize(
    ("driver", "says"),
    [
        (FakeDriver(), "CUDA 13.0: Tesla T4"),
        (FakeDriver(12090, devices=(b"A", b"B")), "CUDA 12.9: A, B"),
        (FakeDriver(devices=()), "CUDA 13.0, no device"),
        (FakeDriver(init=100), "CUDA 13.0, but it does not start (cuInit gave 100)"),
    ],
)
def test_the_driver_is_reported(driver: FakeDriver, says: str) -> None:
    assert doctor.cuda_driver(driver) == says


def test_a_driver_that_does_not_answer() -> None:
    assert "does not tell its version" in doctor.cuda_driver(FakeDriver(version=0))


def test_no_driver() -> None:
    def absent(name: str) -> object:
        raise OSError(f"{name}: cannot open shared object file")

    assert re.fullmatch(r"none \(\S+ is not on this machine\)", doctor.cuda_driver(absent))


def test_all_lanes_work_when_all_is_installed() -> None:
    onnx, hub = doctor.lanes(ALL)
    assert (onnx.name, onnx.works, onnx.remedy) == ("onnx", True, None)
    assert (hub.name, hub.works, hub.remedy) == ("hub", True, None)


@pytest.mark.parametrize("missing", doctor.CORE)
def test_each_package_of_the_core_is_needed(missing: str) -> None:
    onnx, hub = doctor.lanes(ALL | {missing: None})
    assert (onnx.works, onnx.reason) == (False, f"{missing} not installed")
    assert onnx.remedy == f"pip install {missing}"
    assert hub.works


def test_the_hub_lane_names_its_extra() -> None:
    onnx, hub = doctor.lanes(ALL | {"huggingface_hub": None})
    assert onnx.works
    assert (hub.works, hub.reason) == (False, "huggingface_hub not installed")
    assert hub.remedy == "pip install 'nextvit-deploy[hub]'"


def test_versions_are_those_of_the_metadata() -> None:
    versions = doctor.installed_versions(("numpy", "no-such-package-anywhere"))
    assert versions == {"numpy": metadata.version("numpy"), "no-such-package-anywhere": None}
    assert [fact.value for fact in doctor.packages(versions)] == [metadata.version("numpy"), "not installed"]


def test_the_machine_is_told() -> None:
    python, system, _driver = doctor.machine()
    assert python.value.startswith(platform.python_version())
    assert platform.machine() in system.value


def test_the_lists_are_those_of_the_distribution() -> None:
    required = [line for line in metadata.requires("nextvit-deploy") or [] if "extra ==" not in line]
    assert sorted(doctor.CORE) == sorted(_name(line) for line in required)
    hub = [_name(line) for line in metadata.requires("nextvit-deploy") or [] if re.search(r"extra == .hub.", line)]
    assert sorted(doctor.HUB) == sorted(hub)


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom nextvit_deploy import doctor\ndoctor.machine(), doctor.lanes(doctor.installed_versions())\n"
    )
    code += "print(sorted({'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert found
    return found[0]
