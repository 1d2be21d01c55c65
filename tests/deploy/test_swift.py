from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from nextvit_deploy import swift
from nextvit_deploy.data import ImageSet, noise_images
from nextvit_deploy.swift import check_swift_place, write_swift
from nextvit_exporters.coreml.loading import coremltools, heard
from nextvit_exporters.coreml_spec import CoreMLSpec
from nextvit_exporters.errors import OutputNotWritten, UnsupportedSpec
from nextvit_exporters.executors.mil import MilReference
from nextvit_exporters.files import sha256_of
from nextvit_exporters.spec import ExportSpec, InputKind, Precision
from nextvit_models.preprocessing import Preprocessing
from tests.deploy.support import contents
from tests.exporters.coreml.packages import LABELS, save, tiny

SIZE = (32, 48)
IMAGES = noise_images(4, SIZE, Preprocessing(crop_pct=0.9), seed=3)
SPEC = ExportSpec(
    "nextvit_nano",
    len(LABELS),
    "coreml",
    Precision.FP16,
    *SIZE,
    1,
    18,
    IMAGES.preprocessing,
    labels=tuple(LABELS),
    input=InputKind.IMAGE,
    coreml=CoreMLSpec(16, "classify"),
)
PLAIN = replace(SPEC, input=InputKind.NORMALIZED, coreml=CoreMLSpec(16, "logits"))
Floats = NDArray[np.float32]


@dataclass
class Made:
    """A package and what PyTorch answers to ``IMAGES``."""

    spec: ExportSpec
    package: Path
    expected: dict[str, Floats]

    def write(self, folder: Path) -> dict[str, Any]:
        write_swift(folder, self.spec, self.package, IMAGES, self.expected, LABELS)
        told: dict[str, Any] = json.loads((folder / swift.EXPECTED).read_text(encoding="utf-8"))
        return told

    @property
    def answers(self) -> Floats:
        return self.expected["probabilities" if self.spec is SPEC else "logits"]


def convert(spec: ExportSpec, path: Path) -> Made:
    ct, model = coremltools(), tiny()
    picture = spec.input is InputKind.IMAGE
    inputs = torch.from_numpy(IMAGES.pixels.astype(np.float32) / 255 if picture else IMAGES.normalised())
    with torch.no_grad():
        logits = model(inputs)
        expected = {"logits": logits.numpy(), "probabilities": logits.softmax(-1).numpy()}
    whole = torch.nn.Sequential(model, torch.nn.Softmax(-1)) if picture else model
    shape = (1, 3, *SIZE)
    given = (
        ct.ImageType(name="image", shape=shape, scale=1 / 255)
        if picture
        else ct.TensorType(name="image", shape=shape, dtype=np.float32)
    )
    with heard():
        program = torch.export.export(whole.eval(), (torch.rand(shape),)).run_decompositions({})
        made = ct.convert(
            program,
            inputs=[given],
            outputs=[ct.TensorType(name="probabilities" if picture else "logits", dtype=np.float32)],
            classifier_config=ct.ClassifierConfig(LABELS) if picture else None,
            minimum_deployment_target=ct.target.iOS16,
            skip_model_load=True,
        )
    return Made(spec, save(made, path / f"{spec.stem}.mlpackage"), expected)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return convert(SPEC, tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return convert(PLAIN, tmp_path_factory.mktemp("plain"))


def most_decided(answers: Floats) -> int:
    ordered = np.sort(answers, axis=1)
    return int(np.argmax(ordered[:, -1] - ordered[:, -2]))


def judge(told: Mapping[str, Any], found: Floats) -> bool:
    """What the Swift file decides, in Python."""
    bound = told["tolerance"]["absolute"]
    near = all(abs(float(found[each["index"]]) - each["value"]) <= bound for each in told["top"])
    return near and (not told["decided"] or int(found.argmax()) == told["top"][0]["index"])


@pytest.mark.parametrize("kind", ["classifier", "plain"])
def test_what_is_expected_is_pytorchs_answer(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(kind)
    told = made.write(tmp_path / "test")
    chosen = most_decided(made.answers)
    answer = made.answers[chosen].astype(float)
    order = np.argsort(-answer)
    assert told["input"]["from"] == IMAGES.names[chosen]
    assert [each["index"] for each in told["top"]] == order[:5].tolist()
    assert [each["label"] for each in told["top"]] == [LABELS[index] for index in order[:5]]
    assert [each["value"] for each in told["top"]] == answer[order[:5]].tolist()
    assert told["package_sha256"] == sha256_of(made.package)
    assert (told["model"], told["package"], told["against"]) == (
        "nextvit_nano",
        f"{made.spec.stem}.mlpackage",
        "PyTorch float32",
    )
    assert (told["input"]["name"], told["input"]["height"], told["input"]["width"]) == ("image", *SIZE)
    assert told["decided"] == (answer[order[0]] - answer[order[1]] > 2 * told["tolerance"]["absolute"])
    assert told["decided"]


def test_the_picture_is_the_one_that_was_asked_about(classifier: Made, tmp_path: Path) -> None:
    told = classifier.write(tmp_path / "test")
    assert set(contents(tmp_path / "test")) == {"NextViTSelfTest.swift", "README.md", "expected.json", "golden.png"}
    with Image.open(tmp_path / "test" / "golden.png") as opened:
        assert (opened.mode, opened.info) == ("RGB", {})
        pixels = np.asarray(opened)
    np.testing.assert_array_equal(pixels, IMAGES.pixels[most_decided(classifier.answers)].transpose(1, 2, 0))
    assert told["input"]["sha256"] == hashlib.sha256(pixels.tobytes()).hexdigest()
    assert told["input"]["shape"] == [1, *SIZE, 3]
    assert told["output"] == {"name": "classLabel_probs", "label": "classLabel"}
    assert told["preprocessing"]["normalised_by"] == "the package"


def test_a_tensor_goes_as_raw_numbers(plain: Made, tmp_path: Path) -> None:
    told = plain.write(tmp_path / "test")
    assert set(contents(tmp_path / "test")) == {"NextViTSelfTest.swift", "README.md", "expected.json", "golden.bin"}
    raw = (tmp_path / "test" / "golden.bin").read_bytes()
    values = np.frombuffer(raw, "<f4").reshape(told["input"]["shape"])
    np.testing.assert_array_equal(values[0], IMAGES.normalised()[most_decided(plain.answers)])
    assert told["input"]["sha256"] == hashlib.sha256(raw).hexdigest()
    assert told["output"] == {"name": "logits"}
    assert told["preprocessing"]["normalised_by"] == "the app"
    assert told["preprocessing"]["mean"] == list(Preprocessing().mean)


@pytest.mark.parametrize("kind", ["classifier", "plain"])
def test_the_tolerance_lets_rounding_pass_and_nothing_else(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    made: Made = request.getfixturevalue(kind)
    told = made.write(tmp_path / "test")
    chosen, output = most_decided(made.answers), "probabilities" if made.spec is SPEC else "logits"
    inputs = IMAGES.pixels.transpose(0, 2, 3, 1) if made.spec is SPEC else IMAGES.normalised()
    golden = np.ascontiguousarray(inputs[chosen : chosen + 1])
    bgr = golden[..., ::-1] if made.spec is SPEC else golden[:, ::-1]
    with MilReference(made.package, "pessimistic") as reference:
        right = reference.run({"image": golden})[output][0].astype(np.float32)
        wrong = reference.run({"image": np.ascontiguousarray(bgr)})[output][0].astype(np.float32)
        shifted = reference.run({"image": np.roll(golden, 1, axis=2)})[output][0].astype(np.float32)
    assert judge(told, right)
    assert not judge(told, wrong)
    assert not np.array_equal(shifted, right)
    worst = np.abs(right.astype(float) - made.answers[chosen]).max()
    least = 1e-3 if made.spec is SPEC else 1e-3 * np.abs(made.answers[chosen]).max()
    assert max(3 * worst, least) <= told["tolerance"]["absolute"] * (1 + 1e-6)
    assert "times" in told["tolerance"]["measured"]


def test_preparing_a_picture_is_told_in_numbers(classifier: Made, plain: Made, tmp_path: Path) -> None:
    told = classifier.write(tmp_path / "test")["preprocessing"]
    assert (told["resize_to_cover"], told["crop"]) == (
        {"width": 53, "height": 35},
        {"width": 48, "height": 32, "place": "centre"},
    )
    assert "it just covers 53 x 35; cut 48 x 32" in told["words"]
    text = (tmp_path / "test" / "README.md").read_text(encoding="utf-8")
    assert told["words"] in text
    assert "`centerCrop` is not the same" in text
    assert "trained on 90.0% of it" in text
    assert f"{SPEC.stem}.mlpackage" in text
    told = plain.write(tmp_path / "other")["preprocessing"]
    assert "(value / 255 - mean) / std" in told["words"]


@pytest.mark.parametrize("kind", ["classifier", "plain"])
def test_the_swift_file_names_what_the_package_has(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(kind)
    made.write(tmp_path / "test")
    text = (tmp_path / "test" / swift.SOURCE).read_text(encoding="utf-8")
    assert text.startswith(f"{swift.HEADER}\n")
    assert f'static let modelName = "{made.spec.stem}"' in text
    assert 'static let inputName = "image"' in text
    assert ('static let labelName = "classLabel"' in text) == (made.spec is SPEC)
    assert f'static let outputName = "{"classLabel_probs" if made.spec is SPEC else "logits"}"' in text
    assert ("golden.png" in text, "MLMultiArray(shape:" in text) == (made.spec is SPEC, made.spec is PLAIN)
    assert "import Vision" not in text
    assert "@" not in text
    for opening, closing in ("{}", "()", "[]"):
        assert text.count(opening) == text.count(closing)
    assert max(map(len, text.splitlines())) <= 120
    assert not any(line.endswith(" ") for line in text.splitlines())


@pytest.mark.parametrize("kind", ["classifier", "plain"])
def test_swift_takes_it(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if platform.system() != "Darwin" or shutil.which("xcrun") is None:
        pytest.skip("the Swift compiler with Core ML is on macOS only")
    made: Made = request.getfixturevalue(kind)
    made.write(tmp_path / "test")
    command = ["xcrun", "swiftc", "-typecheck", str(tmp_path / "test" / swift.SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def changed(made: Made, **changes: Any) -> Made:
    return replace(made, spec=replace(made.spec, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"coreml": CoreMLSpec(16, "features")}, "feature maps have none"),
        ({"coreml": None}, "use the coreml command"),
        ({"batch": 2, "input": InputKind.NORMALIZED}, "use --batch 1"),
        ({"height": 64}, "don't fit 64x48"),
        ({"num_classes": 3}, "don't fit 4 pictures"),
    ],
)
def test_what_can_not_be_tested_so(classifier: Made, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedSpec, match=words):
        changed(classifier, **changes).write(tmp_path / "test")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("labels", [[*LABELS[:-1], "other"], LABELS[:-1], []])
def test_other_labels_than_the_packages_are_refused(classifier: Made, tmp_path: Path, labels: list[str]) -> None:
    with pytest.raises(UnsupportedSpec, match="label"):
        write_swift(tmp_path / "test", SPEC, classifier.package, IMAGES, classifier.expected, labels)


def test_few_classes_are_all_compared() -> None:
    assert swift._most_decided(np.ones((2, 1), np.float32)) == 0
    assert swift._most_decided(np.array([[0.4, 0.6], [0.9, 0.1]], np.float32)) == 1


def test_the_place_is_checked_before_any_work(classifier: Made, plain: Made, tmp_path: Path) -> None:
    folder = tmp_path / "test"
    check_swift_place(folder, SPEC)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UnsupportedSpec, match="feature maps"):
        check_swift_place(folder, replace(SPEC, coreml=CoreMLSpec(16, "features")))
    classifier.write(folder)
    check_swift_place(folder)
    plain.write(folder)
    assert "golden.png" not in contents(folder)
    (folder / "App.swift").write_text("import SwiftUI")
    before = contents(folder)
    for call in (lambda: check_swift_place(folder), lambda: plain.write(folder)):
        with pytest.raises(OutputNotWritten, match=r"holds App\.swift"):
            call()
    assert contents(folder) == before
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "App.swift").write_text("import SwiftUI")
    with pytest.raises(OutputNotWritten, match="no Swift self-test"):
        check_swift_place(tmp_path / "app")


def test_the_same_again_is_the_same(classifier: Made, tmp_path: Path) -> None:
    classifier.write(tmp_path / "a")
    classifier.write(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_most_decided_of_the_images(classifier: Made, tmp_path: Path) -> None:
    """Another order of pictures, the same one taken."""
    turned = ImageSet(IMAGES.pixels[::-1], IMAGES.preprocessing, IMAGES.names[::-1], IMAGES.labels[::-1], IMAGES.source)
    expected = {name: values[::-1] for name, values in classifier.expected.items()}
    write_swift(tmp_path / "a", SPEC, classifier.package, turned, expected, LABELS)
    classifier.write(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
