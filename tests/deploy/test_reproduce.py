"""Artefacts built again from what they record: the same bytes, or what differs, by cause."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Final

import onnx
import pytest
from torch import fx

from nextvit_deploy import reproduce as r
from nextvit_deploy.cache import VARIABLE
from nextvit_deploy.calibration_again import calibrated_again
from nextvit_deploy.contents import Difference, compare, contents_of
from nextvit_deploy.data import find_pictures
from nextvit_deploy.manifest import manifest_path
from nextvit_deploy.quantization import calibration_of
from nextvit_deploy.references import graph_inputs
from nextvit_exporters import to_onnx
from nextvit_exporters.coreml_spec import CoreMLSpec
from nextvit_exporters.errors import BuildFailed, NotExecutable
from nextvit_exporters.spec import ExportSpec, InputKind, Precision
from nextvit_exporters.to_tensorrt import log_of, onnx_of
from nextvit_models.demo import DEMO_IMAGES
from nextvit_models.preprocessing import Preprocessing
from tests.deploy import support as s
from tests.deploy import support_int8
from tests.deploy.support import Exported, Json, Replay, call, contents, one_line, refusal, tamper
from tests.deploy.support_coreml import exported as exported_package
from tests.deploy.support_coreml import needs_coremltools, planted
from tests.deploy.support_int8 import FEW, needs_tensorrt
from tests.deploy.support_trt import copied, signed

pytestmark = pytest.mark.usefixtures("quick")
Fault = Callable[[onnx.ModelProto], None]
W8A8: Final = ExportSpec(
    "nextvit_nano",
    10,
    "coreml",
    Precision.FP16,
    64,
    64,
    1,
    18,
    Preprocessing(image_size=64),
    input=InputKind.IMAGE,
    coreml=CoreMLSpec(17, activations="int8"),
)
PADS: Final = "stem.0.conv/Conv, pads: [0, 1, 1, 1], here [1, 1, 1, 1]"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go; nothing may be left in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def left(folder: Path) -> list[str]:
    """What of ours is left in it; torch makes a folder of its own there."""
    return [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor")]


def said(path: Path, *options: str | Path, status: int = 3) -> Json:
    """The JSON of a reproduction that ends with ``status``; the first cause is in the one line."""
    ran = call("reproduce", path, "--json", *options)
    assert ran.status == status, ran
    if status:
        assert one_line(ran.err).startswith(f"{path.name} differs from what is built here: ")
        assert one_line(ran.err).endswith(ran.json["differences"][0]["what"])
    else:
        assert (ran.err, ran.json["differences"]) == ("", [])
    assert ran.json["result"] == ("differs" if status else "byte-identical")
    return ran.json


def causes(result: Json) -> list[str]:
    return [each["cause"] for each in result["differences"]]


def rebuilt_as(made: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a build give what was built before, with what is beside it, so that only the comparison takes time."""

    def build(told: object, again: object, draft: Path, *_: object) -> tuple[str, ...]:
        del told, again
        if made.path.is_dir():
            shutil.copytree(made.path, draft)
        else:
            copied(made, draft.parent)
        return ()

    monkeypatch.setattr(r, "_build", build)


def words(result: Json, cause: str) -> str:
    (found,) = (each for each in result["differences"] if each["cause"] == cause)
    return "\n".join([found["what"], *found["details"]])


def edited(path: Path, part: str, name: str, value: object) -> Path:
    """Let the manifest inside a file tell something else."""

    def fault(model: onnx.ModelProto) -> None:
        entry = next(each for each in model.metadata_props if each.key == to_onnx.MANIFEST_KEY)
        record = json.loads(entry.value)
        record[part][name] = value
        entry.value = json.dumps(record, sort_keys=True)

    manifest_path(path).unlink(missing_ok=True)
    return tamper(path, fault)


def cut_padding(model: onnx.ModelProto) -> None:
    (pads,) = (each for each in model.graph.node[0].attribute if each.name == "pads")
    pads.ints[0] = 0


@pytest.mark.parametrize("name", ["demo", "half"])
def test_an_onnx_file_comes_out_byte_for_byte(name: str, places: Path, request: pytest.FixtureRequest) -> None:
    made: Exported = request.getfixturevalue(name)
    before = contents(made.path.parent)
    result = said(made.path, status=0)
    (file,) = result["files"]
    assert file["identical"]
    assert file["rebuilt_sha256"] == file["sha256"] == made.manifest["artifact"]["sha256"]
    assert contents(made.path.parent) == before
    assert left(places) == []


@needs_tensorrt
def test_an_engine_and_its_onnx_file_come_out_byte_for_byte(engine: Exported) -> None:
    files = said(engine.path, status=0)["files"]
    assert [each["file"] for each in files] == [onnx_of(engine.path).name, engine.path.name]
    assert said(onnx_of(engine.path), status=0)["files"] == files[:1]


@needs_tensorrt
def test_an_engine_of_a_given_file_comes_out_byte_for_byte(half: Exported, tmp_path: Path) -> None:
    ran = call("trt", "--onnx", half.path, "--fp16", "--output", tmp_path, "--quiet", "--count", "3")
    assert ran.status == 0, ran
    (path,) = tmp_path.glob("*.engine")
    assert len(said(path, status=0)["files"]) == 2


@needs_coremltools
def test_a_package_comes_out_byte_for_byte(package: Exported) -> None:
    assert len(said(package.path, status=0)["files"]) == 1


@needs_coremltools
def test_int8_activations_are_calibrated_on_the_recorded_pictures(base: Path, tmp_path: Path) -> None:
    made = exported_package(base, "--activations", "int8", "--ios", "17", "--count", "1", *FEW)
    assert "same 16 pictures" in said(made.path, status=0)["notes"][0]
    others = tmp_path / "others"
    others.mkdir()
    for picture in sorted(DEMO_IMAGES.rglob("*.png"))[:16]:
        shutil.copy(picture, others)
    line = refusal("reproduce", made.path, "--calibration", others, status=4)
    assert line == f"not verified: the pictures in {others} are not those that {made.path.name} was calibrated on"
    assert refusal("reproduce", made.path, "--calibration", tmp_path / "none").endswith("name one that holds images")


def test_pictures_that_were_only_hashed_are_counted(tmp_path: Path) -> None:
    for picture in sorted(DEMO_IMAGES.rglob("*.png"))[::60]:
        shutil.copy(picture, tmp_path)
    preprocessing = Preprocessing(image_size=64)
    seen = graph_inputs(W8A8, find_pictures(tmp_path, 5, (64, 64), preprocessing).read())
    asked = CoreMLSpec(17, activations="int8", calibration=sha256(seen.tobytes()).hexdigest())
    made, graph = replace(W8A8, coreml=asked), fx.GraphModule({}, fx.Graph())
    again = calibrated_again(made, graph, Path("x.mlpackage"), tmp_path, print)
    assert again.examples is not None
    assert len(again.examples) == 5
    with pytest.raises(NotExecutable, match="not the demo's; give their folder with --calibration DIR"):
        calibrated_again(made, graph, Path("x.mlpackage"), None, print)


def test_int8_comes_out_of_its_calibration_or_the_pictures(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(base / "int8-cache"))
    made = support_int8.exported(base, "onnx", "--int8", *FEW)
    assert said(made.path, status=0)["notes"] == []
    path = support_int8.copied(made, tmp_path, without=(calibration_of(made.path),))
    assert "same 16 pictures" in said(path, status=0)["notes"][0]
    line = refusal("reproduce", path, "--calibration", DEMO_IMAGES, status=4)
    assert f"{calibration_of(path).name} is not beside" in line
    assert "are not those that" in line
    model = tamper(path, support_int8.nudge_weight)
    result = said(model)
    assert causes(result) == ["changed", "constants"]
    assert "1 of 24 values differ, by 1 at most" in words(result, "constants")


def test_a_changed_file_is_told_from_what_was_written(demo: Exported, replay: Replay, tmp_path: Path) -> None:
    del replay
    path = tamper(demo.copied(tmp_path), cut_padding)
    result = said(path)
    assert causes(result) == ["changed", "structure"]
    assert words(result, "changed").endswith("; what is built here is what was written then")
    assert words(result, "structure").splitlines()[1] == PADS


FAULTS: Final[tuple[tuple[Fault, str, str], ...]] = (
    (s.scale_weight, "constants", "features.3.mlp.conv1.weight (features.3.mlp.conv1): "),
    (s.drop_bias, "structure", "features.3.mlp.conv1/Conv, inputs: "),
    (s.swap_key_and_value, "structure", "features.4.e_mhsa.k/Conv, inputs: "),
    (s.remove_relu, "structure", "Identity: 1, here nothing"),
    (s.swap_classes, "constants", "proj_head.0.bias (proj_head.0): 2 of 10 values differ"),
    (s.put_nan, "constants", "10 of 10 values differ, not all of them finite"),
    (s.forget, "metadata", "preprocessing.mean: [0.5, 0.5, 0.5], here nothing"),
)


@pytest.mark.parametrize(("fault", "cause", "word"), FAULTS, ids=lambda each: getattr(each, "__name__", ""))
def test_what_differs_is_named(fault: Fault, cause: str, word: str, demo: Exported, tmp_path: Path) -> None:
    first = compare(contents_of(tamper(demo.copied(tmp_path), fault)), contents_of(demo.path))
    second = compare(contents_of(demo.path), contents_of(tmp_path / demo.path.name))
    assert [each.cause for each in first] == [each.cause for each in second] == [cause]
    if fault is s.forget:
        first = second
        word = "here nothing"
    assert word in "\n".join(first[0].details)
    assert compare(contents_of(demo.path), contents_of(demo.path)) == ()


def test_other_versions_and_passes_are_causes(demo: Exported, replay: Replay, tmp_path: Path) -> None:
    del replay
    path = edited(demo.copied(tmp_path), "versions", "torch", "1.0")
    result = said(path)
    assert causes(result) == ["versions"]
    assert words(result, "versions").splitlines()[1].startswith("torch: 1.0, here 2")
    assert result["notes"] == ["operations, their wiring and every constant are the same"]
    edited(path, "passes", "a-pass-of-old", 7)
    result = said(path)
    assert causes(result) == ["versions", "passes"]
    assert "a-pass-of-old: 7, here nothing" in words(result, "passes")
    table = call("reproduce", path)
    assert "torch: 1.0, here 2" in table.out
    assert f"{path.name}: differs, sha256 " in table.out
    quiet = call("reproduce", path, "--quiet")
    assert (quiet.status, quiet.out) == (3, "")


def test_another_checkpoint_comes_first(demo: Exported, tmp_path: Path) -> None:
    weights = s.weights(tmp_path / "other.pth", 10, 5)
    result = said(demo.path, "--checkpoint", weights)
    assert causes(result)[0] == "checkpoint"
    assert "other.pth" in words(result, "checkpoint")
    assert "constants differ" in words(result, "constants")
    line = refusal("reproduce", demo.path, "--checkpoint", s.weights(tmp_path / "seven.pth", 7, 5))
    assert line.endswith("give its own --checkpoint")


@needs_tensorrt
def test_an_engine_that_was_changed(engine: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rebuilt_as(engine, monkeypatch)
    path = copied(engine, tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = said(path)
    assert causes(result) == ["changed", "engine"]
    assert [each["identical"] for each in result["files"]] == [True, False]
    assert "its kernels are not known" in words(result, "engine")
    assert causes(said(signed(path))) == ["changed", "engine"]  # the manifest still tells
    manifest_path(path).unlink()
    assert f"the first other byte is at {len(data) // 2}" in words(said(path), "engine")
    log_of(path).unlink()
    assert "bring them" in refusal("reproduce", path, status=4)


@needs_coremltools
def test_a_package_that_was_changed(package: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rebuilt_as(package, monkeypatch)
    path = planted(
        package,
        tmp_path,
        lambda draft: draft.change(draft.find("conv", "features.1.mlp.conv1"), "bias", lambda v: 2 * v),
    )
    result = said(path)
    assert causes(result) == ["constants"]
    assert "(features.1.mlp.conv1): " in words(result, "constants")


def test_what_is_kept_is_the_rebuilt_file_alone(demo: Exported, replay: Replay, tmp_path: Path) -> None:
    del replay
    kept = tmp_path / "kept"
    result = said(demo.path, "--keep", kept, status=0)
    assert contents(kept) == {demo.path.name: demo.path.read_bytes()}
    assert result["kept"] == str(kept / demo.path.name)
    path = demo.copied(tmp_path)
    line = refusal("reproduce", path, "--keep", tmp_path)
    assert line == f"{tmp_path} is where {path.name} is; give another folder with --keep"


def test_what_says_nothing_of_itself_is_not_verified(demo: Exported, tmp_path: Path) -> None:
    path = tamper(demo.copied(tmp_path), s.forget)
    line = refusal("reproduce", path, status=4)
    assert line == f"not verified: {path.name} says nothing of how it was made (none: not written by this tool)"


def test_a_builder_that_refuses_leaves_nothing_known(
    demo: Exported, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise BuildFailed("torch's exporter refused the graph")

    monkeypatch.setattr(to_onnx, "build", refuse)
    line = refusal("reproduce", demo.path, status=4)
    assert line.startswith(f"not verified: {demo.path.name} can't be built again here: torch's")
    assert left(places) == []


def test_bad_input_is_one_line(demo: Exported, tmp_path: Path) -> None:
    assert "there is no file" in refusal("reproduce", tmp_path / "none.onnx")
    assert "is no artefact of" in refusal("reproduce", manifest_path(demo.path))
    path = edited(demo.copied(tmp_path), "spec", "target", "coreml")
    assert "tells of another target" in refusal("reproduce", path)
    edited(path, "spec", "height", 7)
    assert refusal("reproduce", path)


def test_causes_come_in_order_and_once() -> None:
    found = tuple(Difference(cause, "x") for cause in ("bytes", "constants", "checkpoint", "changed", "constants"))
    assert [each.cause for each in r._in_order(found)] == ["checkpoint", "changed", "constants", "bytes"]
