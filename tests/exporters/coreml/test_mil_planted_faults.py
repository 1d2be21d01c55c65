"""Faults planted in a sound package: exact arithmetic moves by ten times the clean error and more, or it is refused.

Measured: the clean error is 2.4e-7, the mildest of these faults (a norm with another epsilon) is at 2.8e-5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nextvit_exporters.coreml.program import Constant, Operation, Package
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.errors import VerificationFailed
from nextvit_exporters.executors.base import Array
from tests.exporters.coreml.small_programs import constant
from tests.exporters.coreml.whole_models import SIZE, distance, plain, ran, saved
from tests.exporters.passes_harness import nano
from tests.harness import images

Fault = Callable[[Operation, Mapping[str, Constant]], Operation]
SEEN = 10


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Package:
    path: Path = tmp_path_factory.mktemp("sound") / "nano.mlpackage"
    return read_package(saved(plain("iOS16", "FLOAT32"), path))


@cache
def example() -> Array:
    found: Array = images(1, 3, SIZE, SIZE, seed=5).numpy()
    return found


def error(package: Package) -> float:
    with torch.no_grad():
        expected = nano()(torch.from_numpy(np.array(example()))).numpy()
    return distance(ran(package, "exact", example())["logits"], expected)


def planted(package: Package, kind: str, index: int, fault: Fault) -> Package:
    """The package with one operation of a kind, by number, changed."""
    known = {
        each.outputs[0].name: each.attributes["val"] for each in package.program.operations if each.kind == "const"
    }
    chosen = [each for each in package.program.operations if each.kind == kind][index]
    operations = tuple(fault(each, known) if each is chosen else each for each in package.program.operations)
    return replace(package, program=replace(package.program, operations=operations))


def bind(name: str, value: object) -> Fault:
    """A parameter bound to another value."""
    return lambda operation, _: replace(operation, inputs={**operation.inputs, name: (constant(value),)})


def change(name: str, edit: Callable[[Any], Any]) -> Fault:
    """A constant that a parameter is bound to, copied and changed."""

    def fault(operation: Operation, known: Mapping[str, Constant]) -> Operation:
        (bound,) = operation.inputs[name]
        values = np.array(known[str(bound)].data)
        edited = constant(edit(values))
        assert not np.array_equal(edited.data, known[str(bound)].data)
        return replace(operation, inputs={**operation.inputs, name: (edited,)})

    return fault


def scaled_channel(values: Array) -> Array:
    found: Array = values.copy()
    found[len(found) // 2] = found[len(found) // 2] * np.float32(1.01)
    return found


def one_zero(values: Array) -> Array:
    found: Array = values.copy()
    found.reshape(-1)[0] = 0
    return found


def swapped(values: Array) -> Array:
    found: Array = values.copy()
    found[[0, 1]] = found[[1, 0]]
    return found


def flipped(name: str) -> Fault:
    return change(name, np.logical_not)


def without(name: str, kind: str | None = None) -> Fault:
    """A parameter left out, and perhaps another operation."""
    return lambda operation, _: replace(
        operation, kind=kind or operation.kind, inputs={k: v for k, v in operation.inputs.items() if k != name}
    )


def joined(order: slice) -> Fault:
    """Some of a list, in this order."""
    return lambda operation, _: replace(
        operation, inputs={**operation.inputs, "values": operation.inputs["values"][order]}
    )


def other(kind: str) -> Fault:
    return lambda operation, _: replace(operation, kind=kind)


FAULTS: dict[str, tuple[str, int, Fault]] = {
    "the padding is all behind": ("conv", 0, bind("pad", [0, 2, 0, 2])),
    "the padding is all in front": ("conv", 0, bind("pad", [2, 0, 2, 0])),
    "a relu is dropped": ("relu", 3, other("identity")),
    "the softmax is over queries": ("softmax", 0, bind("axis", -2)),
    "two branches are joined the other way round": ("concat", 0, joined(slice(None, None, -1))),
    "one channel is times 1.01": ("conv", 4, change("weight", scaled_channel)),
    "one number is zero": ("conv", 4, change("weight", one_zero)),
    "two rows of the head are swapped": ("linear", -1, change("weight", swapped)),
    "two biases are swapped": ("linear", -1, change("bias", swapped)),
    "a norm has another epsilon": ("batch_norm", 0, bind("epsilon", 1e-3)),
    "a norm lost its gamma": ("batch_norm", 0, without("gamma")),
    "a residual is subtracted": ("add", 2, other("sub")),
    "a mean is a maximum": ("avg_pool", 0, without("exclude_padding_from_average", "max_pool")),
    "the attention is not scaled": ("mul", 0, bind("y", 1.0)),
    "a square operand is transposed": ("matmul", -1, flipped("transpose_x")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_output_moves(sound: Package, name: str) -> None:
    clean = error(sound)
    assert clean < 1e-6
    assert error(planted(sound, *FAULTS[name])) > SEEN * clean


REFUSED: dict[str, tuple[str, int, Fault]] = {
    "another stride": ("conv", 0, bind("strides", [1, 1])),
    "no padding": ("conv", 0, bind("pad", [0, 0, 0, 0])),
    "an operand is transposed": ("matmul", 0, flipped("transpose_y")),
    "other axes are averaged": ("reduce_mean", 0, bind("axes", [1])),
    "other groups": ("conv", 0, bind("groups", 3)),
    "a branch is lost": ("concat", 0, joined(slice(1))),
    "two uneven branches are interleaved": ("concat", 0, bind("interleave", value=True)),
    "an axis is kept": ("reduce_mean", 0, flipped("keep_dims")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_a_shape_is_refused(sound: Package, name: str) -> None:
    kind, index, fault = REFUSED[name]
    with pytest.raises(VerificationFailed, match=f"^{kind} .*(is declared|can't be executed)"):
        error(planted(sound, kind, index, fault))
