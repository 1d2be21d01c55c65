"""An INT8 file is held against its calibration: a step that no execution shows is a verdict, and has a name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from nextvit_deploy.cache import VARIABLE
from nextvit_deploy.quantization import calibration_of
from tests.deploy.support import Exported, call, judged, tamper, verdicts

Fault = Callable[[onnx.ModelProto], None]
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The demo in INT8, calibrated on sixteen of its pictures."""
    folder = tmp_path_factory.mktemp("int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(folder / "cache"))
        ran = call("onnx", "--int8", "--calibration-size", "16", "--output", folder / "out", "--json")
    assert ran.status == 0, ran
    (path,) = folder.glob("out/*.onnx")
    return Exported(path, ran)


def copied(int8: Exported, folder: Path) -> Path:
    shutil.copy(calibration_of(int8.path), folder)
    return int8.copied(folder)


def coarser(model: onnx.ModelProto) -> None:
    """A step twice as long as it was meant: nothing clips, so no number that isn't rounded changes."""
    (map_node,) = [node for node in model.graph.node if node.name == "features.3.mlp.conv1/Conv"]
    (back,) = [node for node in model.graph.node if map_node.input[0] in node.output]
    (to,) = [node for node in model.graph.node if back.input[0] in node.output]
    (step,) = [tensor for tensor in model.graph.initializer if tensor.name == to.input[1]]
    value = numpy_helper.to_array(step)
    model.graph.initializer.append(numpy_helper.from_array(np.array(2 * value, value.dtype), "coarser"))
    to.input[1] = back.input[1] = "coarser"


def another_weight(model: onnx.ModelProto) -> None:
    (map_node,) = [node for node in model.graph.node if node.name == "features.3.mlp.conv1/Conv"]
    (back,) = [node for node in model.graph.node if map_node.input[1] in node.output]
    (codes,) = [tensor for tensor in model.graph.initializer if tensor.name == back.input[0]]
    values = numpy_helper.to_array(codes).copy()
    values[0, 0] -= 1 if values[0, 0] > 0 else -1
    codes.CopyFrom(numpy_helper.from_array(values, codes.name))


def test_a_sound_file_is_verified(int8: Exported, tmp_path: Path) -> None:
    status, checks, _ = judged(copied(int8, tmp_path))
    assert status == 0
    assert verdicts(checks) == [{"verified"}, {"verified"}]
    assert [group[0]["mode"] for group in checks.values()] == ["unrounded", "exact"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (coarser, "features.3.mlp.conv1 reads its input in steps of "),
        (another_weight, "features.3.mlp.conv1 has 1 weights on other steps, the first in channel 0"),
    ],
)
def test_a_step_that_executing_does_not_show_fails(int8: Exported, tmp_path: Path, fault: Fault, says: str) -> None:
    status, checks, _ = judged(tamper(copied(int8, tmp_path), fault))
    assert status == 3
    assert verdicts(checks) == [{"failed"}, {"verified"}]
    (check,) = next(iter(checks.values()))
    assert check["why"].startswith(says)


def test_without_its_calibration_only_the_cost_is_known(int8: Exported, tmp_path: Path) -> None:
    status, checks, notes = judged(int8.copied(tmp_path))
    assert status == 4
    assert verdicts(checks) == [{"not verified"}, {"verified"}]
    assert any("is not beside" in note for note in notes)
