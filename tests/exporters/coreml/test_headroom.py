"""What is told of float16's range: of each operation's numbers before they are rounded, and of the weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from nextvit_exporters.coreml.headroom import LIMIT, SMALLEST_NORMAL, Count, Headroom, Layer, Meter
from nextvit_exporters.coreml.program import MODULES, Feature, Operation, Output, Package, Program, TensorType
from nextvit_exporters.errors import VerificationFailed
from nextvit_exporters.executors.mil import MilReference
from tests.exporters.coreml.small_programs import Array, floats, held, normal, package


def test_the_limits_are_float16_s() -> None:
    assert np.finfo(np.float16).max == LIMIT
    assert np.finfo(np.float16).tiny == SMALLEST_NORMAL


@pytest.mark.parametrize("size", [1, 1000, (1 << 16) + 1, 200_000])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_counts_are_what_numpy_counts(size: int, dtype: type) -> None:
    random = np.random.default_rng(size)
    values: Array = (random.standard_normal(size) * 10.0 ** random.uniform(-7, 4, size)).astype(dtype)
    values[random.random(size) < 0.3] = 0
    magnitudes = np.abs(values.astype(np.float32))
    count = Count()
    assert count.add(values) == magnitudes.max()
    assert count.nonzero == int((magnitudes > 0).sum())
    assert count.subnormal == int(((magnitudes > 0) & (magnitudes < 2.0**-14)).sum())
    share = count.share
    assert count.add(np.zeros(7, dtype)) == 0
    assert (count.largest, count.share) == (magnitudes.max(), share)


def test_edges_are_counted_right() -> None:
    count = Count()
    count.add(floats([2.0**-14, -(2.0**-14), np.nextafter(np.float32(2.0**-14), np.float32(0)), -0.0, 0.0, 1e-30]))
    assert (count.nonzero, count.subnormal) == (4, 2)
    assert count.add(floats([-np.inf, 1])) == np.inf
    assert np.isnan(count.add(floats([np.nan, 2])))
    assert count.largest == 2
    assert Count().share == 0


def layer(name: str, largest: float, kind: str = "conv", subnormal: float = 0.0, *, sums: bool = True) -> Layer:
    return Layer(name, kind, f"module.{name}", largest, subnormal, sums)


def test_the_worst_is_the_largest() -> None:
    found = Headroom((layer("a", 3.0), layer("b", 50.0), layer("c", 7.0)))
    assert found.worst == layer("b", 50.0)
    assert Headroom(()).worst is None


def test_it_is_ready_for_json() -> None:
    layers = tuple(layer(f"o{index}", float(index), subnormal=index / 100) for index in range(40))
    found = Headroom(layers, 3, 0.25).as_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["limit"] == 65504
    assert found["accumulator_limit"] == 32768
    assert "third party" in str(found["remark"])
    assert (found["operations"], found["beyond_quarter"], found["runs"]) == (40, 0, 3)
    assert (found["largest"], found["factor"]) == (39, 65504 / 39)
    assert (found["most_subnormal"], found["weights_subnormal"]) == (0.39, 0.25)
    shown = found["layers"]
    assert isinstance(shown, list)
    assert [each["operation"] for each in shown] == [f"o{index}" for index in range(39, -1, -1)]
    assert shown[0] == {
        "operation": "o39",
        "kind": "conv",
        "module": "module.o39",
        "largest": 39.0,
        "subnormal": 0.39,
    }


def test_all_are_shown_those_near_the_limit_counted_and_saturating_sums_named() -> None:
    layers = tuple(layer(f"o{index}", 16377.0 + index, sums=index % 2 == 0) for index in range(30))
    layers += (layer("sum", 40000.0), layer("add", 50000.0, sums=False), layer("small", 1.0))
    found = Headroom(layers).as_dict()
    assert found["beyond_quarter"] == 32
    assert len(found["layers"]) == 33  # type: ignore[arg-type]
    assert found["beyond_accumulator"] == ["sum"]


def test_nothing_seen_is_ready_for_json_too() -> None:
    found = Headroom(()).as_dict()
    assert json.loads(json.dumps(found)) == found
    assert (found["largest"], found["factor"], found["layers"]) == (0.0, None, [])


def test_a_meter_adds_up_over_runs() -> None:
    meter = Meter({"a": "stem.0"}, frozenset({"conv"}))
    meter.see("a", "conv", floats([1, -3, 0]))
    meter.see("a", "conv", floats([2, 1e-6, 0]))
    meter.see("b", "add", floats([5]))
    meter.see_weights("conv a", floats([1, 1e-6]).astype(np.float16))
    first, second = meter.headroom.layers
    assert first == Layer("a", "conv", "stem.0", 3.0, 0.25, sums=True)
    assert second == Layer("b", "add", None, 5.0, 0.0)
    assert meter.headroom.weights_subnormal == 0.5


SHAPE = (2, 3)


def scaled(factor: float, dtype: str = "float16") -> Package:
    """x * factor, then + 1, x as float16."""
    kind = TensorType(dtype, SHAPE)
    program = Program(
        "CoreML6",
        {"x": kind},
        (
            held("f", np.float16(factor) if dtype == "float16" else np.float32(factor)),
            held("one", np.float16(1) if dtype == "float16" else np.float32(1)),
            Operation("mul", "times", {"x": ("x",), "y": ("f",)}, {}, (Output("product", kind),)),
            Operation("relu", "positive", {"x": ("product",)}, {}, (Output("kept", kind),)),
            Operation("add", "more", {"x": ("kept",), "y": ("one",)}, {}, (Output("y", kind),)),
        ),
        ("y",),
    )
    modules = json.dumps({"product": "stages.0.norm"})
    return package(program, [Feature("x", "tensor", "", SHAPE, dtype)], metadata={MODULES: modules})


def x(scale: float = 1.0) -> dict[str, Array]:
    return {"x": (normal(*SHAPE) * np.float32(scale)).astype(np.float16)}


def test_findings_come_with_running() -> None:
    with MilReference(scaled(100.0), "emulated") as executor:
        assert executor.findings == {}
        executor.run(x())
        executor.run(x(2.0))
        headroom = executor.findings["headroom"]
    assert isinstance(headroom, dict)
    assert headroom["runs"] == 2
    product = 2 * float(np.abs(x()["x"].astype(np.float32)).max()) * 100
    by_name = {each["operation"]: each for each in headroom["layers"]}
    assert by_name["product"]["largest"] == pytest.approx(product, rel=1e-6)
    assert by_name["product"]["module"] == "stages.0.norm"
    assert by_name["y"]["module"] is None
    assert set(by_name) == {"product", "y"}  # a relu stores what was stored before


@pytest.mark.parametrize("mode", ["exact", "unrounded"])
def test_what_is_not_rounded_has_no_findings(mode: str) -> None:
    with MilReference(scaled(100.0), mode) as executor:  # type: ignore[arg-type]
        executor.run(x(500.0))
        assert executor.findings == {}


def test_float32_has_no_limit_here() -> None:
    with MilReference(scaled(1e30, "float32"), "emulated") as executor:
        assert executor.run({"x": normal(*SHAPE)})["y"].max() > 1e29
        assert executor.findings["headroom"] == Headroom((), 1).as_dict()


@pytest.mark.parametrize("mode", ["emulated", "pessimistic"])
def test_overflow_names_the_module_the_number_and_the_way_out(mode: str) -> None:
    with MilReference(scaled(60000.0), mode) as executor:  # type: ignore[arg-type]
        executor.run(x(0.1))
        with pytest.raises(VerificationFailed) as refusal:
            executor.run(x(100.0))
    message = str(refusal.value)
    assert message.startswith("mul times (of stages.0.norm) comes to ")
    assert message.endswith(", and float16 ends at 65504: keep it in float32, or scale what goes into it")


def test_the_limit_is_where_it_is_said_to_be() -> None:
    with MilReference(scaled(2.0), "emulated") as executor:
        assert executor.run({"x": np.full(SHAPE, 32720.0, np.float16)})["y"].max() == 65440
        with pytest.raises(VerificationFailed, match="comes to 65536, and float16 ends at 65504"):
            executor.run({"x": np.full(SHAPE, 32768.0, np.float16)})


def test_subnormal_numbers_are_told() -> None:
    with MilReference(scaled(1.0), "emulated") as executor:
        executor.run({"x": floats([[1e-5, 2e-5, 1.0], [0.0, 0.0, -1.0]]).astype(np.float16)})
        headroom = executor.findings["headroom"]
    assert isinstance(headroom, dict)
    assert {each["operation"]: each["subnormal"] for each in headroom["layers"]} == {"product": 0.5, "y": 0.0}


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("mode", ["exact", "emulated"])
def test_weights_that_are_infinite_are_refused_by_module(value: float, mode: str) -> None:
    with (
        MilReference(scaled(value), mode) as executor,  # type: ignore[arg-type]
        pytest.raises(VerificationFailed, match=r"^mul times \(of stages.0.norm\) has weights that are infinite or no"),
    ):
        executor.run(x())


def test_a_mask_is_infinite_and_no_overflow() -> None:
    """scores + where(kept, 0, -inf) is -inf where nothing is to be seen; the softmax makes it 0."""
    half = TensorType("float16", SHAPE)
    program = Program(
        "CoreML6",
        {"x": half},
        (
            held("kept", np.array([[True, False, True], [True, True, False]])),
            held("none", np.float16(1000)),
            held("never", np.float16(-np.inf)),
            Operation(
                "select", "mask", {"cond": ("kept",), "a": ("none",), "b": ("never",)}, {}, (Output("mask", half),)
            ),
            Operation("add", "masked", {"x": ("x",), "y": ("mask",)}, {}, (Output("masked", half),)),
            Operation("softmax", "weights", {"x": ("masked",)}, {}, (Output("y", half),)),
        ),
        ("y",),
    )
    made = package(program, [Feature("x", "tensor", "", SHAPE, "float16")])
    with MilReference(made, "emulated") as executor:
        got = executor.run(x())["y"]
        assert (got == 0).tolist() == [[False, True, False], [False, False, True]]
        headroom = executor.findings["headroom"]
        assert isinstance(headroom, dict)
        assert 1000 < headroom["largest"] < 1010
        with pytest.raises(VerificationFailed, match="add masked comes to"):
            executor.run({"x": np.full(SHAPE, 65000.0, np.float32)})
        with pytest.raises(VerificationFailed, match="input x does not fit float16"):
            executor.run({"x": np.full(SHAPE, 66000.0, np.float32)})
    assert torch.from_numpy(np.array(got)).sum(1).tolist() == pytest.approx([1, 1], rel=1e-3)
