"""Where a saved file comes from: its own record, other weights, or another tool altogether."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from nextvit_exporters import targets, to_onnx
from nextvit_models.checkpoint import load_checkpoint, save_safetensors
from nextvit_models.demo import DEMO_CHECKPOINT
from tests.deploy.support import (
    Exported,
    Json,
    call,
    forget,
    judged,
    one_line,
    refusal,
    rename,
    tamper,
    verdicts,
    weights,
)

Fault = Callable[[onnx.ModelProto], None]
pytestmark = pytest.mark.usefixtures("quick")


def recorded(path: Path, change: Callable[[Json], None]) -> None:
    """Change the manifest inside the file."""

    def fault(model: onnx.ModelProto) -> None:
        entry = next(entry for entry in model.metadata_props if entry.key == to_onnx.MANIFEST_KEY)
        values = json.loads(entry.value)
        change(values)
        entry.value = json.dumps(values)

    tamper(path, fault)


def test_other_weights_of_the_same_variant(demo: Exported, tmp_path: Path) -> None:
    path = demo.copied(tmp_path)
    status, checks, notes = judged(path, "--checkpoint", weights(tmp_path / "other.pth", 10, seed=3))
    assert status == 3
    assert verdicts(checks) == [{"failed"}, {"failed"}]
    assert "the file was made from other weights than other.pth; give its own checkpoint with --checkpoint" in notes
    assert "the file records other preprocessing or class names than other.pth" in notes
    assert not any("has changed" in note for note in notes)


def test_other_class_names_or_preprocessing_are_noted(demo: Exported, tmp_path: Path) -> None:
    """The same weights, so the numbers hold; but whoever reads the file's names reads others than the checkpoint's."""
    loaded = load_checkpoint(DEMO_CHECKPOINT)
    note = "the file records other preprocessing or class names than w.safetensors"
    for other in (
        replace(loaded, labels=loaded.labels[::-1]),
        replace(loaded, preprocessing=replace(loaded.preprocessing, crop_pct=0.9)),
    ):
        save_safetensors(other, tmp_path / "w.safetensors")
        status, _, notes = judged(demo.path, "--checkpoint", tmp_path / "w.safetensors")
        assert status == 0
        assert note in notes
    save_safetensors(loaded, tmp_path / "w.safetensors")
    assert note not in judged(demo.path, "--checkpoint", tmp_path / "w.safetensors")[2]


@pytest.mark.parametrize(("field", "value"), [("model", "nextvit_large"), ("num_classes", 1000)])
def test_another_model(demo: Exported, tmp_path: Path, field: str, value: object) -> None:
    path = demo.copied(tmp_path)
    recorded(path, lambda values: values["spec"].update({field: value}))
    line = refusal("verify", path)
    assert line.startswith(f"{path.name} was made from a ")
    assert line.endswith(f"{DEMO_CHECKPOINT.name} is a nextvit_nano with 10; give its own --checkpoint")


def test_another_number_of_classes(demo: Exported, tmp_path: Path) -> None:
    line = refusal("verify", demo.path, "--checkpoint", weights(tmp_path / "w.pth", 4, seed=1))
    assert line.endswith("w.pth is a nextvit_nano with 4; give its own --checkpoint")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda values: values.pop("spec"), "holds no spec"),
        (lambda values: values["spec"].update(precision="fp4"), "not one this version reads"),
        (lambda values: values["spec"].update(planet="mars"), "not one this version reads"),
        (lambda values: values["spec"].update(height="tall"), "not one this version reads"),
        (lambda values: values["spec"].update(preprocessing={"mean": "grey"}), "unusable preprocessing"),
        (lambda values: values["spec"].update(target="abacus"), "no target 'abacus'"),
    ],
)
def test_a_damaged_record_is_one_line(
    demo: Exported, tmp_path: Path, change: Callable[[Json], None], says: str
) -> None:
    path = demo.copied(tmp_path)
    recorded(path, change)
    assert says in refusal("verify", path)


def test_a_record_that_claims_another_precision_fails(demo: Exported, tmp_path: Path) -> None:
    """FP16's wider tolerance can't be had by claiming it: the constants are not FP16's."""
    path = demo.copied(tmp_path)
    recorded(path, lambda values: values["spec"].update(precision="fp16"))
    _, checks, _ = judged(path)
    assert verdicts(checks)[0] == {"failed"}


def test_other_passes_are_noted(demo: Exported, tmp_path: Path) -> None:
    path = demo.copied(tmp_path)
    recorded(path, lambda values: values["passes"].pop("average-early"))
    assert any("other passes than this version" in note for note in judged(path)[2])


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo through torch's exporter alone: no passes, no record, other names, the batch open."""
    path = tmp_path_factory.mktemp("foreign") / "foreign.onnx"
    batch = torch.export.Dim("n")
    with to_onnx._quiet():
        program = torch.onnx.export(
            load_checkpoint(DEMO_CHECKPOINT).model,
            (torch.ones(2, 3, 64, 64),),
            dynamo=True,
            verbose=False,
            input_names=["pixels"],
            output_names=["scores"],
            dynamic_shapes=({0: batch},),
        )
    assert program is not None
    program.save(str(path))
    return path


def test_a_foreign_file_is_not_verified_but_measured(foreign: Path) -> None:
    status, checks, _ = judged(foreign)
    assert status == 4
    same, *others = checks[targets.SAME_NETWORK]
    assert (same["verdict"], same["comparisons"], others) == ("not verified", [], [])
    assert same["why"] == "the file doesn't say which passes and rounding made it"
    assert [check["inputs"] for check in checks[targets.PRECISION_COST]] == [
        "8 of the demo's digits",
        "noise, batch 3",
    ]
    for check in checks[targets.PRECISION_COST]:
        assert check["verdict"] == "verified"
        assert [0 < comparison["relative_rms"] < 1e-5 for comparison in check["comparisons"]] == [True]


def test_a_foreign_file_reads_as_not_verified(foreign: Path) -> None:
    ran = call("verify", foreign)
    assert ran.status == 4
    assert "not verified" in ran.out
    assert one_line(ran.err) == (
        "foreign.onnx is not verified: same network: the file doesn't say which passes and rounding made it"
    )
    quiet = call("verify", foreign, "--quiet")
    assert (quiet.status, quiet.out) == (4, "")
    assert "not verified" in one_line(quiet.err)


def test_a_foreign_file_of_other_weights_fails(foreign: Path, tmp_path: Path) -> None:
    status, checks, _ = judged(foreign, "--checkpoint", weights(tmp_path / "w.pth", 10, seed=2))
    assert status == 3
    assert verdicts(checks) == [{"not verified"}, {"failed"}]


def test_a_foreign_file_of_fp16_is_held_to_fp16(half: Exported, tmp_path: Path) -> None:
    """Its batch, its uint8 pixels and its precision are read from the file itself."""
    path = half.copied(tmp_path)
    tamper(path, forget)
    tamper(path, lambda model: rename(model, {"image": "x", "logits": "y"}))
    status, checks, _ = judged(path)
    assert status == 4
    (cost,) = checks[targets.PRECISION_COST]
    assert (cost["mode"], cost["verdict"]) == ("emulated", "verified")
    spec = call("verify", path, "--json").json["spec"]
    assert (spec["batch"], spec["input"], spec["precision"]) == (3, "uint8", "fp16")


def second_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1, 1, 64, 64]))


def second_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("relu", TensorProto.FLOAT, [1, 24, 32, 32]))


def flat_input(model: onnx.ModelProto) -> None:
    del model.graph.node[:]
    del model.graph.input[:]
    model.graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 10]))
    model.graph.node.append(helper.make_node("Identity", ["x"], ["logits"]))


def channels_last(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, [1, 64, 64, 3]))
    model.graph.node.insert(0, helper.make_node("Transpose", ["image"], ["turned"], perm=[0, 3, 1, 2]))
    model.graph.node[1].input[0] = "turned"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (second_input, "has 2 inputs and 1 outputs; only a classifier's one image and one output can be compared"),
        (second_output, "has 1 inputs and 2 outputs; only"),
        (flat_input, "reads x of shape (1, 10) and ONNX type 1; only (N, 3, H, W)"),
        (channels_last, "reads image of shape (1, 64, 64, 3) and ONNX type 1; only (N, 3, H, W)"),
    ],
)
def test_a_foreign_file_that_is_no_classifier(demo: Exported, tmp_path: Path, fault: Fault, says: str) -> None:
    path = demo.copied(tmp_path)
    tamper(path, forget)
    tamper(path, fault)
    assert refusal("verify", path).startswith(f"{path.name} {says}")
