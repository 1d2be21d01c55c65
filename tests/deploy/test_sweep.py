"""A sweep builds every compression, tells size against error, and recommends by a rule."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, Final

import pytest
from rich.console import Console

from nextvit_deploy.compare import Comparison
from nextvit_deploy.manifest import CheckpointInfo, Manifest
from nextvit_deploy.render_coreml import show_sweep
from nextvit_deploy.request import CoreMLRequest, Request, with_coreml
from nextvit_deploy.sweep import ROOM, Sweep, Trial, recommend, sweep
from nextvit_deploy.verdict import Verdict
from nextvit_deploy.verify import Check
from nextvit_exporters.coreml_spec import WEIGHTS, CoreMLSpec
from nextvit_exporters.errors import InvariantError, UnsupportedSpec
from nextvit_exporters.files import sha256_of
from nextvit_exporters.spec import Artifact, ExportSpec, Precision, Tolerance
from nextvit_exporters.targets import COST_AT_WORST, PRECISION_COST, SAME_NETWORK
from nextvit_models.preprocessing import Preprocessing
from tests.deploy.support import Json, call, strict_json
from tests.deploy.support_coreml import needs_coremltools

SPEC: Final = ExportSpec(
    "nano", 10, "coreml", Precision.FP16, 64, 64, 1, 18, Preprocessing(), coreml=CoreMLSpec(17, "logits")
)
ALL: Final = ("fp16", *WEIGHTS, "w8a8")


def compared(error: float, margin: float | None = 0.1, top1: float | None = 1.0) -> Comparison:
    finite = True
    return Comparison(
        "logits", 8, finite, error, error, error, 0.99, 40.0, top1, top1, margin, 0, Tolerance(1e-1, "by hand")
    )


def asked(question: str, verdict: Verdict, *comparisons: Comparison) -> Check:
    return Check(question, "mil-reference", "emulated", "PyTorch float32", "images", verdict, "", comparisons)


def trial(
    name: str, size: int, error: float = 1e-2, margin: float | None = 0.1, verdict: Verdict = Verdict.VERIFIED
) -> Trial:
    checks = (
        asked(SAME_NETWORK, Verdict.VERIFIED, compared(9e9)),
        asked(PRECISION_COST, verdict, compared(error, margin), compared(8e9)),
        asked(COST_AT_WORST, Verdict.VERIFIED, compared(7e9)),
    )
    manifest = Manifest(
        SPEC,
        CheckpointInfo("x.pth", "", "", "official", ()),
        Artifact(Path(f"{name}.mlpackage"), "ab", size),
        (),
        {},
        "",
        checks,
        (),
        {},
        {},
    )
    return Trial(name, manifest)


def test_the_smallest_that_leaves_room_is_recommended() -> None:
    trials = [trial("fp16", 100), trial("int8", 50), trial("lut4", 25, margin=ROOM + 0.01), trial("w8a8", 51)]
    found = recommend(trials)
    assert found is not None
    assert found.name == "int8"
    edge = recommend([*trials[:2], trial("lut4", 25, margin=ROOM)])
    assert edge is not None
    assert edge.name == "lut4"


def test_of_equally_large_ones_the_first_is_recommended() -> None:
    found = recommend([trial("fp16", 100), trial("int8", 50), trial("lut8", 50)])
    assert found is not None
    assert found.name == "int8"


def test_what_is_not_verified_or_not_built_is_never_recommended() -> None:
    wrong = [trial("int8", 1, verdict=Verdict.FAILED), trial("lut8", 2, verdict=Verdict.NOT_VERIFIED)]
    assert recommend([*wrong, Trial("lut6", None, "needs iOS 16")]) is None
    found = recommend([*wrong, trial("fp16", 100)])
    assert found is not None
    assert found.name == "fp16"


def test_feature_maps_have_no_decisions_to_turn() -> None:
    assert trial("fp16", 100, margin=None).sound


def test_the_cost_is_that_of_the_precision_on_what_comes_first() -> None:
    """Neither another question nor what follows from the logits."""
    cost = trial("fp16", 100, error=3e-2).cost
    assert cost is not None
    assert cost.relative_rms == 3e-2
    assert (Trial("lut4", None).cost, Trial("lut4", None).size, Trial("lut4", None).sound) == (None, 0, False)


def shown(swept: Sweep) -> str:
    out = StringIO()
    show_sweep(Console(file=out, width=140), swept)
    return out.getvalue()


def test_the_table() -> None:
    trials = (trial("fp16", 2_000_000), trial("lut4", 500_000, 0.25), Trial("w8a8", None, "needs iOS 17; ask for [it]"))
    text = shown(Sweep(trials, recommend(trials)))
    lines = text.splitlines()
    (row,) = [line for line in lines if line.split()[:1] == ["lut4"]]
    assert row.split() == ["lut4", "0.5", "MB", "25%", "2.5e-01", "40", "dB", "100%", "0", "of", "8", "verified"]
    assert any(line.split() == ["w8a8", "not", "built"] for line in lines)
    assert "  w8a8: needs iOS 17; ask for [it]" in lines
    assert "recommended: lut4: the smallest verified package" in text
    assert lines[-1] == "lut4.mlpackage"


def test_the_table_without_anything_to_recommend() -> None:
    swept = Sweep((trial("fp16", 100, margin=5.0),), None)
    assert "recommended" not in shown(swept)
    assert "no package decides safely as PyTorch does" in shown(swept)
    assert swept.as_dict()["recommended"] is None


def test_as_json() -> None:
    trials = (trial("fp16", 100), replace(trial("int8", 50), why=""), Trial("w8a8", None, "needs iOS 17"))
    told = Sweep(trials, trials[1]).as_dict()
    assert told["recommended"] == "int8"
    assert isinstance(told["trials"], list)
    assert [each["name"] for each in told["trials"]] == ["fp16", "int8", "w8a8"]
    assert told["trials"][2] == {"name": "w8a8", "why": "needs iOS 17"}
    assert (told["trials"][0]["bytes"], told["trials"][0]["relative_rms"]) == (100, 1e-2)


def request(folder: Path, ios: int = 17, **options: Any) -> Request:
    wanted = Request(output=folder, precision=Precision.FP16, count=1)
    return with_coreml(wanted, CoreMLRequest(ios=ios, head="logits", **options))


def test_what_an_old_system_cannot_read_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextvit_deploy.sweep.export", lambda wanted, _: trial("fp16", wanted.coreml.ios).manifest)
    old, newer = (sweep(request(tmp_path, ios), lambda _: None) for ios in (15, 16))
    assert [(each.name, bool(each.manifest)) for each in old.trials] == [(name, name == "fp16") for name in ALL]
    assert {each.why for each in old.trials} == {
        "",
        "needs iOS 16; ask for --ios 16 or more",
        "needs iOS 17; ask for --ios 17 or more",
    }
    assert [bool(each.manifest) for each in newer.trials] == [True] * 5 + [False]


def test_weights_that_a_scheme_cannot_hold_leave_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(wanted: Request, _: object) -> Manifest | None:
        if wanted.coreml is not None and wanted.coreml.weights == "lut6":
            raise InvariantError("a weight can't be held")
        return trial("fp16", 100).manifest

    monkeypatch.setattr("nextvit_deploy.sweep.export", export)
    swept = sweep(request(tmp_path), lambda _: None)
    assert [each.why for each in swept.trials if not each.manifest] == ["a weight can't be held"]


@pytest.mark.parametrize("options", [{"weights": "int8"}, {"activations": "int8"}, {"swift": Path("app")}])
def test_nothing_else_may_be_asked_beside_it(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedSpec, match="--sweep"):
        sweep(request(tmp_path, **options), lambda _: None)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Json]:
    """A real one, through the command line; it takes as long as six exports."""
    if needs_coremltools.args[0]:
        pytest.skip("coremltools has no wheel for this platform")
    folder = tmp_path_factory.mktemp("swept")
    ran = call("coreml", "--sweep", "--ios", "17", "--count", "4", "--calibration-size", "16", "-o", folder, "--json")
    assert (ran.status, ran.err) == (0, ""), ran
    return folder, ran.json


@pytest.mark.usefixtures("quick")
def test_every_package_of_a_sweep_is_there_and_verified(swept: tuple[Path, Json]) -> None:
    folder, told = swept
    trials = {each["name"]: each for each in told["trials"]}
    assert tuple(trials) == ALL
    stem = "nextvit_nano_classify_64_b1_fp16_image_ios17"
    for name, each in trials.items():
        path = folder / f"{stem}{'' if name == 'fp16' else f'_{name}'}.mlpackage"
        manifest = strict_json(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
        assert (each["file"], each["verdict"], each["images"]) == (str(path), "verified", 4)
        assert (manifest["verdict"], manifest["artifact"]["bytes"]) == ("verified", each["bytes"])
        assert manifest["artifact"]["sha256"] == sha256_of(path)
    assert len(list(folder.iterdir())) == 3 * len(ALL)
    sizes = {name: each["bytes"] for name, each in trials.items()}
    assert sizes["fp16"] > sizes["int8"] > sizes["lut6"] > sizes["lut4"]
    errors = {name: each["relative_rms"] for name, each in trials.items()}
    assert errors["fp16"] < errors["int8"] < errors["w8a8"]
    assert errors["lut8"] < errors["lut6"] < errors["lut4"]
    assert told["recommended"] in ALL


def test_what_activations_were_calibrated_on_is_told(swept: tuple[Path, Json]) -> None:
    (path,) = swept[0].glob("*_w8a8.mlpackage.json")
    manifest = strict_json(path.read_text(encoding="utf-8"))
    assert len(manifest["spec"]["coreml"]["calibration"]) == 64
    assert manifest["spec"]["coreml"]["calibration_size"] == 16
    assert any("calibrated on pictures of the demo that nothing is judged on" in note for note in manifest["notes"])
    assert {check["mode"] for check in manifest["checks"]} == {"unrounded", "emulated", "pessimistic"}


@pytest.mark.usefixtures("quick")
def test_one_of_them_alone_is_the_same(swept: tuple[Path, Json], tmp_path: Path) -> None:
    options = "--ios", "17", "--activations", "int8", "--count", "4", "--calibration-size", "16"
    ran = call("coreml", *options, "-o", tmp_path, "--json")
    assert (ran.status, ran.json["verdict"]) == (0, "verified")
    (path,) = swept[0].glob("*_w8a8.mlpackage")
    assert ran.json["artifact"]["sha256"] == sha256_of(path)
    assert call("verify", path, "--count", "4", "-q").status == 0
