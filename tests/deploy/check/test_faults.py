"""Faults planted one at a time: each has its verdict, its exit status and, where there is one, its module."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nextvit_deploy.manifest import manifest_path
from nextvit_models.checkpoint import load_checkpoint, save_safetensors
from nextvit_models.demo import DEMO_CHECKPOINT
from tests.deploy import support_coreml as mil
from tests.deploy.check.support_check import acting
from tests.deploy.support import Exported, Json, call, run, scale_weight, tamper
from tests.deploy.test_coreml_faults import turn_weights_of_attention

HEAD = '[check]\noutput = "out"\ncount = 2\n'


def checked(folder: Path, text: str, *options: str, status: int) -> list[Json]:
    """The rows of a check of ``text``, which ends with ``status``."""
    config = folder / "nextvit-export.toml"
    config.write_text(HEAD + text, encoding="utf-8")
    ran = call("check", config, "--json", "--no-report", *options)
    assert ran.status == status, ran
    rows: list[Json] = json.loads(ran.out)["rows"]
    return rows


def artefact(path: Path) -> str:
    return f'[[artefact]]\npath = "{path}"\n'


def matrix(precision: str = "fp32") -> str:
    return f'[[matrix]]\ncheckpoints = ["demo"]\ntargets = ["onnx"]\nprecisions = ["{precision}"]\n'


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXTVIT_DEPLOY_CACHE", str(tmp_path / "cache"))


def only_problem(rows: list[Json]) -> dict[str, Any]:
    (row,) = rows
    assert row["verdict"] == "failed"
    problem: dict[str, Any] = row["problems"][0]
    return problem


def test_a_scaled_weight_in_the_onnx_file(demo: Exported, tmp_path: Path) -> None:
    path = tamper(demo.copied(tmp_path), scale_weight)
    found = only_problem(checked(tmp_path, artefact(path), status=3))
    assert found["kind"] == "same-network"
    assert found["module"] == "features.3.mlp.conv1"


def test_a_norm_that_was_dropped(tmp_path: Path) -> None:
    """What a route that skips norms writes: the file of a network whose norm is the identity."""
    without = load_checkpoint(DEMO_CHECKPOINT)
    norm = without.model.get_submodule("features.4.norm1")
    assert isinstance(norm, torch.nn.BatchNorm2d)
    with torch.no_grad():
        for tensor, value in ((norm.weight, 1.0), (norm.bias, 0.0), (norm.running_mean, 0.0), (norm.running_var, 1.0)):
            assert tensor is not None
            tensor.fill_(value)
    save_safetensors(without, tmp_path / "without.safetensors")
    made = call("onnx", tmp_path / "without.safetensors", "--output", tmp_path, "--quiet")
    assert made.status == 0, made
    (path,) = tmp_path.glob("*.onnx")
    manifest_path(path).unlink()
    found = only_problem(checked(tmp_path, artefact(path), status=3))
    assert found["kind"] == "same-network"
    assert found["module"].startswith("features.4.e_mhsa.")
    told = json.loads((tmp_path / "out" / "check.json").read_text())["rows"][0]["outcome"]["layers"]
    assert "features.4.norm1" in told["series"][0]["partings"][0]["carries"]


@mil.needs_coremltools
def test_a_flag_that_was_flipped_in_the_package(package: Exported, tmp_path: Path) -> None:
    path = mil.planted(package, tmp_path, turn_weights_of_attention)
    found = only_problem(checked(tmp_path, artefact(path), status=3))
    assert found["kind"] == "same-network"
    assert found["module"] == "features.6.e_mhsa"


def test_a_tolerance_that_is_missed(tmp_path: Path) -> None:
    limits = "[tolerance.onnx]\nfp16 = { precision-cost = 1e-4 }\n"
    found = only_problem(checked(tmp_path, matrix("fp16") + limits, status=3))
    assert found["kind"] == "tolerance"
    assert "stated 1.0e-04" in found["message"]


def test_a_regression_since_the_baseline(demo: Exported, tmp_path: Path) -> None:
    before = json.loads(manifest_path(demo.path).read_text(encoding="utf-8"))
    before["artifact"]["bytes"] //= 2
    (tmp_path / "before.json").write_text(json.dumps(before), encoding="utf-8")
    text = matrix() + "[regression]\nsize-ratio = 1.05\n"
    rows = checked(tmp_path, text, "--baseline", str(tmp_path / "before.json"), status=3)
    assert only_problem(rows)["kind"] == "regression"
    (moved,) = [each for each in rows[0]["moves"] if each["regression"]]
    assert moved["what"] == "size"


@pytest.mark.parametrize(("what", "told"), [("kill", "SIGKILL"), ("segfault", "SIGSEGV")])
def test_a_process_that_dies(what: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acting(monkeypatch, tmp_path)
    site = next((tmp_path / "site").iterdir())
    site.write_text(site.read_text().replace('cell.name.partition("-")[0]', repr(what)))
    found = only_problem(checked(tmp_path, matrix(), status=3))
    assert found["kind"] == "crash"
    assert told in found["message"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte, where this process may make one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if mount is None or umount is None or os.name != "posix":
        pytest.skip("this system has no mount")
    made = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"this user can't make a disk: {made.stderr.strip()}")
    yield place
    subprocess.run([umount, str(place)], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    found = only_problem(checked(tmp_path, matrix(), "--output", str(small_disk), status=3))
    assert found["kind"] == "error"
    assert "no space left on the disk" in found["message"]
    left = [path for path in small_disk.rglob("*") if path.is_file()]
    assert {path.suffix for path in left} <= {".json", ".log"}


def test_the_second_time_nothing_is_done(tmp_path: Path) -> None:
    (first,) = checked(tmp_path, matrix(), status=0)
    (second,) = checked(tmp_path, matrix(), status=0)
    assert (first["cached"], second["cached"]) == (False, True)
    assert {**first, "cached": True} == second


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    """As it is called: one line for an error, and PyTorch is not waited for."""
    ran = run("check", str(tmp_path / "nowhere.toml"))
    assert ran.status == 1
    assert ran.err.count("\n") == 1
