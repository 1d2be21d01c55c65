"""What a Core ML package in INT8 is calibrated on, which blocks it keeps, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from torch import fx

from nextvit_deploy import references as r
from nextvit_deploy.coreml_int8 import Inputs, calibration_pictures, with_calibration
from nextvit_deploy.data import find_pictures
from nextvit_deploy.precision.record import BlockPlan, Measurement, PrecisionPlan
from nextvit_deploy.request import CoreMLRequest, Request
from nextvit_exporters import graph as g
from nextvit_exporters import to_coreml
from nextvit_exporters.coreml_spec import CoreMLSpec
from nextvit_exporters.errors import DeployError, UnsupportedSpec
from nextvit_exporters.quantize.placement import blocks, placement
from nextvit_exporters.spec import ExportSpec, InputKind, Precision
from nextvit_exporters.targets import Saved
from nextvit_models.demo import DEMO_CHECKPOINT, DEMO_IMAGES
from nextvit_models.preprocessing import Preprocessing
from tests.deploy.support import call, refusal, strict_json
from tests.deploy.support_coreml import needs_coremltools, verified
from tests.exporters.passes_harness import nano

KEPT: Final = ("stem.0", "features.2")
ASKED: Final = CoreMLRequest(17, activations="int8")
REQUEST: Final = Request(Path("out"), "coreml", count=8, coreml=ASKED)
PREPROCESSING: Final = Preprocessing(image_size=64)
SPEC: Final = ExportSpec(
    "nextvit_nano",
    10,
    "coreml",
    Precision.FP16,
    64,
    64,
    1,
    18,
    PREPROCESSING,
    input=InputKind.IMAGE,
    coreml=CoreMLSpec(17, activations="int8"),
)


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    return g.trace(nano())


def plan(graph: fx.GraphModule, path: Path, kept: tuple[str, ...] = KEPT, **fields: Any) -> Path:
    """A plan for the demo's network, as a scan might have written it."""
    choices = [BlockPlan(name, 30.0, 0.1, 4, 1000, "fp16" if name in kept else "int8") for name in _all(graph, kept)]
    made = PrecisionPlan(
        "nextvit_nano",
        (64, 64),
        "30 dB",
        "mse",
        "ab" * 32,
        64,
        tuple(choices),
        30.0,
        30.0,
        None,
        None,
        (Measurement(2, 30.0, 30.0, None, met=True),),
    )
    path.write_text(json.dumps(replace(made, **fields).as_dict()))
    return path


def _all(graph: fx.GraphModule, kept: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*blocks(placement(graph)), *kept)))


def test_the_demo_calibrates_on_pictures_that_are_not_judged() -> None:
    judged = find_pictures(DEMO_IMAGES, 8, (64, 64), PREPROCESSING)
    pictures = calibration_pictures(REQUEST, SPEC)
    assert pictures is not None
    assert len(pictures) == 128
    assert not set(pictures.paths) & set(judged.paths)
    counts = [pictures.labels.count(label) for label in sorted(set(pictures.labels), key=str)]
    assert len(counts) == 10
    assert min(counts) >= 8
    most = calibration_pictures(replace(REQUEST, count=300), SPEC)
    assert most is not None
    assert len(most) == 60
    own = calibration_pictures(replace(REQUEST, count=360, images=Path("mine"), checkpoint=str(DEMO_CHECKPOINT)), SPEC)
    assert own is not None
    assert len(own) == 128
    with pytest.raises(UnsupportedSpec, match="all 360 pictures of the demo are judged on; ask for fewer with --count"):
        calibration_pictures(replace(REQUEST, count=360), SPEC)


def test_another_checkpoint_calibrates_on_what_is_given_or_what_it_is_verified_on(tmp_path: Path) -> None:
    other = replace(REQUEST, checkpoint="my.pth")
    assert calibration_pictures(other, SPEC) is None
    given = calibration_pictures(
        replace(other, coreml=replace(ASKED, calibration=DEMO_IMAGES, calibration_size=20)), SPEC
    )
    assert given == find_pictures(DEMO_IMAGES, 20, (64, 64), PREPROCESSING)
    assert calibration_pictures(replace(REQUEST, coreml=CoreMLRequest(17, weights="int8")), SPEC) is None
    assert calibration_pictures(replace(REQUEST, target="onnx", coreml=None), SPEC) is None
    with pytest.raises(DeployError, match="is not a folder"):
        calibration_pictures(replace(REQUEST, coreml=replace(ASKED, calibration=tmp_path / "absent")), SPEC)


@pytest.mark.parametrize("kind", [InputKind.IMAGE, InputKind.NORMALIZED])
def test_pictures_are_read_when_they_are_asked_for(kind: InputKind, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SPEC, input=kind)
    pictures = find_pictures(DEMO_IMAGES, 5, (64, 64), PREPROCESSING)
    whole, asked = r.artefact_inputs(spec, pictures.read()), []
    own = type(pictures).read

    def read(self: Any, start: int = 0, stop: int | None = None) -> Any:
        asked.append((start, stop))
        return own(self, start, stop)

    monkeypatch.setattr(type(pictures), "read", read)
    inputs = Inputs(spec, pictures)
    assert (len(inputs), asked) == (5, [])
    parts = [inputs[at : at + 2] for at in range(0, 5, 2)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert asked == [(0, 2), (2, 4), (4, 5)]


def test_what_was_found_is_in_the_spec(graph: fx.GraphModule, tmp_path: Path) -> None:
    asked = replace(ASKED, plan=plan(graph, tmp_path / "plan.json"), calibration=DEMO_IMAGES, calibration_size=20)
    request = replace(REQUEST, coreml=asked)
    pictures = calibration_pictures(request, SPEC)
    assert pictures is not None
    spec, notes = with_calibration(request, SPEC, graph, pictures, quiet)
    assert spec.coreml == CoreMLSpec(
        17, activations="int8", keep=KEPT, calibration=pictures.fingerprint, calibration_size=20
    )
    assert not any("no --calibration given" in note for note in notes)
    assert with_calibration(REQUEST, SPEC, graph, None, quiet) == (SPEC, ())
    plain = replace(SPEC, coreml=CoreMLSpec(17))
    assert with_calibration(request, plain, graph, None, quiet) == (plain, ())


def test_pictures_that_are_unfit_are_refused(graph: fx.GraphModule) -> None:
    few = find_pictures(DEMO_IMAGES, 3, (64, 64), PREPROCESSING)
    with pytest.raises(DeployError) as refused:
        with_calibration(REQUEST, SPEC, graph, few, quiet)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("kept", "fields", "says"),
    [
        (("features.9",), {}, "names a block 'features.9', which nextvit_nano doesn't quantize here"),
        (KEPT, {"model": "nextvit_base"}, "is a plan for nextvit_base, not for nextvit_nano; give its own"),
    ],
)
def test_a_plan_that_is_not_of_this_network_is_one_line(
    graph: fx.GraphModule, tmp_path: Path, kept: tuple[str, ...], fields: dict[str, Any], says: str
) -> None:
    request = replace(REQUEST, coreml=replace(ASKED, plan=plan(graph, tmp_path / "plan.json", kept, **fields)))
    with pytest.raises(UnsupportedSpec) as refused:
        with_calibration(request, SPEC, graph, None, quiet)
    assert says in str(refused.value)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"calibration": "ab" * 32}, "activation scales were taken from the images that the package was first"),
        ({"calibration": "ab" * 32, "calibration_size": 64}, ""),
        ({"calibration": "ab" * 32, "calibration_size": 64, "keep": ["stem.0"]}, "kept in FP16, and out of the"),
    ],
)
def test_what_a_package_says_of_itself(monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], says: str) -> None:
    recorded = {"spec": {"coreml": {"activations": "int8"} | asked}}
    monkeypatch.setattr(to_coreml, "read", lambda _: Saved(recorded, {}, ""))
    monkeypatch.setattr(to_coreml, "why_not_here", lambda: None)
    notes = to_coreml.remarks(Path("a.mlpackage"))
    assert [note for note in notes if not says or not note.startswith(says)] == []
    assert len(notes) == bool(says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--calibration", "photos"), "how int8 activations are calibrated says nothing of others"),
        (("--weights", "int8", "--method", "mse"), "how int8 activations are calibrated says nothing of others"),
        (("--no-equalize",), "how int8 activations are calibrated says nothing of others"),
        (("--calibration-size", "64"), "how int8 activations are calibrated says nothing of others"),
        (("--precision-plan", "plan.json"), "--precision-plan keeps blocks from a compression"),
    ],
)
def test_options_of_a_compression_need_it(tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    assert says in refusal("coreml", *options, "-o", tmp_path / "out", status=2)
    assert list(tmp_path.iterdir()) == []


@needs_coremltools
@pytest.mark.usefixtures("quick")
def test_a_package_with_a_plan_and_pictures_of_its_own(graph: fx.GraphModule, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = plan(graph, tmp_path / "plan.json")
    options = "--ios", "17", "--activations", "int8", "--count", "4", "--method", "mse"
    ran = call(
        "coreml",
        *options,
        "--calibration",
        DEMO_IMAGES,
        "--calibration-size",
        "20",
        "--precision-plan",
        made,
        "-o",
        out,
        "--json",
    )
    assert (ran.status, ran.err, ran.json["verdict"]) == (0, "", "verified")
    asked = strict_json(json.dumps(ran.json["spec"]["coreml"]))
    pictures = find_pictures(DEMO_IMAGES, 20, (64, 64), PREPROCESSING)
    assert (asked["keep"], asked["method"], asked["equalize"]) == (list(KEPT), "mse", True)
    assert asked["calibration_size"] == len(pictures)
    assert any(each["name"] == "equalize-channels" and each["rewrites"] for each in ran.json["passes"])
    assert "kept in FP16, and out of the compression: stem.0, features.2" in ran.json["notes"]
    (path,) = out.glob("*.mlpackage")
    again = verified(path, "--count", "4")
    assert again["spec"]["coreml"] == asked
    errors = [
        max(each["relative_rms"] for each in check["comparisons"])
        for check in again["checks"]
        if check["question"] == "same network"
    ]
    assert max(errors) < 1e-12
