"""Each way to get one step wrong is found and named, by the fewest steps that explain it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from nextvit_deploy.contract.cuts import ORIENTATION, cropped, pixels, resized
from nextvit_deploy.contract.given import test_picture as make_picture
from nextvit_deploy.contract.search import search
from nextvit_deploy.contract.steps import Steps, Values, single_deviations, statistics, to_tensor
from nextvit_deploy.contract.trial import TOLERANCE
from nextvit_deploy.render_contract import difference
from nextvit_models.preprocessing import Preprocessing

WANTED = Preprocessing(image_size=64, crop_pct=0.875)
CONTRACT = Steps(filter=WANTED.interpolation)
SINGLE = tuple(
    each
    for each in single_deviations(CONTRACT, WANTED)
    if each.stats != "ImageNet"  # which is the contract here, and has a test of its own
    and each.scale != "1/256"  # which is less than the tolerance, and has a test of its own
)


def turned() -> Image.Image:
    """A picture that the camera took on its side."""
    picture = make_picture()
    picture.getexif()[ORIENTATION] = 6
    return picture


def made(steps: Steps, wanted: Preprocessing = WANTED) -> Values:
    return to_tensor(pixels(turned(), steps, wanted), steps, wanted)


@pytest.mark.parametrize("steps", SINGLE, ids=lambda each: "-".join(map(each.value, each.differing(CONTRACT))))
def test_one_wrong_step_is_named(steps: Steps) -> None:
    found = search(made(steps), "CHW", turned(), WANTED)
    assert (found.explained, found.agrees, found.steps, found.others) == (True, False, steps, ())
    assert found.from_contract > TOLERANCE
    assert ";" in difference(found.differing[0], found, WANTED)


def test_the_contract_agrees() -> None:
    found = search(made(CONTRACT), "CHW", turned(), WANTED)
    assert found.agrees
    assert found.unseen == ()


def test_imagenet_where_the_checkpoint_has_its_own() -> None:
    wanted = replace(WANTED, mean=(0.39, 0.33, 0.31), std=(0.26, 0.12, 0.13))
    steps = replace(CONTRACT, stats="ImageNet")
    found = search(made(steps, wanted), "CHW", turned(), wanted)
    assert found.steps == steps
    assert "0.485" in difference("stats", found, wanted)
    assert "0.39" in difference("stats", found, wanted)


@pytest.mark.parametrize(
    "steps",
    [
        replace(CONTRACT, channels="BGR", geometry="squash"),
        replace(CONTRACT, filter="bilinear", antialias="no"),
        replace(CONTRACT, scale="none", stats="none"),
        replace(CONTRACT, filter="bilinear", channels="BGR", stats="no std"),
        replace(CONTRACT, flip="left to right", geometry="crop first"),
        replace(CONTRACT, channels="grey", stats="mean reversed"),
        replace(CONTRACT, geometry="short side 71", stats="before scaling"),
        replace(CONTRACT, scale="none", stats="CLIP"),
    ],
)
def test_several_wrong_steps(steps: Steps) -> None:
    found = search(made(steps), "CHW", turned(), WANTED)
    assert (found.explained, found.steps) == (True, steps)


OWN = (0.47, 0.31, 0.52), (0.21, 0.35, 0.17)


@pytest.mark.parametrize(
    "cut",
    [
        CONTRACT,
        replace(CONTRACT, filter="bilinear"),
        replace(CONTRACT, channels="BGR"),
        replace(CONTRACT, geometry="letterbox", flip="left to right"),
    ],
)
def test_a_mean_and_std_that_nobody_knows_are_named_by_their_values(cut: Steps) -> None:
    other = replace(WANTED, mean=OWN[0], std=OWN[1])
    found = search(to_tensor(pixels(turned(), cut, WANTED), cut, other), "CHW", turned(), WANTED)
    assert (found.explained, found.agrees) == (True, False)
    assert set(found.differing) == {*cut.differing(CONTRACT), "stats"}
    assert found.fitted is not None
    assert np.allclose(found.fitted, OWN, atol=1e-9)
    assert "(x - (0.47, 0.31, 0.52)) / (0.21, 0.35, 0.17)" in difference("stats", found, WANTED)


def test_inverted_pixels_are_told() -> None:
    found = search(-made(CONTRACT), "CHW", turned(), WANTED)
    assert found.differing == ("stats",)
    assert "inverts" in difference("stats", found, WANTED)


@pytest.mark.parametrize("steps", [CONTRACT, replace(CONTRACT, filter="bilinear")])
def test_a_division_by_256_is_within_the_tolerance_and_said(steps: Steps) -> None:
    tensor = made(replace(steps, scale="1/256"))
    found = search(tensor, "CHW", turned(), WANTED)
    assert (found.explained, found.steps) == (True, steps)
    assert "divided by 256" in "".join(found.hints)
    assert search(made(steps), "CHW", turned(), WANTED).hints == ()


@pytest.mark.parametrize("value", [0.0, 114 / 255, -2.0])
@pytest.mark.parametrize("crop", ["centre", "corner"])
def test_a_letterbox_may_be_padded_with_anything(value: float, crop: str) -> None:
    steps = replace(CONTRACT, geometry="letterbox", crop=crop)
    tensor = made(steps)
    tensor[:, ~cropped(resized(turned(), steps, WANTED), steps, WANTED).inside] = value
    found = search(tensor, "CHW", turned(), WANTED)
    assert (found.explained, found.steps) == (True, steps)


def test_a_short_side_that_nobody_names() -> None:
    steps = replace(CONTRACT, geometry="short side 81", filter="bilinear", channels="BGR")
    found = search(made(steps), "CHW", turned(), WANTED)
    assert (found.explained, found.steps) == (True, steps)
    assert difference("geometry", found, WANTED).startswith("short side resized to 81;")


def test_another_fraction_is_named_by_its_side() -> None:
    found = search(made(replace(CONTRACT, geometry="short side 67")), "CHW", turned(), WANTED)
    assert found.differing == ("geometry",)
    assert difference("geometry", found, WANTED).startswith("short side resized to 67;")


@pytest.mark.parametrize("steps", [CONTRACT, replace(CONTRACT, filter="bilinear", channels="BGR")])
@pytest.mark.parametrize(("layout", "said"), [("CWH", "channels, width, height"), ("reshaped", "scrambles")])
def test_a_layout_that_the_shape_hides_is_named(layout: str, said: str, steps: Steps) -> None:
    tensor = made(steps)
    wrong = tensor.transpose(0, 2, 1) if layout == "CWH" else tensor.transpose(1, 2, 0).reshape(tensor.shape)
    found = search(wrong, "CHW", turned(), WANTED)
    assert (found.explained, found.steps) == (True, replace(steps, layout=layout))
    assert said in difference("layout", found, WANTED)
    assert found.from_contract > TOLERANCE


def test_reshaped_pixels_may_be_normalised_after_that() -> None:
    cut = pixels(turned(), CONTRACT, WANTED)
    found = search(to_tensor(cut.transpose(1, 2, 0).reshape(cut.shape), CONTRACT, WANTED), "CHW", turned(), WANTED)
    assert (found.explained, found.differing) == (True, ("layout",))


def test_another_layout_is_a_difference() -> None:
    found = search(made(CONTRACT), "HWC", turned(), WANTED)
    assert (found.explained, found.agrees, found.differing) == (True, False, ("layout",))


def test_what_nothing_explains_says_where() -> None:
    tensor = made(CONTRACT)
    tensor[1, 20:30, 40:50] += 1
    found = search(tensor, "CHW", turned(), WANTED)
    assert not found.explained
    assert not found.agrees
    assert found.steps == CONTRACT
    assert "largest in channel 1" in found.where


def test_a_flat_picture_shows_little() -> None:
    flat = Image.new("RGB", (90, 80), (120, 120, 120))
    tensor = to_tensor(pixels(flat, CONTRACT, WANTED), CONTRACT, WANTED)
    found = search(tensor, "CHW", flat, WANTED)
    assert found.agrees
    assert {"filter", "geometry", "crop", "channels"} <= {each.differing(CONTRACT)[0] for each in found.unseen}


def test_the_statistics_are_what_they_are_called() -> None:
    assert statistics("reversed", WANTED) == (WANTED.mean[::-1], WANTED.std[::-1])
    assert statistics("swapped", WANTED) == (WANTED.std, WANTED.mean)
