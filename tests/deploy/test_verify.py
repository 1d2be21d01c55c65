"""A saved file is judged by executing it: what is whole passes, what is not is found out, and nothing is guessed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from typing_extensions import Self

from nextvit_deploy import verify as v
from nextvit_deploy.data import load_images, noise_images
from nextvit_deploy.references import artefact_inputs
from nextvit_deploy.verdict import Verdict
from nextvit_deploy.verify import Check, Names, overall
from nextvit_exporters import targets
from nextvit_exporters.errors import DeployError, VerificationFailed
from nextvit_exporters.executors.base import Array, Arrays
from nextvit_exporters.spec import ExportSpec, InputKind, Precision
from nextvit_models.demo import DEMO_IMAGES
from tests.deploy.support import (
    FAULTS,
    Exported,
    call,
    drop_bias,
    judged,
    one_line,
    put_nan,
    rename,
    scale_weight,
    strict_json,
    tamper,
    verdicts,
)

Fault = Callable[[onnx.ModelProto], None]
pytestmark = pytest.mark.usefixtures("quick")


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
    inputs = artefact_inputs(demo_spec, images)
    echo = Echo()
    rows = v.run_batched(replace(demo_spec, batch=batch), echo, inputs, Names("x", "y"))["logits"]
    assert [len(each) for each in echo.batches] == sizes
    np.testing.assert_allclose(rows.astype(np.float64)[:, 0], inputs.astype(np.float64).sum(axis=(1, 2, 3)))
    last = echo.batches[-1]
    for row in last[8 - batch * (len(sizes) - 1) :]:
        np.testing.assert_array_equal(row, inputs[-1])  # filled up with a real image, not with zeros


@pytest.mark.parametrize("kind", InputKind)
def test_the_artefact_gets_what_it_reads(demo_spec: ExportSpec, kind: InputKind) -> None:
    images = noise_images(2, (64, 64), demo_spec.preprocessing, seed=1)
    given = artefact_inputs(replace(demo_spec, input=kind), images)
    last = kind in {InputKind.UINT8_NHWC, InputKind.IMAGE}
    assert given.shape == ((2, 64, 64, 3) if last else (2, 3, 64, 64))
    assert given.dtype == (np.uint8 if kind.is_uint8 or kind is InputKind.IMAGE else np.float32)
    expected = images.normalised() if kind is InputKind.NORMALIZED else images.pixels
    np.testing.assert_array_equal(given, expected.transpose(0, 2, 3, 1) if last else expected)
    half = artefact_inputs(replace(demo_spec, input=kind, io=Precision.FP16), images)
    assert half.dtype == (np.float16 if kind is InputKind.NORMALIZED else given.dtype)


def test_an_executor_without_the_output_is_refused(demo_spec: ExportSpec) -> None:
    inputs = np.ones((1, 3, 4, 4), np.float32)
    with pytest.raises(VerificationFailed, match="the file returns y, not 'z'"):
        v.run_batched(demo_spec, Echo(), inputs, Names("x", "z"))
    assert issubclass(VerificationFailed, DeployError)


def test_the_manifest_printed_is_the_manifest_saved(demo: Exported) -> None:
    assert strict_json(demo.ran.out) == demo.manifest
