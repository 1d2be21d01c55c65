"""A saved file is judged by executing it: what is whole passes, what is not is found out, and nothing is guessed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from typing_extensions import Self

from nextvit_deploy import verify as v
from nextvit_deploy.data import load_images, noise_images
from nextvit_deploy.verify import Check, Names, Verdict, overall
from nextvit_exporters import targets, to_onnx
from nextvit_exporters.errors import DeployError, VerificationFailed
from nextvit_exporters.executors.base import Array, Arrays
from nextvit_exporters.spec import ExportSpec, InputKind
from nextvit_models.checkpoint import load_checkpoint
from nextvit_models.config import VARIANTS
from nextvit_models.demo import DEMO_CHECKPOINT, DEMO_IMAGES
from nextvit_models.nextvit import NextViT
from tests.deploy.support import (
    FAULTS,
    Exported,
    Json,
    call,
    drop_bias,
    forget,
    one_line,
    put_nan,
    refusal,
    rename,
    scale_weight,
    strict_json,
    tamper,
)
from tests.harness import randomise

Fault = Callable[[onnx.ModelProto], None]
pytestmark = pytest.mark.usefixtures("quick")


def judged(*arguments: str | Path) -> tuple[int, dict[str, list[Json]], list[str]]:
    """Exit status, checks by question, and notes of one ``verify --json``; both questions are always answered."""
    ran = call("verify", *arguments, "--json")
    checks: dict[str, list[Json]] = {}
    manifest = ran.json
    for check in manifest["checks"]:
        checks.setdefault(check["question"], []).append(check)
    assert list(checks) == [targets.SAME_NETWORK, targets.PRECISION_COST]
    verdict = manifest["verdict"]
    assert ran.status == {"verified": 0, "failed": 3, "not verified": 4}[str(verdict)]
    if ran.status:
        assert one_line(ran.err).startswith(f"{Path(arguments[0]).name} is {verdict}: ")
    else:
        assert ran.err == ""
    return ran.status, checks, manifest["notes"]


def verdicts(checks: dict[str, list[Json]]) -> list[set[object]]:
    return [{check["verdict"] for check in group} for group in checks.values()]


def recorded(path: Path, change: Callable[[Json], None]) -> None:
    """Change the manifest inside the file."""

    def fault(model: onnx.ModelProto) -> None:
        entry = next(entry for entry in model.metadata_props if entry.key == to_onnx.MANIFEST_KEY)
        values = json.loads(entry.value)
        change(values)
        entry.value = json.dumps(values)

    tamper(path, fault)


def weights(path: Path, classes: int, seed: int) -> Path:
    """A checkpoint of the demo's variant with other weights."""
    torch.save(randomise(NextViT(VARIANTS["nextvit_nano"], classes), seed).state_dict(), path)
    return path


def test_a_whole_file_is_verified_and_nothing_is_written(demo: Exported, tmp_path: Path) -> None:
    path = demo.copied(tmp_path)
    status, checks, notes = judged(path)
    assert status == 0
    assert verdicts(checks) == [{"verified"}, {"verified"}]
    assert notes == ["no checkpoint given: the bundled demo is used (nextvit_nano trained on digits)"]
    assert sorted(each.name for each in tmp_path.iterdir()) == [path.name, f"{path.name}.json"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_planted_after_the_build_is_found(demo: Exported, tmp_path: Path, fault: Fault) -> None:
    path = tamper(demo.copied(tmp_path), fault)
    status, checks, notes = judged(path)
    assert status == 3
    assert verdicts(checks) == [{"failed"}, {"failed"}]
    assert f"{path.name} has changed since {path.name}.json was written" in notes


@pytest.mark.parametrize("fault", [scale_weight, drop_bias])
def test_only_the_exact_question_sees_a_small_fault_in_fp16(half: Exported, tmp_path: Path, fault: Fault) -> None:
    """Why there are two questions: rounding to FP16 hides a weight that is off by a thousandth."""
    status, checks, _ = judged(tamper(half.copied(tmp_path), fault))
    assert status == 3
    assert verdicts(checks)[0] == {"failed"}
    if fault is scale_weight:
        assert verdicts(checks)[1] == {"verified"}


def test_nan_is_named(demo: Exported, tmp_path: Path) -> None:
    ran = call("verify", tamper(demo.copied(tmp_path), put_nan))
    assert ran.status == 3
    assert "NaN or Inf in the output" in one_line(ran.err)
    assert "failed" in ran.out


def test_a_last_batch_is_filled_and_cut_again(half: Exported) -> None:
    """Eight images, three at a time."""
    status, checks, _ = judged(half.path)
    assert status == 0
    for group in checks.values():
        assert [comparison["count"] for check in group for comparison in check["comparisons"]] == [8]
    assert [group[0]["mode"] for group in checks.values()] == ["exact", "emulated"]

    saved = onnx.load(str(half.path))
    assert saved.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3
    assert saved.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8


def test_open_axes_are_verified_at_several_shapes(dynamic: Exported) -> None:
    status, checks, _ = judged(dynamic.path)
    assert status == 0
    shapes = ["8 of the demo's digits", "noise, batch 3", "noise, 97x69", "noise, 64x128"]
    for group in checks.values():
        assert [check["inputs"] for check in group] == shapes
        assert {check["verdict"] for check in group} == {"verified"}
        assert [check["comparisons"][0]["count"] for check in group] == [8, 3, 2, 2]


def test_an_axis_that_is_not_open_after_all_fails(dynamic: Exported, tmp_path: Path) -> None:
    """The file says its size is open, and isn't: the other shapes find out."""

    def close(model: onnx.ModelProto) -> None:
        shape = model.graph.input[0].type.tensor_type.shape
        shape.dim[2].dim_value = shape.dim[3].dim_value = 64

    path = dynamic.copied(tmp_path)
    model = onnx.load(str(path))
    close(model)
    path.write_bytes(model.SerializeToString())
    status, checks, _ = judged(path)
    assert status == 3
    assert verdicts(checks) == [{"failed"}, {"failed"}]


def test_other_weights_of_the_same_variant(demo: Exported, tmp_path: Path) -> None:
    path = demo.copied(tmp_path)
    status, checks, notes = judged(path, "--checkpoint", weights(tmp_path / "other.pth", 10, seed=3))
    assert status == 3
    assert verdicts(checks) == [{"failed"}, {"failed"}]
    assert "the file was made from other weights than other.pth; give its own checkpoint with --checkpoint" in notes
    assert "the file records other preprocessing or class names than other.pth" in notes
    assert not any("has changed" in note for note in notes)


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


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"image": "pixels"}, "nextvit_nano_classify_64_b1_fp32.onnx reads pixels, not image"),
        ({"logits": "scores"}, "the file returns scores, not 'logits'"),
    ],
)
def test_renamed_inputs_and_outputs_fail(demo: Exported, tmp_path: Path, names: dict[str, str], says: str) -> None:
    path = tamper(demo.copied(tmp_path), lambda model: rename(model, names))
    status, checks, _ = judged(path)
    assert status == 3
    assert all(str(check["why"]).startswith(says) for group in checks.values() for check in group)


def no_rows(model: onnx.ModelProto) -> None:
    """The batch is summed away, which cutting off filled rows must not hide."""
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, [10]))
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [0])
    model.graph.initializer.append(axes)
    model.graph.node.append(helper.make_node("ReduceSum", ["logits", "axes"], ["sum"], keepdims=0))
    rename(model, {"logits": "rows", "sum": "logits"})


def test_a_file_that_loses_the_batch_fails(demo: Exported, tmp_path: Path) -> None:
    status, checks, _ = judged(tamper(demo.copied(tmp_path), no_rows))
    assert status == 3
    assert checks[targets.SAME_NETWORK][0]["why"] == "the file returns shape (10,) for 1 images"


def test_an_operation_that_cannot_run_fails(demo: Exported, tmp_path: Path) -> None:
    def unknown(model: onnx.ModelProto) -> None:
        model.graph.node[1].domain = "made.up"
        model.opset_import.append(helper.make_opsetid("made.up", 1))

    status, checks, _ = judged(tamper(demo.copied(tmp_path), unknown))
    assert status == 3
    assert "ONNX Runtime can't load" in str(checks[targets.SAME_NETWORK][0]["why"])


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ((), Verdict.NOT_VERIFIED),
        ((Verdict.VERIFIED,), Verdict.VERIFIED),
        ((Verdict.VERIFIED, Verdict.VERIFIED), Verdict.VERIFIED),
        ((Verdict.VERIFIED, Verdict.NOT_VERIFIED), Verdict.NOT_VERIFIED),
        ((Verdict.NOT_VERIFIED, Verdict.NOT_VERIFIED), Verdict.NOT_VERIFIED),
        ((Verdict.NOT_VERIFIED, Verdict.FAILED), Verdict.FAILED),
        ((Verdict.VERIFIED, Verdict.FAILED), Verdict.FAILED),
    ],
)
def test_overall(answers: tuple[Verdict, ...], expected: Verdict) -> None:
    checks = [Check("q", "executor", "exact", "PyTorch", "inputs", each, "", ()) for each in answers]
    assert overall(checks) is expected


class Echo:
    """Returns the sum of each image, and remembers the batches it was given."""

    name, mode = "echo", "exact"

    def __init__(self) -> None:
        self.batches: list[Array] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def run(self, inputs: Arrays) -> dict[str, Array]:
        self.batches.append(inputs["x"])
        return {"y": inputs["x"].astype(np.float64).sum(axis=(1, 2, 3))[:, None]}


@pytest.fixture(scope="module")
def demo_spec(demo: Exported) -> ExportSpec:
    return ExportSpec.from_dict(demo.manifest["spec"])


@pytest.mark.parametrize(("batch", "sizes"), [(1, [1] * 8), (3, [3, 3, 3]), (8, [8]), (16, [16])])
def test_batches_are_full_and_in_order(demo_spec: ExportSpec, batch: int, sizes: list[int]) -> None:
    images = load_images(DEMO_IMAGES, 8, (64, 64), demo_spec.preprocessing)
    inputs = v.artefact_inputs(demo_spec, images)
    echo = Echo()
    rows = v._run_batched(replace(demo_spec, batch=batch), echo, inputs, Names("x", "y"))
    assert [len(each) for each in echo.batches] == sizes
    np.testing.assert_allclose(rows.astype(np.float64)[:, 0], inputs.astype(np.float64).sum(axis=(1, 2, 3)))
    last = echo.batches[-1]
    for row in last[8 - batch * (len(sizes) - 1) :]:
        np.testing.assert_array_equal(row, inputs[-1])  # filled up with a real image, not with zeros


@pytest.mark.parametrize("kind", InputKind)
def test_the_artefact_gets_what_it_reads(demo_spec: ExportSpec, kind: InputKind) -> None:
    images = noise_images(2, (64, 64), demo_spec.preprocessing, seed=1)
    given = v.artefact_inputs(replace(demo_spec, input=kind), images)
    assert given.shape == (2, 3, 64, 64)
    assert given.dtype == (np.uint8 if kind is InputKind.UINT8 else np.float32)
    expected = images.normalised() if kind is InputKind.NORMALIZED else images.pixels
    np.testing.assert_array_equal(given, expected)


def test_an_executor_without_the_output_is_refused(demo_spec: ExportSpec) -> None:
    inputs = np.ones((1, 3, 4, 4), np.float32)
    with pytest.raises(VerificationFailed, match="the file returns y, not 'z'"):
        v._run_batched(demo_spec, Echo(), inputs, Names("x", "z"))
    assert issubclass(VerificationFailed, DeployError)


def test_the_manifest_printed_is_the_manifest_saved(demo: Exported) -> None:
    assert strict_json(demo.ran.out) == demo.manifest
