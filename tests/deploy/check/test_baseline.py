"""A baseline is read whole or refused, found again by what was asked for, and what moved is told with its limit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nextvit_deploy.check.baseline import BaselineEntry, read_baseline
from nextvit_deploy.check.cells import Cell
from nextvit_deploy.check.limits import Limits, Regression
from nextvit_deploy.check.moves import moves
from nextvit_deploy.check.result import Kind, Move, Outcome
from nextvit_deploy.verdict import Verdict
from nextvit_exporters.errors import DeployError
from nextvit_exporters.targets import ON_DEVICE, PRECISION_COST, SAME_NETWORK
from tests.deploy.check.support_rows import (
    CELL,
    SAME,
    Json,
    answer,
    comparison,
    judged,
    manifest,
    outcome,
    problems,
    result,
)
from tests.deploy.support import Exported

OTHER = {"name": "other.safetensors", "fingerprint": "e" * 64}


def write(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def checked(folder: Path, *found: tuple[str, Json | None]) -> Path:
    """A folder that an earlier check wrote, with cells of these names."""
    made = (outcome(each) if each else Outcome(crash="killed by SIGSEGV") for _, each in found)
    rows = [judged(one, cell=replace(CELL, name=name)) for (name, _), one in zip(found, made, strict=True)]
    write(folder / "check.json", result(rows).as_dict())
    return folder


def named(found: BaselineEntry | None) -> str | None:
    return None if found is None else str(found)


def moved(found: Json, before: Json, allowed: Regression = Regression(), **latency: float) -> dict[str, Move]:  # noqa: B008 - frozen
    entry = BaselineEntry(before, latency.get("then"))
    return {each.what: each for each in moves(found, entry, allowed, latency.get("now"))}


def test_a_manifest_alone_is_a_baseline(tmp_path: Path) -> None:
    path = write(tmp_path / "x.onnx.json", manifest())
    for place in (path, tmp_path):
        found = read_baseline(place).before(CELL, manifest(cost=1.0, Artifact={"sha256": "b" * 64, "bytes": 2}))
        assert named(found) == str(path)


@pytest.mark.usefixtures("quick")
def test_a_real_export_has_not_moved_from_itself(demo: Exported) -> None:
    before = read_baseline(demo.path.parent)
    row = judged(Outcome(demo.manifest), before=before)
    assert row.verdict is Verdict.VERIFIED
    assert [each.what for each in row.moves] == [f"error, {SAME_NETWORK}", f"error, {PRECISION_COST}", "size", "nodes"]
    assert all(each.before == each.after for each in row.moves)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "nextvit_small"},
        {"target": "coreml"},
        {"precision": "fp32"},
        {"height": 96},
        {"batch": 8},
        {"dynamic_batch": True},
        {"input": "uint8"},
        {"io": "fp16"},
        {"skip": ["fold-conv-norm"]},
        {"engine": {"gpu": "t4", "batch": "1", "height": "64", "width": "64"}},
        {"coreml": {"ios": 17}},
        {"quantize": {"rounding": "gptq"}},
    ],
)
def test_what_was_asked_for_otherwise_is_new(tmp_path: Path, changes: Json) -> None:
    before = read_baseline(write(tmp_path / "x.onnx.json", manifest(**changes)))
    row = judged(outcome(), before=before, limits=Limits(regression=Regression(error_ratio=0.0)))
    assert (row.moves, row.problems) == ((), ())
    assert before.gone([row]) == (f"gone since the baseline: {tmp_path / 'x.onnx.json'}",)
    assert before.before(CELL, manifest(**changes)) is not None


def test_what_versions_and_weights_decide_is_not_what_was_asked_for(tmp_path: Path) -> None:
    then = manifest(opset=17, skip=["a", "b"], Passes=[])
    now = manifest(opset=20, skip=["a", "b", "c"], Passes=[], Checkpoint=OTHER, num_classes=3)
    assert read_baseline(write(tmp_path / "x.onnx.json", then)).before(CELL, now) is not None


def test_a_check_speaks_for_what_lies_below_it(tmp_path: Path) -> None:
    checked(tmp_path, ("demo", manifest()))
    write(tmp_path / "stale" / "x.onnx.json", manifest(Artifact={"sha256": "b" * 64, "bytes": 1}))
    found = read_baseline(tmp_path)
    assert [each.name for each in found.entries] == ["demo"]
    assert [each.name for each in read_baseline(tmp_path / "check.json").entries] == ["demo"]


def test_weights_then_names_tell_apart_what_was_asked_for_alike(tmp_path: Path) -> None:
    one, other = manifest(), manifest(Checkpoint=OTHER, Artifact={"sha256": "b" * 64, "bytes": 1})
    renamed = replace(CELL, name="renamed")
    same_name = manifest(Checkpoint=OTHER | {"name": "nano.safetensors"}, Artifact={"sha256": "b" * 64, "bytes": 1})
    alike = read_baseline(checked(tmp_path, ("one", one), ("other", same_name)))
    assert [named(alike.before(renamed, each)) for each in (one, same_name)] == ["one", "other"]
    before = read_baseline(checked(tmp_path, ("one", one), ("other", other)))
    assert named(before.before(renamed, one)) == "one"
    assert named(before.before(renamed, other)) == "other"
    trained = manifest(Checkpoint={"name": "x.pth", "fingerprint": "d" * 64})
    assert named(before.before(replace(CELL, name="other"), trained)) == "other"
    again = manifest(Checkpoint={"name": "other.safetensors", "fingerprint": "d" * 64})
    assert named(before.before(renamed, again)) == "other"


def test_what_nothing_tells_apart_is_not_verified(tmp_path: Path) -> None:
    other = manifest(Checkpoint=OTHER, Artifact={"sha256": "b" * 64, "bytes": 1})
    before = read_baseline(checked(tmp_path, ("one", manifest()), ("other", other)))
    trained = manifest(Checkpoint={"name": "x.pth", "fingerprint": "d" * 64})
    row = judged(outcome(trained), cell=replace(CELL, name="renamed"), before=before)
    assert (row.verdict, row.moves) == (Verdict.NOT_VERIFIED, ())
    assert "the baseline has several of it, one and other" in problems(row)[0][1]
    assert before.gone([row]) == ()


def test_a_cell_that_is_still_there_is_nobody_elses_predecessor(tmp_path: Path) -> None:
    before = read_baseline(checked(tmp_path, ("small", manifest())))
    new = manifest(Checkpoint=OTHER)
    assert before.before(replace(CELL, name="added"), new) is not None
    assert before.among({"small", "added"}).before(replace(CELL, name="added"), new) is None
    assert before.among({"small", "added"}).before(replace(CELL, name="small"), manifest()) is not None


def test_what_came_to_nothing_is_not_called_gone(tmp_path: Path) -> None:
    before = read_baseline(checked(tmp_path, ("demo", manifest()), ("dead", None)))
    crashed = judged(Outcome(crash="killed by SIGKILL"), cell=replace(CELL, name="demo"))
    alive = judged(outcome(manifest(batch=4)), cell=replace(CELL, name="dead"))
    assert before.gone([crashed]) == ()
    assert before.gone([alive]) == (
        "gone since the baseline: demo",
        "the baseline has no figures of dead, so nothing is compared",
    )
    alone = read_baseline(write(tmp_path / "m" / "x.onnx.json", manifest()))
    assert alone.gone([crashed]) == ()
    assert len(alone.gone([judged(Outcome(crash="x"), cell=Cell("x", lane="trt", precision="fp16"))])) == 1


def test_a_check_can_be_its_own_baseline(tmp_path: Path) -> None:
    before = read_baseline(checked(tmp_path, ("demo", manifest())))
    (tmp_path / "check.json").unlink()
    assert judged(outcome(), before=before).moves


def damaged(**changes: Any) -> str:
    return json.dumps(manifest() | changes)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.onnx.json", "{", "is damaged"),
        ("x.engine.json", "[]", "is no whole manifest"),
        ("x.mlpackage.json", '{"spec": {}}', "is no whole manifest"),
        ("x.json", damaged(spec={}), "is damaged: no 'model'"),
        ("x.json", damaged(spec=None), "is damaged"),
        ("x.json", damaged(checkpoint={}), "is damaged: no 'fingerprint'"),
        ("x.json", damaged(artifact={"sha256": "a", "bytes": None}), "is damaged"),
        ("x.json", damaged(ops={"Conv": "many"}), "is damaged"),
        ("x.json", damaged(versions=3), "is damaged"),
        ("x.json", damaged(checks=[answer(SAME_NETWORK, comparison("much"))]), "is damaged"),
        ("check.json", "\xff", "is damaged"),
        ("check.json", '{"rows": [{}], "output": ""}', "is damaged: no 'outcome'"),
        ("check.json", '{"rows": [{"outcome": {"new": 1}, "cell": {}}], "output": ""}', "is damaged"),
        ("other.json", "{", "holds no manifest and no check.json"),
        ("other.json", "[" * 100_000, "holds no manifest and no check.json"),
    ],
)
def test_what_is_damaged_is_refused_in_one_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(DeployError, match=said) as caught:
        read_baseline(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_what_is_no_baseline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="no such file or folder"):
        read_baseline(tmp_path / "absent")
    (tmp_path / "x.onnx").write_bytes(b"\x08\x07")
    with pytest.raises(DeployError, match="is no manifest and no check"):
        read_baseline(tmp_path / "x.onnx")


def test_two_that_nothing_tells_apart_are_refused_before_anything_runs(tmp_path: Path) -> None:
    write(tmp_path / "a" / "x.onnx.json", manifest())
    write(tmp_path / "b" / "x.onnx.json", manifest())
    assert len(read_baseline(tmp_path).entries) == 2  # the same artefact twice is no question
    write(tmp_path / "b" / "x.onnx.json", manifest(Artifact={"sha256": "b" * 64, "bytes": 1}))
    with pytest.raises(DeployError, match="two different artefacts that were asked for alike"):
        read_baseline(tmp_path)


def test_figures_and_what_else_is_different() -> None:
    now = manifest(
        Ops={"Conv": 50, "Gemm": 1, "Relu": 18}, Versions={"torch": "2.15", "onnx": "1.23.2"}, Checkpoint=OTHER
    )
    found = moved(now, manifest(), then=0.8, now=0.84)
    assert [(each.what, each.before, each.after) for each in found.values()] == [
        ("error, same network", "2.0e-07", "2.0e-07"),
        ("error, precision cost", "4.0e-04", "4.0e-04"),
        ("size", "1.7 MB", "1.7 MB"),
        ("nodes", "70", "69"),
        ("latency over PyTorch's", "0.80", "0.84"),
        ("nodes, Conv", "52", "50"),
        ("nodes, Gemm", "0", "1"),
        ("version of torch", "2.14.1", "2.15"),
        ("weights, sha256", "f" * 12, "e" * 12),
    ]
    assert not any(each.regression or each.allowed for each in found.values())


@pytest.mark.parametrize(
    ("then", "now", "ratio", "floor", "regression"),
    [
        (4e-4, 4.8e-4, 1.2, 0.0, False),
        (4e-4, 4.9e-4, 1.2, 0.0, True),
        (1e-7, 9e-7, 1.2, 1e-6, False),
        (1e-7, 1.1e-6, 1.2, 1e-6, True),
        (0.0, 1e-9, 2.0, 0.0, True),
        (0.0, 0.0, 1.0, 0.0, False),
        (4e-4, "inf", 9.0, 0.0, True),
        (4e-4, "nan", 9.0, 0.0, True),
        ("nan", "nan", 1.0, 0.0, False),
        ("nan", 1e-4, 1.0, 0.0, False),
        ("inf", "inf", 1.0, 0.0, False),
        ("inf", 1e-4, 1.0, 0.0, False),
    ],
)
def test_an_error_may_grow_by_the_ratio(then: Any, now: Any, ratio: float, floor: float, *, regression: bool) -> None:
    found = moved(manifest(cost=now), manifest(cost=then), Regression(error_ratio=ratio, error_floor=floor))
    move = found[f"error, {PRECISION_COST}"]
    assert move.regression is regression
    assert move.allowed is not None
    assert not moved(manifest(cost=now), manifest(cost=then))[f"error, {PRECISION_COST}"].regression


def test_the_worst_input_counts() -> None:
    now = manifest(SAME, *(answer(PRECISION_COST, comparison(error)) for error in (9e-4, 1e-4)))
    assert moved(now, manifest())[f"error, {PRECISION_COST}"].after == "9.0e-04"
    for errors in (("nan", 1e-4), (1e-4, "nan")):
        lost = manifest(SAME, *(answer(PRECISION_COST, comparison(error)) for error in errors))
        assert moved(lost, manifest())[f"error, {PRECISION_COST}"].after == "nan"


@pytest.mark.parametrize(("factor", "regression"), [(1.1, False), (1.1000001, True)])
def test_size_kernels_and_latency_have_their_ratios(factor: float, *, regression: bool) -> None:
    allowed = Regression(size_ratio=1.1, kernels_ratio=1.1, latency_ratio=1.1)
    grown = {"sha256": "b" * 64, "bytes": round(1_700_000 * factor)}
    now = manifest(Artifact=grown, Ops={"Conv": 77 + regression})
    found = moved(now, manifest(), allowed, then=1.0, now=factor)
    assert {name for name, each in found.items() if each.regression} == (
        {"nodes", "latency over PyTorch's"} if regression else set()
    )
    assert found["nodes"].allowed == "at most 77"
    hundred = moved(manifest(Ops={"Conv": 115}), manifest(Ops={"Conv": 100}), Regression(kernels_ratio=1.15))["nodes"]
    assert hundred == Move("nodes", "100", "115", "at most 115")  # 100 times 1.15 is less in floating point
    bigger = manifest(Artifact=grown | {"bytes": 1_870_001})
    assert moved(bigger, manifest(), allowed)["size"] == Move(
        "size", "1700000 bytes", "1870001 bytes", "at most 1870000 bytes", regression=True
    )


def test_a_question_that_is_no_longer_answered_is_not_verified_where_a_limit_is_stated() -> None:
    device = answer(ON_DEVICE, comparison(5e-4))
    before = outcome(manifest(SAME, device))
    row = judged(outcome(manifest(SAME)), before=before, limits=Limits(regression=Regression(error_ratio=1.5)))
    assert problems(row) == [(Kind.NOT_VERIFIED, "error, on the device is not measured, the baseline has 5.0e-04")]
    assert judged(outcome(manifest(SAME)), before=before).verdict is Verdict.VERIFIED
    new = judged(before, before=outcome(manifest(SAME)), limits=Limits(regression=Regression(error_ratio=1.5)))
    assert new.verdict is Verdict.VERIFIED
    assert new.moves[1] == Move("error, on the device", "not measured", "5.0e-04")
