"""The driver is asked as libcuda wants it, and every way it can fail has a line of its own."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys

import pytest

from nextvit_exporters.cuda.driver import Device, Driver, NoDevice, probe_driver
from nextvit_exporters.errors import DeployError, NotExecutable

T4 = Device("Tesla T4", (7, 5))
L4 = Device("NVIDIA L4", (8, 9))
ATTRIBUTES = {75: 0, 76: 1}


class FakeLibrary:
    """Answers as libcuda does: a status, results through pointers; handles are not the ordinals."""

    def __init__(
        self,
        version: int = 13000,
        init: int = 0,
        devices: tuple[Device, ...] = (T4,),
        fails: frozenset[str] = frozenset(),
    ) -> None:
        self.version = version
        self.init = init
        self.devices = devices
        self.fails = fails
        self.started = False

    def __call__(self, name: str) -> FakeLibrary:
        assert name == ("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        return self

    def cuDriverGetVersion(self, pointer: object) -> int:  # noqa: N802 - the library's name
        return self._answer("cuDriverGetVersion", pointer, self.version)

    def cuInit(self, flags: int) -> int:  # noqa: N802 - the library's name
        assert flags == 0
        self.started = self.init == 0
        return self.init

    def cuDeviceGetCount(self, pointer: object) -> int:  # noqa: N802 - the library's name
        assert self.started
        return self._answer("cuDeviceGetCount", pointer, len(self.devices))

    def cuDeviceGet(self, pointer: object, ordinal: int) -> int:  # noqa: N802 - the library's name
        return self._answer("cuDeviceGet", pointer, ordinal + 100)

    def cuDeviceGetName(self, text: ctypes.Array[ctypes.c_char], size: int, device: ctypes.c_int) -> int:  # noqa: N802
        text.value = self.devices[device.value - 100].name.encode()[: size - 1]
        return int("cuDeviceGetName" in self.fails)

    def cuDeviceGetAttribute(self, pointer: object, attribute: int, device: ctypes.c_int) -> int:  # noqa: N802
        capability = self.devices[device.value - 100].capability
        return self._answer("cuDeviceGetAttribute", pointer, capability[ATTRIBUTES[attribute]])

    def _answer(self, call: str, pointer: object, value: int) -> int:
        if call in self.fails:
            return 1
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0] = value  # type: ignore[arg-type]
        return 0


@pytest.mark.parametrize(
    ("library", "says"),
    [
        (FakeLibrary(), "CUDA 13.0: Tesla T4 (SM75)"),
        (FakeLibrary(12090, devices=(T4, L4)), "CUDA 12.9: Tesla T4 (SM75), NVIDIA L4 (SM89)"),
        (FakeLibrary(devices=()), "CUDA 13.0, no device"),
        (FakeLibrary(init=100), "CUDA 13.0, but it does not start (cuInit gave 100)"),
        (FakeLibrary(fails=frozenset({"cuDeviceGetCount"})), "CUDA 13.0, no device"),
        (FakeLibrary(fails=frozenset({"cuDeviceGet"})), "CUDA 13.0, no device"),
        (FakeLibrary(fails=frozenset({"cuDeviceGetName"})), "CUDA 13.0, no device"),
        (FakeLibrary(fails=frozenset({"cuDeviceGetAttribute"})), "CUDA 13.0, no device"),
    ],
)
def test_the_driver_is_told_on_one_line(library: FakeLibrary, says: str) -> None:
    assert str(probe_driver(library)) == says


def test_a_driver_that_does_not_answer() -> None:
    found = probe_driver(FakeLibrary(fails=frozenset({"cuDriverGetVersion"})))
    assert "does not tell its version" in str(found)
    assert found.version is None


def test_no_driver() -> None:
    found = probe_driver(absent)
    assert re.fullmatch(r"none \(\S+ is not on this machine\)", str(found))
    assert found.devices == ()


def test_the_first_gpu_is_used() -> None:
    assert probe_driver(FakeLibrary(devices=(L4, T4))).first() == L4
    assert L4.sm == "SM89"


@pytest.mark.parametrize("driver", [Driver(None, problem="none (x is not on this machine)"), Driver((12, 8))])
def test_without_a_gpu_it_is_not_executable(driver: Driver) -> None:
    with pytest.raises(NoDevice, match=r"^no CUDA driver with a GPU is here \(.+\); run it on a machine") as caught:
        driver.first()
    assert str(driver) in str(caught.value)
    assert isinstance(caught.value, NotExecutable)
    assert isinstance(caught.value, DeployError)


def test_a_name_longer_than_its_buffer_is_cut() -> None:
    (device,) = probe_driver(FakeLibrary(devices=(Device("x" * 1000, (7, 5)),))).devices
    assert device.name == "x" * 255


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom nextvit_exporters.cuda.driver import probe_driver\nprobe_driver()\n"
        "print(sorted({'torch', 'onnx', 'numpy', 'cuda', 'tensorrt_rtx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def absent(name: str) -> object:
    raise OSError(f"{name}: cannot open shared object file")
