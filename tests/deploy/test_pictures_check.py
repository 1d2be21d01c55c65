"""Pictures that tell nothing are refused, in one line that says why; a split keeps judges and calibration apart."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nextvit_deploy import calibrate as c
from nextvit_deploy.cache import VARIABLE
from nextvit_deploy.data import Pictures, find_pictures
from nextvit_deploy.pictures_check import LEAST, UNRELATED, check_pictures, relatedness
from nextvit_exporters.errors import DeployError
from nextvit_models.demo import DEMO_IMAGES
from nextvit_models.preprocessing import Preprocessing
from tests.deploy.support_calibrate import SIDE, SPEC, STEPS, folder_of, network, of, pixels_of, silent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))


def refused(pictures: Pictures) -> str:
    with pytest.raises(DeployError) as caught:
        c.calibrate(SPEC, network(), pictures, silent)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_too_few_pictures_are_refused_before_any_is_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "few", LEAST - 1)
    assert refused(of(folder)) == (f"only 15 images in {folder}; calibration takes at least 16, 128 are recommended")
    assert "only 4 of 15 images" in refused(of(folder, 4))


def test_repeated_pictures_are_refused_by_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p")
    for index in range(3):
        (folder / "1" / f"copy{index}.png").write_bytes((folder / "0" / "002.png").read_bytes())
    assert refused(of(folder)) == (
        f"3 of 27 images in {folder} repeat another, as 1/copy0.png does 0/002.png; give different pictures"
    )


def test_the_same_pixels_in_another_file_are_a_repetition(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p")
    Image.fromarray(pixels_of(2)).save(folder / "1" / "z.bmp")
    (note,) = (note for note in check_pictures(of(folder), silent) if "repeat" in note)
    assert note == "1 calibration images repeat another, as 1/z.bmp does 0/002.png"


def test_pictures_that_become_the_same_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p", 0)
    folder.mkdir()
    for index in range(16):
        picture = np.repeat(np.repeat(pixels_of(0), index % 3 + 1, 0), index % 3 + 1, 1)
        Image.fromarray(picture).save(folder / f"{index}.png")
    nearest = replace(STEPS, interpolation="nearest")
    line = refused(find_pictures(folder, None, (SIDE, SIDE), nearest))
    assert line == f"all 16 images in {folder} are the same at 32x32; give different pictures of your task"


def test_blank_pictures_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p")
    for index in range(3):
        Image.new("RGB", (SIDE, SIDE), (index, 90, 200)).save(folder / "1" / f"z{index}.jpg")
    assert refused(of(folder)) == (
        f"3 of 27 images in {folder} are blank: 1/z0.jpg, 1/z1.jpg, ...; give pictures of your task"
    )
    for index in (1, 2):
        (folder / "1" / f"z{index}.jpg").unlink()
    assert "1 calibration images are blank: 1/z0.jpg" in check_pictures(of(folder), silent)


def test_few_usable_pictures_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p", 15)
    Image.new("RGB", (SIDE, SIDE)).save(folder / "blank.png")
    assert refused(of(folder)).startswith(f"only 15 usable images in {folder}; calibration takes at least 16")


NOISE = ("uniform", "gaussian", "grey")


def noise(kind: str, seed: int, side: int) -> NDArray[np.uint8]:
    generator = np.random.default_rng(seed)
    if kind == "gaussian":
        return np.clip(generator.normal(120, 60, (side, side, 3)), 0, 255).astype(np.uint8)
    channels = 1 if kind == "grey" else 3
    return np.repeat(generator.integers(0, 256, (side, side, channels), np.uint8), 3 // channels, 2)


@pytest.mark.parametrize("kind", NOISE)
@pytest.mark.parametrize("side", [32, 100])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_noise_is_refused(tmp_path: Path, kind: str, side: int, suffix: str) -> None:
    for seed in range(16):
        Image.fromarray(noise(kind, seed, side)).save(tmp_path / f"{seed}.{suffix}")
    line = refused(of(tmp_path))
    assert "are noise: neighbouring pixels correlate by" in line
    found = [relatedness(pixels) for pixels in of(tmp_path).read().pixels]
    assert max(found) < UNRELATED - 0.1


def test_pictures_are_no_noise() -> None:
    from sklearn.datasets import load_sample_images

    generator, found = np.random.default_rng(0), []
    for index in range(40):
        photo = load_sample_images().images[index % 2]
        y, x = generator.integers(0, photo.shape[0] - 224), generator.integers(0, photo.shape[1] - 224)
        found.append(relatedness(photo[y : y + 224, x : x + 224].transpose(2, 0, 1)))
    digits = find_pictures(DEMO_IMAGES, 40, (64, 64), Preprocessing(image_size=64)).read()
    found += [relatedness(pixels) for pixels in digits.pixels]
    assert min(found) > UNRELATED + 0.2
    assert relatedness(np.full((3, 8, 8), 7, np.uint8)) == 1.0


def test_a_few_noisy_pictures_among_others_pass(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p")
    for seed in range(4):
        Image.fromarray(noise("uniform", seed, SIDE)).save(folder / f"{seed}.png")
    assert check_pictures(of(folder), silent) == ("calibrated on 28 images; 128 are recommended",)


def test_a_split_is_even_over_classes_and_leaves_the_rest() -> None:
    everything = find_pictures(DEMO_IMAGES, None, (64, 64), Preprocessing(image_size=64))
    chosen, others = c.split(everything, 128)
    assert (len(chosen), len(others)) == (128, len(everything) - 128)
    assert not set(chosen.paths) & set(others.paths)
    assert set(chosen.paths) | set(others.paths) == set(everything.paths)
    counts = Counter(chosen.labels)
    assert len(counts) == 10
    assert max(counts.values()) - min(counts.values()) <= 1
    assert others.paths[:8] == everything.paths[:8]
    assert c.split(everything, 128)[0] == chosen
    hashes = [{hashlib.sha256(p.read_bytes()).digest() for p in part.paths} for part in (chosen, others)]
    assert not hashes[0] & hashes[1]


def test_a_split_of_uneven_classes_takes_from_each_in_turn(tmp_path: Path) -> None:
    for name, count in (("a", 1), ("b", 5), ("c", 3)):
        for index in range(count):
            place = tmp_path / name / f"{index}.png"
            place.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels_of(index)).save(place)
    chosen, others = c.split(of(tmp_path), 6)
    assert Counter(chosen.labels) == {"a": 1, "b": 3, "c": 2}
    assert others.names == ("b/0.png", "c/0.png", "b/1.png")


@pytest.mark.parametrize("count", [0, 24, 25])
def test_a_split_leaves_something_on_both_sides(tmp_path: Path, count: int) -> None:
    pictures = of(folder_of(tmp_path))
    with pytest.raises(DeployError, match=r"there are 24 pictures.*calibrate on 23 at most"):
        c.split(pictures, count)
