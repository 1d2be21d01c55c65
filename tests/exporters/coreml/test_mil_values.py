"""Operations against coremltools' own inference of their values: a second reading of the specification."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from nextvit_exporters.coreml.loading import coremltools, heard, part
from nextvit_exporters.coreml.program import TensorType
from tests.exporters.coreml.small_programs import Array, execute, floats, int8s, ints, normal, program

if importlib.util.find_spec("coremltools") is None:  # pragma: no cover - depends on the platform
    pytest.skip("coremltools has no wheel for this platform", allow_module_level=True)

CUBE, POSITIVE = normal(2, 3, 4, 5), np.abs(normal(2, 3, 4, 5))
OPSETS = {"iOS15": 5, "iOS16": 6, "iOS17": 7, "iOS18": 8}


@dataclass(frozen=True, slots=True)
class Case:
    """An operation, what it computes with, and its parameters; ``since`` is the first release that has it."""

    kind: str
    inputs: dict[str, Array]
    parameters: dict[str, Any]
    since: str = "iOS15"


def case(kind: str, x: Array = CUBE, since: str = "iOS15", y: Array | None = None, **parameters: Any) -> Case:
    return Case(kind, {"x": x} | ({} if y is None else {"y": y}), parameters, since)


CASES = [
    *(case("softmax", axis=axis) for axis in (0, 1, -1)),
    case("softmax"),
    *(
        case(f"reduce_{kind}", axes=[-1, 1], keep_dims=keep)
        for kind in ("mean", "sum", "max")
        for keep in (True, False)
    ),
    case("reduce_mean"),
    case("rsqrt", POSITIVE),
    case("inverse", POSITIVE),
    case("inverse", POSITIVE, epsilon=0.5),
    case("sqrt", POSITIVE),
    case("clip", alpha=-0.5, beta=0.5),
    case("gelu"),
    case("gelu", mode="TANH_APPROXIMATION"),
    case("gelu", mode="SIGMOID_APPROXIMATION"),
    case("sigmoid"),
    case("tanh"),
    case("relu"),
    case("cast", floats([1.9, -1.9, 0.2]), dtype="int32"),
    case("cast", floats([1.9, 0.0, -3.0]), dtype="bool"),
    case("cast", ints([3, -4]), dtype="fp32"),
    case("add", y=normal(3, 1, 1)),
    case("sub", y=normal(5)),
    case("mul", y=normal(2, 1, 1, 1)),
    case("real_div", y=normal(4, 1)),
    case("maximum", y=normal(5)),
    case("minimum", y=normal(5)),
    case("floor_div", ints([7, -7, 5]), y=ints([2, 2, 5])),
    case("mod", ints([7, -7, 5]), y=ints([2, 2, 5])),
    case("equal", ints([7, 1]), y=ints([7, 2])),
    case("matmul", normal(2, 3, 4), y=normal(2, 4, 5), transpose_x=False, transpose_y=False),
    case("matmul", normal(2, 4, 3), y=normal(2, 4, 5), transpose_x=True, transpose_y=False),
    case("matmul", normal(2, 3, 4), y=normal(2, 5, 4), transpose_x=False, transpose_y=True),
    case("linear", normal(3, 4), weight=normal(5, 4), bias=normal(5)),
    case("layer_norm", axes=[2, 3], gamma=normal(4, 5), beta=normal(4, 5), epsilon=0.1),
    case("reshape", shape=[6, -1]),
    case("reshape", shape=[0, -1, 0, 5]),
    case("reshape", normal(2, 50), "iOS17", shape=[1, 0, -1, 0]),
    case("reshape", since="iOS17", shape=[-1, 0]),
    case("transpose", perm=[0, 2, -3, -1]),
    case("expand_dims", axes=[1, -1]),
    case("squeeze", normal(1, 3, 1), axes=[-1]),
    case("squeeze", normal(1, 3, 1)),
    case("shape"),
    case("slice_by_index", begin=[1, 0, -3, 4], end=[2, 3, -1, 0], stride=[1, 2, 1, -1]),
    case(
        "slice_by_index",
        begin=[1, 7, 1, 2],
        end=[2, 2, 0, 4],
        begin_mask=[False, True, False, False],
        end_mask=[False, False, True, False],
    ),
    case("slice_by_index", begin=[1, 0, 0, -1], end=[0, 3, 4, 0], squeeze_mask=[True, False, False, True]),
    case("slice_by_size", begin=[1, 0, 1, 2], size=[1, 3, 2, -1]),
    case("gather", indices=ints([1, 0, 1]), axis=2),
    case("gather", indices=ints([[1], [0]]), axis=-1),
    case("tile", reps=[1, 2, 1, 3]),
    case("pad", pad=[1, 2, 0, 3], mode="constant", constant_val=0.5),
    case("split", split_sizes=[1, 3], axis=2),
    case("split", num_splits=2, axis=-2),
    Case("concat", {"a": normal(2, 3), "b": normal(2, 1)}, {"axis": -1}),
    Case("select", {"cond": np.array([[True], [False]]), "a": normal(2, 3), "b": normal(2, 3, seed=1)}, {}),
    Case("fill", {}, {"shape": ints([2, 3]), "value": 0.5}),
    Case("fill_like", {"ref_tensor": CUBE}, {"value": 0.5}, "iOS16"),
    Case("quantize", {"input": CUBE}, {"scale": np.float32(0.05), "output_dtype": "int8"}, "iOS17"),
    Case(
        "quantize",
        {"input": CUBE},
        {"scale": np.abs(normal(3)) / 9, "zero_point": int8s([1, -2, 3]), "output_dtype": "int8", "axis": 1},
        "iOS17",
    ),
    Case(
        "dequantize",
        {"input": int8s([[-128, 5, 127], [0, 1, 2]])},
        {"scale": np.abs(normal(3)), "zero_point": int8s([1, -2, 3]), "axis": -1},
        "iOS17",
    ),
    Case(
        "scaled_dot_product_attention",
        {"query": normal(2, 3, 8), "key": normal(2, 4, 8, seed=1), "value": normal(2, 4, 5, seed=2)},
        {},
        "iOS18",
    ),
]
RUNS = [(each, release) for each in CASES for release in OPSETS if OPSETS[release] >= OPSETS[each.since]]


def inferred(made: Case, release: str) -> Sequence[Array]:
    """What coremltools makes of constants."""
    builder, version = part("converters.mil.mil").Builder, getattr(coremltools().target, release)
    given: dict[str, Any] = dict(made.inputs) | made.parameters
    if made.kind == "concat":
        given = {"values": (given.pop("a"), given.pop("b"))} | given
    found: list[Any] = []

    def body(_: Any) -> Any:
        result = getattr(builder, made.kind)(**given)
        found.extend(result if isinstance(result, list | tuple) else [result])
        return found[0]

    with heard():
        builder.program(input_specs=[builder.TensorSpec(shape=(1,))], opset_version=version)(body)
    values = [each.op.materialized_val_inference() if made.kind == "dequantize" else each.val for each in found]
    assert all(each is not None for each in values), f"coremltools infers no value of {made.kind}"
    return [np.asarray(each) for each in values]


@pytest.mark.parametrize(("made", "release"), RUNS, ids=[f"{each.kind}-{release}" for each, release in RUNS])
def test_it_is_what_coremltools_infers(made: Case, release: str) -> None:
    expected = inferred(made, release)
    types = [TensorType("bool" if each.dtype == bool else str(each.dtype), each.shape) for each in expected]
    types = [TensorType("float32", each.shape) if each.dtype == "float64" else each for each in types]
    types = [TensorType("int32", each.shape) if each.dtype == "int64" else each for each in types]
    lists = {"values": ("a", "b")} if made.kind == "concat" else None
    ready = program(made.kind, made.inputs, types, opset=OPSETS[release], lists=lists, **made.parameters)
    fed = {name: each.astype(np.int32) if each.dtype == np.int8 else each for name, each in made.inputs.items()}
    for mine, other in zip(execute(ready, fed), expected, strict=True):
        assert mine.shape == other.shape
        if made.kind == "quantize":
            assert np.array_equal(mine, other)
        else:
            assert np.allclose(mine, other, rtol=1e-5, atol=1e-6)
