"""``check-preproc``: its exit status, its one line, and its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from nextvit_deploy.cli.contract import check_preproc
from nextvit_deploy.contract.given import test_picture as make_picture

PIPELINE = """
from torchvision import transforms as T
mean, std = (0.3883, 0.3285, 0.3102), (0.2559, 0.1246, 0.1258)
def cut(filter): return [T.Resize(64, filter), T.CenterCrop(64), T.ToTensor()]
def right(x):
    print("noise")
    return T.Compose([*cut(T.InterpolationMode.BICUBIC), T.Normalize(mean, std)])(x.convert("RGB"))[None]
def bilinear(x): return T.Compose([*cut(T.InterpolationMode.BILINEAR), T.Normalize(mean, std)])(x)[None]
def imagenet(x): return T.Compose([*cut(3), T.Normalize((.485, .456, .406), (.229, .224, .225))])(x)[None]
def random(x): return T.Compose([T.RandomResizedCrop(64), T.ToTensor(), T.Normalize(mean, std)])(x)[None]
def bgr(x): return right(x).flip(1)
def nan(x): return right(x) * float("nan")
def small(x): return right(x)[..., :40]
def fails(x): return x.no_such_thing
"""


def check(*arguments: str | Path) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(check_preproc)
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preproc") / "mine.py"
    path.write_text(PIPELINE)
    return path


def test_torchvisions_own_agrees(pipeline: Path) -> None:
    ran = check(f"{pipeline}:right")
    assert (ran.exit_code, ran.exception) == (0, None), ran.output
    assert "agrees with the checkpoint" in ran.stdout


@pytest.mark.parametrize(
    ("name", "step", "fix"),
    [
        ("bilinear", "filter", "resize with bicubic"),
        ("imagenet", "stats", "subtract mean (0.3883"),
        ("bgr", "channels", "BGR"),
    ],
)
def test_the_wrong_step_is_named(pipeline: Path, name: str, step: str, fix: str) -> None:
    ran = check(f"{pipeline}:{name}", "--json")
    assert ran.exit_code == 3
    assert ran.stderr.count("nextvit-export: ") == 1
    record = json.loads(ran.stdout)
    assert not record["agrees"]
    assert record["explained"]
    assert step in record["differing"]
    assert fix in record["differing"][step]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("zeros", "every value is 0.0; the picture never reached it"),
        ("blue", "every value of channel 2 is 3.0"),
        ("noise", "no known steps explain it"),
    ],
)
def test_a_saved_tensor(name: str, said: str, tmp_path: Path) -> None:
    make_picture().save(tmp_path / "a.png")
    noise = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
    blue = noise.copy()
    blue[:, 2] = 3
    np.save(tmp_path / "a.npy", {"zeros": noise * 0, "blue": blue, "noise": noise}[name])
    ran = check(tmp_path / "a.npy", "--image", tmp_path / "a.png")
    assert ran.exit_code == 3
    assert said in ran.stderr
    assert ("where: mean" in ran.stdout) == (name == "noise")
    assert ("nothing known comes near" in ran.stdout) == (name == "noise")


def test_random_augmentation_is_the_finding(pipeline: Path) -> None:
    ran = check(f"{pipeline}:random", "--json")
    assert ran.exit_code == 3
    assert "build it in eval mode" in ran.stderr
    record = json.loads(ran.stdout)
    assert (record["agrees"], record["explained"], record["largest"]) == (False, False, None)


def test_quiet(pipeline: Path) -> None:
    ran = check(f"{pipeline}:right", "--quiet")
    assert (ran.exit_code, ran.stdout) == (0, "")


@pytest.mark.parametrize("name", ["nan", "small", "fails", "missing"])
def test_what_cannot_be_compared_is_one_line(pipeline: Path, name: str) -> None:
    ran = check(f"{pipeline}:{name}")
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert ran.stderr.splitlines()[-1].startswith("nextvit-export: ")
    assert "Traceback" not in ran.stderr


def test_a_tensor_needs_its_picture(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1, 3, 64, 64), np.float32))
    ran = check(tmp_path / "a.npy")
    assert ran.exit_code == 1
    assert "--image" in ran.stderr
