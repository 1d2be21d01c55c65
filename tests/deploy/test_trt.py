"""``trt``: what it builds, what it says of it, and that its proof is one."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from nextvit_exporters import to_onnx, to_tensorrt
from nextvit_exporters.files import sha256_of
from nextvit_exporters.spec import ExportSpec
from nextvit_exporters.tensorrt import builder
from nextvit_exporters.tensorrt.backends import BACKENDS, load
from nextvit_exporters.tensorrt.kernels import EngineReport, KernelTensor, read_log
from nextvit_exporters.tensorrt.listening import BuildLog
from nextvit_exporters.to_tensorrt import Origin, log_of, onnx_of
from tests.deploy.support import (
    Exported,
    Json,
    Ran,
    call,
    contents,
    one_line,
    refusal,
    remove_relu,
    run,
)
from tests.deploy.support_trt import STEM, OnnxAsBefore, beside, damaged, exported, is_proven, questions

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed; pip install 'nextvit-deploy[trt-rtx]'")
pytestmark = pytest.mark.usefixtures("quick")
RTX = BACKENDS["tensorrt-rtx"]


@pytest.fixture(scope="session")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Another GPU, named as it is on its box, another list of passes, and TensorRT's own settings."""
    settings = "--workspace", "64", "--opt-level", "2", "--backend", "tensorrt-rtx"
    return exported(
        tmp_path_factory.getbasetemp(), "--gpu", "RTX 4090", "--fp16", "--pass-set", "fewest-macs", *settings
    )


@pytest.fixture
def onnx_as_before(engine: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the demo that leave out torch's exporter: all the rest of them is real."""
    monkeypatch.setattr(to_onnx, "build", OnnxAsBefore(onnx_of(engine.path).read_bytes()).build)


def test_both_questions_are_answered_by_what_tensorrt_understood(engine: Exported) -> None:
    assert is_proven(engine.manifest)
    assert {question: checks[0]["mode"] for question, checks in questions(engine.manifest).items()} == {
        "same network": "exact",
        "precision cost": "emulated",
    }
    assert engine.ran.json == engine.manifest
    assert engine.path.name == f"{STEM}.engine"
    assert sorted(engine.path.parent.iterdir()) == sorted(beside(engine.path))


def test_the_manifest_says_what_was_built(engine: Exported) -> None:
    manifest, built = engine.manifest, engine.manifest["built"]
    count = len(built["kernel list"])
    assert manifest["dtypes"].startswith(f"fp16 asked, {count} of {count} computing kernels in fp16")
    assert (manifest["unit"], sum(manifest["ops"].values())) == ("kernels", count)
    assert (built["for"], built["built by"]) == ("SM75", f"tensorrt-rtx {load(RTX).__version__}")
    assert min(built["activation bytes"], built["weight bytes"]) > 1_000_000
    assert manifest["versions"][RTX.distribution] == load(RTX).__version__
    assert "built by tensorrt-rtx for Tesla T4 (SM75), in fp16" in manifest["notes"]
    assert manifest["artifact"]["sha256"] == sha256_of(engine.path)
    assert manifest["spec"]["engine"] == {
        "backend": "tensorrt-rtx",
        "gpu": "t4",
        "batch": "1",
        "height": "64",
        "width": "64",
        "workspace": None,
        "opt_level": None,
        "timing_cache": None,
    }


def test_kernels_are_traced_to_modules(engine: Exported) -> None:
    kernels = engine.manifest["built"]["kernel list"]
    modules = {module for kernel in kernels for module in kernel["modules"]}
    assert {"stem.0.conv", "features.3.mlp.conv1", "features.4.e_mhsa.q", "proj_head.0"} <= modules
    nodes = {node.name for node in onnx.load(str(onnx_of(engine.path))).graph.node}
    layers = {layer for kernel in kernels for layer in kernel["layers"]}
    assert len(layers & nodes) > 0.9 * len(nodes)


def test_the_log_ends_with_what_it_vouches_for(engine: Exported) -> None:
    lines = log_of(engine.path).read_text(encoding="utf-8").splitlines()
    record = Origin.of_line(lines[-1])
    assert record is not None
    assert (record.engine, record.onnx) == (sha256_of(engine.path), sha256_of(onnx_of(engine.path)))
    assert (str(record.precision), record.spec.gpu, record.spec.backend) == ("fp16", "t4", "tensorrt-rtx")


def test_passes_that_hide_attention_from_tensorrt_are_left_out(engine: Exported, unlike: Exported) -> None:
    default, other = ([each["name"] for each in made.manifest["passes"]] for made in (engine, unlike))
    assert "channel-first-attention" not in {*default, *other}
    assert ("merge-average-conv" in default, "average-early" in default) == (True, False)
    assert ("merge-average-conv" in other, "average-early" in other) == (False, True)


def test_another_process_and_folder_give_the_same_bytes(engine: Exported, tmp_path: Path) -> None:
    """As the installed program runs it, with FP16 only meant: it is said aloud."""
    ran = run("trt", "--output", tmp_path / "elsewhere")
    assert (ran.status, ran.err) == (0, "")
    assert "note: no precision given: the engine is built in FP16" in ran.out
    assert "computing kernels in fp16" in ran.out
    assert "verified" in ran.out
    for file in (engine.path, onnx_of(engine.path)):
        assert (tmp_path / "elsewhere" / file.name).read_bytes() == file.read_bytes()


def test_open_batch_and_camera_pixels(open_batch: Exported) -> None:
    manifest = open_batch.manifest
    assert is_proven(manifest)
    assert open_batch.path.stem == "nextvit_nano_classify_64_b1-2-4_fp16_uint8-nhwc_t4"
    assert manifest["spec"]["engine"]["batch"] == "1:2:4"
    for checks in questions(manifest).values():
        assert [check["inputs"] for check in checks] == ["8 of the demo's digits", "noise, batch 1", "noise, batch 4"]
    (read,) = onnx.load(str(onnx_of(open_batch.path))).graph.input
    assert read.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [dim.dim_param or dim.dim_value for dim in read.type.tensor_type.shape.dim] == ["batch", 64, 64, 3]


def test_open_size_and_fp16_outside(tmp_path_factory: pytest.TempPathFactory) -> None:
    made = exported(tmp_path_factory.getbasetemp(), "--fp16", "--io", "fp16", "--size", "64:96:128x96")
    assert is_proven(made.manifest)
    assert made.path.stem == "nextvit_nano_classify_64-96-128x64-96-96_b1_fp16_io-fp16_t4"
    ranges = {axis: made.manifest["spec"]["engine"][axis] for axis in ("height", "width")}
    assert ranges == {"height": "64:96:128", "width": "64:96:96"}
    shapes = ["8 of the demo's digits", "noise, 64x64", "noise, 97x81", "noise, 128x96"]
    for checks in questions(made.manifest).values():
        assert [check["inputs"] for check in checks] == shapes
    graph = onnx.load(str(onnx_of(made.path))).graph
    kinds = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert kinds == {onnx.TensorProto.FLOAT16}


def test_fp32_where_the_gpu_has_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    made = exported(tmp_path_factory.getbasetemp(), "--fp32", "--gpu", "a10")
    assert is_proven(made.manifest, cost=1e-5)
    count = len(made.manifest["built"]["kernel list"])
    assert made.manifest["dtypes"] == (
        f"fp32 asked, {count} of {count} computing kernels in fp32 ({count} kernels in fp32)"
    )
    assert made.manifest["built"]["for"] == "SM86"
    assert made.path.stem == "nextvit_nano_classify_64_b1_fp32_a10"


def test_other_settings_are_in_the_name_or_the_spec(unlike: Exported) -> None:
    assert is_proven(unlike.manifest)
    assert unlike.path.stem == "nextvit_nano_classify_64_b1_fp16_fewest-macs_rtx4090"
    asked = unlike.manifest["spec"]["engine"]
    assert (asked["workspace"], asked["opt_level"], asked["gpu"]) == (64, 2, "rtx4090")
    assert any(note.startswith("--opt-level 2 has no effect with tensorrt-rtx: ") for note in unlike.manifest["notes"])
    assert unlike.manifest["built"]["for"] == "SM89"


def test_a_kernel_in_another_precision_fails_the_command(
    tmp_path: Path, onnx_as_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of all kernels is enough."""
    del onnx_as_before
    names: list[str] = []

    def one_in_float(lines: list[str]) -> EngineReport:
        report = read_log(lines)
        *others, last = report.kernels
        wrong = replace(last, inputs=(KernelTensor("x", (1, 8), "Float"),))
        names.append(last.name)
        return replace(report, kernels=(*others, wrong))

    monkeypatch.setattr(to_tensorrt, "read_log", one_in_float)
    line = refusal("trt", "--fp16", "--output", tmp_path / "out")
    assert line.startswith("fp16 asked, 69 of 70 computing kernels in fp16; the first other one is ")
    assert names[0] in line
    assert line.endswith((" in fp16, fp32", " in fp32"))
    assert list(tmp_path.iterdir()) == []


def test_an_engine_outside_its_tolerance_is_kept_and_marked(
    engine: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = damaged(engine, tmp_path, remove_relu)
    monkeypatch.setattr(to_onnx, "build", OnnxAsBefore(onnx_of(wrong).read_bytes()).build)
    ran = call("trt", "--fp16", "--output", tmp_path / "out", "--json")
    assert ran.status == 3
    assert one_line(ran.err).startswith(f"{STEM}.engine is failed: same network: FAIL logits: relative rms ")
    assert ran.json["verdict"] == "failed"
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_an_export_replaces_all_four(tmp_path: Path, engine: Exported, onnx_as_before: None) -> None:
    del onnx_as_before
    out = tmp_path / "out"
    out.mkdir()
    for file in beside(out / engine.path.name):
        file.write_bytes(b"older")
    (out / "notes.txt").write_bytes(b"mine")
    assert call("trt", "--fp16", "--output", out, "--quiet") == Ran(0, "", "")
    assert contents(out)["notes.txt"] == b"mine"
    assert (out / engine.path.name).read_bytes() == engine.path.read_bytes()
    assert b"older" not in contents(out).values()


def spec_of(engine: Exported) -> ExportSpec:
    return ExportSpec.from_dict(engine.manifest["spec"])


class Rings(list[Any]):
    """A log that sends a signal to this process as TensorRT's thirtieth line arrives."""

    def append(self, entry: object) -> None:
        super().append(entry)
        if len(self) == 30:
            signal.raise_signal(signal.SIGINT)


def test_a_signal_while_tensorrt_logs_is_not_lost(engine: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT swallows what its listeners raise, and would build on."""
    monkeypatch.setattr(builder, "BuildLog", lambda: BuildLog(Rings()))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        builder.build_engine(RTX, load(RTX), onnx_of(engine.path).read_bytes(), spec_of(engine), lambda _: None)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_signal_stops_the_build(engine: Exported) -> None:
    told: list[str] = []

    def on_step(step: str) -> None:
        told.append(step)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        builder.build_engine(RTX, load(RTX), onnx_of(engine.path).read_bytes(), spec_of(engine), on_step)
    assert len(told) == 1


# Signals as a terminal's shell leaves them: a test run in the background, or under nohup, passes on ignored ones.
_AS_FROM_A_SHELL = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
runpy.run_module("nextvit_deploy", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("number", "status", "says"),
    [
        (signal.SIGINT, 130, "interrupted; nothing was written"),
        (signal.SIGTERM, 143, "stopped; nothing was written"),
    ],
)
def test_interrupted_while_tensorrt_builds(
    tmp_path: Path, engine: Exported, number: signal.Signals, status: int, says: str
) -> None:
    """A real process on a real terminal, stopped while it shows a step of TensorRT."""
    screen, terminal = pty.openpty()
    command = "trt", "--fp16", "--onnx", str(onnx_of(engine.path)), "--output", str(tmp_path / "out")
    process = subprocess.Popen(
        [sys.executable, "-c", _AS_FROM_A_SHELL, *command],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(terminal)
    shown = b""
    while b"TensorRT: " not in shown:
        shown += os.read(screen, 4096)
    process.send_signal(number)
    out, _ = process.communicate(timeout=600)
    try:
        while more := os.read(screen, 4096):
            shown += more
    except OSError:  # what Linux says when nobody holds the other end any more
        pass
    os.close(screen)
    assert (process.returncode, out) == (status, b"")
    assert shown.rstrip().endswith(f"nextvit-export: {says}".encode())
    assert b"Exception caught" not in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (("--gpu", "nonsense"), 1, "there is no GPU 'nonsense' in the list; choose one of t4, "),
        (("--gpu", "h100"), 1, "tensorrt-rtx builds nothing for H100; choose one of t4, "),
        (("--fp32",), 1, "tensorrt-rtx can't build fp32 for Tesla T4: "),
        (("--pass-set", "fewest-flops"), 1, "no pass set is called 'fewest-flops'; did you mean 'fewest-"),
        (("--skip-pass", "fold-norm"), 1, "no pass is called 'fold-norm'; did you mean "),
        (("--timing-cache", "t.cache"), 1, "tensorrt-rtx takes no timing cache: it times nothing while it builds"),
        (("--opt-level", "6"), 1, "there is no optimisation level 6; choose 0 to 5"),
        (("--opt-level", "-1"), 1, "there is no optimisation level -1; choose 0 to 5"),
        (("--workspace", "0"), 1, "a workspace of 0 MiB is none; give 1 or more"),
        (("--workspace", "99999999999999999999"), 1, "no GPU has a workspace of 99999999999999999999 MiB; give "),
        (("--io", "fp16", "--input", "float"), 1, "fp16 at input and output needs fp16 inside, and normalized or "),
        (("--io", "fp16", "--fp32", "--gpu", "a10"), 1, "fp16 at input and output needs fp16 inside"),
        (("--backend", "rtx"), 2, "Invalid value for '--backend': "),
        (("--fp16", "--int8"), 2, "Invalid value for the precision: --fp16 and --int8 exclude each other; give one"),
        (("--fp32", "--fp16"), 2, "Invalid value for the precision: --fp16 and --fp32 exclude each other; give one"),
        (("--rounding", "gptq"), 2, "Invalid value for the precision: what INT8 is told needs --int8, and"),
        (("--uint8-nhwc", "--input", "float"), 2, "Invalid value for the input: --uint8-nhwc and --input float "),
    ],
)
def test_what_is_refused(tmp_path: Path, options: tuple[str, ...], status: int, says: str) -> None:
    assert says in refusal("trt", *options, "--output", tmp_path / "out", status=status)
    assert list(tmp_path.iterdir()) == []


def test_a_precision_that_is_not_built_names_alternatives(tmp_path: Path) -> None:
    line = refusal("trt", "--fp32", "--output", tmp_path)
    assert all(each in line for each in ("no float32 matrix products", "--fp16", "another --gpu", "another --backend"))


def test_tensorrt_itself_without_a_gpu(tmp_path: Path) -> None:
    """Either it is not here, or nothing for it to build on is: what to do is said."""
    line = refusal("trt", "--backend", "tensorrt", "--output", tmp_path)
    assert "pip install 'nextvit-deploy[trt]'" in line or "--backend tensorrt-rtx" in line
    assert contents(tmp_path) == {}


def test_quiet_and_demo_are_as_everywhere(engine: Exported) -> None:
    assert call("verify", engine.path, "--quiet") == Ran(0, "", "")
    manifest: Json = engine.manifest
    assert any("the bundled demo" in note for note in manifest["notes"])
    assert not any("no precision given" in note for note in manifest["notes"])
