"""Estimates give way to times that kits measured, and to nothing less."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nextvit_deploy.int8_verdict import int8_verdict, settle_beside, settled
from nextvit_deploy.kit.merge import merge_verdict
from nextvit_deploy.render_int8 import show_int8
from nextvit_exporters.engine_spec import Range
from nextvit_exporters.errors import DeployError
from nextvit_exporters.spec import Precision
from nextvit_exporters.tensorrt.int8_cost import estimate
from tests.deploy.kit.kits import check, make, spec_of, tiny
from tests.deploy.support import Json, strict_json

NAMES = {
    "int8": "nextvit_nano_classify_64_b1_int8_t4.engine.json",
    "fp16": "nextvit_nano_classify_64_b1_fp16_t4.engine.json",
}
SPEC = {
    "model": "nextvit_nano",
    "task": "classify",
    "num_classes": 10,
    "height": 64,
    "width": 64,
    "batch": 1,
    "input": "normalized",
    "engine": {"gpu": "t4"},
}


def device(milliseconds: float, gpu: str = "Tesla T4", tensorrt: str = "10.13.3.9", side: int = 64) -> Json:
    return {
        "gpu": {"name": gpu, "capability": "7.5", "driver": "CUDA 12.8"},
        "tensorrt": tensorrt,
        "latency_ms": {
            "shape": [1, 3, side, side],
            "iterations": 200,
            "without transfers": {"p50": milliseconds, "p90": 9.0, "p99": 9.5},
            "with transfers": {"p50": 99.0, "p90": 99.0, "p99": 99.0},
        },
    }


def estimated() -> Json:
    told: Any = json.loads(json.dumps(estimate(tiny(spec_of(Range(1, 1, 1), Precision.INT8))).as_dict()))
    assert isinstance(told, dict)
    return told


def written(folder: Path, precision: str, found: Json | None = None, name: str | None = None, **spec: object) -> Path:
    """A manifest of this precision in ``folder``, with a device's times where there are any."""
    told: Json = {"verdict": "verified", "spec": {**SPEC, "precision": precision, **spec}, "built": {}}
    if precision == "int8":
        told["built"] = {"for": "SM75", "int8": estimated()}
    if found is not None:
        told["device"] = found
    path = folder / (name or NAMES[precision])
    path.write_text(json.dumps(told), encoding="utf-8")
    return path


def test_times_of_both_replace_the_estimate(tmp_path: Path) -> None:
    int8 = written(tmp_path, "int8", device(2.0))
    written(tmp_path, "fp16", device(2.5))
    verdict = int8_verdict(int8)
    assert (verdict.basis, verdict.recommendation, verdict.ratio, verdict.missing) == ("measured", "go", 0.8, ())
    assert verdict.sentence == (
        "INT8 takes 2.000 ms and FP16 2.500 ms on Tesla T4 with TensorRT 10.13.3.9 at 1x3x64x64, 0.80 times FP16's "
        "time: go, use INT8 (measured)"
    )
    told = verdict.as_dict()
    assert json.loads(json.dumps(told)) == told


@pytest.mark.parametrize(
    ("milliseconds", "recommendation"), [(0.95, "go"), (0.96, "doubtful"), (1.0, "no-go"), (2.0, "no-go")]
)
def test_what_to_do_follows_from_the_times(tmp_path: Path, milliseconds: float, recommendation: str) -> None:
    int8, fp16 = written(tmp_path, "int8", device(milliseconds)), written(tmp_path, "fp16", device(1.0))
    assert int8_verdict(int8, fp16).recommendation == recommendation


def test_without_times_it_stays_an_estimate(tmp_path: Path) -> None:
    int8 = written(tmp_path, "int8")
    verdict, told = int8_verdict(int8), estimated()
    assert (verdict.basis, verdict.sentence, verdict.recommendation) == (
        "estimate",
        told["sentence"],
        told["recommendation"],
    )
    assert verdict.sentence.endswith("(an estimate, never executed on a GPU)")
    assert verdict.missing == (
        f"no kit with times is merged into {int8.name}",
        f"no manifest of the same in FP16 is beside {int8.name}",
    )
    fp16 = written(tmp_path, "fp16")
    evaluation = {key: told for key, told in json.loads(fp16.read_bytes()).items() if key != "built"}
    fp16.with_name("a_fp16.engine.evaluation.json").write_text(json.dumps(evaluation))
    fp16 = fp16.rename(fp16.with_name("b_fp16.engine.json"))
    assert int8_verdict(int8).missing[1] == f"no kit with times is merged into {fp16.name}"
    written(tmp_path, "int8", device(1.0))
    assert int8_verdict(int8).missing == (f"no kit with times is merged into {fp16.name}",)
    assert int8_verdict(int8).basis == "estimate"


@pytest.mark.parametrize(
    "other",
    [device(1.0, gpu="NVIDIA A10"), device(1.0, tensorrt="11.4.0.106"), device(1.0, side=96)],
    ids=["gpu", "tensorrt", "shape"],
)
def test_times_that_can_not_be_compared(tmp_path: Path, other: Json) -> None:
    int8 = written(tmp_path, "int8", device(2.0))
    written(tmp_path, "fp16", other)
    verdict = int8_verdict(int8)
    assert verdict.basis == "estimate"
    (missing,) = verdict.missing
    assert missing.startswith("INT8 was timed on Tesla T4 with TensorRT 10.13.3.9 at 1x3x64x64, FP16 on ")


@pytest.mark.parametrize(
    "spec", [{"model": "nextvit_small"}, {"height": 96}, {"batch": 8}, {"engine": {"gpu": "a10"}}, {"input": "uint8"}]
)
def test_another_network_says_nothing(tmp_path: Path, spec: Json) -> None:
    int8, fp16 = written(tmp_path, "int8", device(2.0)), written(tmp_path, "fp16", device(2.5), **spec)
    assert int8_verdict(int8).missing == (f"no manifest of the same in FP16 is beside {int8.name}",)
    assert int8_verdict(int8, fp16).missing == (f"{fp16.name} is not of the same in FP16",)


def test_the_one_that_was_timed_is_taken(tmp_path: Path) -> None:
    """INT8's name may tell more than FP16's, and FP16 may have been built twice."""
    int8 = written(tmp_path, "int8", device(2.0), name="nano_int8_minmax_t4.engine.json")
    written(tmp_path, "fp16")
    written(tmp_path, "fp16", device(4.0), name="with_fp16_t4.engine.json")
    (tmp_path / "broken_fp16.json").write_text("{", encoding="utf-8")
    assert int8_verdict(int8).ratio == 0.5


def damaged(edit: Callable[[Json], object]) -> Json:
    found = device(2.5)
    edit(found)
    return found


@pytest.mark.parametrize(
    "found",
    [
        damaged(lambda told: told.pop("latency_ms")),
        damaged(lambda told: told["latency_ms"].update(shape=["a"])),
        damaged(lambda told: told["latency_ms"].update(shape=None)),
        damaged(lambda told: told["latency_ms"]["without transfers"].update(p50=0)),
        damaged(lambda told: told["latency_ms"]["without transfers"].update(p50=True)),
        damaged(lambda told: told.update(gpu=None)),
        {"verdict": "not verified", "why": "no CUDA driver"},
    ],
)
def test_a_device_without_times_counts_as_none(tmp_path: Path, found: Json) -> None:
    int8 = written(tmp_path, "int8", device(2.0))
    fp16 = written(tmp_path, "fp16", found)
    assert int8_verdict(int8).missing == (f"no kit with times is merged into {fp16.name}",)


def test_what_is_no_manifest_of_int8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text('{"a": ', encoding="utf-8")
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    fp16 = written(tmp_path, "fp16")
    for path, says in (
        (tmp_path / "gone.json", "can't be read"),
        (tmp_path / "torn.json", "is no JSON"),
        (tmp_path / "list.json", "is no manifest"),
        (fp16, "tells of no INT8 estimate"),
    ):
        with pytest.raises(DeployError, match=says):
            int8_verdict(path)


def test_settling_keeps_the_estimate_and_can_be_undone(tmp_path: Path) -> None:
    int8, fp16 = written(tmp_path, "int8", device(2.0)), written(tmp_path, "fp16", device(2.5))
    told = strict_json(int8.read_text(encoding="utf-8"))
    known = settled(told, int8)["built"]["int8"]
    assert (known["basis"], known["recommendation"], known["measured"]["ratio"]) == ("measured", "go", 0.8)
    assert known["measured"]["fp16"]["milliseconds"] == 2.5
    assert known["estimate"] == told["built"]["int8"]["estimate"]
    assert settled(settled(told, int8), int8) == settled(told, int8)
    fp16.unlink()
    back = settled(settled(told, int8), int8)["built"]["int8"]
    assert "measured" not in back
    assert {key: back[key] for key in estimated()} == estimated()
    other = {"verdict": "verified", "built": {"for": "SM75"}}
    assert settled(other, int8) == other


def kit_of(folder: Path, precision: Precision) -> tuple[Path, Path, Path]:
    """A kit, its verdict and its engine's manifest, which tells of a network as ``written`` does."""
    made = make(folder, spec_of(Range(1, 1, 1), precision))
    fields = strict_json(made.manifest.read_text(encoding="utf-8"))
    fields |= {"spec": {**SPEC, "precision": str(precision)}, "built": {}}
    if precision is Precision.INT8:
        fields["built"] = {"int8": estimated()}
    for path in (made.manifest, made.folder / "manifest.json"):
        path.write_text(json.dumps(fields), encoding="utf-8")
    assert check(made).status in {0, 4}
    return made.folder, made.verdict, made.manifest


def measured_alike(verdict: Path, factor: float) -> Json:
    """The device of another artefact, timed beside the one in ``verdict``."""
    found = strict_json(verdict.read_text(encoding="utf-8"))
    found["latency_ms"]["without transfers"]["p50"] *= factor
    return found


def test_merging_a_kit_in_int8_puts_times_in_place_of_the_estimate(tmp_path: Path) -> None:
    folder, verdict, manifest = kit_of(tmp_path, Precision.INT8)
    alone = merge_verdict(folder, verdict)["built"]["int8"]
    assert alone["basis"] == "estimate"
    assert alone["missing"] == [f"no manifest of the same in FP16 is beside {manifest.name}"]
    written(tmp_path, "fp16", measured_alike(verdict, 2.0))
    merged = merge_verdict(folder, verdict)
    assert merged["built"]["int8"]["basis"] == "measured"
    assert merged["built"]["int8"]["measured"]["ratio"] == pytest.approx(0.5)
    assert merged == strict_json(manifest.read_text(encoding="utf-8"))
    assert merged == strict_json((folder / "manifest.json").read_text(encoding="utf-8"))


def test_merging_a_kit_in_fp16_settles_the_int8_beside_it(tmp_path: Path) -> None:
    folder, verdict, _ = kit_of(tmp_path, Precision.FP16)
    int8 = written(tmp_path, "int8", measured_alike(verdict, 1.5))
    foreign = written(tmp_path, "int8", measured_alike(verdict, 1.5), name="other_int8.json", height=96)
    before = foreign.read_bytes()
    merge_verdict(folder, verdict)
    known = strict_json(int8.read_text(encoding="utf-8"))["built"]["int8"]
    assert (known["basis"], known["recommendation"]) == ("measured", "no-go")
    assert known["measured"]["ratio"] == pytest.approx(1.5)
    assert foreign.read_bytes() == before
    written_once = int8.stat().st_mtime_ns
    merge_verdict(folder, verdict)
    assert int8.stat().st_mtime_ns == written_once, "nothing new, nothing written"
    settle_beside({"spec": {"precision": "int8"}}, int8)
    assert int8.stat().st_mtime_ns == written_once


def shown(int8: Json, *, verbose: bool = False) -> str:
    console = Console(file=StringIO(), width=80)
    show_int8(console, int8, verbose=verbose)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_the_table_tells_layers_totals_and_what_to_do(tmp_path: Path) -> None:
    text = shown(estimated())
    assert "conv" in text
    assert "in microseconds: an estimate" in text
    assert "Conv int8" in text
    for case in ("best", "expected", "worst"):
        assert f"\n{case}" in text
    assert "never executed on a GPU" in text
    assert "320 GB/s" in text
    int8 = written(tmp_path, "int8", device(2.0))
    written(tmp_path, "fp16", device(2.5))
    known = settled(strict_json(int8.read_text(encoding="utf-8")), int8)["built"]["int8"]
    assert "go, use INT8 (measured)" in shown(known)
    assert "never executed" not in shown(known)


def test_long_tables_are_cut_unless_all_is_asked() -> None:
    told = estimated()
    told["estimate"]["layers"] *= 20
    count = len(told["estimate"]["layers"])
    assert f"and {count - 12} more" in shown(told)
    assert "more" not in shown(told, verbose=True).split("All kernels")[0]
