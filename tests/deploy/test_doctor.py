"""The doctor tells what is here and what to install, from metadata alone."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from nextvit_deploy import doctor
from nextvit_exporters.cuda.driver import Device, Driver

ALL: dict[str, str | None] = dict.fromkeys((*doctor.CORE, *doctor.EXTRAS, *doctor.OTHERS), "1.0")


NONE = Driver(None, problem="none (libcuda.so.1 is not on this machine)")
T4 = Driver((12, 8), (Device("Tesla T4", (7, 5)),))


def by_name(
    versions: dict[str, str | None], driver: Driver = T4, system: str = "linux", processor: str = "x86_64"
) -> dict[str, tuple[bool, str, str | None]]:
    lanes = doctor.lanes(versions, driver, system, processor)
    return {lane.name: (lane.works, lane.reason, lane.remedy) for lane in lanes}


def test_all_lanes_work_when_all_is_installed() -> None:
    found = by_name(ALL)
    assert list(found) == ["onnx", "hub", "trt-rtx", "trt", "pycuda", "coreml", "report", "ray", "modelopt"]
    assert all(works and remedy is None for works, _, remedy in found.values())
    assert found["trt-rtx"][1] == "builds TensorRT-RTX engines without a GPU"
    assert [lane.name for lane in doctor.lanes(ALL)] == list(found)


@pytest.mark.parametrize("missing", doctor.CORE)
def test_each_package_of_the_core_is_needed(missing: str) -> None:
    found = by_name(ALL | {missing: None})
    assert found["onnx"] == (False, f"{missing} not installed", f"pip install {missing}")
    assert all(works for name, (works, _, _) in found.items() if name != "onnx")


@pytest.mark.parametrize(
    ("missing", "lane"),
    [
        ("huggingface_hub", "hub"),
        ("tensorrt-rtx-cu12", "trt-rtx"),
        ("tensorrt-cu12", "trt"),
        ("cuda-bindings", "trt"),
        ("pycuda", "pycuda"),
        ("coremltools", "coreml"),
        ("ray", "ray"),
        ("vl-convert-python", "report"),
        ("nvidia-modelopt", "modelopt"),
        ("lief", "modelopt"),
        ("onnx-graphsurgeon", "modelopt"),
        ("onnxslim", "modelopt"),
    ],
)
def test_a_lane_names_its_extra(missing: str, lane: str) -> None:
    found = by_name(ALL | {missing: None})
    assert found[lane] == (False, f"{missing} not installed", f"pip install 'nextvit-deploy[{lane}]'")
    assert [name for name, (works, _, _) in found.items() if not works] == [lane]


def test_an_rtx_engine_needs_one_of_two_packages_to_run() -> None:
    missing: dict[str, str | None] = {"cuda-bindings": None, "pycuda": None}
    works, reason, _ = by_name(ALL | missing)["trt-rtx"]
    assert works
    assert reason.endswith("; running one needs cuda-bindings or pycuda as well")


def test_without_a_gpu_engines_are_built_by_tensorrt_rtx_alone() -> None:
    found = by_name(ALL, NONE)
    for lane in ("trt", "pycuda"):
        assert found[lane] == (False, "it needs a CUDA driver with a GPU", None)
    assert found["trt-rtx"][0]
    assert found["trt-rtx"][1].endswith("; running one needs a CUDA driver with a GPU")
    works, reason, remedy = by_name(ALL | {"tensorrt-cu12": None}, Driver((12, 8)))["trt"]
    assert not works
    assert reason == "tensorrt-cu12 not installed, and it needs a CUDA driver with a GPU"
    assert remedy == "pip install 'nextvit-deploy[trt]'"


def test_there_is_no_tensorrt_for_macos() -> None:
    found = by_name(dict.fromkeys(ALL), NONE, "darwin")
    for lane in ("trt-rtx", "trt", "pycuda"):
        assert found[lane] == (False, "there is no TensorRT for macOS; use Linux or Windows", None)
    assert found["hub"][2] == "pip install 'nextvit-deploy[hub]'"
    assert by_name(ALL, T4, "win32")["trt"][0]
    assert "for freebsd14" in by_name(ALL, NONE, "freebsd14")["trt"][1]


@pytest.mark.parametrize(
    ("system", "processor", "name"),
    [("win32", "AMD64", "Windows"), ("linux", "aarch64", "Linux on aarch64"), ("freebsd14", "amd64", "freebsd14")],
)
def test_there_are_no_wheels_of_coremltools_everywhere(system: str, processor: str, name: str) -> None:
    found = by_name(ALL | {"coremltools": None}, T4, system, processor)
    reason = f"there is no coremltools for {name}; use macOS, or Linux on x86-64"
    assert found["coreml"] == (False, reason, None)
    assert by_name(ALL, T4, system, processor)["coreml"][0], "somebody built it"


def test_there_are_no_wheels_of_ray_for_old_macs() -> None:
    missing = ALL | {"ray": None}
    reason = "there is no ray for Macs with Intel's processors; use --workers"
    assert by_name(missing, NONE, "darwin", "x86_64")["ray"] == (False, reason, None)
    assert by_name(missing, NONE, "darwin", "arm64")["ray"][2] == "pip install 'nextvit-deploy[ray]'"
    assert by_name(ALL, NONE, "darwin", "x86_64")["ray"][0], "somebody built it"


def test_core_ml_itself_is_asked_on_a_mac() -> None:
    assert by_name(ALL, NONE, "darwin", "arm64")["coreml"][1].endswith("; asks Core ML itself as well")
    assert by_name(ALL)["coreml"][1].endswith("; Core ML itself runs on macOS only")
    missing = by_name(ALL | {"coremltools": None}, NONE, "darwin", "arm64")["coreml"]
    assert missing == (False, "coremltools not installed", "pip install 'nextvit-deploy[coreml]'")


def test_what_coremltools_was_tested_with_is_told() -> None:
    here: dict[str, str | None] = {"coremltools": "9.0", "torch": "2.14.1+cpu"}
    fits, runs = doctor.core_ml(here, "linux")
    assert fits == doctor.Fact(
        "coremltools fits",
        "tested by Apple up to torch 2.7.0, with wheels for Python 3.9 to 3.13; torch 2.14.1+cpu is newer; conversions "
        "go through torch.export, and every package is verified",
    )
    assert runs == doctor.Fact("core ml", "runs on macOS only; packages are executed in PyTorch everywhere")
    assert "newer" not in doctor.core_ml(here | {"torch": "2.7.0"}, "linux")[0].value
    assert "newer" not in doctor.core_ml(here | {"torch": None}, "linux")[0].value
    assert "2.10.1rc0 is newer" in doctor.core_ml(here | {"torch": "2.10.1rc0"}, "linux")[0].value
    assert "is not known here" in doctor.core_ml(here | {"coremltools": "99.0"}, "linux")[0].value
    assert doctor.core_ml(here, "darwin")[1].value.startswith("can be asked on this Mac")
    assert doctor.core_ml({"coremltools": None, "torch": "2.7.0"}) == ()


def test_the_versions_are_those_that_coremltools_holds() -> None:
    version = doctor.installed_versions(("coremltools",))["coremltools"]
    if version is None or version not in doctor.COREMLTOOLS:
        pytest.skip(f"nothing is recorded of coremltools {version}")
    files = metadata.files("coremltools") or []
    (held,) = (file for file in files if file.as_posix() == "coremltools/_deps/__init__.py")
    assert f'_TORCH_MAX_VERSION = "{doctor.COREMLTOOLS[version].torch}"' in held.read_text()


def test_another_onnx_runtime_over_the_cores_closes_modelopt() -> None:
    """As ``nvidia-modelopt[onnx]`` installs it; this project's own extra does not."""
    found = by_name(ALL | {"onnxruntime-gpu": "1.24.4"})
    assert [name for name, (works, _, _) in found.items() if not works] == ["modelopt"]
    assert found["modelopt"] == (
        False,
        "onnxruntime-gpu 1.24.4 lies over onnxruntime's files, as nvidia-modelopt[onnx] wants it",
        "pip uninstall -y onnxruntime-gpu && pip install --force-reinstall --no-deps onnx onnxruntime",
    )
    assert "onnxruntime-gpu" in doctor.installed_versions()
    required = metadata.requires("nextvit-deploy") or []
    assert not any("modelopt[" in line or "onnxruntime-gpu" in line for line in required)


def test_versions_are_those_of_the_metadata() -> None:
    versions = doctor.installed_versions(("numpy", "no-such-package-anywhere"))
    assert versions == {"numpy": metadata.version("numpy"), "no-such-package-anywhere": None}
    assert [fact.value for fact in doctor.packages(versions)] == [metadata.version("numpy"), "not installed"]


def test_the_machine_is_told() -> None:
    python, system, driver = doctor.machine(T4)
    assert python.value.startswith(platform.python_version())
    assert platform.machine() in system.value
    assert driver == doctor.Fact("cuda driver", "CUDA 12.8: Tesla T4 (SM75)")
    assert doctor.machine()[2].value


def test_the_lists_are_those_of_the_distribution() -> None:
    required = metadata.requires("nextvit-deploy") or []
    everywhere = [line for line in required if "extra ==" not in line and "python_version" not in line]
    assert sorted(doctor.CORE) == sorted(map(_name, everywhere))
    extras = {
        "hub": doctor.HUB,
        "trt": doctor.TRT,
        "trt-rtx": doctor.TRT_RTX,
        "pycuda": doctor.PYCUDA,
        "coreml": doctor.COREML,
        "report": doctor.REPORT,
        "ray": doctor.RAY,
        "modelopt": doctor.MODELOPT,
    }
    for extra, names in extras.items():
        found = {_name(line) for line in required if re.search(rf"extra == .{extra}.(?![\w-])", line)}
        assert sorted(names) == sorted(found), extra


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom nextvit_deploy import doctor\ndoctor.machine(), doctor.lanes(doctor.installed_versions())\n"
        "doctor.core_ml(doctor.installed_versions())\n"
    )
    code += "print(sorted({'torch', 'onnx', 'onnxruntime', 'numpy', 'coremltools'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert found
    return found[0]


@pytest.mark.parametrize(
    ("system", "machine", "wanted"),
    [
        ("darwin", "arm64", {"coremltools", "ray"}),
        ("darwin", "x86_64", {"coremltools"}),
        ("linux", "aarch64", {"tensorrt-cu12", "cuda-bindings", "ray"}),
        ("linux", "x86_64", {"tensorrt-cu12", "cuda-bindings", "tensorrt-rtx-cu12", "coremltools", "ray"}),
        ("win32", "AMD64", {"tensorrt-cu12", "cuda-bindings", "tensorrt-rtx-cu12", "ray"}),
    ],
)
def test_extras_ask_only_for_what_has_wheels(system: str, machine: str, wanted: set[str]) -> None:
    found = set()
    for extra in ("trt", "trt-rtx", "coreml", "ray"):
        here = {"sys_platform": system, "platform_machine": machine, "extra": extra}
        for line in metadata.requires("nextvit-deploy") or []:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is not None and "extra" in str(marker) and marker.evaluate(here):
                found.add(requirement.name)
    assert found == wanted
