"""``init`` writes a configuration that check reads: for the demo, for a checkpoint, with lanes missing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from nextvit_deploy import doctor
from nextvit_deploy.check.config import Config, read_config
from nextvit_deploy.check.init import config_text
from nextvit_deploy.check.matrix import cells_of
from nextvit_deploy.doctor import Lane
from nextvit_deploy.pipeline import open_checkpoint
from nextvit_exporters.cuda.driver import Driver
from nextvit_models.checkpoint import Checkpoint
from nextvit_models.demo import DEMO_CHECKPOINT
from tests.deploy.support import call, refusal

ALL: dict[str, str | None] = dict.fromkeys((*doctor.CORE, *doctor.EXTRAS), "1.0")
NO_GPU = Driver(None, problem="none")
CHOICE = re.compile(r"^# (?=\[|[a-z][a-z0-9-]* = )", re.MULTILINE)
"""An option that is not taken, as against a sentence."""


def lanes(*without: str) -> tuple[Lane, ...]:
    return doctor.lanes(ALL | dict.fromkeys(without), NO_GPU, "linux", "x86_64")


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return open_checkpoint(None, ema=False)


def read(folder: Path, text: str) -> Config:
    path = folder / "nextvit-export.toml"
    path.write_text(text, encoding="utf-8")
    return read_config(path)


def asked(config: Config) -> dict[str, tuple[str, ...]]:
    return {target: each.precisions for each in config.matrices for target in each.targets}


def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = lanes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "lanes", lambda _: there)
    ran = call("init")
    assert ran.status == 0, ran
    assert ran.out == "wrote nextvit-export.toml: onnx, trt, coreml. Run: nextvit-export check\n"
    config = read_config(Path("nextvit-export.toml"))
    usual = ("fp32", "fp16", "int8")
    assert asked(config) == {"onnx": usual, "trt": ("fp16", "int8"), "coreml": usual}
    assert config == replace(Config(config.path, tmp_path / "exports/check"), timeout=1800.0, matrices=config.matrices)
    assert {(each.checkpoint, each.size) for each in cells_of(config)} == {(None, (64, 64))}
    text = Path("nextvit-export.toml").read_text()
    assert "nextvit_nano, 10 classes, 64x64 pixels." in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_a_checkpoint_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, there = 'my "best" é.safetensors', lanes("tensorrt-rtx-cu12")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / name).symlink_to(DEMO_CHECKPOINT)
    monkeypatch.chdir(tmp_path / "runs")
    monkeypatch.setattr(doctor, "lanes", lambda _: there)
    for output, named in (("../c.toml", f"runs/{name}"), ("d.toml", name), ("../etc/e.toml", str(Path.cwd() / name))):
        ran = call("init", name, "--output", output, "--json")
        assert ran.json == {"file": output, "targets": ["onnx", "coreml"], "waiting": ["trt"]}
        text = Path(output).read_text(encoding="utf-8")
        assert "checkpoints = [" + '"' + named.replace('"', '\\"') + '"]' in text
        config = read_config(Path(output))
        assert asked(config) == {"onnx": ("fp32", "fp16"), "coreml": ("fp32", "fp16")}  # int8 has no pictures yet
        assert {each.checkpoints for each in config.matrices} == {(str(tmp_path / "runs" / name),)}


def test_averaged_weights(demo: Checkpoint, tmp_path: Path) -> None:
    for wanted in (True, False):
        config = read(tmp_path, config_text("demo", demo, lanes(), ema=wanted))
        assert {each.ema for each in config.matrices} == {wanted}


def test_what_is_not_installed_is_a_comment_with_its_remedy(demo: Checkpoint, tmp_path: Path) -> None:
    text = config_text("demo", demo, lanes("tensorrt-rtx-cu12", "coremltools"), ema=False)
    assert set(asked(read(tmp_path, text))) == {"onnx"}
    for reason, extra in (("tensorrt-rtx-cu12", "trt-rtx"), ("coremltools", "coreml")):
        line = f"# Not on this machine: {reason} not installed. It opens with: pip install 'nextvit-deploy[{extra}]'"
        assert line in text.splitlines()
    matrices = text[text.index("\n[[matrix]]") : text.index("# [[artefact]]")]
    assert set(asked(read(tmp_path, CHOICE.sub("", matrices)))) == {"onnx", "trt", "coreml"}


def test_a_lane_that_can_not_be_opened(demo: Checkpoint, tmp_path: Path) -> None:
    text = config_text("demo", demo, doctor.lanes(ALL, NO_GPU, "darwin", "arm64"), ema=False)
    assert set(asked(read(tmp_path, text))) == {"onnx", "coreml"}
    assert "# Not on this machine: there is no TensorRT for macOS; use Linux or Windows.\n" in text


def test_every_choice_in_it_can_be_taken(demo: Checkpoint, tmp_path: Path) -> None:
    for each in ("photos", "releases/1.0", "exports"):
        (tmp_path / each).mkdir(parents=True)
    (tmp_path / "exports/model.onnx").write_bytes(b"")
    text = CHOICE.sub("", config_text("demo", demo, lanes(), ema=False)).replace("latency = false", "latency = true ")
    config = read(tmp_path, text)
    values = {name: getattr(config, name) for name in Config.__slots__}
    assert [name for name, value in values.items() if value in (None, ())] == []
    assert config.limits.tolerances
    assert config.limits.budgets
    assert None not in (config.limits.regression.error_ratio, config.limits.regression.latency_ratio)
    assert [each.gpu for each in config.matrices] == [None, "a10", None]
    assert len(config.artefacts) == 1


def test_nothing_is_overwritten_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nextvit-export.toml").write_text("mine")
    Path("dangling.toml").symlink_to("nowhere")
    for each in ("nextvit-export.toml", "dangling.toml", "."):
        said = refusal("init", "--output", each)
        assert said == f"{each} is there already; --force replaces it, --output FILE writes another"
    assert Path("nextvit-export.toml").read_text() == "mine"
    assert call("init", "--force", "--quiet").out == ""
    assert read_config(Path("nextvit-export.toml")).matrices
    assert "folder" in refusal("init", "--force", "--output", ".")


def test_a_checkpoint_that_is_none_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.pth").write_bytes(b"nothing")
    assert refusal("init", "x.pth").startswith("x.pth: ")
    assert refusal("init", "gone.pth")
    assert [each.name for each in tmp_path.iterdir()] == ["x.pth"]


def test_a_name_that_can_not_be_printed(tmp_path: Path, demo: Checkpoint) -> None:
    text = config_text("demo", replace(demo, name="a\nb\x1b"), lanes(), ema=False)
    assert "# Written for a?b?: nextvit_nano" in text
    assert read(tmp_path, text).matrices
