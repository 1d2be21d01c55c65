"""What is asked of Core ML and made of its answers: of a fake everywhere, of the real one on a Mac."""

from __future__ import annotations

import importlib.util
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nextvit_exporters.errors import BuildFailed, NotExecutable, UnsupportedSpec, VerificationFailed
from nextvit_exporters.executors import coreml_device
from nextvit_exporters.executors.coreml_device import UNITS, CoreMLDevice, devices, why_not_here
from nextvit_exporters.executors.mil import MilReference
from tests.exporters.coreml.packages import LABELS, classifier, convert, package, save, sound, tensor

__all__ = ["package", "sound"]

ComputeUnit = Enum("ComputeUnit", ["CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL"])
PICTURE = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
Answer = dict[str, Any]


@dataclass
class CoreML:
    """Answers as ``MilReference`` does, in the form in which coremltools hands on what Core ML says."""

    units: list[str] = field(default_factory=list)
    change: Callable[[Answer], Answer] = dict
    refuses: Callable[[], object] | None = None

    def open(self, path: str, *, compute_units: Any) -> Model:
        assert isinstance(compute_units, ComputeUnit)
        self.units.append(compute_units.name)
        model = Model(Path(path), self)
        if self.refuses is not None:
            self.refuses()
            model.__dict__["__proxy__"] = None
        return model


class Model:
    def __init__(self, path: Path, core: CoreML) -> None:
        self.path, self.core = path, core
        self.__dict__["__proxy__"] = object()

    def predict(self, data: Any) -> Answer:
        assert type(data) is dict
        given: Any = data["image"]
        if isinstance(given, Image.Image):
            assert given.mode == "RGB"
            given = np.asarray(given)[None]
        else:
            assert given.dtype == np.float32
        with MilReference(self.path, "emulated") as reference:
            found: Answer = dict(reference.run({"image": given}))
            if "probabilities" in found:
                values = found.pop("probabilities")[0].tolist()
                found["classLabel_probs"] = dict(zip(LABELS, values, strict=True))
                found["classLabel"] = reference.labels_of_last_run[0]
        return self.core.change(found)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> CoreML:
    core = CoreML()
    fake = SimpleNamespace(models=SimpleNamespace(MLModel=core.open), ComputeUnit=ComputeUnit)
    monkeypatch.setattr(coreml_device, "coremltools", lambda: fake)
    monkeypatch.setattr(coreml_device, "why_not_here", lambda: None)
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.5", ("", "", ""), "arm64"))
    return core


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(convert(given=tensor(dtype=np.float32)), tmp_path_factory.mktemp("logits") / "logits.mlpackage")


@pytest.mark.parametrize("unit", UNITS)
def test_a_classifier_on_each_choice_of_units(sound: Path, core: CoreML, unit: str) -> None:
    with CoreMLDevice(sound, unit) as device, MilReference(sound, "emulated") as reference:
        assert (device.name, device.mode) == (f"coreml on macOS 15.5, {unit}", "device")
        found, expected = device.run({"image": PICTURE}), reference.run({"image": PICTURE})
    assert list(found) == ["probabilities"]
    assert found["probabilities"].dtype == np.float32
    np.testing.assert_array_equal(found["probabilities"], expected["probabilities"])
    assert core.units == [UNITS[unit]]


def test_one_executor_for_each_choice(sound: Path) -> None:
    assert [each.unit for each in devices(sound)] == list(UNITS)
    with pytest.raises(UnsupportedSpec, match="no compute units 'gpu'; choose one of cpuOnly, cpuAndGPU"):
        CoreMLDevice(sound, "gpu")


@pytest.mark.usefixtures("core")
def test_tensors_go_in_and_come_out(logits: Path) -> None:
    values = np.random.default_rng(1).normal(size=(1, 3, 16, 16))
    with CoreMLDevice(logits, "all") as device, MilReference(logits, "emulated") as reference:
        found = device.run({"image": values.astype(np.float16)})
        expected = reference.run({"image": values.astype(np.float16)})
    assert {name: array.dtype for name, array in found.items()} == dict.fromkeys(expected, np.dtype(np.float32))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.usefixtures("core")
def test_only_what_the_package_is_described_to_take(sound: Path, logits: Path) -> None:
    with CoreMLDevice(sound, "all") as device:
        for given in (PICTURE[:, :8], PICTURE.astype(np.float32), PICTURE[..., :1], PICTURE[0]):
            with pytest.raises(UnsupportedSpec, match=r"tiny\.mlpackage"):
                device.run({"image": given})
        with pytest.raises(UnsupportedSpec, match="reads image, not picture"):
            device.run({"picture": PICTURE})
    with CoreMLDevice(logits, "all") as device:
        for given in (np.zeros((2, 3, 16, 16), np.float32), np.zeros((1, 3, 16, 16), np.int32)):
            with pytest.raises(UnsupportedSpec, match=r"logits\.mlpackage"):
                device.run({"image": given})


def drop(name: str) -> Callable[[Answer], Answer]:
    return lambda found: {key: value for key, value in found.items() if key != name}


def label(name: str) -> Callable[[Answer], Answer]:
    return lambda found: found | {"classLabel": name}


def probabilities(values: dict[str, float]) -> Callable[[Answer], Answer]:
    return lambda found: found | {"classLabel_probs": values}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("classLabel_probs"), "returns classLabel, and not classLabel_probs"),
        (drop("classLabel"), "and not classLabel"),
        (label("nobody"), "Core ML names 'nobody', and 'label"),
        (probabilities({"label 0": 1.0}), "returns 1 labels where tiny.mlpackage has 12; 'label 1' is in one"),
        (probabilities(dict.fromkeys([*LABELS[1:], "other"], 0.1)), "'label 0' is in one of them"),
    ],
)
def test_another_answer_than_described_fails(
    sound: Path, core: CoreML, change: Callable[[Answer], Answer], words: str
) -> None:
    core.change = change
    with CoreMLDevice(sound, "all") as device, pytest.raises(VerificationFailed, match=words):
        device.run({"image": PICTURE})


def test_a_label_that_is_not_the_most_probable_fails(sound: Path, core: CoreML) -> None:
    values = dict.fromkeys(LABELS, 0.1) | {"label 3": 0.5}
    core.change = lambda _: {"classLabel": "label 4", "classLabel_probs": values}
    with CoreMLDevice(sound, "all") as device:
        with pytest.raises(VerificationFailed, match="names 'label 4', and 'label 3' is the most probable"):
            device.run({"image": PICTURE})
        values["label 4"] = 0.5  # as probable: either may be named
        assert device.run({"image": PICTURE})["probabilities"].argmax() == 3


def test_a_failed_prediction_fails(sound: Path, core: CoreML) -> None:
    def fail(_: Answer) -> Answer:
        raise Exception("Error computing NN outputs\n error -1")  # noqa: TRY002 - as coremltools does

    core.change = fail
    with (
        CoreMLDevice(sound, "all") as device,
        pytest.raises(
            VerificationFailed, match=r"can't predict with tiny\.mlpackage: Error computing NN outputs error -1"
        ),
    ):
        device.run({"image": PICTURE})


def raises(error: Exception) -> Callable[[], object]:
    def refuse() -> None:
        raise error

    return refuse


def warn() -> None:
    text = "You will not be able to run predict() on this Core ML model. Underlying exception message was: compiling"
    warnings.warn(text, RuntimeWarning, stacklevel=1)


@pytest.mark.parametrize(
    ("refuses", "kind", "words"),
    [
        (warn, BuildFailed, "Core ML refuses tiny.mlpackage: compiling$"),
        (raises(RuntimeError("no such file")), BuildFailed, "Core ML refuses tiny.mlpackage: no such file"),
        (raises(ValueError("CPU_AND_NE is only available on macOS >= 13.0")), NotExecutable, "only available"),
        (lambda: None, NotExecutable, "macOS 15.5 has no Core ML that knows specification 7"),
    ],
)
def test_what_core_ml_does_not_load(
    sound: Path, core: CoreML, refuses: Callable[[], object], kind: type[Exception], words: str
) -> None:
    core.refuses = refuses
    with pytest.raises(kind, match=words):
        CoreMLDevice(sound, "cpuAndNeuralEngine").__enter__()


def test_a_closed_one_runs_nothing(sound: Path, core: CoreML) -> None:
    with CoreMLDevice(sound, "all") as device:
        device.run({"image": PICTURE})
    with pytest.raises(RuntimeError, match="closed"):
        device.run({"image": PICTURE})
    assert core.units == ["ALL"]


def test_a_damaged_package_is_told_before_anything_else(package: Path) -> None:
    (package / "Manifest.json").unlink()
    with pytest.raises(BuildFailed, match=r"Manifest\.json is missing"):
        CoreMLDevice(package, "all").__enter__()


def test_why_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("coremltools", None, is_package=True)
    assert why_not_here("linux") == "Core ML runs on macOS only"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install 'nextvit-deploy[coreml]'" in str(why_not_here("darwin"))
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    assert "native libraries" in str(why_not_here("darwin"))
    (tmp_path / "libcoremlpython.so").touch()
    assert why_not_here("darwin") is None


def test_elsewhere_it_is_not_executable(sound: Path) -> None:
    if why_not_here() is None:
        pytest.skip("Core ML is here")
    with pytest.raises(NotExecutable, match=r"macOS only|coremltools"):
        CoreMLDevice(sound, "cpuOnly").__enter__()


@pytest.mark.parametrize("unit", UNITS)
def test_core_ml_itself(unit: str, tmp_path: Path) -> None:
    if reason := why_not_here():
        pytest.skip(reason)
    path = save(classifier(), tmp_path / "tiny.mlpackage")
    with CoreMLDevice(path, unit) as device, MilReference(path, "emulated") as reference:
        found, expected = device.run({"image": PICTURE}), reference.run({"image": PICTURE})
    assert np.abs(found["probabilities"].astype(float) - expected["probabilities"].astype(float)).max() < 0.01
