"""An operation that mixes float16 and float32 is refused by name, as it is on a device."""

from __future__ import annotations

import numpy as np
import pytest

from nextvit_exporters.coreml.program import Constant, Operation, Output, Program, TensorType
from nextvit_exporters.errors import VerificationFailed
from nextvit_exporters.executors.mil_types import check_types

SHAPE = (2, 3)
HALF, SINGLE, BOOL = (TensorType(name, SHAPE) for name in ("float16", "float32", "bool"))


def program(kind: str, given: tuple[TensorType, TensorType], result: TensorType, opset: str = "CoreML6") -> Program:
    """One operation that reads two inputs as its ``x`` and ``y``, or as what ``linear`` calls them."""
    first, second = ("x", "weight") if kind == "linear" else ("values",) * 2 if kind == "concat" else ("x", "y")
    inputs = {first: ("a", "b")} if first == second else {first: ("a",), second: ("b",)}
    operation = Operation(kind, "it", inputs, {}, (Output("it", result),))
    return Program(opset, dict(zip("ab", given, strict=True)), (operation,), ("it",))


@pytest.mark.parametrize("kind", ["add", "concat", "matmul", "linear", "relu"])
@pytest.mark.parametrize("types", [(HALF, SINGLE, HALF), (SINGLE, HALF, HALF), (SINGLE, SINGLE, HALF)])
def test_mixed_types_are_refused(kind: str, types: tuple[TensorType, TensorType, TensorType]) -> None:
    made = program(kind, types[:2], types[2])
    with pytest.raises(VerificationFailed, match=rf"^{kind} it \(of head\) mixes float16 and float32; a cast is miss"):
        check_types(made, {"it": "head"})


def test_a_constant_in_place_has_a_type() -> None:
    one = Constant(TensorType("float32", ()), np.array(1, np.float32))
    operation = Operation("mul", "it", {"x": ("a",), "y": (one,)}, {}, (Output("it", HALF),))
    with pytest.raises(VerificationFailed, match="mul it mixes"):
        check_types(Program("CoreML6", {"a": HALF}, (operation,), ("it",)), {})


@pytest.mark.parametrize(
    "sound",
    [
        program("add", (HALF, HALF), HALF),
        program("cast", (HALF, HALF), SINGLE),
        program("greater", (SINGLE, SINGLE), BOOL),
        program("linear", (SINGLE, HALF), SINGLE, "CoreML7"),  # from iOS 17 on weights may be of another type
    ],
)
def test_what_is_of_one_type_is_not(sound: Program) -> None:
    check_types(sound, {})
