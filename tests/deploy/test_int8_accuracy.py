"""What INT8 costs, in answers: the figures that the project stands for, on pictures that were not calibrated on."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
import torch

from nextvit_deploy.cache import VARIABLE
from nextvit_models.checkpoint import load_checkpoint, save_safetensors
from nextvit_models.demo import DEMO_CHECKPOINT
from nextvit_models.nextvit import NextViT
from tests.deploy.support import Exported, Json, call
from tests.deploy.support_coreml import needs_coremltools
from tests.deploy.support_int8 import exported, needs_tensorrt, parted, pictures_of
from tests.exporters.quantize.scrambled import scrambled_checkpoint
from tests.harness import images, relative_error

POINTS: Final = 0.5
"""Top-1 that INT8 may lose, in percentage points; of 232 pictures that is one."""
HALF: Final = ("--calibration-size", "64")
"""Of the pictures there are to calibrate on; more find the same."""
RUINED: Final = "stem.2"
"""The block that reads channels which dwarf the others."""
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(autouse=True)
def cache(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all that is made once, and none of the user's."""
    monkeypatch.setenv(VARIABLE, str(base / "int8-cache"))


@pytest.fixture(scope="session")
def scrambled(base: Path) -> Path:
    """The demo with channels of very different sizes, which computes the same in float32."""
    return scrambled_checkpoint(base / "scrambled.safetensors", 2.5, 0)


@pytest.fixture(scope="session")
def ruined(base: Path) -> Path:
    """The demo with one block that INT8 ruins, which computes the same in float32."""
    checkpoint = load_checkpoint(DEMO_CHECKPOINT)
    with torch.no_grad():
        _ruin(checkpoint.model)
    path = base / "ruined.safetensors"
    save_safetensors(checkpoint, path)
    return path


def _ruin(model: NextViT) -> None:
    """A few of the channels before a ReLU are made larger, and what reads them smaller by as much."""
    norm, reader = model.get_submodule("stem.1.norm"), model.get_submodule("stem.2.conv")
    assert isinstance(norm, torch.nn.BatchNorm2d)
    assert isinstance(reader, torch.nn.Conv2d)
    scale = torch.ones(len(norm.weight))
    scale[::16] = 2.0**9
    norm.weight.mul_(scale)
    norm.bias.mul_(scale)
    reader.weight.div_(scale.view(1, -1, 1, 1))


def evaluated(made: Exported, folder: Path, output: Path, *options: str | Path) -> Json:
    """The figures of ``evaluate`` on a folder of labelled pictures, those of PyTorch in float32 beside them."""
    ran = call("evaluate", made.path, folder, "--output", output, "--json", "--workers", "1", *options)
    assert (ran.status, ran.err) == (0, ""), ran
    assert ran.json["dataset"]["fingerprint"] == pictures_of(folder).fingerprint
    assert ran.json["spec"]["precision"] in {"int8", "fp16"}, "a package's activations are int8 within fp16"
    figures = ran.json["figures"]
    assert figures["points"]["top1"] == pytest.approx(100 * (figures["artefact"]["top1"] - figures["pytorch"]["top1"]))
    assert isinstance(figures, dict)
    return figures


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("onnx", ("--int8",)),
        pytest.param("trt", ("--int8",), marks=needs_tensorrt),
        pytest.param("coreml", ("--activations", "int8", "--ios", "17"), marks=needs_coremltools),
    ],
    ids=["onnx", "engine", "package"],
)
def test_the_demo_loses_nothing(base: Path, tmp_path: Path, command: str, options: tuple[str, ...]) -> None:
    known, unseen, _ = parted(base)
    assert not {each.read_bytes() for each in known.rglob("*.png")} & {
        each.read_bytes() for each in unseen.rglob("*.png")
    }
    made = exported(base, command, *options, "--calibration", known, *HALF)
    asked = made.manifest["spec"]["coreml"] or made.manifest["spec"]["quantize"]
    assert (asked.get("images") or asked["calibration"]) == pictures_of(known, 64).fingerprint
    figures = evaluated(made, unseen, tmp_path)
    assert (figures["count"], figures["pytorch"]["top1"]) == (232, 1.0)
    assert abs(figures["points"]["top1"]) <= POINTS
    assert 38.0 < figures["sqnr_db"] < 60.0, "so much noise is INT8's, and no more"


@pytest.mark.parametrize("make", ["scrambled", "ruined"])
def test_what_is_planted_changes_nothing_in_float32(make: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(make)
    planted, demo = load_checkpoint(path).model, load_checkpoint(DEMO_CHECKPOINT).model
    x = images(4, 3, 64, 64, seed=1)
    with torch.no_grad():
        assert relative_error(planted(x), demo(x)) < 1e-5


def test_channels_of_different_sizes_need_to_be_equalized(base: Path, tmp_path: Path, scrambled: Path) -> None:
    known, unseen, _ = parted(base)
    options = scrambled, "--int8", "--for", "tensorrt-10", "--calibration", known, *HALF
    lost = exported(base, "onnx", *options, "--no-equalize", status=3)
    assert lost.manifest["verdict"] == "failed", "and verifying tells"
    figures = evaluated(lost, unseen, tmp_path, "--checkpoint", scrambled)
    assert figures["pytorch"]["top1"] == 1.0
    assert figures["artefact"]["top1"] < 0.7
    kept = exported(base, "onnx", *options)
    figures = evaluated(kept, unseen, tmp_path, "--checkpoint", scrambled)
    assert (figures["count"], figures["pytorch"]["top1"]) == (232, 1.0)
    assert abs(figures["points"]["top1"]) <= POINTS
    assert figures["sqnr_db"] > 38.0


def test_the_one_block_that_int8_ruins_is_kept_and_only_it(base: Path, tmp_path: Path, ruined: Path) -> None:
    known, _, few = parted(base)
    options = ruined, "--int8", "--no-equalize", "--calibration", known, "--calibration-size", "32", "--images", few
    made = exported(base, "onnx", *options, "--accuracy-budget", "30dB")
    manifest = made.manifest
    assert manifest["spec"]["quantize"]["keep"] == [RUINED]
    plan = manifest["precision_plan"]
    assert [each["block"] for each in plan["blocks"] if each["precision"] == "fp32"] == [RUINED]
    whole, chosen = plan["steps"]
    assert (whole["kept"], whole["met"], chosen["kept"], chosen["met"]) == (0, False, 1, True)
    assert whole["top1"] < 0.5, "in INT8 as a whole it answers no better than by guessing"
    figures = evaluated(made, few, tmp_path, "--checkpoint", ruined)
    assert figures["sqnr_db"] >= 30.0
    assert figures["artefact"] == figures["pytorch"]
    assert figures["sqnr_db"] == pytest.approx(plan["sqnr_db"], abs=0.1), "the plan's figure is the file's"
