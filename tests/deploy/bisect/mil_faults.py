"""Random faults in one layer of a Core ML package, each with the module that has to be named for it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, Final

import numpy as np

from tests.deploy.support_coreml import Draft, Values

Fault = Callable[[Draft, Random], str]
"""Plants something and returns the module that is to blame."""


def module_of(draft: Draft, operation: Any) -> str:
    return draft._modules.get(operation.outputs[0].name, "")


def operations(draft: Draft, *kinds: str) -> list[Any]:
    """Those whose module is known."""
    return [each for each in draft.operations if each.type in kinds and module_of(draft, each)]


def shape_of(draft: Draft, name: str) -> tuple[int, ...]:
    (output,) = (out for each in draft.operations for out in each.outputs if out.name == name)
    return tuple(int(each.constant.size) for each in output.type.tensorType.dimensions)


def read_by(operation: Any, parameter: str = "x") -> Any:
    return operation.inputs[parameter].arguments[0]


def _numbers(draft: Draft, chosen: Random, parameter: str, how: Callable[[Values], Values]) -> str:
    maps = [each for each in operations(draft, "conv", "linear") if parameter in each.inputs]
    operation = chosen.choice(maps)
    draft.change(operation, parameter, lambda values: how(values.astype(np.float64)))
    return module_of(draft, operation)


def weight_scaled(draft: Draft, chosen: Random) -> str:
    return _numbers(draft, chosen, "weight", lambda values: values * 1.05)


def one_channel_scaled(draft: Draft, chosen: Random) -> str:
    def how(values: Values) -> Values:
        values[chosen.randrange(len(values))] *= 1.05
        return values

    return _numbers(draft, chosen, "weight", how)


def channels_permuted(draft: Draft, chosen: Random) -> str:
    return _numbers(draft, chosen, "weight", lambda values: np.roll(values, 1, axis=0))


def bias_shifted(draft: Draft, chosen: Random) -> str:
    return _numbers(draft, chosen, "bias", lambda values: np.roll(values, 1))


def activation_idle(draft: Draft, chosen: Random) -> str:
    operation = chosen.choice(operations(draft, "relu"))
    operation.type = "identity"
    return module_of(draft, operation)


def activation_left_out(draft: Draft, chosen: Random) -> str:
    gone = chosen.choice(operations(draft, "relu"))
    module, source, result = module_of(draft, gone), read_by(gone).name, gone.outputs[0].name
    for argument in (a for each in draft.operations for bound in each.inputs.values() for a in bound.arguments):
        if argument.WhichOneof("binding") == "name" and argument.name == result:
            argument.name = source
    draft.operations.remove(gone)
    return module


def _windows(draft: Draft) -> list[Any]:
    """Convolutions over three by three pixels, one beside the other."""
    maps = [each for each in operations(draft, "conv") if {"pad", "strides"} <= set(each.inputs)]
    return [each for each in maps if draft._numbers(draft.value(each, "pad")).all()]


def padding_on_one_side(draft: Draft, chosen: Random) -> str:
    operation = chosen.choice(_windows(draft))
    draft.change(operation, "pad", lambda _: np.array([0, 2, 0, 2]))
    return module_of(draft, operation)


def stride_lost(draft: Draft, chosen: Random) -> str:
    strided = [each for each in _windows(draft) if (draft._numbers(draft.value(each, "strides")) == 2).all()]
    operation = chosen.choice(strided)
    draft.change(operation, "strides", np.ones_like)
    return module_of(draft, operation)


def softmax_axis(draft: Draft, chosen: Random) -> str:
    operation = chosen.choice(operations(draft, "softmax"))
    draft.change(operation, "axis", lambda axis: np.array(-1 if axis == -2 else -2))
    return module_of(draft, operation)


def product_transposed(draft: Draft, chosen: Random) -> str:
    operation = chosen.choice(operations(draft, "matmul"))
    draft.change(operation, chosen.choice(("transpose_x", "transpose_y")), np.logical_not)
    return module_of(draft, operation)


def pool_resized(draft: Draft, chosen: Random) -> str:
    operation = chosen.choice(operations(draft, "avg_pool"))
    more = chosen.choice((-1, 1))
    draft.change(operation, "kernel_sizes", lambda sizes: sizes + more)
    return module_of(draft, operation)


def mean_is_maximum(draft: Draft, chosen: Random) -> str:
    operation = chosen.choice(operations(draft, "reduce_mean"))
    operation.type = "reduce_max"
    return module_of(draft, operation)


def sum_is_difference(draft: Draft, chosen: Random) -> str:
    operation = chosen.choice(operations(draft, "add"))
    operation.type = "sub"
    return module_of(draft, operation)


def shortcut_lost(draft: Draft, chosen: Random) -> str:
    operation = chosen.choice(operations(draft, "add"))
    read_by(operation).name = read_by(operation, "y").name
    return module_of(draft, operation)


def parts_swapped(draft: Draft, chosen: Random) -> str:
    operation = chosen.choice(operations(draft, "concat"))
    first, second = operation.inputs["values"].arguments
    first.name, second.name = second.name, first.name
    return module_of(draft, operation)


def read_from_elsewhere(draft: Draft, chosen: Random) -> str:
    """What a convolution reads further in front, of the same shape."""
    maps = operations(draft, "conv")
    read = [(read_by(each).name, shape_of(draft, read_by(each).name)) for each in maps]
    pairs = [
        (each, read[other][0])
        for at, each in enumerate(maps)
        for other in range(at)
        if read[at][0] != read[other][0] and read[at][1] == read[other][1]
    ]
    operation, source = chosen.choice(pairs)
    read_by(operation).name = source
    return module_of(draft, operation)


FAULTS: Final[tuple[Fault, ...]] = (
    weight_scaled,
    one_channel_scaled,
    channels_permuted,
    bias_shifted,
    activation_idle,
    activation_left_out,
    padding_on_one_side,
    stride_lost,
    softmax_axis,
    product_transposed,
    pool_resized,
    mean_is_maximum,
    sum_is_difference,
    shortcut_lost,
    parts_swapped,
    read_from_elsewhere,
)


class RandomFault:
    """One of them, in a random layer: ``module`` says afterwards which, ``kind`` what was done."""

    def __init__(self, seed: int) -> None:
        self._chosen = Random(seed)  # noqa: S311 - faults keep no secret
        self.module, self.kind = "", ""

    def __call__(self, draft: Draft) -> None:
        fault = self._chosen.choice(FAULTS)
        self.module, self.kind = fault(draft, self._chosen), fault.__name__
