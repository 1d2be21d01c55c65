"""Reading a folder: what belongs together, what is never believed, and what is left out with a reason."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nextvit_deploy.manifest import manifest_path
from nextvit_deploy.report import fields
from nextvit_deploy.report.collect import collect
from nextvit_deploy.verdict import Verdict
from nextvit_exporters.errors import DeployError
from tests.deploy.report.support_report import (
    EVIL,
    Json,
    asked,
    bisection,
    checked,
    device,
    digest,
    evaluation,
    manifest,
    put,
    whole,
    write,
)
from tests.deploy.support import Exported


def test_everything_finds_its_artefact(tmp_path: Path) -> None:
    found = collect(whole(tmp_path / "out"))
    assert (found.name, found.verdict, found.skipped) == ("out", Verdict.VERIFIED, ())
    items = {each.title: each for each in found.items}
    assert [each.label for each in found.items] == ["fp16.onnx", "int8.onnx", "fp16.engine", "fp16.mlpackage"]
    int8 = items["nano_int8.onnx"]
    assert (int8.lane, int8.precision, int8.error) == ("onnx", "int8", 5e-3)
    assert int8.made is not None
    assert int8.made.plan is not None
    assert int8.made.plan.keep == ("features.1",)
    assert int8.evaluated is not None
    assert (int8.evaluated.top1, int8.evaluated.flipped) == ((0.99, 1.0), 1)
    assert [each.thumbnail is None for each in int8.evaluated.pictures] == [False, True]
    assert all(each.layers is not None and each.layers.sha256 == digest_of(each) for each in found.items)
    package = items["nano_fp16.mlpackage"].made
    assert package is not None
    assert package.headroom is not None
    assert [each.name for each in package.headroom.layers] == ["features.1.e_mhsa", "matmul_1"]
    engine = items["nano_fp16.engine"]
    assert [each.short for each in engine.latencies] == ["0.412 ms", "0.466 ms with transfers"]
    assert {each.basis for each in engine.latencies} == {"measured"}


def digest_of(item: Any) -> str:
    return str(item.made.sha256)


def test_real_manifests_are_read_whole(demo: Exported, package: Exported) -> None:
    for exported in (demo, package):
        told = json.loads(manifest_path(exported.path).read_text())
        (item,) = collect(exported.path.parent).items
        assert (item.verdict, item.place) == (Verdict.VERIFIED, exported.path.name)
        assert item.made is not None
        assert item.made.sha256 == told["artifact"]["sha256"]
        assert len(item.made.checks) == len(told["checks"])
        assert len(item.made.passes) == len(told["passes"])
        assert item.error == max(
            each["relative_rms"]
            for check in told["checks"]
            if check["question"] == "precision cost"
            for each in check["comparisons"]
        )
        assert (item.made.headroom is not None) is (exported is package)


def test_a_checks_rows_take_what_lies_beside_and_the_worst_comes_first(tmp_path: Path) -> None:
    found = collect(checked(tmp_path))
    assert found.verdict is Verdict.FAILED
    assert [each.verdict.value for each in found.items] == ["failed"] * 2 + ["not verified"] + ["verified"] * 3
    failed, crashed, missing = found.items[:3]
    assert failed.problems[0].startswith("not the same network <img src=x")
    assert failed.evaluated is not None
    assert failed.layers is not None
    assert failed.layers.parting is not None
    assert failed.place == "nano_int8.onnx"
    assert failed.latencies[0].short == "0.71x PyTorch"
    assert [each.regression for each in failed.moves] == [True, False]
    assert (crashed.made, crashed.problems) == (None, ("killed by SIGKILL after 40 s",))
    assert "\\u202e" in missing.title
    assert found.skipped == (("broken.json", "it is no JSON"),)


def test_a_file_that_is_not_the_manifests_is_not_verified(tmp_path: Path) -> None:
    """Whatever the manifest says; and one that isn't there is said not to be."""
    path = put(tmp_path, manifest("a.onnx", b"right"), b"right")
    assert collect(tmp_path).items[0].place == "a.onnx"
    path.write_bytes(b"wrong")
    (item,) = collect(tmp_path).items
    assert item.verdict is Verdict.NOT_VERIFIED
    assert item.problems[0].startswith("the file beside its manifest is another one than was verified")
    path.unlink()
    (item,) = collect(tmp_path).items
    assert (item.verdict, item.place) == (Verdict.VERIFIED, "")


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"checks": []}, Verdict.NOT_VERIFIED),
        ({"checks": [asked("precision cost", 1.0, "failed", "too far")]}, Verdict.FAILED),
        ({"checks": [asked("precision cost", 1e-3), asked("same network", 0.0, "not verified")]}, Verdict.NOT_VERIFIED),
        ({"verdict": "failed"}, Verdict.FAILED),
        ({"device": device() | {"verdict": "failed", "why": "wrong types"}}, Verdict.FAILED),
        ({"device": {"verdict": "not verified", "why": "no GPU"}}, Verdict.VERIFIED),
    ],
)
def test_a_manifest_is_as_bad_as_the_worst_it_says(tmp_path: Path, change: Json, verdict: Verdict) -> None:
    put(tmp_path, manifest("a.onnx") | change)
    assert collect(tmp_path).items[0].verdict is verdict


def test_what_is_damaged_is_named_and_the_rest_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "LARGEST", 40_000)
    put(tmp_path, manifest("good.onnx"))
    bad: dict[str, object] = {
        "list.json": [1],
        "deep.json": None,
        "huge.json": "x" * 50_000,
        "foreign.json": {"name": "package"},
        "kind.json": manifest("k.onnx") | {"verdict": "excellent"},
        "hash.json": manifest("h.onnx") | {"artifact": {"file": "h.onnx", "sha256": "0", "bytes": 1}},
        "size.json": manifest("s.onnx") | {"artifact": {"file": "s.onnx", "sha256": digest(""), "bytes": -1}},
        "target.json": manifest("t.onnx") | {"spec": {"target": "tvm", "precision": "fp16", "model": "m"}},
        "many.json": manifest("m.onnx") | {"checks": {}},
        "a.layers.json": {"artefact": "a", "sha256": digest("a"), "series": [{}], "notes": []},
        "b.layers.json": bisection("gone.onnx", digest("gone")).as_dict(),
        "c.evaluation.json": evaluation("gone.onnx", digest("gone")) | {"figures": {"count": "many"}},
    }
    for name, value in bad.items():
        write(tmp_path / name, value)
    (tmp_path / "deep.json").write_text("[" * 30_000)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "infinite.json").write_text('{"artifact": 1, "checks": 1e999, "spec": ' + "9" * 5000 + "}")
    found = collect(tmp_path)
    assert [each.title for each in found.items] == ["good.onnx"]
    skipped = dict(found.skipped)
    assert skipped.keys() == {*bad, "bytes.json", "infinite.json"}
    assert skipped["huge.json"].startswith("it has 0 MB, more than")
    assert skipped["list.json"] == "it holds no JSON object"
    assert skipped["foreign.json"] == "it is no manifest, bisection, evaluation or check of this tool"
    assert skipped["kind.json"] == "'excellent' is no verdict"
    assert skipped["b.layers.json"].startswith("it tells of gone.onnx, of which no manifest is here")
    assert skipped["deep.json"] == skipped["bytes.json"] == "it is no JSON"


def test_a_damaged_row_takes_no_other_down(tmp_path: Path) -> None:
    checked(tmp_path)
    told = json.loads((tmp_path / "check.json").read_text())
    told["rows"][2]["problems"] = "none"
    write(tmp_path / "check.json", told)
    found = collect(tmp_path)
    assert len(found.items) == 5
    assert ("check.json", "row 3: its 'problems' is no list") in found.skipped


@pytest.mark.parametrize(
    "thumbnail", ["", "PHN2Zz4=", "/9j/AAAA", 7, "/9j/" + "A" * 100_000, '/9j/"onerror=alert(1)' * 3]
)
def test_only_a_jpeg_becomes_a_thumbnail(tmp_path: Path, thumbnail: object) -> None:
    made = manifest("a.onnx")
    put(tmp_path, made)
    write(tmp_path / "a.onnx.evaluation.json", evaluation("a.onnx", made["artifact"]["sha256"], thumbnail))
    evaluated = collect(tmp_path).items[0].evaluated
    assert evaluated is not None
    assert [each.thumbnail for each in evaluated.pictures] == [None, None]


def test_damaged_parts_are_noted_and_the_artefact_stays(tmp_path: Path) -> None:
    made = manifest("a.onnx") | {
        "precision_plan": {"schema": 9},
        "device": device() | {"latency_ms": {"shape": "x"}},
        "built": {"int8": {"basis": "measured", "sentence": "fast"}},
    }
    put(tmp_path, made)
    (item,) = collect(tmp_path).items
    assert item.latencies == ()
    assert item.made is not None
    assert sum("can't be read" in note for note in item.made.notes) == 3


def test_an_estimate_is_called_one(tmp_path: Path) -> None:
    int8 = {"basis": "estimate", "sentence": "expected 1.09 times", "estimate": {"ratio": 1.09}}
    put(tmp_path, manifest("a.onnx") | {"built": {"int8": int8}})
    (latency,) = collect(tmp_path).items[0].latencies
    assert (latency.basis, latency.short) == ("estimate", "1.09x FP16")


def test_copies_count_once_and_links_kits_packages_and_pipes_are_passed_over(tmp_path: Path) -> None:
    made = manifest("a.engine", b"2", "trt")
    put(tmp_path / "out", made, b"2")
    write(tmp_path / "out" / "kit" / "kit.json", {"any": 1})
    write(tmp_path / "out" / "kit" / "verdict.json", {"any": 1})
    write(tmp_path / "out" / "kit" / "manifest.json", made | {"artifact": made["artifact"]})
    write(tmp_path / "out" / "p.mlpackage" / "Manifest.json", {"any": 1})
    write(tmp_path / "out" / ".hidden.json", {"any": 1})
    (tmp_path / "elsewhere").mkdir()
    put(tmp_path / "elsewhere", manifest("b.onnx"))
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "out" / "pipe.json")
    found = collect(tmp_path / "out")
    assert [each.place for each in found.items] == ["a.engine"]
    assert found.skipped == (("pipe.json", "it is no file"),)


def test_nothing_to_tell_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=r"holds no manifest of an artefact and no check.json; export into it first"):
        collect(tmp_path)
    (tmp_path / "x.json").write_text(EVIL)
    with pytest.raises(DeployError, match=r"1 JSON file was skipped: x\.json: it is no JSON"):
        collect(tmp_path)
    with pytest.raises(DeployError, match=r"absent is not a folder"):
        collect(tmp_path / "absent")
