"""Pieces of Core ML packages: they are sound packages, run alone, and give what the whole has there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from nextvit_exporters.coreml.loading import coremltools, heard
from nextvit_exporters.coreml.program import MODEL, WEIGHTS
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.cutting.coreml import cut_coreml
from nextvit_exporters.errors import OutputNotWritten, UnsupportedSpec
from nextvit_exporters.executors.base import Array
from nextvit_exporters.executors.mil import MilReference, Mode
from tests.deploy.support_coreml import exported, needs_coremltools

pytestmark = needs_coremltools
INSIDE = ("add_4_cast_fp16", "add_5_cast_fp16")
"""A block of the demo's second stage, with a shortcut."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A package, and every value in it by the mode it was executed in."""

    path: Path
    seen: Mapping[Mode, Mapping[str, Array]]


def observed(path: Path, *modes: Mode) -> Whole:
    (feature,) = read_package(path).inputs
    values: Array = np.random.default_rng(0).standard_normal(feature.shape).astype(np.float32)
    if feature.kind == "image":
        values = np.random.default_rng(0).integers(0, 255, (1, *feature.shape[2:], 3), np.uint8)
    found: dict[Mode, dict[str, Array]] = {}
    for mode in modes:
        with MilReference(path, mode) as executor:
            executor.trace({feature.name: values}, partial(_keep, found.setdefault(mode, {})))
    return Whole(path, found)


def _keep(seen: dict[str, Array], name: str, values: Array) -> None:
    seen[name] = np.array(values)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The demo in FP16, a picture in."""
    return observed(exported(tmp_path_factory.getbasetemp()).path, "exact", "emulated")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A small network for iOS 15, whose packages take and return no FP16."""
    from nextvit_exporters.coreml_spec import CoreMLSpec
    from tests.exporters.coreml.built import Attends, saved, toy, toy_spec

    package = saved(toy_spec(CoreMLSpec(15, "logits")), toy(Attends()), tmp_path_factory.mktemp("old"))
    return observed(package.path, "exact", "emulated")


def agrees(whole: Whole, mode: Mode, ends: tuple[str, str], out: Path) -> None:
    """Up to the order of sums, which hangs on how a tensor lies in memory, and roundings that tip with it."""
    start, end = ends
    with MilReference(out, mode) as executor:
        given = executor.run({start: whole.seen[mode][start]})[end]
    got, expected = np.asarray(given, np.float64), np.asarray(whole.seen[mode][end], np.float64)
    assert got.shape == expected.shape
    assert np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)) < (2e-4 if mode == "emulated" else 1e-6)


@pytest.mark.parametrize("mode", ["exact", "emulated"])
@pytest.mark.parametrize(
    "ends",
    [INSIDE, ("features_2_patch_embed_conv_cast_fp16", "cat_cast_fp16"), ("image", "stem_0_act_cast_fp16")],
    ids=["block", "attention", "input"],
)
def test_a_piece_gives_what_the_whole_has(demo: Whole, tmp_path: Path, ends: tuple[str, str], mode: Mode) -> None:
    out = tmp_path / "cut.mlpackage"
    piece = cut_coreml(demo.path, [ends[0]], [ends[1]], out)
    agrees(demo, mode, ends, out)
    package = read_package(out)
    assert package.program.opset == read_package(demo.path).program.opset
    assert [(each.name, each.kind) for each in (*package.inputs, *package.outputs)] == [
        (name, "tensor") for name in ends
    ]
    assert {each.name for each in piece.operations} <= {each.name for each in package.program.operations}


def test_only_what_is_needed_comes_along(demo: Whole, tmp_path: Path) -> None:
    out, again = tmp_path / "cut.mlpackage", tmp_path / "again.mlpackage"
    piece = cut_coreml(demo.path, [INSIDE[0]], [INSIDE[1]], out)
    assert [each.kind for each in piece.operations] == ["conv", "conv", "relu", "conv", "add"]
    assert (out / WEIGHTS).stat().st_size < (demo.path / WEIGHTS).stat().st_size / 20
    package = read_package(out)
    assert not package.about  # the author's name, among others
    assert not any("manifest" in key for key in package.metadata)
    cut_coreml(demo.path, [INSIDE[0]], [INSIDE[1]], again)
    assert (out / MODEL).read_bytes() == (again / MODEL).read_bytes()
    assert (out / WEIGHTS).read_bytes() == (again / WEIGHTS).read_bytes()


def test_coremltools_takes_it(demo: Whole, tmp_path: Path) -> None:
    cut_coreml(demo.path, [INSIDE[0]], [INSIDE[1]], tmp_path / "cut.mlpackage")
    with heard():
        model = coremltools().models.MLModel(str(tmp_path / "cut.mlpackage"), skip_model_load=True)
        (given,) = model.get_spec().description.input
    assert (given.name, list(given.type.multiArrayType.shape)) == (INSIDE[0], [1, 96, 8, 8])


def test_without_weights_there_is_no_file_of_them(demo: Whole, tmp_path: Path) -> None:
    ends = ("stem_0_conv_cast_fp16", "stem_0_act_cast_fp16")
    cut_coreml(demo.path, [ends[0]], [ends[1]], tmp_path / "cut.mlpackage")
    assert not (tmp_path / "cut.mlpackage" / WEIGHTS).exists()
    agrees(demo, "emulated", ends, tmp_path / "cut.mlpackage")


@pytest.mark.parametrize("mode", ["exact", "emulated"])
def test_ios_15_casts_at_the_edges(old: Whole, tmp_path: Path, mode: Mode) -> None:
    convs = [each for each in read_package(old.path).program.operations if each.kind == "conv"]
    ends = convs[0].outputs[0].name, convs[-1].outputs[0].name
    cut_coreml(old.path, [ends[0]], [ends[1]], tmp_path / "cut.mlpackage")
    package = read_package(tmp_path / "cut.mlpackage")
    assert {each.dtype for each in (*package.inputs, *package.outputs)} == {"float32"}
    assert package.program.count()["cast"] == 2
    agrees(old, mode, ends, tmp_path / "cut.mlpackage")


def test_packed_and_quantized_weights(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What unpacks them comes along, and so do int8 steps inside."""
    from tests.exporters.coreml.built import write

    folder = tmp_path_factory.mktemp("w8a8")
    write(["w8a8"], folder)
    whole = observed(folder / "w8a8.mlpackage", "unrounded", "emulated")
    adds = [each.outputs[0].name for each in read_package(whole.path).program.operations if each.kind == "add"]
    out = tmp_path / "cut.mlpackage"
    piece = cut_coreml(whole.path, [adds[2]], [adds[4]], out)
    assert "quantize" in {each.kind for each in piece.operations}
    for mode in whole.seen:
        agrees(whole, mode, (adds[2], adds[4]), out)
    inside = next(each.outputs[0].name for each in read_package(out).program.operations if each.kind == "quantize")
    with pytest.raises(UnsupportedSpec, match=f"{inside} of w8a8.mlpackage is u?int8, which no package takes"):
        cut_coreml(whole.path, [inside], [adds[4]], tmp_path / "other.mlpackage")


@pytest.mark.parametrize(
    ("inputs", "outputs", "says"),
    [
        (["absent"], [INSIDE[1]], "has no tensor absent"),
        ([INSIDE[1]], [INSIDE[0]], f"needs image as well as {INSIDE[1]}"),
        ([INSIDE[0]], [INSIDE[0]], "nothing lies between"),
        ([INSIDE[0]], ["classLabel"], "classLabel of .* is string, which no package takes or returns"),
        (["stem_0_conv_groups_0"], [INSIDE[0]], "stem_0_conv_groups_0 is a constant of "),
    ],
)
def test_what_can_not_be_cut(demo: Whole, tmp_path: Path, inputs: list[str], outputs: list[str], says: str) -> None:
    with pytest.raises(UnsupportedSpec, match=says) as refusal:
        cut_coreml(demo.path, inputs, outputs, tmp_path / "cut.mlpackage")
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_open_sizes(demo: Whole, tmp_path: Path) -> None:
    """Where the package takes any size, the piece does; ``shapes`` are the usual ones."""
    from tests.exporters.coreml.packages import convert, image

    sizes = coremltools().RangeDim(16, 64, 16)
    made = convert(given=image(shape=(1, 3, sizes, sizes)), open_sizes=True)
    with heard():
        made.save(str(tmp_path / "open.mlpackage"))
    whole = observed(tmp_path / "open.mlpackage", "emulated")
    kinds = {each.kind: each.outputs[0].name for each in reversed(read_package(whole.path).program.operations)}
    out, ends = tmp_path / "cut.mlpackage", (kinds["conv"], kinds["reduce_mean"])
    cut_coreml(whole.path, [ends[0]], [ends[1]], out, {ends[0]: (1, 32, 16, 16)})
    agrees(whole, "emulated", ends, out)
    (feature,) = read_package(out).inputs
    assert (feature.shape, feature.takes((1, 32, 20, 24))) == ((1, 32, 16, 16), True)
    del demo


def test_full_disks_and_what_is_there(demo: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "cut.mlpackage"
    out.mkdir()
    with pytest.raises(OutputNotWritten, match="is there already"):
        cut_coreml(demo.path, [INSIDE[0]], [INSIDE[1]], out)
    shutil.rmtree(out)

    def full(path: Path, _: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputNotWritten, match="no space left"):
        cut_coreml(demo.path, [INSIDE[0]], [INSIDE[1]], out)
    assert list(tmp_path.iterdir()) == []
