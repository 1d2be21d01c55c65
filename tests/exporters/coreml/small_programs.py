"""Programs of one operation, and inputs that are never zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nextvit_exporters.coreml.program import (
    Binding,
    Constant,
    Feature,
    Operation,
    Output,
    Package,
    Program,
    TensorType,
)
from nextvit_exporters.executors.mil_program import ProgramReference
from nextvit_exporters.executors.mil_rounding import Arithmetic

Array = NDArray[Any]
DOUBLE = Arithmetic(torch.float64)
EMULATED = Arithmetic(rounds=True)
PESSIMISTIC = Arithmetic(rounds=True, chunk=32)


def normal(*shape: int, seed: int = 0) -> Array:
    """float32 of order one, none closer to zero than 0.1."""
    values = np.random.default_rng(seed).standard_normal(shape)
    found: Array = (values + np.copysign(0.1, values)).astype(np.float32)
    return found


def floats(values: object) -> Array:
    return np.asarray(values, np.float32)


def ints(values: object) -> Array:
    return np.asarray(values, np.int32)


def int8s(values: object) -> Array:
    return np.asarray(values, np.int8)


def constant(value: object) -> Constant:
    """A value as a package holds it; whole numbers are int32, real ones float32, a string is an array of one object."""
    data = np.array(value, object) if isinstance(value, str) else np.asarray(value)
    if data.dtype == np.int64:
        data = data.astype(np.int32)
    elif data.dtype == np.float64:
        data = data.astype(np.float32)
    dtype = "string" if data.dtype.kind in "OU" else str(data.dtype)
    return Constant(TensorType(dtype, data.shape), data)


def held(name: str, value: object) -> Operation:
    """A ``const``."""
    found = constant(value)
    return Operation("const", name, {}, {"val": found}, (Output(name, found.type),))


def typed(values: Array, dtype: str | None = None) -> TensorType:
    """An array's type, or that shape with another dtype."""
    return TensorType(dtype or str(values.dtype), values.shape)


def program(
    kind: str,
    inputs: Mapping[str, Array],
    outputs: Sequence[TensorType],
    *,
    opset: int = 6,
    lists: Mapping[str, Sequence[str]] | None = None,
    **parameters: object,
) -> Program:
    """One operation on inputs that are called as its parameters are; the others are constants of the program.

    ``lists`` binds a parameter to several inputs.
    """
    lists = lists or {}
    in_list = {name for names in lists.values() for name in names}
    bound: dict[str, tuple[Binding, ...]] = {name: (name,) for name in inputs if name not in in_list}
    bound |= {name: tuple(names) for name, names in lists.items()} | {name: (f"c_{name}",) for name in parameters}
    held_ones = tuple(held(f"c_{name}", value) for name, value in parameters.items())
    names = tuple(f"out{index}" for index in range(len(outputs)))
    declared = tuple(Output(name, each) for name, each in zip(names, outputs, strict=True))
    operation = Operation(kind, "it", bound, {}, declared)
    types = {name: typed(values) for name, values in inputs.items()}
    return Program(f"CoreML{opset}", types, (*held_ones, operation), names)


def execute(made: Program, inputs: Mapping[str, Array], arithmetic: Arithmetic = DOUBLE) -> tuple[Array, ...]:
    """What the program gives, in the order of its outputs."""
    fed = {}
    for name, values in inputs.items():
        tensor = torch.from_numpy(np.array(values))
        fed[name] = tensor.to(arithmetic.dtype) if tensor.is_floating_point() else tensor
    found = ProgramReference(made, arithmetic).run(fed)
    return tuple(found[name].numpy() for name in made.outputs)


def one(
    kind: str,
    inputs: Mapping[str, Array],
    expected: torch.Tensor,
    arithmetic: Arithmetic = DOUBLE,
    **parameters: Any,
) -> Array:
    """What one operation gives that is declared to be as ``expected`` is."""
    dtype = {torch.bool: "bool", torch.int32: "int32"}.get(expected.dtype, "float32")
    made = program(kind, inputs, [TensorType(dtype, tuple(expected.shape))], **parameters)
    (found,) = execute(made, inputs, arithmetic)
    return found


def package(made: Program, inputs: Sequence[Feature], outputs: Sequence[Feature] = (), **fields: Any) -> Package:
    """A package around a program."""
    return Package(
        Path("it.mlpackage"), 7, made, tuple(inputs), tuple(outputs), fields.pop("metadata", {}), {}, **fields
    )
