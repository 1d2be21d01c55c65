"""Bundles of Core ML packages, and what their script does on a Mac."""

from __future__ import annotations

import platform
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nextvit_deploy.bisect import bundle_repro
from nextvit_deploy.bisect.bundle import Bundle
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.executors.base import Array
from nextvit_exporters.executors.mil import MilReference
from nextvit_exporters.targets import PRECISION_COST
from tests.deploy.bisect.bundles import MODULE, case, repro, traced
from tests.deploy.support import Exported
from tests.deploy.support_coreml import Draft, needs_coremltools, planted

pytestmark = needs_coremltools


def scale_bias(draft: Draft) -> None:
    draft.change(draft.find("conv", MODULE), "bias", lambda values: values * np.float16(1.5))


@pytest.fixture(scope="module")
def bundle(package: Exported, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo in FP16 with a fault in one bias."""
    folder = tmp_path_factory.mktemp("bad")
    bad = planted(package, folder, scale_bias)
    (start,), end = _ends(bad)
    image: Array = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), np.uint8)
    right, wrong = (
        traced(MilReference(path, "emulated"), [{"image": image}], (start, end)) for path in (package.path, bad)
    )
    return case(bad, right, wrong, (start, end), PRECISION_COST, 2e-2).write(folder / "repro")


def _ends(path: Path) -> tuple[tuple[str], str]:
    draft = Draft(path)
    conv = draft.find("conv", MODULE)
    return (conv.inputs["x"].arguments[0].name,), conv.outputs[0].name


def test_a_fault_is_seen(bundle: Bundle) -> None:
    assert bundle.fails
    assert bundle.operations == ("features_3_mlp_conv1_cast_fp16",)
    assert read_package(bundle.folder / "cut.mlpackage").program.count() == {"conv": 1}
    text = (bundle.folder / "issue.md").read_text(encoding="utf-8")
    assert "Core ML differs from PyTorch" in text
    assert "It needs a Mac" in text


def test_elsewhere_it_says_that_it_needs_a_mac(bundle: Bundle) -> None:
    if platform.system() == "Darwin":
        pytest.skip("this is a Mac")
    status, said = repro(bundle)
    assert status == 4
    assert "run this on a Mac" in said


class Model:
    """Stands in for Core ML: executes the package in PyTorch."""

    def __init__(self, path: str, compute_units: str) -> None:
        self._path, self.units = Path(path), compute_units

    def predict(self, given: dict[str, Array]) -> dict[str, Array]:
        with MilReference(self._path, "emulated") as executor:
            return executor.run(given)


@pytest.mark.parametrize(("expected", "status"), [("expected.npz", 1), ("got.npz", 0)])
def test_on_a_mac(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], expected: str, status: int
) -> None:
    tools = SimpleNamespace(
        __version__="9.0",
        models=SimpleNamespace(MLModel=Model),
        ComputeUnit=SimpleNamespace(CPU_ONLY="CPU_ONLY", ALL="ALL"),
    )
    real = bundle_repro.arrays
    monkeypatch.setattr(bundle_repro, "HERE", bundle.folder)
    monkeypatch.setattr(bundle_repro, "load", lambda _: tools)
    monkeypatch.setattr(bundle_repro, "arrays", lambda name: real(expected if name == "expected.npz" else name))
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert bundle_repro.main() == status
    said = capsys.readouterr().out
    assert said.count("DIFFERS" if status else " agrees") == 2
    assert "coremltools 9.0, CPU_ONLY" in said
