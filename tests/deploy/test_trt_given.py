"""``trt --onnx``: a file that is there already, of this tool or another, in FP16, float32 and INT8."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from nextvit_deploy.data import load_images
from nextvit_exporters.to_tensorrt import onnx_of
from nextvit_models.checkpoint import load_checkpoint
from nextvit_models.demo import DEMO_CHECKPOINT, DEMO_IMAGES
from tests.deploy.support import (
    Exported,
    Json,
    call,
    forget,
    judged,
    one_line,
    refusal,
    remove_relu,
    rename,
    scale_weight,
    tamper,
    verdicts,
    weights,
)
from tests.deploy.support_trt import NETWORK, STEM, exported, is_proven, questions

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed; pip install 'nextvit-deploy[trt-rtx]'")
pytestmark = pytest.mark.usefixtures("quick")
Edit = Callable[[onnx.ModelProto], None]
EXCLUDED: Final = ["Conv", "Gemm", "Add", "Relu"]
"""Operations whose outputs stay in FP16."""


@pytest.fixture(scope="session")
def fp16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX file beside the demo's engine."""
    return onnx_of(exported(tmp_path_factory.getbasetemp(), "--fp16").path)


@pytest.fixture(scope="session")
def strange(fp16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same from another tool: without a record, and with names of its own."""
    return edited(fp16, tmp_path_factory.mktemp("strange") / "strange.onnx", anonymise)


@pytest.fixture(scope="session")
def int8(fp16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(fp16, tmp_path_factory.mktemp("int8") / "int8.onnx")


def anonymise(model: onnx.ModelProto) -> None:
    forget(model)
    rename(model, {"image": "pixels", "logits": "scores"})


def edited(source: Path, path: Path, *edits: Edit) -> Path:
    model = onnx.load(str(source))
    for edit in edits:
        edit(model)
    path.write_bytes(model.SerializeToString())
    return path


class Digits(CalibrationDataReader):  # type: ignore[misc]  # it ships no types
    """A few of the demo's digits."""

    def __init__(self) -> None:
        images = load_images(DEMO_IMAGES, 8, (64, 64), load_checkpoint(DEMO_CHECKPOINT).preprocessing)
        self._left: Iterator[Any] = iter(images.normalised())

    def get_next(self) -> dict[str, Any] | None:
        image = next(self._left, None)
        return None if image is None else {"image": image[None]}


def quantized(source: Path, path: Path, **options: Any) -> Path:
    """``source`` by ONNX Runtime's quantizer, in the form that TensorRT takes unless ``options`` say otherwise."""
    kind = options.pop("activation_type", QuantType.QInt8)
    extra = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": EXCLUDED,
    }
    quantize_static(
        str(source),
        str(path),
        Digits(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=kind,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv", "Gemm"],
        extra_options=extra | options,
    )
    return path


def built(*options: str | Path, folder: Path) -> Json:
    ran = call("trt", *options, "--output", folder, "--json")
    assert (ran.status, ran.err) == (0, ""), ran
    return ran.json


def test_a_file_of_this_tool_in_fp16(tmp_path: Path) -> None:
    """As the ONNX command writes it for TensorRT; what is beside the engine is that file."""
    assert call("onnx", "--fp16", "--for", "tensorrt-10", "--output", tmp_path, "--quiet").status == 0
    (given,) = tmp_path.glob("*.onnx")
    manifest = built("--onnx", given, folder=tmp_path / "out")
    assert is_proven(manifest)
    assert {checks[0]["against"] for checks in questions(manifest).values()} == {
        "PyTorch, fp16 constants",
        "PyTorch float32",
    }
    (engine,) = (tmp_path / "out").glob("*.engine")
    assert engine.name == f"{STEM}.engine"
    beside, original = onnx.load(str(onnx_of(engine))), onnx.load(str(given))
    assert beside == original
    assert "no precision given: the engine is built in FP16" in manifest["notes"]
    assert judged(engine)[0] == 0


def test_a_file_of_this_tool_in_float32(demo: Exported, tmp_path: Path) -> None:
    """One that was meant for ONNX Runtime: its own passes are applied to the checkpoint again."""
    manifest = built("--onnx", demo.path, "--fp32", "--gpu", "a10", folder=tmp_path)
    assert is_proven(manifest, cost=1e-5)
    assert "channel-first-attention" in [each["name"] for each in manifest["passes"]]
    assert manifest["built"]["for"] == "SM86"
    (engine,) = tmp_path.glob("*.engine")
    assert engine.name == "nextvit_nano_classify_64_b1_fp32_a10.engine"
    assert judged(engine)[0] == 0


def test_pixels_and_batch_are_the_files(half: Exported, tmp_path: Path) -> None:
    manifest = built("--onnx", half.path, "--fp16", "--batch", "3", folder=tmp_path)
    assert is_proven(manifest)
    assert manifest["spec"]["input"] == "uint8"
    assert manifest["spec"]["engine"]["batch"] == "3"


def test_open_axes_get_the_ranges_asked_for(dynamic: Exported, tmp_path: Path) -> None:
    ranges = "--batch", "1:2:3", "--size", "64:64:96"
    manifest = built("--onnx", dynamic.path, "--fp32", "--gpu", "a10", *ranges, folder=tmp_path)
    assert is_proven(manifest, cost=1e-5)
    asked = manifest["spec"]["engine"]
    assert (asked["batch"], asked["height"], asked["width"]) == ("1:2:3", "64:64:96", "64:64:96")
    assert len(manifest["checks"]) == 2 * 6


def test_a_file_of_another_tool(strange: Path, tmp_path: Path) -> None:
    """Held against what ONNX Runtime reads in it; its cost against the checkpoint."""
    manifest = built("--onnx", strange, "--fp16", folder=tmp_path)
    assert is_proven(manifest)
    against = [checks[0]["against"] for checks in questions(manifest).values()]
    assert against[0].startswith("onnxruntime ")
    assert against[0].endswith(", the ONNX file")
    assert against[1] == "PyTorch float32"
    assert manifest["passes"] == []
    (engine,) = tmp_path.glob("*.engine")
    assert judged(engine)[0] == 0


def set_opset(number: int) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = number

    return edit


def test_an_opset_that_this_tool_does_not_write(strange: Path, tmp_path: Path) -> None:
    given = edited(strange, tmp_path / "new.onnx", set_opset(23))
    manifest = built("--onnx", given, "--fp16", folder=tmp_path / "out")
    assert is_proven(manifest)
    assert manifest["spec"]["opset"] == 23


def test_weights_beside_the_file_are_taken_in(strange: Path, tmp_path: Path) -> None:
    model = onnx.load(str(strange))
    external_data_helper.convert_model_to_external_data(model, location="w.data", size_threshold=0)
    onnx.save(model, str(tmp_path / "large.onnx"))
    assert (tmp_path / "w.data").stat().st_size > 1_000_000
    assert is_proven(built("--onnx", tmp_path / "large.onnx", "--fp16", folder=tmp_path / "out"))
    beside = onnx.load(str(tmp_path / "out" / f"{STEM}.onnx"), load_external_data=False)
    assert not any(tensor.external_data for tensor in beside.graph.initializer)


def test_another_networks_file_is_the_same_network_and_costs_too_much(strange: Path, tmp_path: Path) -> None:
    """TensorRT understands it well; it is only not the checkpoint."""
    given = edited(strange, tmp_path / "other.onnx", remove_relu)
    ran = call("trt", "--onnx", given, "--fp16", "--output", tmp_path / "out", "--json")
    assert ran.status == 3
    assert one_line(ran.err).startswith(f"{STEM}.engine is failed: precision cost: FAIL logits: relative rms ")
    assert verdicts(questions(ran.json)) == [{"verified"}, {"failed"}]


def test_a_file_of_this_tool_that_has_changed(fp16: Path, tmp_path: Path) -> None:
    given = edited(fp16, tmp_path / "changed.onnx")
    tamper(given, scale_weight)
    ran = call("trt", "--onnx", given, "--fp16", "--output", tmp_path / "out", "--json")
    assert ran.status == 3
    assert verdicts(questions(ran.json)) == [{"failed"}, {"verified"}]


def test_a_file_of_another_checkpoint(fp16: Path, tmp_path: Path) -> None:
    other, fewer = weights(tmp_path / "other.pth", 10, seed=3), weights(tmp_path / "fewer.pth", 7, seed=3)
    line = refusal("trt", fewer, "--onnx", fp16, "--fp16", "--output", tmp_path / "out")
    assert line.startswith(f"{fp16.name} was made from a nextvit_nano with 10 classes, fewer.pth is a nextvit_nano ")
    assert not (tmp_path / "out").exists()
    ran = call("trt", other, "--onnx", fp16, "--fp16", "--output", tmp_path / "out", "--json")
    assert ran.status == 3
    one_line(ran.err)
    assert any(note.startswith("the file was made from other weights than other.pth") for note in ran.json["notes"])
    assert verdicts(questions(ran.json)) == [{"failed"}, {"failed"}]


def test_a_stranger_of_another_number_of_classes(strange: Path, tmp_path: Path) -> None:
    fewer = weights(tmp_path / "fewer.pth", 7, seed=3)
    ran = call("trt", fewer, "--onnx", strange, "--fp16", "--output", tmp_path / "out")
    assert ran.status == 3
    assert "shape" in one_line(ran.err)


@pytest.mark.parametrize(
    "options",
    [
        ("--pass-set", "fewest-macs"),
        ("--skip-pass", "drop-key-bias"),
        ("--io", "fp16"),
        ("--input", "uint8"),
        ("--input", "uint8-nhwc"),
    ],
)
def test_options_that_the_file_does_not_follow(fp16: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """It is built as it is: what would change it is refused, not ignored."""
    ran = call("trt", "--onnx", fp16, *options, "--output", tmp_path / "out")
    assert ran.status in {1, 2}
    line = one_line(ran.err)
    assert options[0] in line
    assert "drop " in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--fp32", "--gpu", "a10"), f"{STEM}.onnx is in fp16, not fp32; ask for --fp16"),
        (("--int8",), f"{STEM}.onnx holds no QuantizeLinear, so nothing in it is INT8; quantize it, or use --fp16"),
    ],
)
def test_another_precision_than_the_files(fp16: Path, tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    assert refusal("trt", "--onnx", fp16, *options, "--output", tmp_path / "out") == says
    assert list(tmp_path.iterdir()) == []


def test_float32_is_not_built_in_fp16(demo: Exported, tmp_path: Path) -> None:
    line = refusal("trt", "--onnx", demo.path, "--output", tmp_path)
    assert line == f"{demo.path.name} is in fp32, not fp16; ask for --fp32"
    line = refusal("trt", "--onnx", demo.path, "--fp32", "--output", tmp_path)
    assert line.startswith("tensorrt-rtx can't build fp32 for Tesla T4: ")


def to_float32(model: onnx.ModelProto, *names: str) -> None:
    for tensor in model.graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def float32_island(model: onnx.ModelProto) -> None:
    """Two convolutions in float32 among FP16: TensorRT builds them, and they are not what was asked."""
    conv1, conv2 = (node for node in model.graph.node if node.name in {f"features.3.mlp.conv{n}/Conv" for n in (1, 2)})
    first, last = ([*model.graph.node].index(node) for node in (conv1, conv2))
    to_float32(model, *conv1.input[1:], *conv2.input[1:])
    cast, source, target = onnx.helper.make_node, conv1.input[0], conv2.output[0]
    there, back = "features.3.mlp/there", "features.3.mlp/back"
    conv1.input[0], conv2.output[0] = "island/in", "island/out"
    model.graph.node.insert(last + 1, cast("Cast", ["island/out"], [target], back, to=TensorProto.FLOAT16))
    model.graph.node.insert(first, cast("Cast", [source], ["island/in"], there, to=TensorProto.FLOAT))


def test_a_kernel_that_is_really_in_float32(fp16: Path, tmp_path: Path) -> None:
    given = edited(fp16, tmp_path / "island.onnx", forget, float32_island)
    line = refusal("trt", "--onnx", given, "--fp16", "--output", tmp_path / "out")
    assert line.startswith("fp16 asked, ")
    assert "features.3.mlp" in line
    assert "fp32" in line
    assert not (tmp_path / "out").exists()


def test_int8(int8: Path, tmp_path: Path) -> None:
    manifest = built("--onnx", int8, "--int8", folder=tmp_path)
    assert manifest["verdict"] == "verified"
    same, cost = questions(manifest).values()
    assert all(str(check["executor"]).startswith(NETWORK) for check in (*same, *cost))
    assert same[0]["against"].startswith("onnxruntime ")
    assert same[0]["comparisons"][0]["relative_rms"] < 5e-3
    assert 1e-3 < cost[0]["comparisons"][0]["relative_rms"] < 5e-2  # INT8 costs more than FP16 does
    assert manifest["dtypes"].startswith("int8 asked, ")
    assert any("on SM75 it computes INT8 convolutions in FP16" in note for note in manifest["notes"])
    (engine,) = tmp_path.glob("*.engine")
    assert engine.name == "nextvit_nano_classify_64_b1_int8_t4.engine"
    found = call("inspect", engine, "--json").json
    assert str(found["computes in"]).startswith("int8 asked, ")
    assert judged(engine)[0] == 0


def test_int8_for_a_gpu_that_has_it_all(int8: Path, tmp_path: Path) -> None:
    manifest = built("--onnx", int8, "--int8", "--gpu", "a10", folder=tmp_path)
    assert manifest["verdict"] == "verified"
    assert not any("computes INT8 convolutions in FP16" in note for note in manifest["notes"])


def wrong_scale(model: onnx.ModelProto) -> None:
    """The scale of the head's input doubled, where it is quantized but not where it is read back."""
    node = [node for node in model.graph.node if node.op_type == "QuantizeLinear"][-1]
    (scale,) = (tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    doubled = numpy_helper.to_array(scale) * 2
    model.graph.initializer.append(numpy_helper.from_array(doubled.astype(doubled.dtype), "doubled"))
    node.input[1] = "doubled"


def test_a_wrong_scale_is_found(int8: Path, tmp_path: Path) -> None:
    """It is the network that the file holds, and too far from the checkpoint."""
    given = edited(int8, tmp_path / "scaled.onnx", wrong_scale)
    ran = call("trt", "--onnx", given, "--int8", "--output", tmp_path / "out", "--json")
    assert ran.status == 3
    assert verdicts(questions(ran.json)) == [{"verified"}, {"failed"}]


def test_a_quantized_file_without_int8(int8: Path, tmp_path: Path) -> None:
    for options in ((), ("--fp16",), ("--fp32", "--gpu", "a10")):
        line = refusal("trt", "--onnx", int8, *options, "--output", tmp_path / "out")
        assert line.startswith("int8.onnx holds ")
        assert line.endswith("Linear, so it is an INT8 graph; ask for --int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"QuantizeBias": True}, "dequantizes an int32 bias, which TensorRT refuses; quantize with QuantizeBias=False"),
        ({"ActivationSymmetric": False}, "has a zero point other than 0, TensorRT takes symmetric quantization only"),
        ({"activation_type": QuantType.QUInt8}, "is uint8, TensorRT takes int8 only; quantize with signed activations"),
    ],
)
def test_what_tensorrt_does_not_take_of_int8(fp16: Path, tmp_path: Path, options: dict[str, object], says: str) -> None:
    given = quantized(fp16, tmp_path / "q.onnx", **options)
    line = refusal("trt", "--onnx", given, "--int8", "--output", tmp_path / "out")
    assert line.startswith("q.onnx: ")
    assert line.endswith(says)
    assert not (tmp_path / "out").exists()
