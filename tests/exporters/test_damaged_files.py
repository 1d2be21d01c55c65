"""A damaged ONNX file is one line, whatever is wrong with it and whoever notices first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from nextvit_exporters import to_onnx
from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.executors.onnx_runtime import OnnxRuntime
from nextvit_exporters.spec import Precision
from tests.exporters.exports import NANO, Export

Damage = Callable[[onnx.ModelProto], object]
INPUTS = {"image": np.ones((2, 3, 64, 64), np.float32)}
BOTH = pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16], ids=str)
MODES = pytest.mark.parametrize("mode", ["exact", "emulated"])


def refused(path: Path, mode: str) -> str:
    with pytest.raises(BuildFailed) as refusal, OnnxRuntime(path, mode) as executor:
        executor.run(INPUTS)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[4]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="gone.bin")


def rename_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "picture"
    for node in model.graph.node:
        node.input[:] = ["picture" if name == "image" else name for name in node.input]


DAMAGES: dict[str, tuple[Damage, str]] = {
    "unknown operation": (lambda m: setattr(m.graph.node[6], "op_type", "Frobnicate"), "Frobnicate"),
    "unknown domain": (lambda m: setattr(m.graph.node[6], "domain", "com.nobody"), "com.nobody"),
    "input from nowhere": (lambda m: m.graph.node[6].input.__setitem__(0, "nowhere"), "inferred"),
    "constant lost": (lambda m: m.graph.initializer.pop(3), "can't load"),
    "future opset": (lambda m: setattr(m.opset_import[0], "version", 99), "can't load"),
    "future file format": (lambda m: setattr(m, "ir_version", 99), "can't load"),
    "constant of another shape": (lambda m: m.graph.initializer[4].dims.__setitem__(0, 7), "stem"),
    "constant cut short": (lambda m: setattr(m.graph.initializer[4], "raw_data", b"123"), "stem"),
    "constant elsewhere": (external, "gone.bin"),
    "circle": (lambda m: m.graph.node[1].input.__setitem__(0, m.graph.node[-2].output[0]), "inferred"),
    "another input name": (rename_input, "reads picture, not image"),
}


@BOTH
@MODES
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_graph_is_one_line(
    exported: Export, tmp_path: Path, damage: str, mode: str, precision: Precision
) -> None:
    model = exported(replace(NANO, precision=precision)).proto
    change, says = DAMAGES[damage]
    change(model)
    path = tmp_path / "damaged.onnx"
    path.write_bytes(model.SerializeToString())
    assert says in refused(path, mode)


@MODES
@pytest.mark.parametrize("cut", [0, 100, 0.5, 0.999])
def test_a_file_cut_short_is_one_line(exported: Export, tmp_path: Path, cut: float, mode: str) -> None:
    data = exported(NANO).path.read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: int(cut * len(data)) if cut < 1 else int(cut)])
    assert path.name in refused(path, mode)
    with pytest.raises(BuildFailed, match="is not an ONNX file"):
        to_onnx.read(path)


@MODES
@pytest.mark.parametrize("data", [b"hello, I am a picture", bytes(1000), b"\x89PNG\r\n\x1a\n" * 9])
def test_another_kind_of_file_is_one_line(tmp_path: Path, data: bytes, mode: str) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(data)
    assert path.name in refused(path, mode)
    with pytest.raises(BuildFailed, match="is not an ONNX file"):
        to_onnx.read(path)


@MODES
def test_a_missing_file_is_one_line(tmp_path: Path, mode: str) -> None:
    assert "No such file" in refused(tmp_path / "gone.onnx", mode)
    with pytest.raises(BuildFailed, match=r"^there is no file .*gone.onnx; give the path of an artefact$"):
        to_onnx.read(tmp_path / "gone.onnx")


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"image": np.ones((2, 3, 32, 64), np.float32)}, "Got invalid dimensions"),
        ({"image": np.ones((2, 3, 64, 64), np.float64)}, "Unexpected input data type"),
        ({"picture": np.ones((2, 3, 64, 64), np.float32)}, "model.onnx reads image, not picture"),
        ({}, "model.onnx reads image, not "),
    ],
)
def test_wrong_inputs_are_one_line(exported: Export, inputs: dict[str, np.ndarray], says: str) -> None:
    with OnnxRuntime(exported(NANO).path, "exact") as executor, pytest.raises(BuildFailed) as refusal:
        executor.run(inputs)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
