"""INT8 as a user asks for it: ONNX files and engines with what is remembered beside them, verified now and again."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import onnx
import pytest
import torch

from nextvit_deploy import calibrate, quantization
from nextvit_deploy.cache import VARIABLE
from nextvit_deploy.data import Pictures
from nextvit_deploy.quantization import calibration_of
from nextvit_exporters.quantize.calibration import Calibration
from nextvit_exporters.quantize.observe import Observer
from nextvit_exporters.to_tensorrt import onnx_of
from tests.deploy.support import Exported, call, contents, judged, one_line, refusal, run, strict_json, tamper, verdicts
from tests.deploy.support_int8 import (
    FEW,
    beside,
    copied,
    exported,
    is_proven,
    needs_tensorrt,
    nudge_weight,
    parted,
    pictures_of,
    questions,
    stretch_step,
)
from tests.deploy.support_trt import signed

STEM: Final = "nextvit_nano_classify_64_b1_int8"
FOR_TENSORRT: Final = ("--int8", "--for", "tensorrt-10", *FEW)
SAID: Final = "no --calibration given: calibrated on pictures of the demo that nothing is judged on"
Fault = Callable[[onnx.ModelProto], None]
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(autouse=True)
def cache(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all that is made once, and none of the user's."""
    monkeypatch.setenv(VARIABLE, str(base / "int8-cache"))


@pytest.fixture
def plain(base: Path, cache: None) -> Exported:
    """The demo for anybody, with float32 beside INT8."""
    del cache
    return exported(base, "onnx", "--int8", *FEW)


@pytest.fixture
def paired(base: Path, cache: None) -> Exported:
    """The demo for TensorRT, with FP16 beside INT8."""
    del cache
    return exported(base, "onnx", *FOR_TENSORRT)


@pytest.fixture(scope="session")
def engine(base: Path) -> Exported:
    """The demo as an engine, as the installed program builds it; in a process of its own, with a cache of its own."""
    folder = base / "int8-engine"
    ran = run("trt", "--int8", *FEW, "--output", folder, **{VARIABLE: str(base / "engine-cache")})
    assert ran.status == 0, ran
    (path,) = folder.glob("*.engine")
    return Exported(path, ran)


def test_a_file_for_anybody(plain: Exported) -> None:
    manifest, found = plain.manifest, Calibration.load(calibration_of(plain.path))
    assert is_proven(manifest)
    assert plain.path.name == f"{STEM}.onnx"
    assert set(contents(plain.path.parent)) == {path.name for path in beside(plain.path)}
    asked = manifest["spec"]["quantize"]
    assert (asked["rest"], asked["method"], asked["rounding"], asked["keep"]) == ("fp32", "mse", "nearest", [])
    assert (asked["size"], asked["images"], asked["calibration"]) == (16, found.images, found.digest)
    assert (found.count, found.method, found.codes) == (16, "mse", {})
    assert manifest["spec"]["opset"] >= 19, "what engines are built from"
    assert "precision_plan" not in manifest
    assert manifest["dtypes"].startswith("52 of 59 convolutions and products in int8")
    notes = manifest["notes"]
    assert SAID in notes
    assert "calibrated on 16 of 360 images in images" in notes
    assert "calibrated on 16 images; 128 are recommended" in notes
    (convergence,) = [note for note in notes if note.startswith("scales still move by up to ")]
    assert convergence.endswith("% over the last 4 of 16 images; give more")
    for note in notes:
        assert f"note: {note}\n" in plain.ran.out
    assert plain.ran.err == ""


@pytest.mark.parametrize(
    ("options", "rest", "asked"),
    [
        (FOR_TENSORRT, "fp16", {"method": "mse", "rounding": "nearest"}),
        (
            ("--int8", *FEW, "--rounding", "gptq", "--method", "percentile", "--dynamic-batch"),
            "fp32",
            {"method": "percentile", "rounding": "gptq", "correct_bias": True},
        ),
        ((*FOR_TENSORRT, "--method", "entropy", "--input", "uint8"), "fp16", {"method": "entropy", "equalize": True}),
        (
            ("--int8", *FEW, "--method", "minmax", "--no-equalize", "--no-correct-bias", "--batch", "2"),
            "fp32",
            {"method": "minmax", "equalize": False, "correct_bias": False},
        ),
    ],
    ids=["for-tensorrt", "gptq-percentile-open-batch", "entropy-uint8", "minmax-plain-batch"],
)
def test_what_is_asked_for_is_done_and_verified_again(
    base: Path, options: tuple[str, ...], rest: str, asked: dict[str, object]
) -> None:
    made = exported(base, "onnx", *options)
    manifest, found = made.manifest, Calibration.load(calibration_of(made.path))
    assert is_proven(manifest)
    quantize = manifest["spec"]["quantize"]
    assert quantize == quantize | asked | {"rest": rest, "calibration": found.digest}
    assert (found.method, bool(found.codes)) == (quantize["method"], quantize["rounding"] == "gptq")
    equalized = [each["rewrites"] for each in manifest["passes"] if each["name"] == "equalize-channels"]
    assert equalized == ([21] if quantize["equalize"] else [])
    inputs = {check["inputs"] for check in manifest["checks"]}
    assert any(each.endswith("batch 3") for each in inputs) == manifest["spec"]["dynamic_batch"]
    status, checks, _ = judged(made.path)
    assert (status, verdicts(checks)) == (0, [{"verified"}, {"verified"}])
    assert [check["comparisons"] for group in checks.values() for check in group] == [
        check["comparisons"] for group in questions(manifest).values() for check in group
    ]


def test_every_method_finds_steps_of_its_own(base: Path, plain: Exported) -> None:
    others = (
        ("--int8", *FEW, "--rounding", "gptq", "--method", "percentile", "--dynamic-batch"),
        ("--int8", *FEW, "--method", "minmax", "--no-equalize", "--no-correct-bias", "--batch", "2"),
    )
    made = [plain, *(exported(base, "onnx", *options) for options in others)]
    steps = {each.manifest["spec"]["quantize"]["method"]: Calibration.load(calibration_of(each.path)) for each in made}
    assert set(steps) == {"mse", "percentile", "minmax"}
    mse, percentile = (sum(steps[name].steps.values()) for name in ("mse", "percentile"))
    assert mse != percentile


@needs_tensorrt
def test_an_engine_with_all_that_is_beside_it(engine: Exported, paired: Exported) -> None:
    manifest, found = engine.manifest, Calibration.load(calibration_of(engine.path))
    assert is_proven(manifest)
    assert engine.path.name == f"{STEM}_t4.engine"
    assert set(contents(engine.path.parent)) == {path.name for path in beside(engine.path)}
    assert manifest["spec"]["quantize"]["calibration"] == found.digest
    assert SAID in manifest["notes"]
    estimate = manifest["built"]["int8"]
    assert estimate["basis"] == "estimate"
    assert estimate["sentence"].endswith("(an estimate, never executed on a GPU)")
    assert f"INT8: {estimate['sentence']}" in engine.ran.out
    assert f"note: {SAID}\n" in engine.ran.out
    assert found.digest == Calibration.load(calibration_of(paired.path)).digest, "one graph, one calibration"


@needs_tensorrt
def test_another_process_writes_the_same_bytes(
    engine: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    assert call("trt", "--int8", *FEW, "--output", tmp_path / "out", "-q").err == ""
    again = tmp_path / "out" / engine.path.name
    for file, other in zip(beside(engine.path), beside(again), strict=True):
        if file.suffix in {".engine", ".onnx", ".safetensors"}:
            assert file.read_bytes() == other.read_bytes(), file.name


@needs_tensorrt
def test_a_saved_engine_is_verified_with_what_it_was_made_from(engine: Exported, tmp_path: Path) -> None:
    status, checks, _ = judged(copied(engine, tmp_path))
    assert (status, verdicts(checks)) == (0, [{"verified"}, {"verified"}])
    gone = calibration_of(tmp_path / engine.path.name)
    gone.unlink()
    status, checks, notes = judged(tmp_path / engine.path.name)
    assert (status, verdicts(checks)[1]) == (4, {"verified"})
    assert f"{gone.name} is not beside {onnx_of(engine.path).name}; bring it along, or export again" in notes


@needs_tensorrt
@pytest.mark.parametrize("fault", [nudge_weight, stretch_step])
def test_a_damaged_engine_fails(engine: Exported, tmp_path: Path, fault: Fault) -> None:
    path = copied(engine, tmp_path)
    tamper(onnx_of(path), fault)
    status, checks, _ = judged(signed(path))
    assert (status, verdicts(checks)[0]) == (3, {"failed"})


@pytest.mark.parametrize("fault", [nudge_weight, stretch_step])
def test_a_damaged_file_fails(paired: Exported, tmp_path: Path, fault: Fault) -> None:
    status, checks, _ = judged(tamper(copied(paired, tmp_path), fault))
    assert (status, verdicts(checks)[0]) == (3, {"failed"})


def test_the_calibration_of_another_file(plain: Exported, base: Path, tmp_path: Path) -> None:
    other = exported(base, "onnx", "--int8", *FEW, "--rounding", "gptq", "--method", "percentile", "--dynamic-batch")
    path = copied(plain, tmp_path)
    shutil.copy(calibration_of(other.path), calibration_of(path))
    status, checks, notes = judged(path)
    assert (status, verdicts(checks)) == (4, [{"not verified"}, {"verified"}])
    assert f"{calibration_of(path).name} is not what {path.name} was made from; export again" in notes
    ran = call("verify", path, "-q")
    assert one_line(ran.err).startswith(f"{path.name} is not verified: ")
    calibration_of(path).write_bytes(b"torn")
    status, _, notes = judged(path)
    assert status == 4
    assert any(note.startswith(f"{calibration_of(path)} ") for note in notes)


@needs_tensorrt
def test_inspect_tells_of_int8(plain: Exported, engine: Exported) -> None:
    told = call("inspect", plain.path, "--json").json
    assert "convolutions and products in int8" in told["computes in"]
    assert told["spec"] == plain.manifest["spec"]
    told = call("inspect", engine.path, "--json").json
    assert told["computes in"].startswith("int8 asked, ")
    assert "kernels in int8" in told["computes in"]
    assert told["int8"]["sentence"] == engine.manifest["built"]["int8"]["sentence"]


@needs_tensorrt
def test_an_engine_from_a_file_of_ours(paired: Exported, tmp_path: Path) -> None:
    ran = call("trt", "--int8", "--onnx", paired.path, "--output", tmp_path, "--json")
    assert (ran.status, ran.err) == (0, ""), ran
    assert is_proven(ran.json)
    (path,) = tmp_path.glob("*.engine")
    assert set(contents(tmp_path)) == {each.name for each in beside(path)}
    assert calibration_of(path).read_bytes() == calibration_of(paired.path).read_bytes()
    assert questions(ran.json)["same network"][0]["against"].startswith("PyTorch")
    status, checks, _ = judged(path)
    assert (status, verdicts(checks)) == (0, [{"verified"}, {"verified"}])


@needs_tensorrt
def test_no_engine_from_a_file_with_float32_beside_int8(plain: Exported, tmp_path: Path) -> None:
    line = refusal("trt", "--int8", "--onnx", plain.path, "--output", tmp_path / "out")
    assert line.startswith("the file computes in float32 beside INT8, which can't be built here; export it")
    assert not (tmp_path / "out").exists()


@needs_tensorrt
def test_a_kit_with_open_batch_raw_pixels_and_half_at_the_ends(tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    options = "--batch", "1:2:4", "--input", "uint8", "--io", "fp16", "--kit", kit
    ran = call("trt", "--int8", *FEW, *options, "--output", tmp_path / "out", "--json")
    assert (ran.status, ran.err) == (0, ""), ran
    assert is_proven(ran.json)
    (path,) = (tmp_path / "out").glob("*.engine")
    assert (kit / "model.onnx").read_bytes() == onnx_of(path).read_bytes()
    manifest = strict_json((kit / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["spec"] == ran.json["spec"]
    assert {check["inputs"].split(", ")[-1] for check in manifest["checks"]} >= {"batch 1", "batch 4"}
    model = onnx.load(onnx_of(path))
    kinds = [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)]
    assert kinds == [onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT16]


def test_interrupted_while_calibrating(plain: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was seen by then is not seen again, nothing else is left, and the file is the one it would have been."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(calibrate, "SAVE_EVERY", 4)
    own, seen = Observer.see, []

    def see(self: Observer, images: torch.Tensor) -> None:
        own(self, images)
        seen.append(len(images))
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Observer, "see", see)
    out, handler = tmp_path / "out", signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        line = refusal("onnx", "--int8", *FEW, "--output", out, status=130)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert line == "interrupted; nothing was written"
    assert not out.exists()
    ran = call("onnx", "--int8", *FEW, "--output", out, "--json")
    assert ran.status == 0, ran
    assert seen[:3] == [4, 4, 4]
    assert 4 <= sum(seen[3:]) < 16
    assert f"calibration taken up again after {16 - sum(seen[3:])} of 16 images" in ran.json["notes"]
    assert (out / plain.path.name).read_bytes() == plain.path.read_bytes()
    assert calibration_of(out / plain.path.name).read_bytes() == calibration_of(plain.path).read_bytes()


def test_a_budget_keeps_blocks_and_a_plan_keeps_the_same(base: Path, tmp_path: Path) -> None:
    _, _, few = parted(base)
    options = "--int8", *FEW, "--images", few
    budgeted = exported(base, "onnx", *options, "--accuracy-budget", "44dB")
    manifest = budgeted.manifest
    assert is_proven(manifest)
    plan = manifest["precision_plan"]
    kept = [each["block"] for each in plan["blocks"] if each["precision"] != "int8"]
    assert 1 <= len(kept) < len(plan["blocks"])
    assert sorted(manifest["spec"]["quantize"]["keep"]) == sorted(kept)
    assert plan["budget"] == "44dB"
    assert plan["sqnr_db"] >= 44.0
    assert (plan["count"], plan["images"]) == (20, pictures_of(few).fingerprint)
    chosen = budgeted.path.with_name(f"{budgeted.path.stem}.plan.svg")
    assert chosen.read_text(encoding="utf-8").startswith("<svg ")
    assert all(block in chosen.read_text(encoding="utf-8") for block in kept)

    again = call("onnx", *options, "--precision-plan", f"{budgeted.path}.json", "--output", tmp_path / "out", "--json")
    assert again.status == 0, again
    mine, theirs = contents(budgeted.path.parent), contents(tmp_path / "out")
    assert set(mine) == set(theirs)
    assert {name for name in mine if mine[name] != theirs[name]} == {f"{budgeted.path.name}.json"}, "the times in it"
    assert again.json["precision_plan"] == plan
    status, checks, _ = judged(budgeted.path)
    assert (status, verdicts(checks)) == (0, [{"verified"}, {"verified"}])


def test_half_a_point_of_the_demo_keeps_nothing(
    plain: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on pictures of the demo that are not calibrated on, and the same file as without a plan."""
    parts: list[Pictures] = []

    def fewer(pictures: Pictures, count: int) -> tuple[Pictures, Pictures]:
        known, others = calibrate.split(pictures, count)
        parts[:] = known, replace(others, paths=others.paths[:20])  # all of them take ten seconds
        return parts[0], parts[1]

    monkeypatch.setattr(quantization, "split", fewer)
    out = tmp_path / "out"
    ran = call("onnx", "--int8", *FEW, "--accuracy-budget", "0.5", "--output", out, "--json")
    assert (ran.status, ran.err) == (0, ""), ran
    known, others = parts
    assert not set(known.paths) & set(others.paths)
    plan = ran.json["precision_plan"]
    assert (plan["budget"], plan["count"], plan["images"]) == ("0.5pt", 20, others.fingerprint)
    assert (plan["float_top1"], plan["top1"]) == (1.0, 1.0)
    assert {each["precision"] for each in plan["blocks"]} == {"int8"}
    assert ran.json["spec"]["quantize"]["keep"] == []
    assert (out / plain.path.name).read_bytes() == plain.path.read_bytes()
