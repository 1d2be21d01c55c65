"""A configuration is read whole, or refused in one line that names the place."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nextvit_deploy import doctor
from nextvit_deploy.check.config import read_config
from nextvit_deploy.check.init import write_config
from nextvit_deploy.check.lines import lines_of
from nextvit_deploy.check.matrix import cells_of, default_matrix
from nextvit_exporters.errors import DeployError
from nextvit_models.demo import DEMO_CHECKPOINT
from tests.deploy.support import call, refusal

ROOT = Path(__file__).parents[3]
HEAD = '[[matrix]]\ncheckpoints = ["demo"]\ntargets = ["onnx"]\nprecisions = ["fp16"]\n'

WRONG = {
    "no TOML": ("[check\n", 1, "TOML"),
    "an unknown section": (HEAD + "[chek]\n", 5, "check"),
    "an unknown option": ("[check]\ncuont = 8\n" + HEAD, 2, "did you mean"),
    "an unknown target": (HEAD.replace('"onnx"', '"onnxx"'), 3, "onnxx"),
    "an unknown precision": (HEAD.replace('"fp16"', '"fp8"'), 4, "fp8"),
    "a wrong type": ("[check]\ncount = true\n" + HEAD, 2, "count"),
    "out of range": ("[check]\ncount = 0\n" + HEAD, 2, "count"),
    "an empty list": (HEAD.replace('["onnx"]', "[]"), 3, "targets"),
    "a checkpoint that is not there": (HEAD.replace('"demo"', '"gone.pth"'), 2, "gone.pth"),
    "a folder that is not there": ('[check]\nimages = "gone"\n' + HEAD, 2, "gone"),
    "an unknown question": (HEAD + "[tolerance.onnx]\nfp16 = { same-netwrok = 1e-6 }\n", 6, "same-netwrok"),
    "a tolerance that is none": (HEAD + "[tolerance.onnx]\nfp16 = { same-network = 0 }\n", 6, "same-network"),
    "a size that is none": (HEAD + '[budget.onnx]\nfp16 = { size = "big" }\n', 6, "size"),
    "a ratio that is none": (HEAD + "[regression]\nsize-ratio = -1\n", 6, "size-ratio"),
    "the same cell twice": (HEAD + HEAD, 5, "matrix"),
    "nothing to check": ("[check]\ncount = 8\n", 1, "nothing to check"),
}


@pytest.mark.parametrize(("text", "line", "word"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_one_line_with_its_place(text: str, line: int, word: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DeployError) as told:
        read_config(path)
    message = str(told.value)
    assert "\n" not in message
    assert f"c.toml:{line}:" in message, message
    assert word in message


def test_the_command_says_so_too(tmp_path: Path) -> None:
    assert "write one with: nextvit-export init" in refusal("check", tmp_path / "gone.toml")
    (tmp_path / "c.toml").write_text(WRONG["an unknown target"][0])
    assert "c.toml:3:" in refusal("check", tmp_path / "c.toml")


def test_every_line_is_where_its_key_begins() -> None:
    text = (
        '# [a]\n[a]\n"b c" = 1\nd.e = """\n[a]\nb = 2\n"""\n\n[[f]]\ng = [\n  1, # ]\n  2,\n]\nh = { i = 3, j = "}" }\n'
        "[[f]]\ng = '''x\ny'''\nk = 4\n"
    )
    found = lines_of(text)
    assert found["a",] == 2
    assert found["a", "b c"] == 3
    assert found["a", "d", "e"] == 4
    assert found["f", 0, "g"] == 10
    assert found["f", 0, "g", 1] == 12
    assert found["f", 0, "h", "j"] == 14
    assert found["f", 1, "g"] == 16
    assert found["f", 1, "k"] == 18


def test_our_own_is_the_demo_in_everything() -> None:
    cells = cells_of(read_config(ROOT / "nextvit-export.toml"))
    everything = {(lane, number) for lane in ("onnx", "trt", "coreml") for number in ("fp32", "fp16", "int8")}
    assert {(cell.lane, cell.precision) for cell in cells} == everything
    assert len({cell.name for cell in cells}) == len(cells) == 10
    assert all(cell.checkpoint is None for cell in cells)
    assert next(cell.ios for cell in cells if (cell.lane, cell.precision) == ("coreml", "int8")) == 17


def test_every_combination_is_a_cell_of_its_own_name(tmp_path: Path) -> None:
    shutil.copy(DEMO_CHECKPOINT, tmp_path / "best.safetensors")
    path = tmp_path / "c.toml"
    path.write_text(
        '[[matrix]]\ncheckpoints = ["demo", "best.safetensors"]\ntargets = ["onnx"]\nprecisions = ["fp32", "fp16"]\n'
        'sizes = [64, "64x96"]\nbatches = [1, 2]\npasses = ["all", "none"]\n'
    )
    cells = cells_of(read_config(path))
    assert len(cells) == len({cell.name for cell in cells}) == 32
    assert cells[0].name == "demo-onnx-fp32-64-b1"
    assert cells[-1].name == "best-onnx-fp16-64x96-b2-nopasses"
    assert cells[-1].checkpoint == str(tmp_path / "best.safetensors")


def test_all_asks_for_what_each_lane_takes() -> None:
    cells = [(cell.lane, cell.precision) for cell in default_matrix(None, ("onnx", "trt", "coreml"))]
    assert ("trt", "fp32") not in cells  # TensorRT-RTX has none for a T4
    assert len(cells) == 8
    own = default_matrix("/somewhere/best.pth", ("onnx",))
    assert [cell.precision for cell in own] == ["fp32", "fp16"]  # nothing to calibrate on


@pytest.mark.parametrize("name", ["best.safetensors", "demo"])
def test_what_init_writes_is_read_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(DEMO_CHECKPOINT, tmp_path / name)
    ran = call("init", tmp_path / name)
    assert ran.status == 0, ran
    cells = cells_of(read_config(tmp_path / "nextvit-export.toml"))
    assert {cell.checkpoint for cell in cells} == {str(tmp_path / name)}
    assert "--force" in refusal("init", tmp_path / name)
    assert call("init", tmp_path / name, "--force", "--quiet").status == 0


def test_what_is_not_installed_waits_as_a_comment(tmp_path: Path) -> None:
    versions: dict[str, str | None] = dict.fromkeys(doctor.CORE, "1.0")
    lanes = doctor.lanes(versions, None, "linux", "x86_64")
    path = tmp_path / "c.toml"
    written = write_config(None, path, lanes, ema=False, force=False)
    assert written.targets == ("onnx",)
    assert {cell.lane for cell in cells_of(read_config(path))} == {"onnx"}
    assert "pip install 'nextvit-deploy[coreml]'" in path.read_text()
