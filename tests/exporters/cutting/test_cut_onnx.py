"""Pieces of ONNX files: they run alone, and give what the whole file has there."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nextvit_exporters.cutting.onnx import cut_onnx, stand_in
from nextvit_exporters.errors import BuildFailed, OutputNotWritten, UnsupportedSpec
from nextvit_exporters.executors.base import Array
from nextvit_exporters.executors.onnx_runtime import OnnxRuntime
from nextvit_exporters.spec import Precision
from tests.deploy.support_int8 import FEW
from tests.deploy.support_int8 import exported as exported_int8
from tests.exporters.exports import NANO, Export

PLACES = (("add_4", "cat"), ("conv2d_14", "add_5"), ("cat", "logits"))
"""Between which tensors: inside a block, across an attention, and up to the end."""


@pytest.fixture(scope="module")
def files(exported: Export, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Nano in every precision."""
    half = exported(replace(NANO, precision=Precision.FP16))
    int8 = exported_int8(tmp_path_factory.getbasetemp(), "onnx", "--int8", *FEW)
    return {"fp32": exported(NANO).path, "fp16": half.path, "int8": int8.path}


def traced(path: Path, mode: str) -> dict[str, Array]:
    """Every tensor of the whole file, for inputs of order one."""
    model = onnx.load(str(path), load_external_data=False)
    random, found = np.random.default_rng(0), dict[str, Array]()
    shapes = {each.name: [d.dim_value for d in each.type.tensor_type.shape.dim] for each in model.graph.input}
    images = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    with OnnxRuntime(path, mode) as executor:
        executor.trace(images, lambda name, values: found.__setitem__(name, np.array(values)))
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("precision", "mode"), [("fp32", "exact"), ("fp16", "exact"), ("fp16", "emulated"), ("int8", "unrounded")]
)
def test_a_piece_gives_what_the_whole_has(
    files: dict[str, Path], tmp_path: Path, place: tuple[str, str], precision: str, mode: str
) -> None:
    path, (start, end) = files[precision], place
    whole, out = traced(path, mode), tmp_path / "cut.onnx"
    piece = cut_onnx(path, [start], [end], out)
    with OnnxRuntime(out, mode) as executor:
        given = whole[start] if stand_in(out, mode) else whole[start].astype(piece.inputs[0].dtype)
        np.testing.assert_array_equal(executor.run({start: given})[end], whole[end])
    assert [each.name for each in piece.inputs] == [start]
    assert piece.outputs[0].shape == whole[end].shape
    assert piece.inputs[0].dtype == ("float16" if precision == "fp16" else "float32")


def test_only_what_is_needed_comes_along(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "cut.onnx"
    piece = cut_onnx(files["fp32"], ["add_4"], ["cat"], out)
    whole, cut = onnx.load(str(files["fp32"])), onnx.load(str(out))
    assert (cut.ir_version, list(cut.opset_import)) == (whole.ir_version, list(whole.opset_import))
    assert [node.name for node in cut.graph.node] == [each.name for each in piece.operations]
    read = {name for node in cut.graph.node for name in node.input}
    assert {tensor.name for tensor in cut.graph.initializer} <= read
    assert not cut.metadata_props  # the class names, and how the whole file was made
    cut_onnx(files["fp32"], ["add_4"], ["cat"], tmp_path / "again.onnx")
    assert out.read_bytes() == (tmp_path / "again.onnx").read_bytes()


def test_what_other_exporters_note_of_the_machine_stays_behind(files: dict[str, Path], tmp_path: Path) -> None:
    model, noted = onnx.load(str(files["fp32"])), tmp_path / "noted.onnx"
    for each in (*model.graph.node, *model.graph.initializer, *model.graph.output):
        each.doc_string = 'File "/somebody/net.py", line 1'
        each.metadata_props.add(key="stack_trace", value="/somebody/net.py")
    onnx.save(model, str(noted))
    cut_onnx(noted, ["cat"], ["logits"], tmp_path / "cut.onnx")
    assert b"somebody" not in (tmp_path / "cut.onnx").read_bytes()


def test_int8_weights_are_no_operations(files: dict[str, Path], tmp_path: Path) -> None:
    piece = cut_onnx(files["int8"], ["add_4"], ["cat"], tmp_path / "cut.onnx")
    cut = onnx.load(str(tmp_path / "cut.onnx"))
    assert len(piece.operations) < len(cut.graph.node)
    assert all(each.reads for each in piece.operations)
    assert piece.operations[-1].writes == ("cat",)


def test_an_input_that_nothing_reads_is_left_out(files: dict[str, Path], tmp_path: Path) -> None:
    piece = cut_onnx(files["fp32"], ["cat", "add_4"], ["conv2d_20"], tmp_path / "cut.onnx")
    assert [each.name for each in piece.inputs] == ["cat"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "says"),
    [
        (["absent"], ["cat"], "has no tensor absent"),
        (["add_4"], ["absent"], "has no tensor absent"),
        (["cat"], ["add_4"], "needs image as well as cat"),
        (["cat"], ["cat"], "nothing lies between cat and cat"),
        (["add_5"], ["cat"], "cat of model.onnx needs image as well as add_5"),
        (["features.2.mlp.conv1.weight"], ["cat"], "features.2.mlp.conv1.weight is a constant of "),
        ([], ["cat"], "without an input"),
        (["add_4", "add_4"], ["cat"], "named twice"),
    ],
)
def test_what_can_not_be_cut(
    files: dict[str, Path], tmp_path: Path, inputs: list[str], outputs: list[str], says: str
) -> None:
    with pytest.raises(UnsupportedSpec, match=says) as refusal:
        cut_onnx(files["fp32"], inputs, outputs, tmp_path / "cut.onnx")
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_external_weights_come_along(files: dict[str, Path], tmp_path: Path) -> None:
    """A large file keeps them beside it; a piece holds its own."""
    model, big = onnx.load(str(files["fp32"])), tmp_path / "big.onnx"
    onnx.save(model, str(big), save_as_external_data=True, location="weights", size_threshold=0)
    cut_onnx(big, ["add_4"], ["cat"], tmp_path / "cut.onnx")
    cut_onnx(files["fp32"], ["add_4"], ["cat"], tmp_path / "other.onnx")
    pieces = [onnx.load(str(tmp_path / name), load_external_data=False) for name in ("cut.onnx", "other.onnx")]
    held = [{each.name: numpy_helper.to_array(each) for each in piece.graph.initializer} for piece in pieces]
    assert held[0].keys() == held[1].keys()
    assert all(np.array_equal(held[0][name], held[1][name]) for name in held[0])
    (tmp_path / "weights").unlink()
    with pytest.raises(BuildFailed, match="can't be read from beside it"):
        cut_onnx(big, ["add_4"], ["cat"], tmp_path / "third.onnx")


def test_what_a_branch_reads_from_outside(tmp_path: Path) -> None:
    branches = [
        helper.make_graph([helper.make_node(kind, ["x", "one"], [kind])], kind, [], [_value(kind)])
        for kind in ("Add", "Mul")
    ]
    nodes = [
        helper.make_node("Relu", ["image"], ["x"]),
        helper.make_node("If", ["which"], ["y"], then_branch=branches[0], else_branch=branches[1]),
    ]
    which = helper.make_tensor_value_info("which", TensorProto.BOOL, [])
    one = numpy_helper.from_array(np.full(4, 3, np.float32), "one")
    graph = helper.make_graph(nodes, "whole", [_value("image"), which], [_value("y")], [one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, str(tmp_path / "whole.onnx"))
    piece = cut_onnx(tmp_path / "whole.onnx", ["x", "which"], ["y"], tmp_path / "cut.onnx")
    assert [each.name for each in piece.inputs] == ["x", "which"]
    with OnnxRuntime(tmp_path / "cut.onnx", "exact") as executor:
        given = np.arange(4, dtype=np.float32)
        np.testing.assert_array_equal(executor.run({"x": given, "which": np.zeros((), np.bool_)})["y"], given * 3)


def _value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [4])


def test_damaged_files_and_full_disks(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "damaged.onnx").write_bytes(b"\xff" * 100)
    for name in ("damaged.onnx", "absent.onnx"):
        with pytest.raises(BuildFailed, match=f"{name} can't be read"):
            cut_onnx(tmp_path / name, ["a"], ["b"], tmp_path / "cut.onnx")

    def full(path: Path, _: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputNotWritten, match="no space left"):
        cut_onnx(files["fp32"], ["add_4"], ["cat"], tmp_path / "cut.onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["damaged.onnx"]
