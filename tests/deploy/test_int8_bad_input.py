"""Whatever is wrong with what INT8 is told: one line that says so, the right status, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from nextvit_deploy.cache import VARIABLE
from nextvit_deploy.quantization import seen_before
from nextvit_models.demo import DEMO_IMAGES
from tests.deploy.support import refusal, weights
from tests.deploy.support_calibrate import folder_of, of, pixels_of

Maker = Callable[[Path], Path]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, quick: None) -> Path:
    del quick
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


def nothing_came_of(folder: Path, cache: Path, *arguments: str | Path, status: int = 1) -> str:
    """The one line of a refusal that left neither a file nor a calibration."""
    line = refusal(*arguments, "--output", folder / "out", status=status)
    assert not (folder / "out").exists()
    assert list(cache.rglob("*.safetensors")) == []
    return line


def noise(folder: Path) -> Path:
    folder.mkdir()
    for seed in range(20):
        Image.effect_noise((64, 64), 90).save(folder / f"{seed}.png")
    return folder


def three(folder: Path) -> Path:
    return folder_of(folder, 3)


def one_many_times(folder: Path) -> Path:
    folder.mkdir()
    for index in range(20):
        Image.fromarray(pixels_of(0)).save(folder / f"{index}.png")
    return folder


def half_of_them_twice(folder: Path) -> Path:
    folder.mkdir()
    for index in range(40):
        Image.fromarray(pixels_of(index // 2)).save(folder / f"{index:02}.png")
    return folder


def blank(folder: Path) -> Path:
    folder.mkdir()
    for index in range(20):
        Image.new("RGB", (64, 64), (index, 90, 20)).save(folder / f"{index}.png")
    return folder


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def absent(folder: Path) -> Path:
    return folder


def torn(folder: Path) -> Path:
    picture = folder_of(folder, 20) / "0" / "002.png"
    picture.write_bytes(picture.read_bytes()[:60])
    return folder


def torn_plan(path: Path) -> Path:
    path.write_text('{"precision_plan": ', encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (noise, "the 20 images in {} are noise: neighbouring pixels correlate by "),
        (three, "only 3 images in {}; calibration takes at least 16, 128 are recommended"),
        (one_many_times, "all 20 images in {} are the same at 64x64; give different pictures of your task"),
        (half_of_them_twice, "20 of 40 images in {} repeat another, as 01.png does 00.png; give different pictures"),
        (blank, "20 of 20 images in {} are blank: "),
        (empty, "no image in {}; it takes .bmp, "),
        (absent, "{} is not a folder"),
        (torn, "0/002.png"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
@pytest.mark.parametrize("command", ["onnx", "trt"])
def test_pictures_that_are_no_use(tmp_path: Path, cache: Path, make: Maker, says: str, command: str) -> None:
    folder = make(tmp_path / "pictures")
    line = nothing_came_of(tmp_path, cache, command, "--int8", "--calibration", folder)
    assert says.format(folder) in line


def test_a_checkpoint_of_ones_own_needs_pictures_of_ones_own(tmp_path: Path, cache: Path) -> None:
    own = weights(tmp_path / "own.pth", 10, 1)
    for command in ("onnx", "trt"):
        assert nothing_came_of(tmp_path, cache, command, own, "--int8") == (
            "INT8 needs pictures of your task to calibrate on; give a folder of 128 or more with --calibration DIR"
        )


def test_a_budget_in_points_needs_classes(tmp_path: Path, cache: Path) -> None:
    """Refused before anything is calibrated."""
    judged = tmp_path / "judged"
    judged.mkdir()
    for path in sorted((DEMO_IMAGES / "3").glob("*.png"))[:4]:
        (judged / path.name).write_bytes(path.read_bytes())
    options = "--accuracy-budget", "0.5", "--images", judged
    line = nothing_came_of(tmp_path, cache, "onnx", "--int8", *options)
    assert line.startswith(
        f"a budget of 0.5pt counts right answers, and the images of {judged} are in no class folders"
    )


def test_the_demo_keeps_some_to_judge_on(tmp_path: Path, cache: Path) -> None:
    assert nothing_came_of(tmp_path, cache, "onnx", "--int8", "--calibration-size", "360") == (
        "there are 360 pictures, some of which are for judging the result; calibrate on 359 at most"
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--calibration", "pictures"), "what INT8 is told needs --int8"),
        (("--calibration-size", "64"), "what INT8 is told needs --int8"),
        (("--method", "minmax"), "what INT8 is told needs --int8"),
        (("--rounding", "gptq"), "what INT8 is told needs --int8"),
        (("--no-equalize",), "what INT8 is told needs --int8"),
        (("--no-correct-bias",), "what INT8 is told needs --int8"),
        (("--accuracy-budget", "0.5"), "what INT8 is told needs --int8"),
        (("--precision-plan", "plan.json"), "what INT8 is told needs --int8"),
        (("--workers", "2"), "what INT8 is told needs --int8"),
        (("--int8", "--fp16"), "--fp16 and --int8 exclude each other; give one"),
        (
            ("--int8", "--accuracy-budget", "0.5", "--precision-plan", "plan.json"),
            "--accuracy-budget and --precision-plan exclude each other; give one",
        ),
        (("--int8", "--calibration-size", "0"), "calibration-size"),
        (("--int8", "--method", "histogram"), "histogram"),
        (("--int8", "--rounding", "up"), "'up'"),
    ],
)
@pytest.mark.parametrize("command", ["onnx", "trt"])
def test_usage(tmp_path: Path, cache: Path, command: str, options: tuple[str, ...], says: str) -> None:
    assert says in nothing_came_of(tmp_path, cache, command, *options, status=2)


def test_a_file_that_is_there_already_is_not_quantized(tmp_path: Path, cache: Path) -> None:
    line = nothing_came_of(
        tmp_path, cache, "trt", "--int8", "--onnx", "model.onnx", "--calibration", DEMO_IMAGES, status=2
    )
    assert "what INT8 is told needs --int8, and a checkpoint that is quantized here" in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--opset", "17"), "INT8 needs opset 19 or more, not 17; drop --opset"),
        (("--for", "tensorrt-8.6"), "INT8 needs opset 19 or more, not 17"),
        (("--accuracy-budget", "much"), "'much' is no accuracy budget; write points of top-1 as in 0.5, or decibels"),
        (("--accuracy-budget", "inf"), "'inf' is no accuracy budget"),
        (("--accuracy-budget", "101"), "an accuracy budget of 101 is beyond all there is; try 0.5 or 30dB"),
    ],
)
def test_what_can_not_be_had_is_refused(tmp_path: Path, cache: Path, options: tuple[str, ...], says: str) -> None:
    assert says in nothing_came_of(tmp_path, cache, "onnx", "--int8", *options)


@pytest.mark.parametrize("make", [absent, torn_plan])
def test_a_plan_that_is_none_is_refused_before_anything_is_calibrated(tmp_path: Path, cache: Path, make: Maker) -> None:
    plan = make(tmp_path / "plan.json")
    assert str(plan) in nothing_came_of(tmp_path, cache, "onnx", "--int8", "--precision-plan", plan)


def test_a_budget_needs_pictures_to_be_measured_on_before_anything_is_calibrated(tmp_path: Path, cache: Path) -> None:
    options = "--calibration", DEMO_IMAGES, "--accuracy-budget", "30dB"
    assert nothing_came_of(tmp_path, cache, "onnx", "--int8", *options) == (
        "--accuracy-budget needs pictures that nothing was calibrated on; give some with --images DIR"
    )


def test_a_budget_measured_on_what_was_calibrated_on_is_told(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pictures", 6)
    others = folder_of(tmp_path / "others", 4)
    (tmp_path / "link").symlink_to(folder)
    six, four, again = of(folder), of(folder, 4), of(tmp_path / "link", 4)
    for judged in (four, again):
        assert seen_before(judged, six) == (
            "4 of the 4 images that the budget is measured on were calibrated on; give others with --images",
        )
    (note,) = seen_before(six, four)
    assert note.startswith("4 of the 6 images ")
    assert seen_before(of(others), six) == ()
