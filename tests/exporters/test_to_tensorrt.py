"""The TensorRT target: what lies beside an engine, what it says of itself, and who executes it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nextvit_exporters import graph as g
from nextvit_exporters import targets, to_onnx, to_tensorrt
from nextvit_exporters.cuda.driver import Device, Driver
from nextvit_exporters.engine_spec import EngineSpec, Range
from nextvit_exporters.errors import BuildFailed, NotExecutable, UnsupportedSpec
from nextvit_exporters.executors.tensorrt_device import TensorRTDevice
from nextvit_exporters.executors.tensorrt_network import TensorRTNetwork
from nextvit_exporters.files import sha256_of
from nextvit_exporters.passes.base import run_passes
from nextvit_exporters.passes.sets import FEWEST_KERNELS
from nextvit_exporters.spec import Artifact, ExportSpec, InputKind, Precision
from nextvit_exporters.tensorrt.backends import BACKENDS, load
from tests.exporters.exports import NANO, PROVENANCE, probe, relative_rms
from tests.exporters.passes_harness import make, pixels

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed; pip install 'nextvit-deploy[trt-rtx]'")
SIDE = Range.of(64)
ENGINE = EngineSpec("tensorrt-rtx", "t4", Range.of(2), SIDE, SIDE)
SPEC = replace(NANO, target="tensorrt", precision=Precision.FP16, opset=20, engine=ENGINE)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    graph, records = run_passes(g.trace(make("nano")), to_tensorrt.passes_for(SPEC), [pixels(2, 3, 64, 64, seed=9)])
    assert all(record.certified for record in records)
    path = tmp_path_factory.mktemp("engine") / "x.engine"
    return to_tensorrt.build(SPEC, to_tensorrt.lower(SPEC, graph), path, PROVENANCE, lambda _: None)


@pytest.fixture
def engine(built: Artifact, tmp_path: Path) -> Path:
    """A copy with its ONNX file and log, free to be damaged."""
    for path in built.path.parent.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path / "x.engine"


def names(executors: Mapping[str, object]) -> list[str]:
    return list(executors)


def test_three_files_belong_together(engine: Path, built: Artifact) -> None:
    assert sorted(path.name for path in engine.parent.iterdir()) == ["x.engine", "x.engine.log", "x.onnx"]
    last = to_tensorrt.log_of(engine).read_text("utf-8").splitlines()[-1]
    record = to_tensorrt.Origin.of_line(last)
    assert record is not None
    assert record == to_tensorrt.Origin(built.sha256, sha256_of(engine.with_suffix(".onnx")), Precision.FP16, ENGINE)
    assert to_tensorrt.source(engine) == engine.with_suffix(".onnx")


def test_what_it_says_of_itself(engine: Path) -> None:
    saved = to_tensorrt.read(engine)
    assert saved.provenance == PROVENANCE
    assert saved.unit == "kernels"
    count = sum(saved.ops.values())
    assert saved.dtypes == f"fp16 asked, {count} of {count} computing kernels in fp16 ({count} kernels in fp16)"
    assert saved.facts["for"] == "SM75"
    listed = saved.facts["kernel list"]
    assert isinstance(listed, list)
    assert len(listed) == count
    assert any("features.4.e_mhsa" in kernel["modules"] for kernel in listed)
    assert any("features.4.e_mhsa/Softmax" in kernel["layers"] for kernel in listed)


def test_the_header_alone_is_something(engine: Path) -> None:
    to_tensorrt.log_of(engine).unlink()
    saved = to_tensorrt.read(engine)
    assert saved.dtypes == "not known: x.engine.log is not beside it"
    assert (saved.provenance, dict(saved.ops)) == (None, {})
    assert saved.facts["built by"] == f"tensorrt-rtx {load(BACKENDS['tensorrt-rtx']).__version__}"


def cut_log(engine: Path) -> None:
    log = to_tensorrt.log_of(engine)
    log.write_text("\n".join(log.read_text("utf-8").splitlines()[:-1]), "utf-8")


def remove_onnx(engine: Path) -> None:
    engine.with_suffix(".onnx").unlink()


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_log, remove_onnx, lambda engine: to_tensorrt.log_of(engine).unlink()])
def test_without_its_company_it_cannot_be_executed(engine: Path, damage: object) -> None:
    damage(engine)  # type: ignore[operator]  # a table of functions
    with pytest.raises(NotExecutable, match=r"x.onnx and x.engine.log are not both beside x.engine; export it again"):
        to_tensorrt.executors(SPEC, engine)


@pytest.mark.parametrize("name", ["x.engine", "x.onnx"])
def test_files_of_another_engine_are_told(engine: Path, name: str) -> None:
    change(engine.with_name(name))
    with pytest.raises(BuildFailed, match=rf"{name} is not the file that x.engine.log tells of; export it again"):
        to_tensorrt.executors(SPEC, engine)
    if name == "x.onnx":
        assert to_tensorrt.read(engine).provenance is None
    else:
        assert to_tensorrt.read(engine).dtypes == "not known: x.engine.log tells of another engine"


def test_both_questions_go_to_the_parsed_network(engine: Path) -> None:
    found = to_tensorrt.executors(SPEC, engine)
    assert {question: executor.mode for question, executor in found.items()} == {
        targets.SAME_NETWORK: "exact",
        targets.PRECISION_COST: "emulated",
    }
    assert all(isinstance(executor, TensorRTNetwork) for executor in found.values())
    single = to_tensorrt.executors(replace(SPEC, precision=Precision.FP32), engine)
    assert [executor.mode for executor in single.values()] == ["exact", "exact"]
    quantized = to_tensorrt.executors(replace(SPEC, precision=Precision.INT8), engine)
    assert [executor.mode for executor in quantized.values()] == ["unrounded", "emulated"]


@pytest.mark.parametrize(
    ("device", "here"),
    [(Device("Tesla T4", (7, 5)), True), (Device("NVIDIA A10", (8, 6)), False)],
)
def test_beside_its_own_gpu_the_engine_runs_too(
    engine: Path, monkeypatch: pytest.MonkeyPatch, device: Device, *, here: bool
) -> None:
    monkeypatch.setattr(to_tensorrt, "probe_driver", lambda: Driver((13, 0), (device,)))
    found = to_tensorrt.executors(SPEC, engine)
    assert (targets.ON_DEVICE in found) is here
    assert isinstance(found.get(targets.ON_DEVICE), TensorRTDevice) is here
    assert targets.ON_DEVICE not in to_tensorrt.executors(SPEC, engine.with_suffix(".onnx"))


def test_another_tensorrt_than_its_own_does_not_run_it(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_tensorrt, "probe_driver", lambda: Driver((13, 0), (Device("Tesla T4", (7, 5)),)))
    data = bytearray(engine.read_bytes())
    data[25] += 1
    engine.write_bytes(data)
    log = to_tensorrt.log_of(engine)
    *lines, last = log.read_text("utf-8").splitlines()
    record = to_tensorrt.Origin.of_line(last)
    assert record is not None
    log.write_text("\n".join([*lines, replace(record, engine=sha256_of(engine)).line(), ""]), "utf-8")
    assert targets.ON_DEVICE not in to_tensorrt.executors(SPEC, engine)
    (note,) = to_tensorrt.remarks(engine)
    assert note.startswith("not executed on the GPU here: x.engine was built by tensorrt-rtx 1.8")


def test_the_exact_answer_is_pytorch_s(engine: Path) -> None:
    graph, _ = run_passes(g.trace(make("nano")), to_tensorrt.passes_for(SPEC), [pixels(2, 3, 64, 64, seed=9)])
    images = probe(SPEC)
    (expected,) = g.execute(to_tensorrt.reference(SPEC, graph), images.float())
    with to_tensorrt.executors(SPEC, engine)[targets.SAME_NETWORK] as executor:
        actual = executor.run({"image": images.float().numpy()})["logits"]
    wanted = np.asarray(expected.numpy(), np.float32)
    assert (
        relative_rms(np.asarray(actual, np.float32), wanted)
        <= to_tensorrt.SAME_NETWORK[Precision.FP16].relative_rms / 5
    )


def test_a_record_of_another_target_is_adopted(engine: Path) -> None:
    """An ONNX file that the onnx command wrote, built with trt --onnx: backend and GPU are in the engine's header."""
    assert to_tensorrt.adopt(replace(SPEC, target="onnx", engine=None), engine) == SPEC
    other = replace(ENGINE, gpu="a10", batch=Range(1, 4, 8))
    assert to_tensorrt.adopt(replace(SPEC, engine=other, batch=4, precision=Precision.FP32), engine) == SPEC
    assert to_onnx.adopt(SPEC, engine) == replace(SPEC, target="onnx", engine=None)


@pytest.mark.parametrize(
    "line", ["", "nextvit-deploy built", "nextvit-deploy built {}", 'nextvit-deploy built {"engine": 1}', "built by me"]
)
def test_a_record_that_is_none(line: str) -> None:
    assert to_tensorrt.Origin.of_line(line) is None


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (replace(SPEC, engine=None), "asks for no engine"),
        (replace(SPEC, precision=Precision.FP32), "can't build fp32 for Tesla T4"),
        (
            replace(SPEC, pass_set="fewest"),  # noqa: S106 - no password
            "there is no pass set 'fewest'; choose one of fewest-kernels, fewest-macs",
        ),
        (replace(SPEC, skip=("fold-everything",)), "no pass is called 'fold-everything'"),
        (replace(SPEC, engine=replace(ENGINE, gpu="h100")), "builds nothing for H100; choose one of t4, "),
        (replace(SPEC, engine=replace(ENGINE, timing_cache=Path("t"))), "takes no timing cache: it times nothing"),
        (replace(SPEC, engine=replace(ENGINE, height=Range(16, 64, 64))), "16x64 is too small; start the range at 32"),
        (replace(SPEC, io=Precision.FP16, input=InputKind.FLOAT), "needs fp16 inside, and normalized or uint8 input"),
    ],
)
def test_what_cannot_be_built_is_refused_with_what_can(spec: ExportSpec, says: str) -> None:
    to_tensorrt.check_spec(SPEC)
    with pytest.raises(UnsupportedSpec) as refusal:
        to_tensorrt.check_spec(spec)
    assert says in str(refusal.value)


def test_int8_is_not_lowered_from_a_checkpoint() -> None:
    with pytest.raises(UnsupportedSpec, match=r"^INT8 needs a calibration; give images with --calibration DIR$"):
        to_tensorrt.lower(replace(SPEC, precision=Precision.INT8), g.trace(make("nano")))


def test_passes_follow_the_spec() -> None:
    assert to_tensorrt.passes_for(SPEC) == FEWEST_KERNELS
    ranged = [each.name for each in to_tensorrt.passes_for(replace(SPEC, dynamic_size=True))]
    assert {"average-tokens", "merge-average-conv"}.isdisjoint(ranged)
    without = to_tensorrt.passes_for(replace(SPEC, skip=("drop-key-bias",)))
    assert [each.name for each in without] == [each.name for each in FEWEST_KERNELS if each.name != "drop-key-bias"]
    assert to_tensorrt.passes_for(replace(SPEC, input=InputKind.UINT8_NHWC))[-1].name == "normalize-input"
    assert "channel-first-attention" not in {each.name for each in to_tensorrt.PASSES}
