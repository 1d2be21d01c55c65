from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from nextvit_exporters.errors import DeployError, UnsupportedSpec
from nextvit_exporters.opsets import CONSUMERS, DEFAULT_OPSET, NEWEST_OPSET, OLDEST_OPSET, newest_opset, opset_for
from nextvit_exporters.spec import ExportSpec, InputKind, Precision
from tests.exporters.exports import NANO

OTHER = replace(
    NANO,
    model="mine",
    num_classes=3,
    precision=Precision.FP16,
    height=96,
    width=160,
    batch=5,
    opset=20,
    preprocessing=replace(NANO.preprocessing, mean=(0.5, 0.4, 0.3), crop_pct=1.0),
    labels=("cat", "Hündin", "鳥"),
    input=InputKind.UINT8,
    dynamic_batch=True,
    dynamic_size=True,
    simplify=False,
    consumer="tensorrt-10",
    skip=("fold-pre-norm",),
)


@pytest.mark.parametrize("spec", [NANO, OTHER])
def test_a_spec_survives_json(spec: ExportSpec) -> None:
    assert ExportSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec


def test_every_field_is_written() -> None:
    assert set(NANO.as_dict()) == {field.name for field in fields(ExportSpec)}


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "int3"},
        {"precision": None},
        {"input": "yuv"},
        {"labels": 3},
        {"skip": None},
        {"height": "64"},
        {"height": 8},
        {"batch": 0},
        {"preprocessing": {"mean": [1.0]}},
        {"preprocessing": 5},
        {"colour": "red"},
    ],
    ids=str,
)
def test_what_is_no_spec_is_one_line(change: dict[str, object]) -> None:
    with pytest.raises(DeployError) as refusal:
        ExportSpec.from_dict(NANO.as_dict() | change)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["model", "precision", "preprocessing", "opset"])
def test_a_spec_with_a_part_missing_is_one_line(name: str) -> None:
    parts = NANO.as_dict()
    del parts[name]
    with pytest.raises(UnsupportedSpec, match=f"(?s)^the manifest's spec is not one this version reads: .*{name}"):
        ExportSpec.from_dict(parts)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"height": 31}, "31x64 is too small; Next-ViT halves an image five times, use 32 or more"),
        ({"width": 8, "height": 9}, "9x8 is too small; Next-ViT halves an image five times, use 32 or more"),
        ({"batch": 0}, "a batch of 0 is empty; use --batch 1 or more"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, int], says: str) -> None:
    with pytest.raises(UnsupportedSpec) as refusal:
        replace(NANO, **change)  # type: ignore[arg-type]  # sizes
    assert str(refusal.value) == says


def test_a_spec_is_a_value() -> None:
    assert replace(OTHER) == OTHER
    assert len({NANO, replace(NANO), OTHER}) == 2
    with pytest.raises(FrozenInstanceError):
        NANO.batch = 7  # type: ignore[misc]  # the point


def test_the_file_s_name() -> None:
    assert NANO.stem == "nano_classify_64_b2_fp32"
    assert replace(NANO, height=96, batch=1).stem == "nano_classify_96x64_b1_fp32"
    assert OTHER.stem == "mine_classify_96x160dyn_bdyn_fp16_uint8_tensorrt-10"
    assert NANO.input_shape == (2, 3, 64, 64)


def test_who_reads_the_file_decides_the_opset() -> None:
    assert opset_for(None) == DEFAULT_OPSET
    assert opset_for(None, 22) == 22
    assert opset_for("tensorrt-8.6") == 17
    assert opset_for("tensorrt-10") == 20
    assert opset_for("tensorrt-11") == NEWEST_OPSET < newest_opset("tensorrt-11")
    assert opset_for("tensorrt-10", 19) == 19
    for consumer in CONSUMERS:
        assert OLDEST_OPSET <= opset_for(consumer) <= NEWEST_OPSET


def test_an_unknown_reader_is_refused_with_the_known() -> None:
    with pytest.raises(
        UnsupportedSpec, match=r"^no opset is known for 'abacus'; choose one of tensorrt-8.6, .*--opset$"
    ):
        opset_for("abacus")
    with pytest.raises(UnsupportedSpec, match=r"^tensorrt-8.6 reads up to opset 17, not 18; drop --opset$"):
        opset_for("tensorrt-8.6", 18)
