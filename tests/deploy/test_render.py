"""What people read: tables that fit 80 columns, nothing cut off, and names shown as they are."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from nextvit_deploy.inspection import inspect
from nextvit_exporters.errors import UnsupportedSpec
from nextvit_models.checkpoint import load_checkpoint, save_safetensors
from nextvit_models.demo import DEMO_CHECKPOINT
from tests.deploy.support import Exported, call, forget, remove_relu, tamper

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The width of a plain terminal."""
    monkeypatch.setenv("COLUMNS", "80")


def tables(out: str) -> list[str]:
    """The lines of tables: those below a rule, to the next line of text that may be as long as it likes."""
    lines = out.splitlines()
    rules = [number for number, line in enumerate(lines) if set(line.strip()) == {"─"}]
    assert rules
    return [line for number in rules for line in lines[number - 1 : number + 2]]


@pytest.mark.parametrize("which", ["demo", "half", "dynamic"])
def test_a_verdict_fits_a_plain_terminal(which: str, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(which)
    out = call("verify", exported.path).out
    assert all(len(line) <= 80 for line in tables(out))
    assert "…" not in out
    rows = 8 if which == "dynamic" else 2
    assert len(re.findall(r"\bverified$", out, re.MULTILINE)) == rows
    assert len(re.findall(r"\bcertified$", out, re.MULTILINE)) >= 10
    assert "same network: onnxruntime " in out
    assert "precision cost: onnxruntime " in out
    if which == "dynamic":
        assert all(inputs in out for inputs in ("noise, batch 3", "noise, 97x69", "noise, 64x128"))


def test_a_failure_says_why(demo: Exported, tmp_path: Path) -> None:
    out = call("verify", tamper(demo.copied(tmp_path), remove_relu)).out
    assert len(re.findall(r"\bfailed$", out, re.MULTILINE)) == 2
    assert "FAIL logits: relative rms " in out
    assert "…" not in out


def test_not_verified_says_why(demo: Exported, tmp_path: Path) -> None:
    path = tamper(demo.copied(tmp_path), forget)
    out = call("verify", path).out
    assert len(re.findall(r"\bnot verified$", out, re.MULTILINE)) == 1
    assert "  the file doesn't say which passes and rounding made it\n" in out


@pytest.mark.parametrize("name", ["[red]w.safetensors", ":boom:.safetensors", "a b'c.safetensors"])
def test_names_are_no_markup(tmp_path: Path, name: str) -> None:
    loaded = load_checkpoint(DEMO_CHECKPOINT)
    labels = ("[bold]zero[/]", ":one:", *loaded.labels[2:])
    path = tmp_path / name
    save_safetensors(replace(loaded, labels=labels), path)
    out = call("inspect", path).out
    assert out.startswith(name)
    assert "10: [bold]zero[/], :one:, 2, 3" in out
    assert call("inspect", path, "--json").json["name"] == name
    (tmp_path / "absent").mkdir()
    assert f"{tmp_path / 'absent' / name}: no such file" in call("inspect", tmp_path / "absent" / name).err


def test_a_checkpoint_is_told_in_facts() -> None:
    found = inspect(None, None, ema=False)
    loaded = load_checkpoint(DEMO_CHECKPOINT)
    assert found.name == DEMO_CHECKPOINT.name
    assert found.facts["variant"] == "nextvit_nano"
    assert found.facts["classes"] == "10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert found.facts["parameters"] == f"{sum(p.numel() for p in loaded.model.parameters()) / 1e6:.2f} M"
    assert found.facts["weights"] == loaded.fingerprint
    assert found.facts["found"] == list(loaded.found)
    assert "demo" in str(found.facts["note"])
    assert "unread tokens" not in found.facts
    assert "short side to 64 (bicubic), centre 64" in str(found.facts["preprocessing"])


def test_work_is_counted_at_the_size_asked_for() -> None:
    def macs(size: tuple[int, int] | None) -> float:
        work = str(inspect(str(DEMO_CHECKPOINT), size, ema=False).facts["work"])
        found = re.match(r"([0-9.]+) GMACs at (\d+)x(\d+)", work)
        assert found is not None
        assert size is None or size == (int(found[2]), int(found[3]))
        return float(found[1])

    assert macs((128, 128)) == pytest.approx(4 * macs(None), rel=0.1)
    assert macs((64, 256)) == pytest.approx(4 * macs((64, 64)), rel=0.1)
    tokens = inspect(None, (40, 40), ema=False).facts["unread tokens"]
    model = load_checkpoint(DEMO_CHECKPOINT).model
    assert tokens == {f"stage {stage}": count for stage, count in model.config.dropped_tokens(40, 40).items()}
    with pytest.raises(UnsupportedSpec, match="31x64 is too small"):
        inspect(None, (31, 64), ema=False)


def test_an_artefact_is_told_in_facts(demo: Exported, tmp_path: Path) -> None:
    found = inspect(str(demo.path), None, ema=False)
    assert found.name == demo.path.name
    assert found.facts["sha256"] == demo.manifest["artifact"]["sha256"]
    assert found.facts["op table"] == demo.manifest["ops"]
    assert found.facts["nodes"] == sum(demo.manifest["ops"].values())
    assert found.facts["spec"] == demo.manifest["spec"]
    assert demo.manifest["artifact"]["sha256"] in call("inspect", demo.path).out  # on one line, to be copied
    assert "52 Conv, 18 Relu, " in " ".join(call("inspect", demo.path).out.split())
    foreign = inspect(str(tamper(demo.copied(tmp_path), forget)), None, ema=False)
    assert foreign.facts["provenance"] == "none: not written by this tool"
    assert "spec" not in foreign.facts


def test_nothing_is_wider_than_the_terminal(demo: Exported) -> None:
    for command in (("inspect",), ("inspect", demo.path), ("doctor",)):
        out = call(*command).out
        assert out
        assert max(map(len, out.splitlines())) <= 80
        assert "…" not in out
    assert Console().width == 80
