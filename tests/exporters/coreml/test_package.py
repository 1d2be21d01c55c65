"""A package is the same bytes wherever it is written, tells nothing of where that was, and says what was asked."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import nn

from nextvit_exporters import to_coreml
from nextvit_exporters.coreml.convert import Converted
from nextvit_exporters.coreml.loading import coremltools, heard
from nextvit_exporters.coreml.package import write_package
from nextvit_exporters.coreml.program import MANIFEST, MANIFEST_JSON, MODEL, MODULES, WEIGHTS, WEIGHTS_SHA256, Package
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.coreml_spec import About, CoreMLSpec
from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.files import sha256_of
from tests.exporters.coreml.built import (
    ABOUT,
    LABELS,
    PROVENANCE,
    ROOT,
    SPEC,
    SPECS,
    Classes,
    saved,
    toy,
    toy_spec,
)
from tests.exporters.toys import wired

IDENTIFIER: Final = re.compile(
    rb"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-([0-9a-fA-F])[0-9a-fA-F]{3}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
)
DATE: Final = re.compile(rb"\b20\d\d[-/]\d\d?[-/]\d\d?\b|\b\d\d:\d\d:\d\d\b")
PATHS: Final = [each.encode() for each in (str(ROOT), str(Path.home()), str(Path(torch.__file__).parents[1]))]
TOY: Final = toy_spec(CoreMLSpec(16, "logits"))


def contents(folder: Path) -> dict[str, bytes]:
    return {each.relative_to(folder).as_posix(): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


@pytest.mark.parametrize("name", SPECS)
def test_two_processes_write_the_same_bytes(twice: tuple[Path, Path], name: str) -> None:
    """Other working directories, temporary folders, places of the output and hashes of strings."""
    first, second = (contents(folder / f"{name}.mlpackage") for folder in twice)
    assert sorted(first) == sorted([MANIFEST_JSON, MODEL, WEIGHTS])
    assert first.keys() == second.keys()
    assert [file for file in first if first[file] != second[file]] == []
    assert len({sha256_of(folder / f"{name}.mlpackage") for folder in twice}) == 1


@pytest.mark.parametrize("name", SPECS)
def test_nothing_tells_when_or_where_it_was_written(twice: tuple[Path, Path], name: str) -> None:
    for folder in twice:
        log = to_coreml.log_of(folder / f"{name}.mlpackage").read_bytes()
        files = contents(folder / f"{name}.mlpackage") | {"log": log}
        for file, data in files.items():
            places = [*PATHS, *(str(each).encode() for each in twice), b"working-", b"temporary-", b".coremltools-"]
            assert [place for place in places if place in data] == [], file
            if file != WEIGHTS:  # among a million numbers anything may come up
                assert DATE.findall(data) == [], file
                assert b"conversion_date" not in data
                assert set(IDENTIFIER.findall(data)) <= {b"5"}, file
            assert (IDENTIFIER.search(data) is not None) == (file == MANIFEST_JSON)


def test_the_log_holds_what_coremltools_said(twice: tuple[Path, Path]) -> None:
    lines = to_coreml.log_of(twice[0] / "fp16.mlpackage").read_text(encoding="utf-8").splitlines()
    assert any("has not been tested with coremltools" in line for line in lines)
    assert all(line.isprintable() for line in lines)


def test_identifiers_follow_from_what_they_name(twice: tuple[Path, Path]) -> None:
    manifests = [json.loads((twice[0] / f"{name}.mlpackage" / MANIFEST_JSON).read_text()) for name in SPECS]
    assert manifests[0] == manifests[1] == manifests[2]
    items = manifests[0]["itemInfoEntries"]
    assert all(str(uuid.UUID(each)) == each and uuid.UUID(each).version == 5 for each in items)
    paths = {identifier: item["path"] for identifier, item in items.items()}
    assert sorted(paths.values()) == ["com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights"]
    assert paths[manifests[0]["rootModelIdentifier"]] == "com.apple.CoreML/model.mlmodel"


@pytest.fixture(scope="module")
def read_by_coremltools(twice: tuple[Path, Path]) -> Mapping[str, Any]:
    with heard():
        models = coremltools().models
        return {
            name: models.MLModel(str(twice[0] / f"{name}.mlpackage"), skip_model_load=True).get_spec() for name in SPECS
        }


@pytest.mark.parametrize("name", SPECS)
def test_coremltools_reads_what_was_asked(read_by_coremltools: Mapping[str, Any], name: str) -> None:
    spec = read_by_coremltools[name]
    told = spec.description.metadata
    assert spec.specificationVersion == (8 if name == "w8a8" else 7)
    assert (told.author, told.license, told.versionString, told.shortDescription) == (
        ABOUT.author,
        ABOUT.licence,
        ABOUT.version,
        ABOUT.description,
    )
    assert told.userDefined["com.apple.coreml.model.preview.type"] == "imageClassifier"
    assert json.loads(told.userDefined[MANIFEST]) == PROVENANCE
    assert set(told.userDefined) >= {MODULES, WEIGHTS_SHA256}
    (image,) = spec.description.input
    assert (image.name, image.type.imageType.width, image.type.imageType.height) == ("image", 64, 64)
    assert image.type.imageType.colorSpace == image.type.imageType.RGB
    assert "67 x 67 pixels (bicubic), centre crop of 64 x 64; RGB; " in image.shortDescription
    assert image.shortDescription.endswith("mean and standard deviation are applied inside")
    texts = {each.name: each.shortDescription for each in spec.description.output}
    assert texts == {
        "classLabel": "the class of the highest probability",
        "classLabel_probs": "the probability of each class; they add up to one",
    }
    assert spec.description.predictedFeatureName == "classLabel"
    assert spec.description.predictedProbabilitiesName == "classLabel_probs"
    (function,) = spec.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    (classes,) = [op for op in block.operations if op.type == "classify"]
    (held,) = classes.inputs["classes"].arguments
    values = [each.immediateValue.tensor.strings.values for each in held.value.immediateValue.list.values]
    assert [list(each) for each in values] == [[label] for label in LABELS]


def test_what_the_user_leaves_empty_is_filled_in() -> None:
    assert to_coreml._about(SPEC) == ABOUT
    about = to_coreml._about(TOY)
    assert about == About(description="toy, 3 classes, fp16, exported by nextvit-deploy")


def test_a_tensor_is_described_by_what_is_done_to_pixels() -> None:
    told = to_coreml._descriptions(TOY)
    assert told["image"].endswith(
        "(B, 3, H, W), RGB as (value / 255 - mean) / std, mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)"
    )
    assert told["logits"] == "(B, 3), before the softmax"
    assert told["stage3"] == "feature map of stage 3, stride 16"


def test_the_weights_are_vouched_for(packages: dict[str, Package]) -> None:
    for package in packages.values():
        assert package.metadata[WEIGHTS_SHA256] == package.files[WEIGHTS] == sha256_of(package.path / WEIGHTS)


def test_compression_saves_what_it_says(packages: dict[str, Package]) -> None:
    sizes = {name: (package.path / WEIGHTS).stat().st_size for name, package in packages.items()}
    assert 0.25 < sizes["lut4"] / sizes["fp16"] < 0.35
    assert 0.5 < sizes["w8a8"] / sizes["fp16"] < 0.6


def test_a_preview_is_for_classifiers_alone(tmp_path: Path) -> None:
    package = saved(TOY, toy(Classes()), tmp_path)
    assert "com.apple.coreml.model.preview.type" not in package.metadata
    assert package.about["author"] == ABOUT.author


def test_a_model_without_weights_has_no_file_for_them(tmp_path: Path) -> None:
    package = saved(TOY, toy(wired(lambda _, x: torch.relu(x * 2))), tmp_path)
    assert sorted(package.files) == [MODEL, MANIFEST_JSON]
    assert WEIGHTS_SHA256 not in package.metadata
    assert len(json.loads((package.path / MANIFEST_JSON).read_text())["itemInfoEntries"]) == 1
    assert list(tmp_path.iterdir()) == [package.path]


def test_what_coremltools_cannot_save_is_one_line(tmp_path: Path) -> None:
    class Refuses:
        def save(self, path: str) -> None:
            del path
            raise RuntimeError("no such thing\nand much more")

    path = tmp_path / "x.mlpackage"
    path.mkdir()
    with pytest.raises(BuildFailed, match=r"^coremltools could not save the package: no such thing$"):
        write_package(Converted(Refuses(), {}), path, ABOUT, {}, {})
    assert contents(tmp_path) == {}


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise BuildFailed("it would not")

    module = to_coreml.lower(TOY, toy(Classes()))
    monkeypatch.setattr(to_coreml, "write_package", refuse)
    with pytest.raises(BuildFailed, match="it would not"):
        to_coreml.build(TOY, module, tmp_path / "x.mlpackage", {}, lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_a_build_says_what_it_does(tmp_path: Path) -> None:
    steps: list[str] = []
    path = tmp_path / "x.mlpackage"
    module = to_coreml.lower(TOY, toy(wired(lambda m, x: m.conv(x).mean((2, 3)), conv=nn.Conv2d(3, 3, 1))))
    built = to_coreml.build(TOY, module, path, PROVENANCE, steps.append)
    assert steps == ["coremltools: convert", "write the package"]
    assert (built.path, built.sha256) == (path, sha256_of(path))
    assert built.size == sum(map(len, contents(path).values()))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.mlpackage", "x.mlpackage.log"]
    saved_one = to_coreml.read(path)
    assert saved_one.provenance == PROVENANCE
    assert saved_one.unit == "operations"
    assert read_package(path).about["description"] == "toy, 3 classes, fp16, exported by nextvit-deploy"
