from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nextvit_deploy.kit.merge import merge_verdict
from nextvit_exporters.errors import DeployError
from tests.deploy.kit.kits import DYNAMIC, Made, check, make
from tests.deploy.support import Json, contents, strict_json

Edit = Callable[[Json], object]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make(tmp_path)


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A kit with a verified verdict, which a test may copy but not change."""
    made = make(tmp_path_factory.mktemp("proven"), verdict="verified")
    assert check(made).status == 0
    return made


def refused(kit: Path, verdict: Path) -> str:
    before = contents(kit.parent)
    with pytest.raises(DeployError) as raised:
        merge_verdict(kit, verdict)
    assert "\n" not in str(raised.value)
    assert contents(kit.parent) == before
    return str(raised.value)


def edited(made: Made, folder: Path, edit: Edit) -> Path:
    found = made.json("verdict.json")
    edit(found)
    path = folder / "edited.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


def test_a_verified_device_joins_both_manifests(made: Made) -> None:
    assert check(made).status == 0
    merged = merge_verdict(made.folder, made.verdict)
    assert merged == made.json("manifest.json") == strict_json(made.manifest.read_text(encoding="utf-8"))
    assert (merged["verdict"], merged["device"]["verdict"]) == ("not verified", "verified")
    assert merged["device"]["gpu"]["name"] == "Tesla T4"
    assert check(made).status == 0, "merging changes nothing that check.py looks at"


def test_a_failed_device_fails_the_whole_and_a_later_one_mends_it(tmp_path: Path) -> None:
    made = make(tmp_path, verdict="verified")
    assert check(made, FAULT="wrong").status == 3
    assert merge_verdict(made.folder, made.verdict)["verdict"] == "failed"
    assert strict_json(made.manifest.read_text(encoding="utf-8"))["verdict"] == "failed"
    assert check(made).status == 0
    merged = merge_verdict(made.folder, made.verdict)
    assert (merged["verdict"], merged["device"]["verdict"]) == ("verified", "verified")
    assert merged == merge_verdict(made.folder, made.verdict)
    assert set(merged) == {"verdict", "onnx", "artifact", "device"}


def test_without_a_driver_the_manifest_keeps_its_own_verdict(tmp_path: Path) -> None:
    made = make(tmp_path, verdict="verified")
    assert check(made, CUINIT="missing").status == 4
    merged = merge_verdict(made.folder, made.verdict)
    assert (merged["verdict"], merged["device"]["why"]) == ("verified", "no CUDA driver")


def test_the_verdict_of_another_kit_is_refused(made: Made, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = make(tmp_path / "other", DYNAMIC)
    assert check(other).status == 0
    assert "belongs to another kit" in refused(made.folder, other.verdict)


def test_a_manifest_of_another_model_is_left_alone(made: Made) -> None:
    assert check(made).status == 0
    foreign = {"verdict": "verified", "onnx": {"sha256": "0" * 64}, "artifact": {"sha256": "1" * 64}}
    made.manifest.write_text(json.dumps(foreign), encoding="utf-8")
    assert "device" in merge_verdict(made.folder, made.verdict)
    assert strict_json(made.manifest.read_text(encoding="utf-8")) == foreign
    made.manifest.unlink()
    assert "device" in merge_verdict(made.folder, made.verdict)
    assert not made.manifest.exists()


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "check.py"])
def test_a_kit_that_changed_since_is_refused(made: Made, name: str) -> None:
    assert check(made).status == 0
    with (made.folder / name).open("ab") as file:
        file.write(b" ")
    assert f"{name} is not the file that the kit was made with" in refused(made.folder, made.verdict)


def test_what_is_no_kit_is_refused(tmp_path: Path, proven: Made) -> None:
    (tmp_path / "empty").mkdir()
    assert "is no kit" in refused(tmp_path / "empty", proven.verdict)
    assert "is no kit" in refused(tmp_path / "gone", proven.verdict)


@pytest.mark.parametrize("damage", ['{"kind": "nextvit-deploy kit"}', '{"kind": "nextvit-deploy kit", "files": {}}'])
def test_a_damaged_kit_is_refused(made: Made, proven: Made, damage: str) -> None:
    (made.folder / "kit.json").write_text(damage, encoding="utf-8")
    assert "is damaged" in refused(made.folder, proven.verdict)


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"verdict": 3}', '{"verdict": "verified", "device": 3}'])
def test_a_damaged_manifest_is_refused(made: Made, damage: str) -> None:
    assert check(made).status == 0
    (made.folder / "manifest.json").write_text(damage, encoding="utf-8")
    assert str(made.folder / "manifest.json") in refused(made.folder, made.verdict)


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{", '{"a": NaN}', "[" * 100_000, '"x"', "\x00", "9" * 5000, "{}" + " " * (1 << 20)],
    ids=range(10),
)
def test_hostile_json_is_one_line(proven: Made, tmp_path: Path, text: str) -> None:
    path = tmp_path / "hostile.json"
    path.write_text(text, encoding="utf-8")
    assert str(path) in refused(proven.folder, path)


def test_a_file_that_cannot_be_read_is_one_line(proven: Made, tmp_path: Path) -> None:
    assert "can't be read" in refused(proven.folder, tmp_path / "gone.json")
    assert "can't be read" in refused(proven.folder, tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda found: found.pop("kit"), "'kit' is missing"),
        (lambda found: found.update(schema=True), "'schema' is missing or of another kind"),
        (lambda found: found.update(schema=2), "schema or verdict is unknown"),
        (lambda found: found.update(verdict="passed"), "schema or verdict is unknown"),
        (lambda found: found.update(date="yesterday"), "date"),
        (lambda found: found.update(extra="x" * 10), "fields that check.py doesn't write"),
        (lambda found: found.update(files={}), "belongs to another kit"),
        (lambda found: found.update(kit="0" * 64), "belongs to another kit"),
        (lambda found: found.pop("comparison"), "'comparison' is missing"),
        (lambda found: found["comparison"].update(relative_rms=0.5), "its own figures don't"),
        (lambda found: found["comparison"].update(relative_rms="0"), "its own figures don't"),
        (lambda found: found["comparison"].update(finite=False), "its own figures don't"),
        (lambda found: found["tolerance"].update(relative_rms=1.0), "its own figures don't"),
        (
            lambda found: [
                found.pop(each)
                for each in ("gpu", "tensorrt", "engine", "kernels", "dtypes", "comparison", "tolerance", "latency_ms")
            ],
            "says verified without a measurement",
        ),
    ],
    ids=range(14),
)
def test_a_verdict_that_check_py_would_not_write_is_refused(
    proven: Made, tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    assert message in refused(proven.folder, edited(proven, tmp_path, edit))
