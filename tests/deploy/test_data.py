"""Pictures come out as timm's evaluation transform makes them, spread over classes, and never silently fewer."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.transforms_factory import create_transform

from nextvit_deploy.data import load_images, noise_images
from nextvit_models.errors import DeployError
from nextvit_models.preprocessing import INTERPOLATIONS, Preprocessing

PREPROCESSING = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), crop_pct=0.875, image_size=64)
SIZE = (64, 64)


def picture(height: int, width: int, seed: int, channels: int = 3) -> NDArray[np.uint8]:
    """Coarse shapes with grain on top, so that resampling and position both show."""
    generator = np.random.default_rng(seed)
    coarse = np.kron(generator.integers(0, 200, (4, 4, channels)), np.ones((height // 4 + 1, width // 4 + 1, 1)))
    pixels: NDArray[np.floating] = coarse[:height, :width] + generator.integers(0, 56, (height, width, channels))
    return pixels.astype(np.uint8)


def save(path: Path, seed: int = 0, height: int = 80, width: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(height, width, seed)).save(path)
    return path


def one(folder: Path, size: tuple[int, int] = SIZE, preprocessing: Preprocessing = PREPROCESSING) -> NDArray[np.uint8]:
    pixels = load_images(folder, 1, size, preprocessing).pixels
    assert pixels.shape == (1, 3, *size)
    first: NDArray[np.uint8] = pixels[0]
    return first


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("height", "width"), [(80, 100), (101, 73), (64, 64), (40, 90), (333, 250)])
def test_the_same_bits_as_timm(tmp_path: Path, interpolation: str, height: int, width: int) -> None:
    preprocessing = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), interpolation, 0.93, 64)
    path = save(tmp_path / "a.png", height=height, width=width)
    transform = create_transform(
        64, is_training=False, interpolation=interpolation, crop_pct=0.93, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)
    )
    expected: torch.Tensor = transform(Image.open(path))
    normalised = load_images(tmp_path, 1, (64, 64), preprocessing).normalised()
    assert normalised.dtype == np.float32
    np.testing.assert_array_equal(normalised[0], expected.numpy())


@pytest.mark.parametrize(
    ("size", "kept"), [((32, 64), (slice(16, 48), slice(0, 64))), ((64, 32), (slice(0, 64), slice(16, 48)))]
)
def test_another_aspect_keeps_the_middle(tmp_path: Path, size: tuple[int, int], kept: tuple[slice, slice]) -> None:
    whole = Preprocessing(crop_pct=1.0, image_size=64)
    path = save(tmp_path / "a.png", height=64, width=64)
    expected = np.asarray(Image.open(path))[kept].transpose(2, 0, 1)
    np.testing.assert_array_equal(one(tmp_path, size, whole), expected)


def test_classes_take_turns_in_a_fixed_order(tmp_path: Path) -> None:
    for index, name in enumerate(("b/1.png", "a/2.png", "a/1.png", "a/3.PNG", "c/deep/1.jpg", "top.bmp")):
        save(tmp_path / name, seed=index)
    images = load_images(tmp_path, 5, SIZE, PREPROCESSING)
    assert images.names == ("top.bmp", "a/1.png", "b/1.png", "c/deep/1.jpg", "a/2.png")
    assert images.labels == (None, "a", "b", "c", "a")
    assert images.source == f"6 images in {tmp_path.name}, 5 used"
    assert len(images) == 5
    assert load_images(tmp_path, 99, SIZE, PREPROCESSING).names[5] == "a/3.PNG"


def test_each_name_has_its_own_pixels(tmp_path: Path) -> None:
    for seed, name in enumerate(("a/1.png", "b/1.png", "b/2.png")):
        save(tmp_path / name, seed=seed)
    images = load_images(tmp_path, 3, SIZE, PREPROCESSING)
    for index, name in enumerate(images.names):
        (tmp_path / "alone").mkdir(exist_ok=True)
        (tmp_path / "alone" / "x.png").write_bytes((tmp_path / name).read_bytes())
        np.testing.assert_array_equal(images.pixels[index], one(tmp_path / "alone"))


def test_hidden_files_other_suffixes_and_loops_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "._1.png").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    save(tmp_path / ".trash" / "2.png")
    for link in ("back", "again"):  # following both would never end
        (tmp_path / "a" / link).symlink_to(tmp_path, target_is_directory=True)
    assert load_images(tmp_path, 9, SIZE, PREPROCESSING).names == ("a/1.png",)


def test_linked_class_folders_are_followed(tmp_path: Path) -> None:
    save(tmp_path / "store" / "1.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "store", target_is_directory=True)
    assert load_images(tmp_path / "set", 9, SIZE, PREPROCESSING).labels == ("cat",)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_cameras_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = picture(80, 100, 3)
    mirrored, quarter_turns = {1: (0, 0), 2: (1, 0), 3: (0, 2), 4: (1, 2), 5: (1, 1), 6: (0, 1), 7: (1, 3), 8: (0, 3)}[
        orientation
    ]
    stored = np.rot90(upright[:, ::-1] if mirrored else upright, quarter_turns)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    turned = one(tmp_path)
    (tmp_path / "a.png").unlink()
    Image.fromarray(upright).save(tmp_path / "a.png")
    np.testing.assert_array_equal(turned, one(tmp_path))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_kind_of_picture_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(picture(80, 100, 1)).convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    expected = Image.open(path).convert("RGB")
    (tmp_path / "rgb").mkdir()
    expected.save(tmp_path / "rgb" / "a.png")
    assert one(tmp_path).std() > 10
    np.testing.assert_array_equal(one(tmp_path), one(tmp_path / "rgb"))


def test_sixteen_bit_grey_keeps_its_upper_half(tmp_path: Path) -> None:
    grey = picture(80, 100, 2, channels=1)[..., 0]
    for name, values in (("a", grey.astype(np.uint16) * 256 + 7), ("b", grey)):
        (tmp_path / name).mkdir()
        Image.fromarray(values).save(tmp_path / name / "1.png")
    np.testing.assert_array_equal(one(tmp_path / "a"), one(tmp_path / "b"))


def test_a_palette_with_transparency_gives_no_warning(tmp_path: Path) -> None:
    image = Image.fromarray(picture(80, 100, 1)).quantize(16)
    image.save(tmp_path / "a.png", transparency=bytes([0, 128] * 8))
    assert one(tmp_path).std() > 10


def test_unreadable_pictures_stop_the_run_by_name(tmp_path: Path) -> None:
    for index in range(8):
        save(tmp_path / f"{index}.png", seed=index)
    for index in (1, 3, 4, 6):
        whole = (tmp_path / f"{index}.png").read_bytes()
        (tmp_path / f"{index}.png").write_bytes(whole[: len(whole) // 2] if index > 1 else b"not a picture")
    with pytest.raises(DeployError) as caught:
        load_images(tmp_path, 8, SIZE, PREPROCESSING)
    assert str(caught.value) == (
        f"4 of 8 images in {tmp_path} cannot be read: 1.png, 3.png, 4.png, ...; repair or remove them"
    )


def test_only_the_pictures_that_are_used_must_be_readable(tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"")
    assert len(load_images(tmp_path, 1, SIZE, PREPROCESSING)) == 1


@pytest.mark.parametrize("maximum", [50, 20])  # a picture of 64 pixels earns Pillow's warning, or its error
def test_a_decompression_bomb_is_an_unreadable_picture(
    tmp_path: Path, maximum: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a.png", height=8, width=8)
    assert one(tmp_path).std() > 0
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", maximum)
    with warnings.catch_warnings(), pytest.raises(DeployError, match=r"1 of 1 images in .* cannot be read: a\.png"):
        warnings.simplefilter("ignore")  # as it is outside the tests
        one(tmp_path)


def test_a_strip_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    Image.new("RGB", (5000, 1)).save(tmp_path / "a.png")
    with pytest.raises(DeployError, match=r"cannot be read: a\.png"):
        one(tmp_path)


def test_a_folder_that_is_missing_empty_or_a_file(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="missing is not a folder; name one that holds images"):
        load_images(tmp_path / "missing", 1, SIZE, PREPROCESSING)
    with pytest.raises(DeployError, match=r"no image in .*; it takes \.bmp, \.jpeg, \.jpg, \.png, \.webp"):
        load_images(tmp_path, 1, SIZE, PREPROCESSING)
    with pytest.raises(DeployError, match="is not a folder"):
        load_images(save(tmp_path / "a.png"), 1, SIZE, PREPROCESSING)


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)  # as root, no folder refuses
    with pytest.raises(DeployError, match=r"cannot list .*: Permission denied; check its permissions"):
        load_images(tmp_path, 1, SIZE, PREPROCESSING)


@pytest.mark.parametrize("limit", [0, -3])
def test_no_images_asked_for(tmp_path: Path, limit: int) -> None:
    save(tmp_path / "a.png")
    with pytest.raises(DeployError, match=f"asked for {limit} images; ask for at least 1"):
        load_images(tmp_path, limit, SIZE, PREPROCESSING)
    with pytest.raises(DeployError, match=f"asked for {limit} images; ask for at least 1"):
        noise_images(limit, SIZE, PREPROCESSING, 0)


def test_the_fingerprint_follows_what_the_network_sees(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    first = load_images(tmp_path, 1, SIZE, PREPROCESSING)
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert load_images(tmp_path, 1, SIZE, PREPROCESSING).fingerprint == first.fingerprint
    other_mean = Preprocessing((0.5, 0.4, 0.31), PREPROCESSING.std, crop_pct=0.875, image_size=64)
    assert load_images(tmp_path, 1, SIZE, other_mean).fingerprint != first.fingerprint
    save(tmp_path / "b.png", seed=1)
    assert load_images(tmp_path, 1, SIZE, PREPROCESSING).fingerprint != first.fingerprint


def test_pixels_cannot_be_changed_by_accident() -> None:
    images = noise_images(1, SIZE, PREPROCESSING, 0)
    with pytest.raises(ValueError, match="read-only"):
        images.pixels[0] = 0


def test_noise_looks_like_normalised_pictures() -> None:
    images = noise_images(32, (64, 96), PREPROCESSING, seed=0)
    assert images.pixels.shape == (32, 3, 64, 96)
    assert images.source == "32 noise images, seed 0"
    assert set(images.labels) == {None}
    normalised = images.normalised()
    assert np.all(np.abs(normalised.mean((0, 2, 3))) < 0.25)
    assert np.all(np.abs(normalised.std((0, 2, 3)) - 0.9) < 0.2)
    assert normalised.std((2, 3)).min() > 0.3  # no picture is flat
    coarse = normalised.reshape(32, 3, 4, 16, 6, 16).mean((3, 5))
    assert coarse.std() > 0.4  # and none is grain alone, which pooling would average away


def test_noise_is_a_function_of_its_seed() -> None:
    first, again, other = (noise_images(2, SIZE, PREPROCESSING, seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert not np.array_equal(first.pixels[0], first.pixels[1])
