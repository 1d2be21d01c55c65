from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nextvit_exporters.engine_spec import ONE, EngineSpec, Range
from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.spec import ExportSpec, InputKind, Precision
from nextvit_models.preprocessing import Preprocessing

ENGINE = EngineSpec("tensorrt-rtx", "t4", Range(1, 8, 32), Range.of(224), Range(224, 256, 512), 512, 3)
SPEC = ExportSpec("nano", 10, "tensorrt", Precision.FP16, 224, 256, 8, 20, Preprocessing(), engine=ENGINE)


@pytest.mark.parametrize(
    ("text", "expected"), [("8", Range(8, 8, 8)), ("1:8:32", Range(1, 8, 32)), ("2:2:2", Range.of(2))]
)
def test_ranges_are_read_and_written(text: str, expected: Range) -> None:
    assert Range.from_text(text) == expected
    assert Range.from_text(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["", "0", "1:2", "8:1:32", "1:32:8", "0:1:2", "-1", "1:2:3:4", "a", "1e3", " 1", "1\n", "٣", "9999999"]
)
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(UnsupportedSpec, match="is no range; write "):
        Range.from_text(text)


def test_a_range_knows_its_sizes() -> None:
    sizes = Range(2, 4, 6)
    assert [size in sizes for size in (1, 2, 4, 6, 7)] == [False, True, True, True, False]
    assert (sizes.fixed, ONE.fixed) == (False, True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"opt_level": 6}, "no optimisation level 6; choose 0 to 5"),
        ({"opt_level": -1}, "no optimisation level -1"),
        ({"workspace": 0}, "a workspace of 0 MiB is none"),
    ],
)
def test_limits(changes: dict[str, int], says: str) -> None:
    with pytest.raises(UnsupportedSpec, match=says):
        replace(ENGINE, **changes)  # type: ignore[arg-type]  # a table of fields


def test_the_ends_of_the_ranges() -> None:
    assert (ENGINE.minimum, ENGINE.optimum, ENGINE.maximum) == ((1, 224, 224), (8, 224, 256), (32, 224, 512))


def test_the_spec_comes_back() -> None:
    assert ExportSpec.from_dict(SPEC.as_dict()) == SPEC
    assert ExportSpec.from_dict(replace(SPEC, engine=None).as_dict()).engine is None


def test_what_is_recorded_does_not_hold_the_timings_folder(tmp_path: Path) -> None:
    spec = replace(SPEC, engine=replace(ENGINE, timing_cache=tmp_path / "timings.bin"))
    assert str(tmp_path) not in str(spec.as_dict())
    read = ExportSpec.from_dict(spec.as_dict()).engine
    assert read is not None
    assert read.timing_cache == Path("timings.bin")


@pytest.mark.parametrize("damage", [{"batch": "x"}, {"batch": None}, {"opt_level": "3"}, {"unknown": 1}])
def test_a_damaged_record_is_one_line(damage: dict[str, object]) -> None:
    engine = SPEC.as_dict()["engine"]
    assert isinstance(engine, dict)
    with pytest.raises(UnsupportedSpec):
        ExportSpec.from_dict(SPEC.as_dict() | {"engine": engine | damage})


def test_the_file_name_holds_what_tells_two_engines_apart() -> None:
    assert SPEC.stem == "nano_classify_224x224-256-512_b1-8-32_fp16_t4"
    special = replace(SPEC, io=Precision.FP16, input=InputKind.UINT8_NHWC, pass_set="fewest-macs")  # noqa: S106 - no password
    assert special.stem == "nano_classify_224x224-256-512_b1-8-32_fp16_uint8-nhwc_io-fp16_fewest-macs_t4"


def test_channels_last_is_the_shape_of_the_input() -> None:
    assert SPEC.input_shape == (8, 3, 224, 256)
    assert replace(SPEC, input=InputKind.UINT8_NHWC).input_shape == (8, 224, 256, 3)
    assert [each for each in InputKind if each.is_uint8] == [InputKind.UINT8, InputKind.UINT8_NHWC]
    assert [each for each in InputKind if each.channels_last] == [InputKind.UINT8_NHWC, InputKind.IMAGE]
