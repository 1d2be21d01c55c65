from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nextvit_models.errors import DeployError
from nextvit_models.preprocessing import Preprocessing


def test_defaults_are_those_of_imagenet() -> None:
    assert Preprocessing() == Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.95, 224)


def test_json_round_trip() -> None:
    preprocessing = Preprocessing((0.1, 0.2, 0.3), (1 / 3, 0.5, 0.7), "bilinear", 1.0, 384)
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.as_dict()))) == preprocessing


def test_absent_fields_keep_their_defaults() -> None:
    assert Preprocessing.from_dict({"crop_pct": 1, "image_size": 384}) == replace(
        Preprocessing(), crop_pct=1.0, image_size=384
    )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "expected an object with fields, not []"),
        ({"scale": 1}, "unknown field 'scale'"),
        ({"mean": [0.5, 0.5]}, "mean must be three numbers, not [0.5, 0.5]"),
        ({"mean": "abc"}, "mean must be three numbers, not 'abc'"),
        ({"mean": [0.5, 0.5, "x"]}, "mean must be a number, not 'x'"),
        ({"std": [0.5, 0.5, 0]}, "mean and std must be finite and std positive"),
        ({"mean": [0.5, float("nan"), 0.5]}, "mean and std must be finite and std positive"),
        ({"interpolation": "random"}, "interpolation must be one of nearest, bilinear, bicubic, lanczos, not 'random'"),
        ({"crop_pct": 0}, "crop_pct must lie in (0, 1], not 0.0"),
        ({"crop_pct": 1.2}, "crop_pct must lie in (0, 1], not 1.2"),
        ({"crop_pct": True}, "crop_pct must be a number, not True"),
        ({"image_size": 224.0}, "image_size must be a whole number, not 224.0"),
        ({"image_size": 16}, "image_size must be at least 32 pixels, not 16"),
    ],
)
def test_impossible_values(data: object, says: str) -> None:
    with pytest.raises(DeployError) as caught:
        Preprocessing.from_dict(data)
    assert str(caught.value).startswith(f"unusable preprocessing: {says}")


def test_the_constructor_checks_too() -> None:
    with pytest.raises(DeployError, match="need three values each"):
        Preprocessing(mean=(0.5, 0.5))  # type: ignore[arg-type]


@pytest.mark.parametrize(("crop_pct", "side", "covering"), [(0.95, 224, 235), (0.875, 224, 256), (1.0, 64, 64)])
def test_the_covering_side_is_rounded_down(crop_pct: float, side: int, covering: int) -> None:
    assert Preprocessing(crop_pct=crop_pct).cover(side) == covering
