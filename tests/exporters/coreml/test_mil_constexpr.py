"""Compressed weights, made whole bit for bit as coremltools does."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from nextvit_exporters.coreml.loading import part
from nextvit_exporters.coreml.program import Operation, Output, Program, TensorType
from nextvit_exporters.errors import NotExecutable, VerificationFailed
from nextvit_exporters.executors.mil_call import Constants
from nextvit_exporters.executors.mil_constexpr import CONSTANT_EXPRESSIONS, decompress
from nextvit_exporters.executors.mil_rounding import Arithmetic
from tests.exporters.coreml.small_programs import Array, constant, held

if importlib.util.find_spec("coremltools") is None:  # pragma: no cover - depends on the platform
    pytest.skip("coremltools has no wheel for this platform", allow_module_level=True)

RANDOM = np.random.default_rng(0)
Parameters = Mapping[str, Any]


def numbers(low: int, high: int, *shape: int, dtype: Any = np.int8) -> Array:
    found: Array = RANDOM.integers(low, high, shape).astype(dtype)
    return found


def scales(*shape: int, dtype: Any = np.float16) -> Array:
    return np.asarray(RANDOM.random(shape) / 50 + 1e-4).astype(dtype)


def lone(value: float, dtype: Any) -> Array:
    return np.asarray(value, dtype)


MASK = (RANDOM.random((6, 8)) < 0.6).astype(np.uint8)
ONES = int(MASK.sum())
BITS = np.packbits(MASK.reshape(-1), bitorder="little")
IOS16: dict[str, tuple[str, Parameters]] = {
    "affine, half": (
        "affine_dequantize",
        {"quantized_data": numbers(-128, 128, 4, 3), "scale": scales(4), "zero_point": numbers(-9, 9, 4), "axis": 0},
    ),
    "affine, single": (
        "affine_dequantize",
        {
            "quantized_data": numbers(0, 256, 2, 3, 4, dtype=np.uint8),
            "scale": scales(3, dtype=np.float32),
            "zero_point": lone(7, np.uint8),
            "axis": -2,
        },
    ),
    "affine, one scale": (
        "affine_dequantize",
        {
            "quantized_data": numbers(-128, 128, 4, 3),
            "scale": lone(0.01, np.float16),
            "zero_point": lone(-3, np.int8),
            "axis": 0,
        },
    ),
    **{
        f"table of {bits} bits": (
            "lut_to_dense",
            {
                "indices": numbers(0, 256, -(-7 * 5 * bits // 8), dtype=np.uint8),
                "lut": RANDOM.standard_normal(1 << bits).astype(np.float16),
                "shape": np.array([7, 5], np.uint32),
            },
        )
        for bits in (1, 2, 4, 6, 8)
    },
    "sparse": (
        "sparse_to_dense",
        {
            "nonzero_data": RANDOM.standard_normal(ONES).astype(np.float16),
            "mask": BITS,
            "shape": np.array([6, 8], np.uint32),
        },
    ),
}
IOS18: dict[str, tuple[str, Parameters]] = {
    "blocks, half": ("blockwise_shift_scale", {"data": numbers(-128, 128, 4, 6), "scale": scales(4, 2)}),
    "blocks, offsets": (
        "blockwise_shift_scale",
        {"data": numbers(-128, 128, 4, 6), "scale": scales(2, 3), "offset": numbers(-9, 9, 2, 3)},
    ),
    "blocks, unsigned, single": (
        "blockwise_shift_scale",
        {
            "data": numbers(0, 256, 4, 6, dtype=np.uint8),
            "scale": scales(1, 1, dtype=np.float32),
            "offset": numbers(0, 256, 1, 1, dtype=np.uint8),
        },
    ),
    "blocks, real offsets": (
        "blockwise_shift_scale",
        {"data": numbers(-128, 128, 4, 6), "scale": scales(4, 1), "offset": scales(4, 1)},
    ),
    "one table": (
        "lut_to_dense",
        {
            "indices": numbers(0, 16, 4, 6, dtype=np.uint8),
            "lut": RANDOM.standard_normal((1, 1, 16, 1)).astype(np.float16),
        },
    ),
    "tables by group": (
        "lut_to_dense",
        {
            "indices": numbers(0, 4, 4, 6, dtype=np.uint8),
            "lut": RANDOM.standard_normal((2, 3, 4, 1)).astype(np.float16),
        },
    ),
    **{
        f"table of vectors along {axis}": (
            "lut_to_dense",
            {
                "indices": numbers(0, 4, 4, 6, 2, dtype=np.uint8),
                "lut": RANDOM.standard_normal((2, 1, 1, 4, 3)).astype(np.float16),
                "vector_axis": axis,
            },
        )
        for axis in (0, 1, 2, -1)
    },
    "sparse": ("sparse_to_dense", {"nonzero_data": RANDOM.standard_normal(ONES).astype(np.float16), "mask": MASK}),
    "sparse table": (
        "lut_to_sparse",
        {
            "indices_mask": MASK,
            "indices_nonzero_data": numbers(0, 4, ONES, dtype=np.uint8),
            "lut": RANDOM.standard_normal((2, 1, 4, 1)).astype(np.float16),
        },
    ),
    "sparse table of vectors": (
        "lut_to_sparse",
        {
            "indices_mask": MASK,
            "indices_nonzero_data": numbers(0, 4, ONES, dtype=np.uint8),
            "lut": RANDOM.standard_normal((1, 1, 4, 2)).astype(np.float16),
            "vector_axis": 1,
        },
    ),
    "sparse blocks": (
        "sparse_blockwise_shift_scale",
        {
            "data_mask": MASK,
            "nonzero_data": numbers(-128, 128, ONES),
            "scale": scales(1, 8),
            "offset": numbers(-9, 9, 1, 8),
        },
    ),
}
CASES = {f"{name} ({release})": (release, *case) for release, table in (("iOS16", IOS16), ("iOS18", IOS18))
         for name, case in table.items()}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_what_coremltools_makes_of_it(case: tuple[str, str, Parameters]) -> None:
    release, kind, parameters = case
    module = part(f"converters.mil.mil.ops.defs.{release}.{'constexpr_ops' if release == 'iOS16' else 'compression'}")
    theirs = getattr(module, f"constexpr_{kind}").decompress
    defaults = {name: None for name in ("offset", "vector_axis") if name in theirs.__code__.co_varnames}
    expected = theirs(**(defaults | dict(parameters)))
    expected = expected if isinstance(expected, tuple) else (expected,)
    got = decompress(f"constexpr_{kind}", "it", {name: np.asarray(value) for name, value in parameters.items()})
    for mine, other in zip(got, expected, strict=True):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        assert mine.tobytes() == other.tobytes()


def test_a_cast_widens() -> None:
    values = RANDOM.standard_normal(5).astype(np.float16)
    (got,) = decompress("constexpr_cast", "it", {"source_val": values, "output_dtype": np.array("fp32", object)})
    assert got.dtype == np.float32
    assert np.array_equal(got, values)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scale": None}, VerificationFailed, "^it lacks its scale$"),
        ({"rows": np.zeros(1)}, NotExecutable, "^it has parameters that can't be executed here: rows$"),
        ({"scale": scales(3, 1)}, VerificationFailed, "^it can't be decompressed: .* does not divide"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Array | None], error: type[Exception], message: str) -> None:
    given = {"data": numbers(-128, 128, 4, 6), "scale": scales(4, 2)} | change
    with pytest.raises(error, match=message):
        decompress(
            "constexpr_blockwise_shift_scale", "it", {name: each for name, each in given.items() if each is not None}
        )


def expression(kind: str, parameters: Parameters, shape: tuple[int, ...], *, in_attributes: bool) -> Operation:
    name, output = f"constexpr_{kind}", (Output("weight", TensorType("float16", shape)),)
    if in_attributes:
        return Operation(name, "it", {}, {key: constant(value) for key, value in parameters.items()}, output)
    return Operation(name, "it", {key: (constant(value),) for key, value in parameters.items()}, {}, output)


@pytest.mark.parametrize("in_attributes", [False, True])
def test_parameters_are_attributes_or_inputs(*, in_attributes: bool) -> None:
    kind, parameters = IOS16["affine, half"]
    made = Program("CoreML6", {}, (expression(kind, parameters, (4, 3), in_attributes=in_attributes),), ())
    constants = Constants(made, {}, Arithmetic())
    (expected,) = decompress(f"constexpr_{kind}", "it", {name: np.asarray(each) for name, each in parameters.items()})
    assert np.array_equal(constants.array("weight"), expected)
    assert constants.tensor("weight", "conv it").dtype is torch.float32


def test_one_expression_may_read_another() -> None:
    """Pruned and quantised at once: a mask and numbers, scaled, then spread."""
    kind, parameters = IOS18["sparse blocks"]
    outputs = (Output("mask", TensorType("uint1", (6, 8))), Output("values", TensorType("float16", (ONES,))))
    first = Operation(f"constexpr_{kind}", "first", {key: (f"c_{key}",) for key in parameters}, {}, outputs)
    second = Operation(
        "constexpr_sparse_to_dense",
        "second",
        {"mask": ("mask",), "nonzero_data": ("values",)},
        {},
        (Output("weight", TensorType("float16", (6, 8))),),
    )
    helds = tuple(held(f"c_{key}", value) for key, value in parameters.items())
    got = Constants(Program("CoreML8", {}, (*helds, first, second), ()), {}, Arithmetic()).array("weight")
    given = {name: np.asarray(each) for name, each in parameters.items()}
    mask, values = decompress(f"constexpr_{kind}", "it", given)
    assert np.array_equal(got[mask != 0], values)
    assert not got[mask == 0].any()


def test_the_declaration_is_held_against_it() -> None:
    kind, parameters = IOS16["affine, half"]
    made = Program("CoreML6", {}, (expression(kind, parameters, (3, 4), in_attributes=True),), ())
    with pytest.raises(VerificationFailed, match=r"constexpr_affine_dequantize it is declared \(3, 4\), and \(4, 3\)"):
        Constants(made, {}, Arithmetic()).array("weight")
    wide = dict(parameters) | {"scale": scales(4, dtype=np.float32)}
    made = Program("CoreML6", {}, (expression(kind, wide, (4, 3), in_attributes=True),), ())
    with pytest.raises(VerificationFailed, match="is declared float16, and float32 was computed"):
        Constants(made, {}, Arithmetic()).array("weight")


def test_an_expression_reads_constants() -> None:
    output = (Output("w", TensorType("float16", (4, 3))),)
    bad = Operation("constexpr_affine_dequantize", "it", {"scale": ("x",)}, {}, output)
    with pytest.raises(VerificationFailed, match="it reads x, which is no constant"):
        Constants(Program("CoreML8", {}, (bad,), ()), {}, Arithmetic()).array("w")


def test_coremltools_is_the_one_that_is_known() -> None:
    """Every constexpr operation that it can write is one that can be read."""
    registry = part("converters.mil.mil.ops.registry").SSAOpRegistry
    theirs = {kind for kind in registry.core_ops if kind.startswith("constexpr_")}
    assert theirs == set(CONSTANT_EXPRESSIONS)
