from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nextvit_deploy.kit.merge import merge_verdict
from nextvit_deploy.render import show_device
from nextvit_exporters.engine_spec import Range
from nextvit_exporters.errors import DeployError
from nextvit_exporters.files import sha256_of
from nextvit_exporters.spec import Precision
from tests.deploy.kit.kits import DYNAMIC, STATIC, Made, check, make, spec_of
from tests.deploy.support import Json, call, contents, one_line, refusal, strict_json

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


@pytest.mark.parametrize(
    "edit",
    [
        lambda told: told.update(tolerance={}),
        lambda told: told["tolerance"].update(relative_rms=None),
        lambda told: told.pop("gpu"),
        lambda told: told["gpu"].update(capability=7.5),
        lambda told: told["dtypes"].update(engine="Half"),
        lambda told: told["output"].update(dtype="complex64"),
        lambda told: told.update(files={"model.onnx": 3}),
    ],
    ids=range(7),
)
def test_a_kit_with_a_damaged_field_is_refused(made: Made, edit: Edit) -> None:
    assert check(made).status == 0
    told, found = made.json("kit.json"), made.json("verdict.json")
    edit(told)
    (made.folder / "kit.json").write_text(json.dumps(told), encoding="utf-8")
    found["kit"] = sha256_of(made.folder / "kit.json")
    made.verdict.write_text(json.dumps(found), encoding="utf-8")
    assert "kit.json is damaged; write the kit again" in refused(made.folder, made.verdict)


@pytest.mark.parametrize("fault", ["wrong", "infinite", "type", "edge-type", "untold"])
def test_every_verdict_of_check_py_can_be_merged_and_shown(tmp_path: Path, fault: str) -> None:
    for place, spec in (("half", STATIC), ("int8", spec_of(Range.of(2), Precision.INT8))):
        (tmp_path / place).mkdir()
        made = make(tmp_path / place, spec)
        assert check(made, FAULT=fault, GPU="NVIDIA A10:8.6").status in {3, 4}
        device = merge_verdict(made.folder, made.verdict)["device"]
        console = Console(file=StringIO())
        show_device(console, device)
        assert device["verdict"] in console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO above


@pytest.mark.parametrize("damage", ['{"kind": "nextvit-deploy kit"}', '{"kind": "nextvit-deploy kit", "files": {}}'])
def test_a_damaged_kit_is_refused(made: Made, proven: Made, damage: str) -> None:
    (made.folder / "kit.json").write_text(damage, encoding="utf-8")
    assert "is damaged" in refused(made.folder, proven.verdict)


@pytest.mark.parametrize(
    "damage",
    ["", "[]", "{}", '{"verdict": 3}', '{"verdict": "verified", "x": 1e999}', '{"verdict": "verified", "device": 3}'],
)
def test_a_damaged_manifest_is_refused(made: Made, damage: str) -> None:
    assert check(made).status == 0
    (made.folder / "manifest.json").write_text(damage, encoding="utf-8")
    assert str(made.folder / "manifest.json") in refused(made.folder, made.verdict)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{",
        '{"a": NaN}',
        '{"a": 1e999}',
        "[" * 100_000,
        '"x"',
        "\x00",
        "9" * 5000,
        "{}" + " " * (1 << 20),
    ],
    ids=range(11),
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
        (lambda found: found["files"].update({"model.onnx": "0" * 64}), "belongs to another kit"),
        (lambda found: found.update(files={}), "'files' is missing or of another kind"),
        (lambda found: found.update(kit="0" * 64), "belongs to another kit"),
        (lambda found: found.pop("comparison"), "'comparison' is missing"),
        (lambda found: found["comparison"].update(relative_rms=0.5), "own figures say failed (relative rms 5.0e-01 >"),
        (lambda found: found["comparison"].update(relative_rms="0"), "'comparison.relative_rms' is missing or of an"),
        (lambda found: found["comparison"].update(relative_rms=10**400), "'comparison.relative_rms' is missing or"),
        (lambda found: found["comparison"].update(relative_rms=-1e-3), "'comparison.relative_rms' is missing or"),
        (lambda found: found["comparison"].update(finite=False), "'comparison' has fields that check.py doesn't"),
        (lambda found: found.update(comparison={"images": 5, "finite": False}), "say failed (NaN or infinity"),
        (lambda found: found.update(comparison={"shape": [5], "expected shape": [5, 3]}), "say failed (the engine"),
        (lambda found: found["tolerance"].update(relative_rms=1.0), "its tolerance is not the kit's"),
        (lambda found: found.update(gpu={}), "'gpu.name' is missing"),
        (lambda found: found["gpu"].update(name="two\nlines"), "'gpu.name' is missing or of another kind"),
        (lambda found: found["gpu"].update(capability="8.6"), "own figures say not verified (this is Tesla T4 (8.6)"),
        (lambda found: found.update(tolerance={}), "'tolerance.relative_rms' is missing"),
        (lambda found: found.update(latency_ms={}), "'latency_ms.shape' is missing"),
        (lambda found: found["latency_ms"]["with transfers"].update(p50=None), "'latency_ms.with transfers.p50' is"),
        (lambda found: found["engine"].update(path="x"), "'engine' has fields that check.py doesn't write"),
        (lambda found: found["dtypes"].pop("logits"), "'dtypes.logits' is missing"),
        (lambda found: found["dtypes"].update(logits="HALF"), "own figures say failed ('logits' is HALF, not FLOAT)"),
        (lambda found: found["dtypes"].update(network=["FLOAT"]), "say failed (the network computes in FLOAT)"),
        (lambda found: found["dtypes"].update(network=[]), "say failed (nothing in it computes in Half)"),
        (lambda found: found["dtypes"].update(engine=["Half", "Float"]), "a kernel of the engine computes in Float"),
        (lambda found: found.update(why="it is slow"), "it says verified and gives a reason against it"),
        (lambda found: found.update(verdict="not verified"), "it says not verified, and its own figures say verified"),
        (lambda found: found.update(verdict="failed", why="x"), "it says failed, and its own figures say verified"),
        (
            lambda found: [
                found.pop(each)
                for each in ("gpu", "tensorrt", "engine", "kernels", "dtypes", "comparison", "tolerance", "latency_ms")
            ],
            "says verified without a measurement",
        ),
    ],
    ids=range(34),
)
def test_a_verdict_that_check_py_would_not_write_is_refused(
    proven: Made, tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    assert message in refused(proven.folder, edited(proven, tmp_path, edit))


@pytest.mark.parametrize(
    ("own", "environment", "status", "line"),
    [
        ("verified", {}, 0, None),
        ("not verified", {}, 4, "is not verified: as its manifest says"),
        ("verified", {"GPU": "NVIDIA A10:8.6"}, 4, "is not verified: this is NVIDIA A10 (8.6), the kit is for Tesla"),
        ("verified", {"CUINIT": "missing"}, 4, "is not verified: no CUDA driver"),
        ("verified", {"FAULT": "wrong"}, 3, "is failed: relative rms 1.0e-01 > 1e-02"),
        ("failed", {}, 3, "is failed: as its manifest says"),
    ],
)
def test_merging_leaves_with_the_worse_verdict(
    tmp_path: Path, own: str, environment: dict[str, str], status: int, line: str | None
) -> None:
    made = make(tmp_path, verdict=own)
    check(made, **environment)
    ran = call("verify", made.folder, "--merge", made.verdict)
    assert (ran.status, "on the device:" in ran.out) == (status, True)
    assert ran.err == "" if line is None else line in one_line(ran.err)
    again = call("verify", made.folder, "--merge", made.verdict, "--json")
    assert (again.status, again.json["device"]["kit"]) == (status, sha256_of(made.folder / "kit.json"))


@pytest.mark.parametrize("option", [["--checkpoint", "x.pth"], ["--images", "x"], ["--ema"]])
def test_what_merging_would_ignore_is_refused(proven: Made, option: list[str]) -> None:
    before = contents(proven.folder)
    line = refusal("verify", proven.folder, "--merge", proven.verdict, *option, status=2)
    assert f"executes nothing, so it can't be combined with {option[0]}; leave one out" in line
    assert contents(proven.folder) == before


def test_a_kit_is_not_executed_here(proven: Made, tmp_path: Path) -> None:
    assert "is a kit: run its check.py on the GPU's machine, then add --merge VERDICT" in refusal(
        "verify", proven.folder
    )
    assert "is no artefact of" in refusal("verify", tmp_path)
