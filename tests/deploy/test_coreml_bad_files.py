"""Whatever is wrong with a package on disk: one line that names it and what is wrong, and no verdict."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from nextvit_exporters.coreml.loading import coremltools, heard
from nextvit_exporters.coreml.program import MANIFEST, MANIFEST_JSON, MODEL, WEIGHTS
from tests.deploy.support import Exported, Json, call, contents, one_line, refusal
from tests.deploy.support_coreml import STEM, Draft, copied, needs_coremltools, verified

pytestmark = [needs_coremltools, pytest.mark.usefixtures("quick")]
COMMANDS: Final = ("verify", "inspect", "lint")
Damage = Callable[[Path], object]


def cut(name: str, size: int) -> Damage:
    """The first so many bytes of a file, or all but so many."""
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:size])


def flip(path: Path) -> None:
    """One bit in the middle of one blob."""
    data = bytearray((path / WEIGHTS).read_bytes())
    data[len(data) // 2] ^= 1
    (path / WEIGHTS).write_bytes(data)


def of_another(path: Path) -> None:
    """Sound weights of the same length, of another package."""
    draft = Draft(path)
    draft.change(draft.find("linear"), "bias", lambda values: values + 1)
    (path / WEIGHTS).write_bytes(draft.weights)


def edit(change: Callable[[Any], object]) -> Damage:
    """Another message in the model's place."""

    def damage(path: Path) -> None:
        draft = Draft(path)
        change(draft.model)
        (path / MODEL).write_bytes(draft.model.SerializeToString(deterministic=True))

    return damage


def forgotten(path: Path) -> None:
    """A manifest that lists another file than is there."""
    manifest = json.loads((path / MANIFEST_JSON).read_bytes())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = "com.apple.CoreML/gone.mlmodel"
    (path / MANIFEST_JSON).write_text(json.dumps(manifest))


def emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"weights")


NOT_WRITTEN_WITH: Final = f"{WEIGHTS} is not the file the package was written with (one byte differing is enough)"
FILES: Final[dict[str, tuple[Damage, str]]] = {
    "no weights": (lambda path: (path / WEIGHTS).unlink(), f"{WEIGHTS} is missing; copy the package whole"),
    "half the weights": (cut(WEIGHTS, 700_000), NOT_WRITTEN_WITH),
    "weights a byte short": (cut(WEIGHTS, -1), NOT_WRITTEN_WITH),
    "one bit of the weights": (flip, NOT_WRITTEN_WITH),
    "another package's weights": (of_another, NOT_WRITTEN_WITH),
    "no manifest": (lambda path: (path / MANIFEST_JSON).unlink(), f"{MANIFEST_JSON} is missing"),
    "half a manifest": (cut(MANIFEST_JSON, 100), f"{MANIFEST_JSON} is not JSON"),
    "a manifest of what is not there": (forgotten, "Data/com.apple.CoreML/gone.mlmodel is missing"),
    "no model": (lambda path: (path / MODEL).unlink(), f"{MODEL} is missing"),
    "half a model": (cut(MODEL, 50_000), f"{MODEL} is damaged or no Core ML model"),
    "an empty model": (cut(MODEL, 0), f"{MODEL} is empty"),
    "a version of tomorrow": (
        edit(lambda model: setattr(model, "specificationVersion", 99)),
        "its specification is of version 99; known are 6, 7, 8, 9, 10: export it again",
    ),
    "a version of another opset": (
        edit(lambda model: setattr(model, "specificationVersion", 8)),
        "its opset is CoreML6, and its specification's CoreML7; export it again",
    ),
    "an empty folder": (emptied, f"{MANIFEST_JSON} is missing, so it is no Core ML package"),
    "a file": (a_file, "it is a file; a Core ML package is a folder; give the path of a .mlpackage"),
    "nothing": (shutil.rmtree, "it is not there; give the path of a .mlpackage"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_package(package: Exported, name: str, tmp_path: Path) -> None:
    damage, reason = FILES[name]
    path = copied(package, tmp_path)
    damage(path)
    before = contents(tmp_path)
    for command in COMMANDS:
        line = refusal(command, path)
        assert line.startswith(f"{path}: {reason}"), command
        assert len(line) < 600
    assert contents(tmp_path) == before


def test_weights_that_are_changed_without_a_hash_to_tell(package: Exported, tmp_path: Path) -> None:
    """Without the hash a flipped bit is another network, or not to be read; it is not believed."""
    path = copied(package, tmp_path)
    edit(lambda model: model.description.metadata.userDefined.pop("nextvit_deploy.weights_sha256"))(path)
    cut(WEIGHTS, -1)(path)
    assert f"{path}: {WEIGHTS} holds " in refusal("verify", path)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_neural_network_is_not_executed(package: Exported, command: str, tmp_path: Path) -> None:
    """It may be sound, so that is no failure."""

    def older(model: Any) -> None:
        model.specificationVersion = 4
        model.neuralNetwork.arrayInputShapeMapping = 1  # takes the program's place

    path = copied(package, tmp_path)
    edit(older)(path)
    line = refusal(command, path, status=4)
    assert f"{path}: it holds a neuralNetwork; only ML programs are read here: export it as one" in line


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("{", "the manifest inside {} is damaged: "),
        ("[]", "the manifest inside {} is damaged; export it again"),
        ('{"spec": []}', "the manifest inside the file holds no spec; export it again"),
        ('{"spec": {"model": "nextvit_nano"}}', "the manifest's spec is not one this version reads: "),
    ],
)
def test_a_damaged_record_inside(package: Exported, record: str, says: str, tmp_path: Path) -> None:
    path = copied(package, tmp_path)
    edit(lambda model: model.description.metadata.userDefined.update({MANIFEST: record}))(path)
    assert refusal("verify", path).startswith(says.format(path.name))


@pytest.mark.parametrize(
    "other", [{"target": "onnx"}, {"target": "tensorrt", "coreml": None}, {"coreml": None}, {"input": "uint8"}]
)
def test_a_record_of_something_else(package: Exported, other: Json, tmp_path: Path) -> None:
    def forge(model: Any) -> None:
        entries = model.description.metadata.userDefined
        record = json.loads(entries[MANIFEST])
        record["spec"] |= other
        entries[MANIFEST] = json.dumps(record)

    path = copied(package, tmp_path)
    edit(forge)(path)
    says = f"the manifest inside {path.name} tells of no Core ML package; export it again"
    assert refusal("verify", path) == says


def test_an_empty_record_is_none(package: Exported, tmp_path: Path) -> None:
    """As of another tool's package, only the precision's cost is known."""
    path = copied(package, tmp_path)
    edit(lambda model: model.description.metadata.userDefined.update({MANIFEST: "{}"}))(path)
    ran = call("verify", path, "--json", "--count", "1")
    assert (ran.status, ran.json["verdict"]) == (4, "not verified")
    assert [check["verdict"] for check in ran.json["checks"]] == ["not verified", "verified", "verified"]


def test_a_slash_behind_the_path(package: Exported) -> None:
    """Shells put it there, a package being a folder."""
    path = f"{package.path}/"
    for command in COMMANDS:
        ran = call(command, path)
        assert (ran.status, ran.err) == (0, ""), command
    assert call("inspect", path, "--json").json["name"] == package.path.name == f"{STEM}.mlpackage"


def test_a_package_without_its_suffix(package: Exported, tmp_path: Path) -> None:
    path = copied(package, tmp_path).rename(tmp_path / "package")
    assert refusal("verify", path) == "package is no artefact of coreml, onnx, tensorrt"


def test_what_lies_beside_does_not_matter(package: Exported, tmp_path: Path) -> None:
    """All that a proof needs is inside; what macOS leaves in a folder does no harm."""
    path = copied(package, tmp_path)
    (path / ".DS_Store").write_bytes(b"\0")
    assert verified(path, "--count", "1")["notes"]


def test_coremltools_opens_a_package_without_weights(package: Exported, tmp_path: Path) -> None:
    """Why packages are read here without it: there an app would be the first to know."""
    path = copied(package, tmp_path)
    (path / WEIGHTS).unlink()
    with heard():
        try:
            opened = coremltools().models.MLModel(str(path), skip_model_load=True)
        except Exception as error:  # noqa: BLE001 - whichever it chooses
            pytest.skip(f"coremltools refuses it by now: {error}")
    assert opened.get_spec().description.predictedFeatureName == "classLabel"
    assert "weight.bin is missing" in one_line(call("verify", path).err)
