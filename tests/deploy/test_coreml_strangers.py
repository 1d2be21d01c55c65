"""Packages of other tools: what their description tells is enough to hold their answers against the checkpoint's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nextvit_deploy.strangers import strange_package
from nextvit_exporters.coreml.loading import coremltools, heard
from nextvit_exporters.coreml.program import Feature, Operation, Output, Program, TensorType
from nextvit_exporters.coreml_spec import CoreMLSpec
from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.spec import ExportSpec, InputKind, Precision
from nextvit_exporters.targets import COST_AT_WORST, PRECISION_COST, SAME_NETWORK
from nextvit_models.checkpoint import load_checkpoint
from nextvit_models.demo import DEMO_CHECKPOINT
from nextvit_models.preprocessing import Preprocessing
from tests.deploy.support import Json, call, one_line, refusal, weights
from tests.deploy.support_coreml import by_question, error, needs_coremltools
from tests.exporters.coreml.small_programs import package as package_of

pytestmark = [needs_coremltools, pytest.mark.usefixtures("quick")]
TWO: Final = ("--count", "2")
SPEC: Final = ExportSpec("nextvit_nano", 10, "coreml", Precision.FP32, 64, 64, 1, 18, Preprocessing())


class Pictured(nn.Module):
    """The demo's model as people wrap it for Core ML: values from 0 to 1 in, probabilities out."""

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        out: Tensor = self.model((x - mean) / std)
        return out.softmax(-1)


def converted(model: nn.Module, path: Path, given: Any, precision: str, **options: Any) -> Path:
    ct = coremltools()
    with heard(), torch.no_grad():
        program = torch.export.export(model.eval(), (torch.rand(1, 3, 64, 64),)).run_decompositions({})
        made = ct.convert(
            program,
            inputs=[given],
            minimum_deployment_target=ct.target.iOS17,
            compute_precision=getattr(ct.precision, precision),
            skip_model_load=True,
            **options,
        )
        made.save(str(path))
    return path


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of pictures in FP16."""
    checkpoint = load_checkpoint(DEMO_CHECKPOINT)
    ct, wanted = coremltools(), checkpoint.preprocessing
    model = Pictured(checkpoint.model, wanted.mean, wanted.std)
    image = ct.ImageType(name="photo", shape=(1, 3, 64, 64), scale=1 / 255, color_layout=ct.colorlayout.RGB)
    labels = ct.ClassifierConfig(list(checkpoint.labels))
    path = tmp_path_factory.mktemp("pictured") / "digits.mlpackage"
    return converted(model, path, image, "FLOAT16", classifier_config=labels)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 tensor to logits, under names of its own."""
    ct = coremltools()
    tensor = ct.TensorType(name="x", shape=(1, 3, 64, 64), dtype=np.float32)
    path = tmp_path_factory.mktemp("plain") / "net.mlpackage"
    answer = [ct.TensorType(name="scores", dtype=np.float32)]
    return converted(load_checkpoint(DEMO_CHECKPOINT).model, path, tensor, "FLOAT32", outputs=answer)


def judged(path: Path, *options: str | Path) -> tuple[int, Json]:
    ran = call("verify", path, "--json", *TWO, *options)
    assert ran.status == {"failed": 3, "not verified": 4}[str(ran.json["verdict"])]
    assert one_line(ran.err).startswith(f"{path.name} is {ran.json['verdict']}: ")
    return ran.status, ran.json


@pytest.mark.parametrize("kind", ["pictured", "plain"])
def test_the_cost_is_known_and_the_rest_is_not(kind: str, request: pytest.FixtureRequest) -> None:
    status, manifest = judged(request.getfixturevalue(kind))
    asked = by_question(manifest)
    assert status == 4
    assert [check["verdict"] for check in asked[SAME_NETWORK]] == ["not verified"]
    assert asked[SAME_NETWORK][0]["why"] == "the file doesn't say which passes and rounding made it"
    questions = [PRECISION_COST, *([COST_AT_WORST] if kind == "pictured" else [])]
    assert list(asked) == [SAME_NETWORK, *questions]
    for question in questions:
        (check,) = asked[question]
        assert (check["verdict"], check["comparisons"][0]["top1"]) == ("verified", 1.0)
        assert error(check) <= (2e-2 if kind == "pictured" else 1e-5)
    assert manifest["passes"] == []


def test_what_it_tells_of_itself(pictured: Path, plain: Path) -> None:
    spec = judged(pictured)[1]["spec"]
    assert (spec["input"], spec["precision"], spec["coreml"]["head"]) == ("image", "fp16", "classify")
    assert (spec["coreml"]["ios"], spec["labels"]) == (17, [str(digit) for digit in range(10)])
    spec = judged(plain)[1]["spec"]
    assert (spec["input"], spec["precision"], spec["coreml"]["head"]) == ("normalized", "fp32", "logits")


def test_other_weights_are_seen(plain: Path, tmp_path: Path) -> None:
    status, manifest = judged(plain, "--checkpoint", weights(tmp_path / "other.pth", 10, seed=3))
    assert status == 3
    assert by_question(manifest)[PRECISION_COST][0]["verdict"] == "failed"


def test_inspected_and_linted(pictured: Path) -> None:
    facts = call("inspect", pictured, "--json").json
    assert facts["provenance"] == "none: not written by this tool"
    assert str(facts["inputs"]["photo"]).startswith("image RGB 1x3x64x64")
    assert call("lint", pictured, "--json").status == 0


IMAGE: Final = Feature("x", "tensor", "", (2, 3, 64, 96), "float32")
SCORES: Final = Feature("y", "tensor", "", (2, 10), "float32")


def told(inputs: tuple[Feature, ...], outputs: tuple[Feature, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    made = replace(package_of(Program("CoreML6", {}, (), ()), inputs, outputs), specification=8)
    monkeypatch.setattr("nextvit_deploy.strangers.read_package", lambda _: made)
    return strange_package(Path("it.mlpackage"), SPEC)


@pytest.mark.parametrize(
    ("inputs", "outputs", "says"),
    [
        ((IMAGE, IMAGE), (SCORES,), "it.mlpackage has 2 inputs; only a classifier's one can be compared"),
        ((), (SCORES,), "it.mlpackage has 0 inputs"),
        ((IMAGE,), (SCORES, SCORES), "it.mlpackage has 2 outputs; only a classifier's one can be compared"),
        ((replace(IMAGE, shape=(3, 64, 64)),), (SCORES,), "it.mlpackage reads x of shape 3x64x64; only (N, 3, H, W)"),
        ((replace(IMAGE, shape=(1, 1, 64, 64)),), (SCORES,), "it.mlpackage reads x of shape 1x1x64x64; only (N, 3"),
    ],
)
def test_what_cannot_be_compared(
    inputs: tuple[Feature, ...], outputs: tuple[Feature, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedSpec) as refused:
        told(inputs, outputs, monkeypatch)
    assert str(refused.value).startswith(says)


def test_sizes_are_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, names = told((IMAGE,), (SCORES,), monkeypatch)
    assert (spec.batch, spec.height, spec.width, spec.input) == (2, 64, 96, InputKind.NORMALIZED)
    assert (names.input, names.output, spec.coreml) == ("x", "y", CoreMLSpec(17, "logits"))
    assert (spec.dynamic_size, spec.precision) == (False, Precision.FP32)
    some = replace(IMAGE, allowed=((2, 3, 64, 96), (2, 3, 32, 32)))
    assert told((some,), (SCORES,), monkeypatch)[0].coreml.sizes == ((32, 32),)
    ranged = replace(IMAGE, ranges=((2, 2), (3, 3), (32, 128), (64, 256)))
    spec, _ = told((ranged,), (SCORES,), monkeypatch)
    assert (spec.dynamic_size, spec.coreml.flexible) == (True, (64, 128))


def test_half_precision_is_seen_in_its_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    half = Operation("relu", "r", {}, {}, (Output("r", TensorType("float16", (1,))),))
    made = package_of(Program("CoreML6", {}, (half,), ()), (IMAGE,), (SCORES,))
    monkeypatch.setattr("nextvit_deploy.strangers.read_package", lambda _: made)
    assert strange_package(Path("it.mlpackage"), SPEC)[0].precision is Precision.FP16


def test_a_package_that_is_no_classifier_of_pictures(tmp_path: Path) -> None:
    ct = coremltools()
    tensor = ct.TensorType(name="x", shape=(1, 3, 64, 64), dtype=np.float32)

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.relu(x), x * 2

    path = converted(Pair(), tmp_path / "pair.mlpackage", tensor, "FLOAT32")
    assert refusal("verify", path).startswith("pair.mlpackage has 2 outputs; only a classifier's one can be compared")
