"""``coreml``: what it builds, what it says of it, and from a picture on disk to probabilities by another route."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from nextvit_deploy.data import load_images
from nextvit_deploy.manifest import manifest_path
from nextvit_exporters.coreml.program import Package
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.executors.base import Array
from nextvit_exporters.executors.mil import MilReference
from nextvit_exporters.files import sha256_of
from nextvit_exporters.targets import COST_AT_WORST, PRECISION_COST, SAME_NETWORK
from nextvit_exporters.to_coreml import log_of
from nextvit_models.checkpoint import load_checkpoint
from nextvit_models.demo import DEMO_CHECKPOINT, DEMO_IMAGES
from tests.deploy.support import Exported, Json, Ran, call, one_line, refusal
from tests.deploy.support_coreml import STEM, by_question, error, exported, needs_coremltools

pytestmark = [needs_coremltools, pytest.mark.usefixtures("quick")]
FEW: Final = ("--count", "4")
VARIANTS: Final[dict[str, tuple[str, ...]]] = {
    "logits_64_b1_fp16_image_ios16": ("--logits", *FEW),
    "features_64_b1_fp16_image_ios16": ("--features", *FEW),
    "logits_64_b3_fp16_ios16": ("--input", "tensor", "--batch", "3", "--logits", *FEW),
    "classify_64_b1_fp32_image_ios16": ("--precision", "fp32"),
    "classify_64+96_b1_fp16_image_ios16": ("--enumerated-sizes", "64,96", *FEW),
    "classify_64-64-96_b1_fp16_image_ios16": ("--flexible", "64:96", *FEW),
    "classify_64_b1_fp16_image_ios15": ("--ios", "15", *FEW),
    "classify_64_b1_fp16_image_ios18_int8": ("--ios", "18", "--weights", "int8", *FEW),
    "classify_64_b1_fp16_image_ios26_lut6": ("--ios", "26", "--weights", "lut6", *FEW),
    "classify_64_b1_fp16_image_ios16_int8": ("--weights", "int8"),
    "classify_64_b1_fp16_image_ios16_lut4": ("--weights", "lut4"),
}
COMPRESSED: Final = {"ios16_int8": 0.56, "ios26_lut6": 0.43, "ios16_lut4": 0.32}
"""How large a package is, of the uncompressed one."""
SAME: Final = 1e-5
"""The same network: at most this relative rms, whatever is asked for."""
COST: Final = {"int8": 1e-1, "lut6": 3e-1, "lut4": 1.0}
"""What compression may cost at most; FP16 alone 1e-2, float32 1e-5."""


def made(base: Path, stem: str) -> Exported:
    return exported(base, *VARIANTS[stem])


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def test_the_default_is_proven(package: Exported) -> None:
    manifest = package.manifest
    asked = by_question(manifest)
    assert {question: checks[0]["mode"] for question, checks in asked.items()} == {
        SAME_NETWORK: "exact",
        PRECISION_COST: "emulated",
        COST_AT_WORST: "pessimistic",
    }
    for checks, bound in zip(asked.values(), (SAME, 1e-2, 2e-2), strict=True):
        (check,) = checks
        assert (check["verdict"], check["inputs"]) == ("verified", "8 of the demo's digits")
        assert str(check["executor"]).startswith("mil-reference")
        assert {each["output"] for each in check["comparisons"]} == {"logits", "probabilities"}
        assert error(check) <= bound
        assert all(each["top1"] == 1.0 for each in check["comparisons"])
    assert manifest["verdict"] == "verified"
    assert package.path.name == f"{STEM}.mlpackage"


def test_three_things_lie_beside_each_other(package: Exported) -> None:
    beside = [package.path, log_of(package.path), manifest_path(package.path)]
    assert sorted(package.path.parent.iterdir()) == sorted(beside)
    assert package.path.is_dir()


def test_json_is_the_manifest(package: Exported) -> None:
    assert package.ran.json == package.manifest
    assert package.manifest["artifact"] == {
        "file": package.path.name,
        "sha256": sha256_of(package.path),
        "bytes": sum(each.stat().st_size for each in package.path.rglob("*") if each.is_file()),
    }


def test_the_manifest_says_what_was_built(package: Exported) -> None:
    manifest, built = package.manifest, package.manifest["built"]
    assert manifest["unit"] == "operations"
    assert (manifest["ops"]["conv"], manifest["ops"]["softmax"], manifest["ops"]["classify"]) == (49, 4, 1)
    assert {"batch_norm", "transpose"}.isdisjoint(manifest["ops"])
    assert manifest["dtypes"] == "123 of 124 operations in fp16, 1 of 124 operations in fp32"
    assert built["runs on"] == "iOS 16 or newer (specification 7, CoreML6)"
    assert built["inputs"]["image"].startswith("image RGB 1x3x64x64; ")
    assert built["labels"] == "10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert built["about"] == {"description": "nextvit_nano, 10 classes, fp16, exported by nextvit-deploy"}
    assert manifest["spec"]["coreml"]["keep_fp32"] == []
    assert "coremltools" in manifest["versions"]
    assert any("the bundled demo" in note for note in manifest["notes"])


def pictures() -> Iterator[Path]:
    """One PNG of each class, in the order in which folders are read."""
    for folder in sorted(each for each in DEMO_IMAGES.iterdir() if each.is_dir()):
        yield min(folder.glob("*.png"))


def test_from_a_picture_on_disk_to_probabilities_by_another_route(package: Exported) -> None:
    """timm reads and normalises the PNG, PyTorch runs the checkpoint: nothing of an export takes part in that."""
    checkpoint = load_checkpoint(DEMO_CHECKPOINT)
    wanted = checkpoint.preprocessing
    transform = create_transform(
        64,
        is_training=False,
        interpolation=wanted.interpolation,
        crop_pct=wanted.crop_pct,
        mean=wanted.mean,
        std=wanted.std,
    )
    files = list(pictures())
    batch = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        expected = checkpoint.model.float()(batch).softmax(-1).numpy()
    images = load_images(DEMO_IMAGES, len(files), (64, 64), wanted)
    assert [DEMO_IMAGES / name for name in images.names] == files
    fed = np.ascontiguousarray(images.pixels.transpose(0, 2, 3, 1))
    with MilReference(package.path, "emulated") as executor:
        found: list[Array] = []
        labels: list[str] = []
        for picture in fed:
            found.append(executor.run({"image": picture[None]})["probabilities"])
            labels += executor.labels_of_last_run
    assert relative_rms(np.concatenate(found), expected) <= 1e-2
    assert labels == [checkpoint.labels[index] for index in expected.argmax(1)]
    assert labels == [file.parent.name for file in files]


def relative_rms(found: Any, expected: Any) -> float:
    difference = found.astype(np.float64) - expected.astype(np.float64)
    return float(np.sqrt((difference**2).mean() / (expected.astype(np.float64) ** 2).mean()))


@pytest.mark.parametrize("stem", VARIANTS)
def test_what_is_asked_for_is_proven(base: Path, stem: str) -> None:
    made_of = made(base, stem)
    assert made_of.path.stem == f"nextvit_nano_{stem}"
    manifest = made_of.manifest
    assert (made_of.ran.json, manifest["verdict"]) == (manifest, "verified")
    single = manifest["spec"]["precision"] == "fp32"
    asked = by_question(manifest)
    assert list(asked) == [SAME_NETWORK, PRECISION_COST, COST_AT_WORST][: 2 if single else 3]
    cost = COST.get(str(manifest["spec"]["coreml"]["weights"]), SAME if single else 1e-2)
    for question, checks in asked.items():
        for check in checks:
            bound = {SAME_NETWORK: SAME, PRECISION_COST: cost, COST_AT_WORST: 2 * cost}[question]
            assert error(check) <= bound, (question, check["inputs"])
            assert all(each["top1"] in {None, 1.0} for each in check["comparisons"])


def test_logits(base: Path) -> None:
    read = read_package(made(base, "logits_64_b1_fp16_image_ios16").path)
    assert [(each.name, each.kind, each.shape) for each in read.outputs] == [("logits", "tensor", (1, 10))]
    assert (read.labels, read.program.count()["softmax"]) == ((), 3)


def test_four_feature_maps(base: Path) -> None:
    found = made(base, "features_64_b1_fp16_image_ios16")
    read = read_package(found.path)
    assert {each.name: each.shape for each in read.outputs} == {
        "stage1": (1, 32, 16, 16),
        "stage2": (1, 128, 8, 8),
        "stage3": (1, 128, 4, 4),
        "stage4": (1, 160, 2, 2),
    }
    for checks in by_question(found.manifest).values():
        assert [each["output"] for each in checks[0]["comparisons"]] == ["stage1", "stage2", "stage3", "stage4"]


def test_a_batch_of_tensors(base: Path) -> None:
    read = read_package(made(base, "logits_64_b3_fp16_ios16").path)
    (image,) = read.inputs
    assert (image.kind, image.shape, image.dtype) == ("tensor", (3, 3, 64, 64), "float32")
    assert "mean (" in image.description


def whole_numbers(read: Package) -> set[str]:
    """The types of what has fewer than two axes: sizes."""
    computing = (op for op in read.program.operations if op.kind not in {"const", "classify"})
    return {each.type.dtype for op in computing for each in op.outputs if len(each.type.shape) < 2}


def test_sizes_that_are_enumerated(base: Path) -> None:
    found = made(base, "classify_64+96_b1_fp16_image_ios16")
    read = read_package(found.path)
    assert set(read.inputs[0].allowed) == {(1, 3, 64, 64), (1, 3, 96, 96)}
    assert "int32" in whole_numbers(read) <= {"int32", "float32"}
    for checks in by_question(found.manifest).values():
        assert [check["inputs"] for check in checks] == ["4 of the demo's digits", "noise, 96x96"]


def test_a_range_of_sizes(base: Path) -> None:
    found = made(base, "classify_64-64-96_b1_fp16_image_ios16")
    read = read_package(found.path)
    assert read.inputs[0].ranges[2:] == ((64, 96), (64, 96))
    assert "int32" in whole_numbers(read) <= {"int32", "float32"}
    sizes = ["64x64", "65x96", "81x64", "96x96"]
    for checks in by_question(found.manifest).values():
        assert [check["inputs"] for check in checks] == [
            "4 of the demo's digits",
            *(f"noise, {size}" for size in sizes),
        ]


@pytest.mark.parametrize(
    ("stem", "specification", "opset"),
    [
        ("classify_64_b1_fp16_image_ios15", 6, "CoreML5"),
        ("classify_64_b1_fp16_image_ios16_int8", 7, "CoreML6"),
        ("classify_64_b1_fp16_image_ios18_int8", 9, "CoreML8"),
        ("classify_64_b1_fp16_image_ios26_lut6", 10, "CoreML9"),
    ],
)
def test_the_oldest_release(base: Path, stem: str, specification: int, opset: str) -> None:
    read = read_package(made(base, stem).path)
    assert (read.specification, read.program.opset) == (specification, opset)


def test_compression_makes_it_smaller(base: Path, package: Exported) -> None:
    sizes = {name: made(base, f"classify_64_b1_fp16_image_{name}").manifest["artifact"]["bytes"] for name in COMPRESSED}
    whole = package.manifest["artifact"]["bytes"]
    shares = [size / whole for size in sizes.values()]
    assert shares == sorted(shares, reverse=True)
    assert all(abs(share - expected) < 0.05 for share, expected in zip(shares, COMPRESSED.values(), strict=True)), sizes
    counts = made(base, "classify_64_b1_fp16_image_ios16_lut4").manifest["built"]["compressed weights"]
    assert list(counts) == ["constexpr_lut_to_dense"]


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """With class names of a file and everything Xcode shows, for fp16 weights of another release."""
    folder = tmp_path_factory.mktemp("named")
    labels = folder / "labels.txt"
    labels.write_text("\ufeffzero\n\n one \r\nzwei\ntrois\nciñco\n5\n6\n7\n8\n九\n", encoding="utf-8")
    about = "--author", "A. Author", "--license", "MIT", "--model-version", "3.1", "--description", "Digits, by hand"
    ran = call("coreml", "-o", folder / "out", "--count", "2", "--labels", labels, *about, "--ios", "17", "--json")
    assert (ran.status, ran.err) == (0, ""), ran
    (path,) = (folder / "out").glob("*.mlpackage")
    return Exported(path, ran)


def test_labels_of_a_file(named: Exported) -> None:
    read = read_package(named.path)
    assert read.labels == ("zero", "one", "zwei", "trois", "ciñco", "5", "6", "7", "8", "九")
    assert set(read.about.values()) == {"A. Author", "MIT", "3.1", "Digits, by hand"}
    assert read.specification == 8
    assert named.manifest["spec"]["labels"] == list(read.labels)


def test_other_labels_are_noted(named: Exported) -> None:
    ran = call("verify", named.path, "--count", "2", "--json")
    assert (ran.status, ran.json["verdict"]) == (0, "verified")
    assert any("other preprocessing or class names" in note for note in ran.json["notes"])


def test_verified_again(package: Exported) -> None:
    ran = call("verify", package.path, "--json")
    assert (ran.status, ran.err) == (0, "")
    again, before = ran.json, package.manifest
    for manifest in (again, before):
        manifest["passes"] = {
            each["name"]: each["rewrites"] for each in manifest["passes"]
        }  # and not how long they took
        del manifest["seconds"]
    assert again == before


def test_human_words(package: Exported) -> None:
    shown = call("verify", package.path, "--count", "2")
    assert (shown.status, shown.err) == (0, "")
    for text in ("same network", "precision cost, at worst", "mil-reference (pessimistic)", "verified"):
        assert text in shown.out
    told = call("inspect", package.path)
    assert (told.status, told.err) == (0, "")
    words = " ".join(told.out.split())
    assert "iOS 16 or newer (specification 7, CoreML6)" in words
    assert "image RGB 1x3x64x64" in words
    assert call("verify", package.path, "--count", "2", "-q") == Ran(0, "", "")


def test_inspect_as_json(package: Exported) -> None:
    facts: Json = call("inspect", package.path, "--json").json
    assert facts["sha256"] == package.manifest["artifact"]["sha256"]
    assert facts["operations"] == sum(package.manifest["ops"].values())
    assert facts["op table"] == package.manifest["ops"]
    assert facts["spec"] == package.manifest["spec"]
    assert facts["runs on"] == package.manifest["built"]["runs on"]


def test_lint(package: Exported) -> None:
    shown = call("lint", package.path)
    assert (shown.status, shown.err) == (0, "")
    assert "Heuristics: only a measurement on the device" in shown.out
    findings = call("lint", package.path, "--json").json["findings"]
    assert all({"rule", "message", "source", "module"} <= set(each) for each in findings)
    assert json.dumps(findings)


def test_what_is_no_package(tmp_path: Path) -> None:
    for command in ("verify", "inspect", "lint"):
        one_line(call(command, tmp_path / "absent.mlpackage").err)
    assert refusal("lint", tmp_path).isprintable()
