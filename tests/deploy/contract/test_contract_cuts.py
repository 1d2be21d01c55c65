"""Each way of bringing a picture to size does what it is called."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from nextvit_deploy.contract.cuts import ORIENTATION, cropped, go_together, pixels, plan, resized, unrounded
from nextvit_deploy.contract.given import open_picture
from nextvit_deploy.contract.given import test_picture as make_picture
from nextvit_deploy.contract.steps import CHOICES, Steps, other_sides
from nextvit_deploy.contract.trial import TOLERANCE
from nextvit_deploy.data import load_images
from nextvit_exporters.errors import DeployError
from nextvit_models.preprocessing import INTERPOLATIONS, Preprocessing

WANTED = Preprocessing(image_size=64, crop_pct=0.9)
CONTRACT = Steps(filter="bicubic")


def hard(mode: str) -> Image.Image:
    """A picture of a mode that isn't simply three bytes a pixel."""
    values = np.random.default_rng(2).integers(0, 65536, (90, 131))
    if mode == "I;16":
        return Image.fromarray(values.astype(np.uint16))
    made = make_picture().convert(mode)
    if mode == "P":
        made.info["transparency"] = bytes([0, 128, 255] * 80)
    return made


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16"])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("held", [1, 6])
def test_the_contract_is_what_every_command_reads(mode: str, interpolation: str, held: int, tmp_path: Path) -> None:
    wanted = replace(WANTED, interpolation=interpolation)
    exif = Image.Exif()
    exif[ORIENTATION] = held
    hard(mode).save(tmp_path / "a.png", exif=exif)
    (expected,) = load_images(tmp_path, 1, (64, 64), wanted).pixels
    assert np.array_equal(pixels(open_picture(tmp_path / "a.png"), Steps(filter=interpolation), wanted), expected)


def test_a_picture_that_no_command_reads_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((70, 70), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DeployError, match="can't be read as a picture"):
        open_picture(tmp_path / "a.tiff")


@pytest.mark.parametrize(
    ("geometry", "size", "part", "resizes_to"),
    [
        ("short side", (300, 201), (0, 0, 300, 201), (105, 71)),
        ("long side rounded", (300, 201), (0, 0, 300, 201), (106, 71)),
        ("short side 96", (200, 300), (0, 0, 200, 300), (96, 144)),
        ("squash", (300, 200), (0, 0, 300, 200), (64, 64)),
        ("crop first", (300, 200), (50, 0, 250, 200), (64, 64)),
        ("crop fraction first", (300, 200), (60, 10, 240, 190), (64, 64)),
        ("letterbox", (300, 201), (0, 0, 300, 201), (64, 43)),
        ("letterbox floored", (300, 201), (0, 0, 300, 201), (64, 42)),
        ("letterbox", (1, 900), (0, 0, 1, 900), (1, 64)),
    ],
)
def test_plans(
    geometry: str, size: tuple[int, int], part: tuple[int, int, int, int], resizes_to: tuple[int, int]
) -> None:
    done = plan(size, geometry, WANTED)
    assert (done.part, done.size) == (part, resizes_to)


def test_a_picture_too_long_is_refused() -> None:
    with pytest.raises(DeployError, match="too long and thin"):
        plan((1, 2000), "short side", WANTED)


def test_other_sides_leave_out_the_contracts() -> None:
    assert other_sides(WANTED) == tuple(f"short side {each}" for each in (64, 73, 67, 96))
    assert "short side 72" in other_sides(replace(WANTED, crop_pct=0.89))  # 71.9


def test_a_letterbox_is_pillows() -> None:
    cut = cropped(resized(make_picture(), replace(CONTRACT, geometry="letterbox"), WANTED), CONTRACT, WANTED)
    padded = np.asarray(ImageOps.pad(make_picture(), (64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(cut.pixels, padded)
    assert 0.7 < cut.inside.mean() < 0.8
    assert not cut.pixels[:, ~cut.inside].any()


def test_area_is_the_mean() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 192, 3), np.uint8))
    done = np.asarray(resized(picture, replace(CONTRACT, filter="area", geometry="short side 64"), WANTED))
    means = np.asarray(picture, np.float64).reshape(64, 2, 96, 2, 3).mean(axis=(1, 3))
    assert np.abs(done - means).max() <= 0.5


def test_floored_nearest_takes_the_pixel_before() -> None:
    row = np.broadcast_to(np.arange(128, dtype=np.uint8)[None, :, None], (128, 128, 3))
    done = np.asarray(resized(Image.fromarray(row.copy()), replace(CONTRACT, filter="floored nearest"), WANTED))
    assert np.array_equal(done[0, :, 0], np.floor(np.arange(71) * 128 / 71))


@pytest.mark.parametrize("channels", CHOICES["channels"])
@pytest.mark.parametrize("flip", CHOICES["flip"])
@pytest.mark.parametrize("geometry", ["short side", "crop first", "letterbox"])
def test_floats_are_the_same_picture(channels: str, flip: str, geometry: str) -> None:
    steps = replace(CONTRACT, filter="bilinear", channels=channels, flip=flip, geometry=geometry)
    cut = cropped(resized(make_picture(), steps, WANTED), steps, WANTED)
    floats = unrounded(make_picture(), steps, WANTED)
    assert floats is not None
    assert np.abs(cut.pixels - floats).max() <= TOLERANCE


def test_steps_that_change_nothing_do_not_go_together() -> None:
    assert go_together(replace(CONTRACT, antialias="no"))
    assert not go_together(replace(CONTRACT, antialias="no", filter="box"))
    assert not go_together(replace(CONTRACT, crop="corner", geometry="squash"))
    assert go_together(replace(CONTRACT, crop="corner", geometry="letterbox"))
