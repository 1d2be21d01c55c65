from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from nextvit_exporters import graph as g
from nextvit_exporters import to_onnx
from nextvit_exporters.errors import BuildFailed, UnsupportedSpec
from nextvit_exporters.files import sha256_of
from nextvit_exporters.passes.normalize_input import NormalizeInput
from nextvit_exporters.passes.sets import FEWEST_KERNELS, FEWEST_MACS, ONNX_RUNTIME
from nextvit_exporters.spec import ExportSpec, InputKind, Precision
from tests.exporters.exports import NANO, PROVENANCE, Export, original, probe, relative_rms, rewritten
from tests.exporters.passes_harness import nano, pixels
from tests.exporters.toys import feature_map, wired

FP16 = replace(NANO, precision=Precision.FP16)
UINT8 = replace(FP16, input=InputKind.UINT8)
FLOAT = replace(NANO, input=InputKind.FLOAT)
OPEN = replace(NANO, dynamic_batch=True, dynamic_size=True, batch=1)
OPSET17 = replace(NANO, opset=17)
OPSET20 = replace(FP16, opset=20, consumer="tensorrt-10")
OPSET22 = replace(NANO, opset=22, simplify=False)
UINT8_NHWC = replace(FP16, input=InputKind.UINT8_NHWC)
HALF_IO = replace(FP16, io=Precision.FP16)
TENSORRT_OPEN = replace(OPSET20, dynamic_batch=True, dynamic_size=True, batch=1)
TENSORRT_17 = replace(NANO, opset=17, consumer="tensorrt-8.6")
OWN_HEAD = replace(NANO, model="own head", num_classes=7, labels=tuple("abcdefg"))
SPECS = {
    "fp32": NANO,
    "fp16": FP16,
    "uint8": UINT8,
    "float": FLOAT,
    "open": OPEN,
    "opset 17": OPSET17,
    "opset 20 for TensorRT": OPSET20,
    "opset 22, not simplified": OPSET22,
    "own head": OWN_HEAD,
    "uint8 nhwc": UINT8_NHWC,
    "fp16 at the edges": HALF_IO,
    "open for TensorRT": TENSORRT_OPEN,
    "opset 17 for TensorRT": TENSORRT_17,
}
EVERY = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@EVERY
def test_the_file_is_the_same_network(exported: Export, spec: ExportSpec) -> None:
    file = exported(spec)
    images = probe(replace(spec, batch=2))
    expected = file.expected(images)
    assert relative_rms(expected[:1], expected[1:]) > 0.02  # the images matter
    assert relative_rms(file.run(images), expected) <= to_onnx.SAME_NETWORK[spec.precision].relative_rms


@EVERY
def test_the_precision_costs_what_it_may(exported: Export, spec: ExportSpec) -> None:
    file, images = exported(spec), probe(replace(spec, batch=2))
    executor = to_onnx.executors(spec, file.path)["precision cost"]
    assert executor.mode == ("exact" if spec.precision is Precision.FP32 else "emulated")
    cost = relative_rms(file.run(images, executor.mode), original(spec, images))
    assert cost <= to_onnx.PRECISION_COST[spec.precision].relative_rms
    if spec.precision is Precision.FP16:
        assert cost > 1e-5  # rounding is there


@EVERY
def test_only_what_a_runtime_needs_is_left(exported: Export, spec: ExportSpec) -> None:
    model = exported(spec).proto
    onnx.checker.check_model(model, full_check=True)
    kinds = Counter(node.op_type for node in model.graph.node)
    for gone in ("BatchNormalization", "Identity", "Constant", "Dropout", "Sub" * (spec.input is InputKind.NORMALIZED)):
        assert gone not in kinds
    assert len(model.functions) == 0
    assert kinds["Softmax"] == 3
    assert [(o.domain, o.version) for o in model.opset_import if o.domain == ""] == [("", spec.opset)]
    assert model.ir_version == {17: 8, 18: 8, 20: 9, 22: 10}[spec.opset]
    read = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= read


@EVERY
def test_nodes_are_named_after_modules(exported: Export, spec: ExportSpec) -> None:
    names = [node.name for node in exported(spec).proto.graph.node]
    assert len(set(names)) == len(names)
    assert all(names)
    modules = set(dict(exported(spec).graph.named_modules())) | {"features.4.e_mhsa"}
    wanted = {"stem.0.conv/Conv", "features.1.mhca.group_conv3x3/Conv", "features.4.mlp.conv1/Conv"}
    if spec is not TENSORRT_17:  # there onnx-simplifier makes one product of the three
        attention = "MatMul" if spec in {OPSET20, TENSORRT_OPEN} else "Conv"
        wanted |= {f"features.4.e_mhsa.{part}/{attention}" for part in ("q", "k", "v")}
    wanted |= {"features.4.e_mhsa.proj/Conv"}
    wanted |= {"features.4.e_mhsa/MatMul", "features.4.e_mhsa/Softmax", "avgpool/ReduceMean"}
    assert wanted <= set(names)
    for name in names:
        scope, _, kind = name.rpartition("/")
        assert kind.partition("_")[0].isalpha()
        assert scope in modules or scope == ""
    assert sum("/" not in name for name in names) <= (12 if spec.dynamic_size else 2)


@EVERY
def test_nothing_of_this_machine_is_in_the_file(exported: Export, spec: ExportSpec) -> None:
    data = exported(spec).path.read_bytes()
    for trace in (b"site-packages", b".py", b"Traceback", str(Path.cwd()).encode(), str(Path.home()).encode(), b"/tmp"):
        assert trace not in data
    model = exported(spec).proto
    assert not model.doc_string
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    assert not any(value.doc_string or value.metadata_props for value in (*model.graph.input, *model.graph.output))


@EVERY
def test_the_artefact_is_the_file(exported: Export, spec: ExportSpec) -> None:
    file = exported(spec)
    assert file.artifact.sha256 == sha256_of(file.path)
    assert file.artifact.size == file.path.stat().st_size
    assert sorted(path.name for path in file.path.parent.iterdir()) == ["model.onnx"]
    steps = ["torch.onnx export", "onnx-simplifier", "check and write"]
    assert list(file.steps) == [step for step in steps if spec.simplify or step != "onnx-simplifier"]


@EVERY
def test_inputs_outputs_and_axes(exported: Export, spec: ExportSpec) -> None:
    session = ort.InferenceSession(str(exported(spec).path), providers=["CPUExecutionProvider"])
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, logits.name) == ("image", "logits")
    edge = "tensor(float16)" if spec is HALF_IO else "tensor(float)"
    assert image.type == ("tensor(uint8)" if spec.input.is_uint8 else edge)
    assert logits.type == edge
    shape = ["batch", 3, "height", "width"] if spec.dynamic_size else list(spec.input_shape)
    assert image.shape == shape
    assert logits.shape == [shape[0], spec.num_classes]


@EVERY
def test_what_the_file_says_of_itself(exported: Export, spec: ExportSpec) -> None:
    file = exported(spec)
    model, saved = file.proto, to_onnx.read(file.path)
    entries = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert entries == {
        "class_names": list(spec.labels),
        "preprocessing": spec.preprocessing.as_dict() | {"input": str(spec.input)},
        to_onnx.MANIFEST_KEY: dict(PROVENANCE),
    }
    assert model.producer_name == "nextvit-deploy"
    assert model.graph.name == spec.model
    assert saved.provenance == PROVENANCE
    assert sum(saved.ops.values()) == len(model.graph.node)
    assert next(iter(saved.ops)) == "Conv"
    assert str(spec.precision) in saved.dtypes


@EVERY
def test_the_dtypes_are_those_asked_for(exported: Export, spec: ExportSpec) -> None:
    model = exported(spec).proto
    kinds = {tensor.data_type for tensor in model.graph.initializer if tensor.data_type != onnx.TensorProto.INT64}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    mean = {single} if spec.input.is_uint8 else set()
    assert kinds == (({half} | mean) if spec.precision is Precision.FP16 else {single})
    assert exported(spec).artifact.size < (1.8e6 if spec.precision is Precision.FP16 else 3.6e6)


@pytest.mark.parametrize(
    ("batch", "height", "width"),
    [(1, 64, 64), (3, 64, 64), (1, 65, 97), (2, 33, 47), (1, 96, 64), (1, 64, 128), (2, 101, 75), (1, 32, 32)],
)
def test_open_axes_are_open(exported: Export, batch: int, height: int, width: int) -> None:
    images = pixels(batch, 3, height, width, seed=height * width)
    expected = original(OPEN, images)
    assert relative_rms(exported(OPEN).run(images), expected) <= to_onnx.PRECISION_COST[Precision.FP32].relative_rms


def test_a_static_file_refuses_other_sizes(exported: Export) -> None:
    with pytest.raises(BuildFailed, match="Got invalid dimensions"):
        exported(NANO).run(pixels(2, 3, 96, 64, seed=1))


@pytest.mark.parametrize("spec", [UINT8, FLOAT], ids=["uint8", "float"])
def test_raw_pixels_are_right_at_the_border(exported: Export, spec: ExportSpec) -> None:
    """Black, white and noisy frames, where a mean folded into the bias would show."""
    file = exported(spec)
    for value in (0, 255):
        raw = torch.full((2, 3, 64, 64), float(value), dtype=torch.float64)
        raw[1, :, 1:-1, 1:-1] = 255.0 - value
        mean, std = (
            torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1)
            for v in (file.spec.preprocessing.mean, file.spec.preprocessing.std)
        )
        normalised = (raw / 255.0 - mean) / std
        assert (file.feed(normalised).double() - raw).abs().max() < 1e-4
        mode = "exact" if spec.precision is Precision.FP32 else "emulated"
        cost = relative_rms(file.run(normalised, mode), original(spec, normalised))
        assert cost <= to_onnx.PRECISION_COST[spec.precision].relative_rms


def test_the_input_s_mean_is_subtracted_in_float32(exported: Export) -> None:
    """255 times a mean, 123.675, has no FP16 form: rounded, every pixel would be off by 0.05."""
    model = exported(UINT8).proto
    (sub,) = [node for node in model.graph.node if node.op_type == "Sub"]
    (mean,) = [tensor for tensor in model.graph.initializer if tensor.name in sub.input]
    values = onnx.numpy_helper.to_array(mean)
    assert values.dtype == np.float32
    assert values.ravel() == pytest.approx([255.0 * m for m in NANO.preprocessing.mean], rel=1e-7)


@pytest.mark.full_size
def test_small_at_224_takes_at_most_260_nodes(exported: Export) -> None:
    spec = replace(NANO, model="small", num_classes=100, height=224, width=224, batch=1)
    file, images = exported(spec), probe(spec)
    assert len(file.proto.graph.node) <= 260
    assert relative_rms(file.run(images), original(spec, images)) <= 1e-5


def test_the_same_spec_gives_the_same_bytes(exported: Export, tmp_path: Path) -> None:
    again = to_onnx.build(
        NANO, to_onnx.lower(NANO, rewritten(nano(), NANO)), tmp_path / "again.onnx", PROVENANCE, print
    )
    assert again.sha256 == exported(NANO).artifact.sha256


def test_the_same_bytes_from_any_folder_and_math_library_path(exported: Export, tmp_path: Path) -> None:
    """MKL_CBWR takes other instructions, as another CPU would: folds are made in float64 and rounded once."""
    root = Path(__file__).resolve().parents[2]
    code = "import sys; from pathlib import Path; from tests.exporters.exports import NANO, export\n"
    code += "print(export(NANO, Path(sys.argv[1])).artifact.sha256)"
    paths = os.pathsep.join(str(root / part) for part in (".", "models", "exporters"))
    running = []
    for number, extra in enumerate(({"MKL_CBWR": "COMPATIBLE"}, {"PYTHONHASHSEED": "7"})):
        cwd = tmp_path / str(number)
        cwd.mkdir()
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | extra
        command = [sys.executable, "-c", code, "files"]
        running.append(subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True))
    hashes = [process.communicate(timeout=300)[0].strip() for process in running]
    assert hashes == [exported(NANO).artifact.sha256] * 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"opset": 16}, "opset 16 can't be written; choose 17 to 22"),
        ({"opset": 23}, "opset 23 can't be written; choose 17 to 22"),
        ({"skip": ("fold-everything",)}, "no pass is called 'fold-everything'; the passes are average-early, "),
        ({"labels": ("one", "two")}, "2 labels for 10 classes; give one label per class"),
    ],
)
def test_what_can_t_be_built_is_refused_with_what_can(change: dict[str, object], says: str) -> None:
    with pytest.raises(UnsupportedSpec) as refusal:
        to_onnx.check_spec(replace(NANO, **change))  # type: ignore[arg-type]  # one field each
    assert str(refusal.value).startswith(says)
    assert "\n" not in str(refusal.value)


def test_good_specs_are_not_refused() -> None:
    for spec in SPECS.values():
        to_onnx.check_spec(spec)
    to_onnx.check_spec(replace(NANO, skip=tuple(each.name for each in to_onnx.PASSES), labels=tuple("0123456789")))


def test_passes_follow_the_spec() -> None:
    names = [each.name for each in ONNX_RUNTIME]
    assert [each.name for each in to_onnx.passes_for(NANO)] == names
    skipped = to_onnx.passes_for(replace(NANO, skip=("fold-pre-norm", "average-early")))
    assert [each.name for each in skipped] == [n for n in names if n not in {"fold-pre-norm", "average-early"}]
    assert to_onnx.passes_for(OPSET20) == FEWEST_KERNELS
    assert to_onnx.passes_for(replace(OPSET20, pass_set="fewest-macs")) == FEWEST_MACS  # noqa: S106 - no password
    assert {each.name for each in FEWEST_KERNELS} - {each.name for each in to_onnx.passes_for(TENSORRT_OPEN)} == {
        "average-tokens",
        "merge-average-conv",
    }
    *before, last = to_onnx.passes_for(UINT8)
    assert [each.name for each in before] == names
    assert last == NormalizeInput(NANO.preprocessing.mean, NANO.preprocessing.std, uint8=True)
    assert to_onnx.passes_for(FLOAT)[-1] == replace(last, uint8=False)
    assert to_onnx.passes_for(UINT8_NHWC)[-1] == replace(last, channels_last=True)


@pytest.mark.parametrize("spec", [UINT8, FLOAT], ids=["uint8", "float"])
def test_raw_input_without_normalisation_is_refused(spec: ExportSpec) -> None:
    """The pass may have refused the model; the file would read pixels and treat them as normalised."""
    graph = g.trace(wired(lambda m, x: m.conv(x.relu()), conv=nn.Conv2d(3, 4, 1)))
    with pytest.raises(UnsupportedSpec, match=rf"^normalize-input was refused or rolled back, so {spec.input} input"):
        to_onnx.lower(spec, graph)


def test_an_operation_without_an_onnx_form_is_one_line(tmp_path: Path) -> None:
    graph = g.trace(wired(lambda m, x: torch.linalg.eigvals(m.conv(x)[:, :, :4, :4]).abs(), conv=nn.Conv2d(3, 4, 1)))
    with pytest.raises(BuildFailed, match=r"^torch's ONNX exporter refused the graph: ") as refusal:
        to_onnx.build(NANO, to_onnx.lower(NANO, graph), tmp_path / "model.onnx", {}, print)
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_an_operation_without_an_older_form_is_one_line(tmp_path: Path) -> None:
    graph = g.trace(wired(lambda m, x: nn.functional.mish(m.conv(x)), conv=nn.Conv2d(3, 4, 1)))
    with pytest.raises(BuildFailed, match=r"^the graph can't be written in opset 17: .*Mish.*; choose 18 or more$"):
        to_onnx.build(OPSET17, to_onnx.lower(NANO, graph), tmp_path / "model.onnx", {}, print)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_lowered_is_refused(tmp_path: Path) -> None:
    """Asked for FP16, handed float32: the dtypes are read back before anything is written."""
    graph = g.trace(wired(lambda m, x: m.conv(x), conv=nn.Conv2d(3, 4, 1)))
    with pytest.raises(BuildFailed, match=r"^asked for fp16, but 1 operations are not, first conv/Conv is fp32$"):
        to_onnx.build(FP16, to_onnx.lower(NANO, graph), tmp_path / "model.onnx", {}, print)
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_not_asked_to_train_or_to_print(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    graph = g.trace(wired(lambda m, x: m.conv(x), conv=nn.Conv2d(3, 4, 1)))
    to_onnx.build(NANO, to_onnx.lower(NANO, graph), tmp_path / "model.onnx", {}, lambda _: None)
    assert capsys.readouterr() == ("", "")
    assert feature_map().dtype == graph.get_parameter("conv.weight").dtype  # the float64 graph stays as it was
