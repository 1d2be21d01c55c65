"""What INT8 is asked to be: values, what can't be asked, and what both targets make of it."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from nextvit_exporters import targets, to_onnx, to_tensorrt
from nextvit_exporters.engine_spec import EngineSpec, Range
from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.quantize_spec import METHODS, QUANTIZERS, RESTS, ROUNDINGS, QuantizeSpec
from nextvit_exporters.spec import ExportSpec, Precision
from tests.exporters.exports import NANO

OTHER = QuantizeSpec(
    rest="fp32",
    method="entropy",
    rounding="gptq",
    equalize=False,
    correct_bias=False,
    keep=("features.3", "head"),
    size=7,
    images="a" * 64,
    calibration="b" * 64,
)
INT8 = replace(NANO, precision=Precision.INT8, opset=20, quantize=QuantizeSpec(rest="fp32"))
SIDE = Range.of(64)
ENGINE = EngineSpec("tensorrt-rtx", "t4", Range.of(2), SIDE, SIDE)
FOR_T4 = replace(INT8, target="tensorrt", quantize=QuantizeSpec(), engine=ENGINE)


@pytest.mark.parametrize("spec", [QuantizeSpec(), OTHER])
def test_it_survives_json(spec: QuantizeSpec) -> None:
    assert QuantizeSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec
    assert set(spec.as_dict()) == {field.name for field in fields(QuantizeSpec)}


def test_an_export_s_spec_carries_it() -> None:
    for quantize in (QuantizeSpec(), OTHER, None):
        spec = replace(INT8, quantize=quantize)
        assert ExportSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec


@pytest.mark.parametrize(
    "change", [{"method": "best"}, {"keep": 3}, {"colour": "red"}, {"rest": None}, {"quantizer": "by hand"}], ids=str
)
def test_a_record_of_something_else_is_one_line(change: dict[str, object]) -> None:
    parts = INT8.as_dict() | {"quantize": QuantizeSpec().as_dict() | change}
    with pytest.raises(UnsupportedSpec) as refusal:
        ExportSpec.from_dict(parts)
    assert "\n" not in str(refusal.value)


def test_it_is_a_value() -> None:
    assert len({QuantizeSpec(), replace(QuantizeSpec()), OTHER}) == 2
    with pytest.raises(FrozenInstanceError):
        OTHER.size = 8  # type: ignore[misc]  # the point


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "best"}, f"there is no calibration method best; choose one of {', '.join(METHODS)}"),
        ({"rounding": "up"}, f"there is no rounding up; choose one of {', '.join(ROUNDINGS)}"),
        ({"quantizer": "x"}, f"there is no quantizer x; choose one of {', '.join(QUANTIZERS)}"),
        ({"rest": "bf16"}, f"there is no type beside int8 bf16; choose one of {', '.join(RESTS)}"),
        ({"quantizer": "modelopt"}, "ModelOpt calibrates by minmax or entropy, not mse"),
        (
            {"quantizer": "modelopt", "method": "minmax", "rounding": "gptq"},
            "ModelOpt rounds weights by itself; leave --rounding gptq out",
        ),
    ],
)
def test_what_there_is_not(change: dict[str, str], says: str) -> None:
    with pytest.raises(UnsupportedSpec) as refusal:
        QuantizeSpec(**change)  # type: ignore[arg-type]  # strings
    assert str(refusal.value) == says


def test_names_tell_what_changes_the_numbers() -> None:
    assert INT8.stem == "nano_classify_64_b2_int8"
    assert replace(INT8, quantize=replace(OTHER, keep=())).stem == "nano_classify_64_b2_int8_gptq"
    by_other = QuantizeSpec(quantizer="modelopt", method="minmax")
    assert replace(INT8, quantize=by_other).stem == "nano_classify_64_b2_int8_modelopt"
    assert (by_other.own_steps, QuantizeSpec().own_steps) == (False, True)
    assert (INT8.numbers, FOR_T4.numbers) == ("int8, fp32", "int8, fp16")
    assert (INT8.rest, FOR_T4.rest, NANO.rest) == (Precision.FP32, Precision.FP16, Precision.FP32)


def test_channels_are_equalized_last_before_the_input() -> None:
    assert [each.name for each in to_onnx.passes_for(INT8)][-1] == "equalize-channels"
    assert [each.name for each in to_tensorrt.passes_for(FOR_T4)][-1] == "equalize-channels"
    for off in (
        replace(INT8, quantize=replace(QuantizeSpec(), equalize=False)),
        replace(INT8, skip=("equalize-channels",)),
        replace(INT8, precision=Precision.FP16, quantize=None),
    ):
        assert "equalize-channels" not in [each.name for each in to_onnx.passes_for(off)]


def test_both_targets_build_it() -> None:
    to_onnx.check_spec(INT8)
    to_tensorrt.check_spec(FOR_T4)
    for target, spec in ((to_onnx, INT8), (to_tensorrt, FOR_T4)):
        with pytest.raises(UnsupportedSpec, match=r"^INT8 needs opset 19 or more, not 18; drop --opset$"):
            target.check_spec(replace(spec, opset=18))
        for question in (targets.SAME_NETWORK, targets.PRECISION_COST):
            assert target.tolerance_for(spec, question).relative_rms == {targets.SAME_NETWORK: 1e-5}.get(question, 1e-1)


def test_fp16_ends_need_fp16_inside() -> None:
    to_onnx.check_spec(replace(INT8, io=Precision.FP16, quantize=QuantizeSpec(rest="fp16")))
    with pytest.raises(UnsupportedSpec, match=r"^fp16 at input and output needs fp16 inside"):
        to_onnx.check_spec(replace(INT8, io=Precision.FP16))
