"""Bundles: what is in them shows the failure to somebody who has nothing else."""

from __future__ import annotations

import errno
import getpass
import json
import math
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nextvit_deploy.bisect.bundle import check_bundle_place, is_bundle
from nextvit_deploy.bisect.bundle_trial import way_for
from nextvit_exporters.errors import OutputNotWritten, UnsupportedSpec
from nextvit_exporters.executors.base import Array
from nextvit_exporters.executors.onnx_runtime import OnnxRuntime
from nextvit_exporters.files import sha256_of
from nextvit_exporters.targets import PRECISION_COST, SAME_NETWORK
from tests.deploy.bisect.bundles import Case, case, onnx_case, repro, scale_bias, traced
from tests.deploy.support import Exported, contents, tamper
from tests.deploy.support_int8 import FEW, needs_tensorrt
from tests.deploy.support_int8 import exported as exported_int8

FILES = {"bundle.json", "bundle.zip", "cut.onnx", "expected.npz", "got.npz", "inputs.npz", "issue.md", "repro.py"}


@pytest.fixture(scope="module")
def planted(demo: Exported, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The demo in float32 with a fault, on three images."""
    bad = tamper(demo.copied(tmp_path_factory.mktemp("bad")), scale_bias)
    return onnx_case(demo.path, bad, "exact", runs=3)


def test_a_fault_is_seen_by_somebody_else(planted: Case, tmp_path: Path) -> None:
    bundle = planted.write(tmp_path / "repro")
    assert (bundle.fails, bundle.operations) == (True, ("features.3.mlp.conv1/Conv", "features.3.mlp.act/Relu"))
    assert {each.name for each in bundle.folder.iterdir()} == FILES
    assert bundle.error is not None
    assert bundle.error > 0.05
    status, said = repro(bundle)
    assert status == 1
    assert f"relu_11 DIFFERS: relative rms {bundle.error:.3e} > " in said
    with np.load(bundle.folder / "inputs.npz") as inputs:
        assert inputs["add_7"].shape == (1, 96, 4, 4)  # of three images one
    assert (bundle.folder / "cut.onnx").stat().st_size < planted.artefact.stat().st_size / 20


def test_what_the_issue_says(planted: Case, tmp_path: Path) -> None:
    bundle = planted.write(tmp_path / "repro")
    text = (bundle.folder / "issue.md").read_text(encoding="utf-8")
    told = json.loads((bundle.folder / "bundle.json").read_text(encoding="utf-8"))
    assert bundle.error is not None
    for words in (
        f"# features.3.mlp.conv1: ONNX differs from PyTorch by {bundle.error:.1e}",
        f"| what comes out, in the whole of {planted.artefact.name} | {planted.cut.parting.error:.3e} |",
        f"| {planted.artefact.name} | {sha256_of(planted.artefact)} |",
        "operation: `features.3.mlp.act/Relu` (Relu)",
        "it adds something else",
        "$ python repro.py",
        "Here it is 1.",
        f"| onnx | {onnx.__version__} |",
        "hold activations",
    ):
        assert words in text
    for name, digest in told["files"].items():
        assert sha256_of(bundle.folder / name) == digest
        assert f"| {name} | {digest} |" in text


def test_nothing_tells_whose_machine_it_was(planted: Case, tmp_path: Path) -> None:
    bundle = planted.write(tmp_path / "repro")
    with zipfile.ZipFile(bundle.archive) as archive:
        held = {name.removeprefix("repro/"): archive.read(name) for name in archive.namelist()}
    assert held == {name: data for name, data in contents(bundle.folder).items() if name != "bundle.zip"}
    secrets = {str(tmp_path), str(planted.artefact.parent), str(Path.home()), str(Path(__file__).parents[3])}
    user = getpass.getuser()
    for data in held.values():
        assert not any(secret.encode() in data for secret in secrets)
        assert f"/{user}/".encode() not in data


def test_the_same_bytes_each_time(planted: Case, tmp_path: Path) -> None:
    first, second = (planted.write(tmp_path / each / "repro") for each in ("one", "two"))
    assert contents(first.folder) == contents(second.folder)


@pytest.mark.parametrize("mode", ["exact", "emulated"])
def test_fp16(half: Exported, tmp_path: Path, mode: str) -> None:
    """The verdict is on the file that stands for it in float32; the file itself is shown beside it."""
    made = onnx_case(half.path, tamper(half.copied(tmp_path), scale_bias), mode)
    if mode == "emulated":
        series = replace(made.bisection.series[0], question=PRECISION_COST, tolerance=1e-2)
        made = replace(made, bisection=replace(made.bisection, series=(series,)))
    bundle = made.write(tmp_path / "repro")
    status, said = repro(bundle)
    assert (bundle.fails, status) == (True, 1)
    assert said.index(f"cut.{mode}.onnx ({mode}, in float32): relu_11 DIFFERS") < said.index("cut.onnx (as it is)")


def test_int8(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    sound = exported_int8(tmp_path_factory.getbasetemp(), "onnx", "--int8", *FEW)
    bundle = onnx_case(sound.path, tamper(sound.copied(tmp_path), scale_bias), "unrounded").write(tmp_path / "repro")
    status, said = repro(bundle)
    assert (bundle.fails, status) == (True, 1)
    assert "cut.unrounded.onnx (unrounded, in float32): relu_11 DIFFERS" in said
    assert "features.3.mlp.conv1/Conv" in bundle.operations


def test_a_sound_piece_is_said_to_agree(planted: Case, demo: Exported, tmp_path: Path) -> None:
    """The difference came from further in front: what goes in is right, and so is what the piece makes of it."""
    bundle = replace(planted, artefact=demo.path).write(tmp_path / "repro")
    assert not bundle.fails
    assert "the difference needs what comes before" in bundle.notes[0]
    status, said = repro(bundle)
    assert status == 0
    assert "relu_11 agrees" in said
    text = (bundle.folder / "issue.md").read_text(encoding="utf-8")
    assert "The piece alone does not show it" in text
    assert "the cut alone agrees" in text
    assert "Here it is 0." in text


def test_rounded_inputs_are_no_failure(half: Exported, tmp_path: Path) -> None:
    """A difference as small as what rounding the inputs to keep them makes is not called one of the piece."""
    made = onnx_case(half.path, half.path, "exact")
    parting = replace(made.cut.parting, error=3e-4)
    inputs = {name: values.astype(np.float16) for name, values in made.cut.inputs.items()}
    series = replace(made.bisection.series[0], partings=(parting,))
    made = Case(half.path, replace(made.cut, inputs=inputs, parting=parting), replace(made.bisection, series=(series,)))
    bundle = made.write(tmp_path / "repro")
    assert not bundle.fails
    assert bundle.error is not None
    assert bundle.error > 3e-4 / 4
    assert "rounded to be kept" in bundle.notes[0]
    assert repro(bundle)[0] == 0


def test_operations_that_do_no_harm_are_left_out(tmp_path: Path) -> None:
    """Only the last of three overflows FP16; of two images one does."""
    path = tmp_path / "overflow.onnx"
    names = ("image", "a", "b", "c")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", 4]) for name in names]
    nodes = [
        helper.make_node("Relu", ["image"], ["a"]),
        helper.make_node("Add", ["a", "one"], ["b"]),
        helper.make_node("Mul", ["b", "thousand"], ["c"]),
    ]
    held = [numpy_helper.from_array(np.array(v, np.float16), n) for n, v in (("one", 1.0), ("thousand", 1000.0))]
    graph = helper.make_graph(nodes, "overflow", [values[0]], [values[3]], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), str(path))
    images: Array = np.array([[1, 2, 3, 4], [5, 70, 7, 8]], np.float16)
    right = traced(OnnxRuntime(path, "exact"), [{"image": images}], names)
    wrong = traced(OnnxRuntime(path, "emulated"), [{"image": images}], names)
    made = case(path, right, wrong, ("image", "c"), PRECISION_COST, 1e-2)
    assert made.cut.parting.error == math.inf
    bundle = made.write(tmp_path / "repro")
    assert bundle.fails
    assert len(bundle.operations) == 1
    assert any("first 2 operations" in each for each in bundle.notes)
    with np.load(bundle.folder / "inputs.npz") as inputs:
        np.testing.assert_array_equal(inputs["b"], images[1:] + 1)
    assert repro(bundle)[0] == 1


def test_without_anything_to_expect(planted: Case, tmp_path: Path) -> None:
    bundle = replace(planted, cut=replace(planted.cut, expected={})).write(tmp_path / "repro")
    assert (bundle.fails, bundle.error) == (False, None)
    assert "not known whether it fails" in bundle.notes[0]
    status, said = repro(bundle)
    assert status == 4
    assert "nothing in PyTorch answers" in said


@needs_tensorrt
def test_an_engine(engine: Exported, tmp_path: Path) -> None:
    """What TensorRT parses out of the piece is shown; nothing is called executed."""
    sound = engine.path.with_suffix(".onnx")
    made = onnx_case(sound, sound, "exact")
    parting = replace(made.cut.parting, error=1.0)
    expected = {name: values * 2 for name, values in made.cut.expected.items()}
    series = replace(made.bisection.series[0], question=SAME_NETWORK, partings=(parting,))
    cut = replace(made.cut, parting=parting, expected=expected)
    bundle = Case(engine.path, cut, replace(made.bisection, series=(series,))).write(tmp_path / "repro")
    assert bundle.fails
    status, said = repro(bundle)
    assert status == 4
    assert "CONVOLUTION features.3.mlp.conv1/Conv: add_7 " in said
    assert "not executed" in said


def test_a_place_that_is_taken(planted: Case, tmp_path: Path) -> None:
    folder = tmp_path / "repro"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputNotWritten, match="is no repro bundle of this program"):
        planted.write(folder)
    with pytest.raises(OutputNotWritten, match="is no repro bundle of this program"):
        check_bundle_place(folder)
    (folder / "notes.txt").unlink()
    planted.write(folder)
    assert is_bundle(folder)
    planted.write(folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputNotWritten, match=r"holds notes\.txt besides the repro bundle"):
        planted.write(folder)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_full_disk_leaves_nothing(
    planted: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real, calls = Path.write_bytes, []

    def write(path: Path, data: bytes) -> int:
        calls.append(path)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(OutputNotWritten, match="no space left on the disk") as refusal:
        planted.write(tmp_path / "deep" / "repro")
    assert ".tmp-" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_what_can_not_be_cut(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSpec, match="nothing can be cut out of it"):
        way_for(tmp_path / "model.safetensors", SAME_NETWORK)
