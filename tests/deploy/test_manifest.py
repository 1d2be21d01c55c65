"""The manifest beside an artefact and the record inside it: strict, true, and the same for the same export."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import onnx
import pytest

from nextvit_deploy.compare import Comparison
from nextvit_deploy.manifest import CheckpointInfo, Manifest, manifest_path, plain, provenance, rewrites, versions
from nextvit_deploy.verdict import Verdict
from nextvit_deploy.verify import Check
from nextvit_exporters import to_onnx
from nextvit_exporters.errors import OutputNotWritten
from nextvit_exporters.files import sha256_of
from nextvit_exporters.passes.base import TOGETHER, PassRecord
from nextvit_exporters.spec import Artifact, ExportSpec, Tolerance
from nextvit_models.checkpoint import load_checkpoint
from nextvit_models.demo import DEMO_CHECKPOINT
from tests.deploy.support import Exported, Json, call, strict_json

MARKS_OF_A_RUN = re.compile(r"20\d\d-\d\d|\d\d:\d\d:\d\d|/tmp|/home|/Users|\\\\|seconds|\.safetensors|\.pth|\.onnx")
"""Dates, times, paths, file names: what may not be inside an artefact."""


def recorded(path: Path) -> dict[str, Json | list[str]]:
    """The JSON entries inside an artefact, by key."""
    model = onnx.load(str(path))
    return {entry.key: json.loads(entry.value) for entry in model.metadata_props}


def test_it_says_what_was_exported(demo: Exported) -> None:
    manifest = demo.manifest
    checkpoint = load_checkpoint(DEMO_CHECKPOINT)
    assert manifest["schema"] == 1
    assert manifest["artifact"] == {
        "file": demo.path.name,
        "sha256": sha256_of(demo.path),
        "bytes": demo.path.stat().st_size,
    }
    assert manifest["checkpoint"] == {
        "name": DEMO_CHECKPOINT.name,
        "sha256": sha256_of(DEMO_CHECKPOINT),
        "fingerprint": checkpoint.fingerprint,
        "layout": "official",
        "found": list(checkpoint.found),
    }
    assert manifest["versions"] == versions("onnx")
    assert manifest["versions"]["torch"].startswith("2.")
    assert "not installed" not in manifest["versions"].values()
    assert manifest["ops"]["Conv"] > 40
    assert re.fullmatch(r"\d+ of \d+ operations in fp32", manifest["dtypes"])
    assert manifest["seconds"]["build onnx"] > 0


def test_the_spec_comes_back(demo: Exported, half: Exported, dynamic: Exported) -> None:
    for each in (demo, half, dynamic):
        spec = ExportSpec.from_dict(each.manifest["spec"])
        assert strict_json(json.dumps(spec.as_dict())) == each.manifest["spec"]
        assert spec.stem + to_onnx.SUFFIX == each.path.name
        assert spec.preprocessing == load_checkpoint(DEMO_CHECKPOINT).preprocessing
        inside = recorded(each.path)[to_onnx.MANIFEST_KEY]
        assert isinstance(inside, dict)
        assert inside["spec"] == each.manifest["spec"]


def test_the_passes_are_all_there(demo: Exported) -> None:
    spec = ExportSpec.from_dict(demo.manifest["spec"])
    names = [each["name"] for each in demo.manifest["passes"]]
    assert names == [*(each.name for each in to_onnx.passes_for(spec)), TOGETHER]
    for each in demo.manifest["passes"]:
        assert each["certified"] is True
        assert each["error_float64"] < 1e-12
    inside = recorded(demo.path)[to_onnx.MANIFEST_KEY]
    assert isinstance(inside, dict)
    assert inside["passes"] == {e["name"]: e["rewrites"] for e in demo.manifest["passes"] if e["name"] != TOGETHER}


def test_both_questions_are_answered_with_figures(demo: Exported) -> None:
    for check in demo.manifest["checks"]:
        assert (check["verdict"], check["why"]) == ("verified", "")
        (comparison,) = check["comparisons"]
        assert set(comparison) == {each.name for each in fields(Comparison)}
        assert 0 < comparison["relative_rms"] <= comparison["tolerance"]["relative_rms"] <= 1e-5
        assert (comparison["count"], comparison["top1"], comparison["can_flip"]) == (8, 1.0, 0)


def test_inside_the_artefact_nothing_tells_of_the_run(demo: Exported, half: Exported, dynamic: Exported) -> None:
    for each in (demo, half, dynamic):
        entries = recorded(each.path)
        assert set(entries) == {"class_names", "preprocessing", to_onnx.MANIFEST_KEY}
        assert entries["class_names"] == [str(digit) for digit in range(10)]
        assert MARKS_OF_A_RUN.findall(json.dumps(entries)) == []
        data = each.path.read_bytes()
        for mark in (each.path.parent, Path.cwd(), Path.home(), DEMO_CHECKPOINT.stem):
            assert str(mark).encode() not in data
    assert MARKS_OF_A_RUN.findall("at 2026-01-02 12:00:00 from w.pth") == ["2026-01", "12:00:00", ".pth"]


def test_beside_the_artefact_no_path_of_this_machine(demo: Exported) -> None:
    text = manifest_path(demo.path).read_text(encoding="utf-8")
    for folder in (demo.path.parent, Path.cwd(), Path.home(), DEMO_CHECKPOINT.parent):
        assert str(folder) not in text


def test_the_same_export_gives_the_same_bytes(demo: Exported, tmp_path: Path) -> None:
    """Another process, another folder, and the checkpoint written anew under another name."""
    ran = call("convert", DEMO_CHECKPOINT, tmp_path / "renamed.safetensors")
    assert ran.status == 0
    ran = call("onnx", tmp_path / "renamed.safetensors", "--output", tmp_path / "elsewhere", "--json")
    assert ran.status == 0
    assert (tmp_path / "elsewhere" / demo.path.name).read_bytes() == demo.path.read_bytes()
    again, first = ran.json, demo.manifest
    assert again["checkpoint"]["name"] == "renamed.safetensors"
    assert again["artifact"] == first["artifact"]
    assert {key for key in first if again[key] != first[key]} <= {"checkpoint", "notes", "passes", "seconds"}


def comparison(value: float) -> Comparison:
    return Comparison("y", 1, True, value, value, value, value, value, None, None, value, 1, Tolerance(1.0, "none"))  # noqa: FBT003


def manifest(spec: ExportSpec, path: Path, *verdicts: Verdict) -> Manifest:
    checks = tuple(
        Check("same network", "executor", "exact", "PyTorch", "noise", each, "", (comparison(math.inf),))
        for each in verdicts
    )
    record = PassRecord("spoil", False, 1, (), (1, 1), (1, 1), (1, 1), math.inf, math.nan, 0.1)  # noqa: FBT003
    info = CheckpointInfo("w.pth", "0" * 64, "1" * 64, "timm", ("found",))
    return Manifest(spec, info, Artifact(path, "2" * 64, 3), (record,), {"Conv": 1}, "", checks, (), {}, {})


@pytest.fixture
def spec(demo: Exported) -> ExportSpec:
    return ExportSpec.from_dict(demo.manifest["spec"])


def test_infinite_figures_are_words(spec: ExportSpec, tmp_path: Path) -> None:
    whole = manifest(spec, tmp_path / "a.onnx", Verdict.FAILED)
    whole.write(tmp_path / "a.json")
    read = strict_json((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert read == whole.as_dict()
    assert (read["passes"][0]["error_float64"], read["passes"][0]["error_float32"]) == ("inf", "nan")
    assert read["checks"][0]["comparisons"][0]["margin"] == "inf"
    assert read["verdict"] == "failed"


def test_the_verdict_is_that_of_the_checks(spec: ExportSpec) -> None:
    path = Path("a.onnx")
    assert manifest(spec, path).verdict is Verdict.NOT_VERIFIED
    assert manifest(spec, path, Verdict.VERIFIED).as_dict()["verdict"] == "verified"
    assert manifest(spec, path, Verdict.VERIFIED, Verdict.NOT_VERIFIED).as_dict()["verdict"] == "not verified"


def test_it_is_written_whole_or_not_at_all(spec: ExportSpec, tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OutputNotWritten):
        manifest(spec, tmp_path / "a.onnx").write(tmp_path / "a.json")
    shutil.rmtree(tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_what_goes_inside_depends_on_what_was_asked_alone(spec: ExportSpec) -> None:
    """Measured errors, seconds and the checkpoint's name differ from run to run; they stay outside."""
    info = CheckpointInfo("w.pth", "0" * 64, "1" * 64, "timm", ("found",))
    done = PassRecord("fold", True, 2, (), (3, 1), (5, 4), (7, 6), 1e-16, 1e-8, 0.5)  # noqa: FBT003
    again = replace(done, error_float64=2e-16, error_float32=2e-8, seconds=9.0)
    same = provenance(spec, replace(info, name="other.pth", sha256="9" * 64, found=()), (again,))
    assert provenance(spec, info, (done,)) == same
    for other in (
        provenance(replace(spec, batch=2), info, (done,)),
        provenance(spec, replace(info, fingerprint="3" * 64), (done,)),
        provenance(spec, info, (replace(done, rewrites=3),)),
        provenance(spec, info, ()),
    ):
        assert other != same


def test_rewrites_count_what_was_kept() -> None:
    done = PassRecord("fold", True, 2, (), (3, 1), (5, 4), (7, 6), 1e-16, 1e-8, 0.5)  # noqa: FBT003
    spoiled = replace(done, name="spoil", certified=False)
    assert rewrites([done, spoiled, replace(done, name=TOGETHER)]) == {"fold": 2}


def test_plain() -> None:
    given = {"a": (1, 2.5, math.inf), "b": [-math.inf, math.nan, Verdict.FAILED], 3: {"c": None, "d": True}}
    expected = {"a": [1, 2.5, "inf"], "b": ["-inf", "nan", "failed"], "3": {"c": None, "d": True}}
    assert plain(given) == expected
    assert type(plain(Verdict.FAILED)) is str


def test_its_place_is_beside_the_artefact() -> None:
    assert manifest_path(Path("out/a.onnx")) == Path("out/a.onnx.json")
