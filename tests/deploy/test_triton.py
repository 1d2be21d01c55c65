from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextvit_deploy import triton
from nextvit_deploy.tensors import Images
from nextvit_deploy.triton import check_triton_place, write_triton
from nextvit_exporters.engine_spec import EngineSpec, Range
from nextvit_exporters.errors import DeployError, OutputNotWritten, UnsupportedSpec
from nextvit_exporters.spec import ExportSpec, InputKind, Precision
from nextvit_models.preprocessing import Preprocessing
from tests.deploy.support import contents

schema = pytest.importorskip(
    "tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] has the schema that Triton reads its files with"
)
text_format = pytest.importorskip("google.protobuf.text_format", reason="comes with tritonclient[grpc]")

ENGINE = EngineSpec("tensorrt", "t4", Range.of(1), Range.of(64), Range.of(96))
SPEC = ExportSpec("nextvit_nano", 3, "tensorrt", Precision.FP16, 64, 96, 1, 18, Preprocessing(), engine=ENGINE)
SAMPLE = np.random.default_rng(0).normal(size=(4, 3, 64, 96)).astype(np.float32)


@dataclass
class Files:
    engine: Path
    onnx: Path
    repository: Path


@pytest.fixture
def files(tmp_path: Path) -> Files:
    (tmp_path / "x.engine").write_bytes(b"ftrt engine")
    (tmp_path / "x.onnx").write_bytes(b"onnx graph")
    return Files(tmp_path / "x.engine", tmp_path / "x.onnx", tmp_path / "repository")


def parse(text: str) -> Any:
    return text_format.Parse(text, schema.ModelConfig())


def served(files: Files, spec: ExportSpec, sample: Images = SAMPLE, labels: tuple[str, ...] = ()) -> Any:
    write_triton(files.repository, spec, files.engine, files.onnx, labels, sample)
    return parse((files.repository / spec.model / "config.pbtxt").read_text(encoding="utf-8"))


def kind(value: int) -> str:
    name: str = schema.DataType.Name(value)
    return name


def asked(**changes: Any) -> ExportSpec:
    """The static spec with some of the engine's or its own fields changed."""
    engine = {name: value for name, value in changes.items() if name in {"backend", "batch", "height", "width"}}
    own = {name: value for name, value in changes.items() if name not in engine}
    return replace(SPEC, engine=replace(ENGINE, **engine), **own)


def warm(config: Any) -> Any:
    (sample,) = config.model_warmup
    assert list(sample.inputs) == ["image"]
    assert sample.inputs["image"].input_data_file == "image.bin"
    return sample


def test_a_static_engine_is_served_with_its_whole_shape(files: Files) -> None:
    config = served(files, SPEC)
    assert (config.name, config.platform, config.backend) == ("nextvit_nano", "tensorrt_plan", "")
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    (image,), (logits,) = config.input, config.output
    assert (image.name, kind(image.data_type), list(image.dims)) == ("image", "TYPE_FP32", [1, 3, 64, 96])
    assert (logits.name, kind(logits.data_type), list(logits.dims)) == ("logits", "TYPE_FP32", [1, 3])
    assert logits.label_filename == ""
    (group,) = config.instance_group
    assert (group.count, group.Kind.Name(group.kind), list(group.profile)) == (1, "KIND_GPU", ["0"])
    assert (warm(config).batch_size, list(warm(config).inputs["image"].dims)) == (1, [1, 3, 64, 96])
    assert set(contents(files.repository / SPEC.model)) == {"config.pbtxt", "1/model.plan", "warmup/image.bin"}
    assert (files.repository / SPEC.model / "1" / "model.plan").read_bytes() == b"ftrt engine"


def test_a_static_batch_warms_up_with_a_whole_batch(files: Files) -> None:
    config = served(files, asked(batch=Range.of(6)))
    assert (config.max_batch_size, list(config.input[0].dims), list(config.output[0].dims)) == (
        0,
        [6, 3, 64, 96],
        [6, 3],
    )
    raw = (files.repository / SPEC.model / "warmup" / "image.bin").read_bytes()
    expected = np.concatenate([SAMPLE, SAMPLE[-1:], SAMPLE[-1:]])
    assert np.array_equal(np.frombuffer(raw, np.float32).reshape(6, 3, 64, 96), expected)
    assert (warm(config).batch_size, list(warm(config).inputs["image"].dims)) == (1, [6, 3, 64, 96])


def test_a_dynamic_batch_is_formed_by_triton(files: Files) -> None:
    config = served(files, asked(batch=Range(1, 8, 32), dynamic_batch=True))
    assert config.max_batch_size == 32
    assert list(config.dynamic_batching.preferred_batch_size) == [8]
    assert (list(config.input[0].dims), list(config.output[0].dims)) == ([3, 64, 96], [3])
    assert (warm(config).batch_size, list(warm(config).inputs["image"].dims)) == (8, [3, 64, 96])
    assert (files.repository / SPEC.model / "warmup" / "image.bin").read_bytes() == SAMPLE[:1].tobytes()


def test_batches_that_triton_would_send_too_small_are_left_to_the_client(files: Files) -> None:
    config = served(files, asked(batch=Range(4, 8, 16), dynamic_batch=True))
    assert (config.max_batch_size, list(config.input[0].dims), list(config.output[0].dims)) == (
        0,
        [-1, 3, 64, 96],
        [-1, 3],
    )
    assert not config.HasField("dynamic_batching")
    assert list(warm(config).inputs["image"].dims) == [8, 3, 64, 96]


def test_open_sizes_are_minus_one_and_the_warm_up_names_its_own(files: Files) -> None:
    config = served(files, asked(height=Range(32, 64, 128), width=Range(32, 96, 128), dynamic_size=True))
    assert list(config.input[0].dims) == [1, 3, -1, -1]
    assert list(warm(config).inputs["image"].dims) == [1, 3, 64, 96]


def test_raw_pixels_as_cameras_give_them(files: Files) -> None:
    pixels = np.arange(64 * 96 * 3, dtype=np.uint8).reshape(1, 64, 96, 3)
    config = served(files, asked(input=InputKind.UINT8_NHWC), pixels)
    assert (kind(config.input[0].data_type), list(config.input[0].dims)) == ("TYPE_UINT8", [1, 64, 96, 3])
    assert list(warm(config).inputs["image"].dims) == [1, 64, 96, 3]


@pytest.mark.parametrize(
    ("reads", "sample", "expected"),
    [
        (InputKind.NORMALIZED, SAMPLE.astype(np.float16), "TYPE_FP16"),
        (InputKind.FLOAT, SAMPLE, "TYPE_FP32"),
        (InputKind.UINT8, SAMPLE.astype(np.uint8), "TYPE_UINT8"),
    ],
)
def test_fp16_at_the_edges(files: Files, reads: InputKind, sample: Images, expected: str) -> None:
    config = served(files, asked(io=Precision.FP16, input=reads), sample)
    assert (kind(config.input[0].data_type), kind(config.output[0].data_type)) == (expected, "TYPE_FP16")
    assert kind(warm(config).inputs["image"].data_type) == expected


@pytest.mark.parametrize(
    ("changes", "sample"),
    [
        ({}, SAMPLE),
        ({"batch": Range(1, 4, 8)}, SAMPLE),
        ({"batch": Range.of(3)}, SAMPLE),
        ({"io": Precision.FP16}, SAMPLE.astype(np.float16)),
        ({"input": InputKind.UINT8_NHWC}, np.zeros((2, 64, 96, 3), np.uint8)),
        ({"height": Range(32, 64, 128)}, SAMPLE),
    ],
)
def test_the_warm_up_file_is_as_long_as_its_shape_says(files: Files, changes: dict[str, Any], sample: Images) -> None:
    told = warm(served(files, asked(**changes), sample)).inputs["image"]
    size = {"TYPE_FP32": 4, "TYPE_FP16": 2, "TYPE_UINT8": 1}[kind(told.data_type)]
    path = files.repository / SPEC.model / "warmup" / told.input_data_file
    assert path.stat().st_size == int(np.prod(told.dims)) * size


def test_an_engine_that_triton_cannot_load_is_served_by_onnx_runtime(files: Files) -> None:
    spec = asked(backend="tensorrt-rtx", batch=Range(1, 8, 32), dynamic_batch=True)
    config = served(files, spec)
    assert (config.platform, config.backend) == ("", "onnxruntime")
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert dict(accelerator.parameters) == {
        "precision_mode": "FP16",
        "trt_profile_min_shapes": "image:1x3x64x96",
        "trt_profile_opt_shapes": "image:8x3x64x96",
        "trt_profile_max_shapes": "image:32x3x64x96",
    }
    assert list(config.instance_group[0].profile) == []
    model = files.repository / spec.model
    assert (model / "1" / "model.onnx").read_bytes() == b"onnx graph"
    assert not (model / "1" / "model.plan").exists()
    assert "can't load engines of TensorRT-RTX" in (model / "config.pbtxt").read_text(encoding="utf-8")


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_without_fp16_the_files_own_types_decide(files: Files, precision: Precision) -> None:
    config = served(files, asked(backend="tensorrt-rtx", precision=precision))
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert dict(accelerator.parameters) == {}


def test_workspace_and_level_reach_the_accelerator(files: Files) -> None:
    engine = replace(ENGINE, backend="tensorrt-rtx", workspace=2, opt_level=5)
    config = served(files, replace(SPEC, engine=engine))
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.parameters["max_workspace_size_bytes"] == "2097152"
    assert accelerator.parameters["trt_builder_optimization_level"] == "5"


def test_labels_take_one_line_each(files: Files) -> None:
    config = served(files, SPEC, labels=('say "cheese"', "line\nbreak\r\nagain", "Käse 干酪 \\"))
    assert config.output[0].label_filename == "labels.txt"
    written = (files.repository / SPEC.model / "labels.txt").read_bytes().decode()
    assert written.split("\n") == ['say "cheese"', "line break again", "Käse 干酪 \\", ""]


@pytest.mark.parametrize(
    "text", ["plain", 'a "b" \\ c', "two\nlines\r\tend", "Käse 干酪 🧀", "\x00\x01\x7f\x1f7", "\\n", "' # {", "\u2028"]
)
def test_any_text_survives_the_text_format(text: str) -> None:
    assert parse(f"name: {triton.quoted(text)} max_batch_size: 7").name == text


def test_text_that_no_file_can_hold_is_refused(files: Files) -> None:
    with pytest.raises(UnsupportedSpec, match="UTF-8"):
        triton.quoted("\ud800")
    with pytest.raises(UnsupportedSpec, match="UTF-8"):
        served(files, SPEC, labels=("a", "\ud800", "c"))
    assert not files.repository.exists()


@pytest.mark.parametrize(
    ("spec", "sample", "labels", "message"),
    [
        (replace(SPEC, engine=None), SAMPLE, (), "makes no engine"),
        (SPEC, SAMPLE, ("a", "b"), "2 labels don't name 3 classes"),
        (replace(SPEC, model="../up"), SAMPLE, (), "can't name a Triton model"),
        (SPEC, SAMPLE.astype(np.float16), (), r"\(N, 3, H, W\) float32, height 64, width 96"),
        (SPEC, SAMPLE[0], (), "don't fit"),
        (SPEC, SAMPLE[:0], (), "don't fit"),
        (SPEC, SAMPLE[:, :, ::2], (), "don't fit"),
        (asked(input=InputKind.UINT8_NHWC), SAMPLE.astype(np.uint8), (), r"\(N, H, W, 3\) uint8"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    files: Files, spec: ExportSpec, sample: Images, labels: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UnsupportedSpec, match=message):
        served(files, spec, sample, labels)
    assert not files.repository.exists()


def test_a_missing_engine_is_one_line_and_leaves_nothing(files: Files) -> None:
    files.engine.unlink()
    with pytest.raises(DeployError, match="is no file"):
        served(files, SPEC)
    assert not files.repository.exists()


def test_a_failure_half_way_leaves_the_earlier_model(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    served(files, SPEC)
    before = contents(files.repository)

    def fail(images: Images, count: int) -> Images:
        raise RuntimeError(f"no room for {count} of {len(images)}")

    monkeypatch.setattr(triton, "_exactly", fail)
    files.engine.write_bytes(b"ftrt another")
    with pytest.raises(RuntimeError, match="no room"):
        served(files, SPEC)
    assert contents(files.repository) == before
    files.repository = files.repository.parent / "deep" / "er"
    with pytest.raises(RuntimeError, match="no room"):
        served(files, SPEC)
    assert not files.repository.parent.exists()


def test_a_model_replaces_its_own_earlier_folder_and_leaves_its_neighbours(files: Files) -> None:
    served(files, SPEC)
    served(files, replace(SPEC, model="nextvit_small"), labels=("a", "b", "c"))
    files.engine.write_bytes(b"ftrt another")
    served(files, SPEC)
    found = contents(files.repository)
    assert found["nextvit_nano/1/model.plan"] == b"ftrt another"
    assert found["nextvit_small/1/model.plan"] == b"ftrt engine"
    assert sorted(path.name for path in files.repository.iterdir()) == ["nextvit_nano", "nextvit_small"]


@pytest.mark.parametrize("foreign", ["notes.txt", "2/model.plan", "1/model.py", "warmup/more.bin"])
def test_what_was_put_into_a_model_is_not_deleted(files: Files, foreign: str) -> None:
    served(files, SPEC)
    check_triton_place(files.repository, SPEC)
    path = files.repository / SPEC.model / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"mine")
    before = contents(files.repository)
    named = rf"nextvit_nano holds {foreign.removesuffix('/model.plan')} besides the Triton model; move it away or"
    with pytest.raises(OutputNotWritten, match=named):
        served(files, SPEC)
    with pytest.raises(OutputNotWritten, match=named):
        check_triton_place(files.repository, SPEC)
    assert contents(files.repository) == before
    served(files, replace(SPEC, model="nextvit_small"))
    assert path.read_bytes() == b"mine"


def test_a_place_is_found_out_before_anything_is_written(files: Files) -> None:
    check_triton_place(files.repository, SPEC)
    assert not files.repository.exists()
    for wrong, message in (
        (replace(SPEC, model="../up"), "can't name a Triton model"),
        (replace(SPEC, labels=("a", "b")), "2 labels don't name 3 classes"),
        (replace(SPEC, labels=("a", "\ud800", "c")), "UTF-8"),
        (replace(SPEC, engine=None), "makes no engine"),
    ):
        with pytest.raises(UnsupportedSpec, match=message):
            check_triton_place(files.repository, wrong)
    files.repository.mkdir()
    (files.repository / SPEC.model).write_bytes(b"mine")
    with pytest.raises(OutputNotWritten, match="is no Triton repository of this program"):
        check_triton_place(files.repository, SPEC)
    with pytest.raises(OutputNotWritten, match=r"x.engine is there and is no folder"):
        check_triton_place(files.engine, SPEC)
    with pytest.raises(OutputNotWritten, match="can't be written"):
        check_triton_place(files.engine / "deep", SPEC)


@pytest.mark.parametrize("foreign", ["notes.txt", "theirs/config.pbtxt", "nextvit_nano/config.pbtxt"])
def test_a_folder_with_anything_else_is_refused(files: Files, foreign: str) -> None:
    path = files.repository / foreign
    path.parent.mkdir(parents=True)
    path.write_bytes(b'name: "theirs"\n')
    with pytest.raises(OutputNotWritten, match="is no Triton repository of this program"):
        served(files, SPEC)
    assert contents(files.repository) == {foreign: b'name: "theirs"\n'}


def test_a_file_in_the_folders_place_is_refused(files: Files) -> None:
    files.repository.write_bytes(b"mine")
    with pytest.raises(OutputNotWritten, match="is no folder"):
        served(files, SPEC)
    assert files.repository.read_bytes() == b"mine"


def test_an_empty_folder_is_taken(files: Files) -> None:
    files.repository.mkdir()
    assert served(files, SPEC).name == "nextvit_nano"
