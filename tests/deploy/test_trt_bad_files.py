"""Whatever is wrong with an ONNX file: one line that says so, nothing written, and no crash below Python."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from nextvit_exporters.to_tensorrt import onnx_of
from tests.deploy.support import Exported, Ran, one_line, strict_json

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed; pip install 'nextvit-deploy[trt-rtx]'")
pytestmark = pytest.mark.usefixtures("quick")
Model = onnx.ModelProto


# Each makes one bad file from a good one. All are given to one process, so that a crash in it is seen.
def node(model: Model, name: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(each for each in model.graph.node if each.name == name)
    return found


def constant(model: Model, name: str) -> TensorProto:
    found: TensorProto = next(each for each in model.graph.initializer if each.name == name)
    return found


def written(model: Model, path: Path) -> None:
    path.write_bytes(model.SerializeToString())


def empty(_: Model, path: Path) -> None:
    path.write_bytes(b"")


def truncated(model: Model, path: Path) -> None:
    path.write_bytes(model.SerializeToString()[:1_000_000])


def random_bytes(_: Model, path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(100_000))  # noqa: S311 - any bytes will do


def missing(_: Model, __: Path) -> None:
    """No file at all."""


def a_folder(_: Model, path: Path) -> None:
    path.mkdir()


def with_data(model: Model, path: Path) -> Path:
    """Save with the weights in a file beside, as large models have them."""
    data = path.with_name(f"{path.stem}.data")
    external_data_helper.convert_model_to_external_data(model, location=data.name, size_threshold=0)
    onnx.save(model, str(path))
    return data


def data_missing(model: Model, path: Path) -> None:
    with_data(model, path).unlink()


def data_truncated(model: Model, path: Path) -> None:
    data = with_data(model, path)
    data.write_bytes(data.read_bytes()[:1000])


def data_outside(model: Model, path: Path) -> None:
    with_data(model, path)
    saved = onnx.load(str(path), load_external_data=False)
    for tensor in saved.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../outside.data"
    written(saved, path)


def opset_of_the_future(model: Model, path: Path) -> None:
    model.opset_import[0].version = 99
    written(model, path)


def float64(model: Model, path: Path) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    node(model, "stem.0.conv/Cast").attribute[0].i = TensorProto.DOUBLE
    written(model, path)


def custom_operation(model: Model, path: Path) -> None:
    node(model, "stem.0.act/Relu").domain = "made.up"
    model.opset_import.append(helper.make_opsetid("made.up", 1))
    written(model, path)


def unknown_operation(model: Model, path: Path) -> None:
    node(model, "stem.0.act/Relu").op_type = "Rleu"
    written(model, path)


def no_output(model: Model, path: Path) -> None:
    del model.graph.output[:]
    written(model, path)


def cyclic(model: Model, path: Path) -> None:
    node(model, "stem.0.conv/Conv").input[0] = node(model, "stem.3.act/Relu").output[0]
    written(model, path)


def dangling(model: Model, path: Path) -> None:
    node(model, "stem.1.conv/Conv").input[0] = "nowhere"
    written(model, path)


def half_filled(model: Model, path: Path) -> None:
    tensor = constant(model, "stem.1.conv.weight")
    tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // 2]
    written(model, path)


def wrong_shape(model: Model, path: Path) -> None:
    weight = constant(model, "stem.1.conv.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[:, :-1].copy(), weight.name))
    written(model, path)


def two_inputs(model: Model, path: Path) -> None:
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))
    del model.metadata_props[:]
    written(model, path)


def no_image(model: Model, path: Path) -> None:
    del model.graph.input[0].type.tensor_type.shape.dim[3]
    written(model, path)


def mixed_types(model: Model, path: Path) -> None:
    bias = constant(model, "features.4.e_mhsa.q.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias).astype(np.float32), bias.name))
    written(model, path)


def strings(model: Model, path: Path) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    written(model, path)


def damaged_record(model: Model, path: Path) -> None:
    helper.set_model_props(model, {"nextvit_deploy.manifest": "{"})
    written(model, path)


def float32_head(model: Model, path: Path) -> None:
    """The classifier alone in float32: ONNX allows it, and TensorRT builds nothing of it for a T4."""
    for part in ("weight", "bias"):
        tensor = constant(model, f"proj_head.0.{part}")
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    gemm, back = node(model, "proj_head.0/Gemm"), node(model, "proj_head.0/Cast")
    at = [each.name for each in model.graph.node].index(gemm.name)
    model.graph.node.insert(at, helper.make_node("Cast", [gemm.input[0]], ["wide"], "wide", to=TensorProto.FLOAT))
    gemm.input[0] = "wide"
    model.graph.node.remove(back)
    node(model, "proj_head.0/Gemm").output[0] = "logits"
    del model.metadata_props[:]
    written(model, path)


FILES: dict[Callable[[Model, Path], None], str] = {
    empty: "empty.onnx is not an ONNX file, or holds no operations",
    truncated: "truncated.onnx is not an ONNX file",
    random_bytes: "random_bytes.onnx is not an ONNX file",
    missing: "there is no file ",
    a_folder: "there is no file ",
    data_missing: "the data beside data_missing.onnx can't be read: ",
    data_truncated: "the data beside data_truncated.onnx can't be read: ",
    data_outside: "the data beside data_outside.onnx can't be read: ",
    opset_of_the_future: "opset_of_the_future.onnx is in opset 99, tensorrt-rtx ",
    float64: "float64.onnx computes in float64, first ",
    custom_operation: "custom_operation.onnx: stem.0.act/Relu is Relu of made.up, not of ONNX, and TensorRT may take ",
    unknown_operation: "Rleu stem.0.act/Relu: ",
    no_output: "finds no output in the file",
    cyclic: "node name: stem.0.conv/Conv",
    dangling: "node name: stem.1.conv/Conv",
    half_filled: "half_filled.onnx: the numbers of stem.1.conv.weight do not fill its shape [",
    wrong_shape: "TensorRT's ONNX parser refuses the file: Conv stem.1.conv/Conv: ",
    two_inputs: "two_inputs.onnx has 2 inputs and 1 outputs; only a classifier's one image and one output can be ",
    no_image: "types can't be inferred",
    mixed_types: "node name: features.4.e_mhsa.q/Add",
    strings: "TensorRT's ONNX parser refuses the file: ",
    damaged_record: "the manifest inside damaged_record.onnx is damaged: ",
    float32_head: "Cannot compile operation 'proj_head.0/Gemm' for Turing (SM75): FP32 GEMM is not supported",
}
_ALL_IN_ONE: Final = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from nextvit_deploy import cli
for line in sys.stdin:
    out, err, status = io.StringIO(), io.StringIO(), None
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli.main(json.loads(line))
    except SystemExit as left:
        status = left.code
    except BaseException as error:
        err.write(repr(error))
    print(json.dumps({"status": status, "out": out.getvalue(), "err": err.getvalue()}), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Answers:
    """What was said to each file, and the folder in which nothing may be written."""

    out: Path
    to: dict[Callable[[Model, Path], None], Ran]


@pytest.fixture(scope="session")
def answers(engine: Exported, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What a process of its own says to each bad file in turn; it ends there if one of them brings it down."""
    folder = tmp_path_factory.mktemp("bad")
    commands = []
    for make in FILES:
        path = folder / f"{make.__name__}.onnx"
        make(onnx.load(str(onnx_of(engine.path))), path)
        commands.append(["trt", "--fp16", "--onnx", str(path), "--output", str(folder / "out" / make.__name__)])
    done = subprocess.run(
        [sys.executable, "-c", _ALL_IN_ONE],
        input="".join(json.dumps(command) + "\n" for command in commands),
        capture_output=True,
        text=True,
        check=False,
    )
    said = [strict_json(line) for line in done.stdout.splitlines()]
    assert len(said) == len(FILES), f"{[*FILES][len(said)].__name__} ended it with {done.returncode}: {done.stderr}"
    assert done.returncode == 0, done.stderr
    ran = (Ran(each["status"], each["out"], each["err"]) for each in said)
    return Answers(folder / "out", dict(zip(FILES, ran, strict=True)))


@pytest.mark.parametrize("make", FILES)
def test_a_file_that_cannot_be_built(answers: Answers, make: Callable[[Model, Path], None]) -> None:
    ran = answers.to[make]
    assert (ran.status, ran.out) == (1, ""), ran
    line = one_line(ran.err)
    assert FILES[make] in line
    assert len(line) < 600, line
    assert not (answers.out / make.__name__).exists()
