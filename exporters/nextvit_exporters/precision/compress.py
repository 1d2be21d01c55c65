"""Compressed weights: what a Core ML package of int8 or table weights computes with, computed here first.

Every constant of the float64 graph is rounded to FP16 once. The weight of every convolution and linear map of more
than ``THRESHOLD`` elements then goes through a scheme, whose results are FP16 numbers again:

``int8``
    With W in FP16 and m = max|W| over an output channel: step s = fp16(2m / 254), whole numbers
    q = clip(round(fp16(W / s)), -127, 127), and W' = fp16(s q). This is coremltools' ``linear_symmetric`` number for
    number, so what it writes for W decompresses to W' exactly.
``lut8``, ``lut6``, ``lut4``
    One table of up to 256, 64 or 16 FP16 values per tensor, and W' the table value nearest to W. Such W' need no
    more rounding: whoever converts the graph finds the table by listing the values that occur.

Maps of blocks that are kept have their weights in plain FP16.

So the reference's constants come from the checkpoint by this arithmetic, and not from the package. Each W' is held
against the float64 weight that it came from; one that moved further than its scheme may is an InvariantError.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.coreml_spec import WEIGHTS
from nextvit_exporters.errors import InvariantError, UnsupportedSpec
from nextvit_exporters.precision.fp16 import round_constants
from nextvit_exporters.precision.tables import distinct, nearest, to_table
from nextvit_exporters.quantize.placement import Map, block_of

THRESHOLD: Final = 2048
"""Weights of more elements are compressed: coremltools' own default, and exclusive as there."""
TABLES: Final[Mapping[str, int]] = {"lut8": 256, "lut6": 64, "lut4": 16}
"""Values of a table, by scheme."""
LARGEST_LOSS: Final[Mapping[str, float]] = {"lut8": 0.02, "lut6": 0.08, "lut4": 0.3}
"""Largest root mean square of W' - W that a table may cost, relative to that of W.

About twice the worst measured on the layers of the demo and of nano and small with random weights after all folds:
0.0093, 0.038 and 0.14. A normal distribution alone costs 0.0068, 0.026 and 0.098.
"""
_MOST: Final = 127
_HALF: Final = 2.0**-11
_TINY: Final = 2.0**-25

Float16s = NDArray[np.float16]
Float64s = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Loss:
    """How far one module's weights moved: the root mean square of W' - W relative to that of W, and what it may be."""

    module: str
    scheme: str
    relative_rms: float
    bound: float


def compress_graph(
    graph: fx.GraphModule, scheme: str, keep: Collection[str] = ()
) -> tuple[fx.GraphModule, tuple[Loss, ...]]:
    """A float32 copy of a float64 graph that carries exactly the constants of its compressed package, and the losses.

    ``keep`` names the blocks whose weights stay FP16. Raises InvariantError naming the module whose weights FP16 or the
    scheme can't hold or whose W' is further from W than the scheme's bound, and UnsupportedSpec for an unknown scheme.
    """
    if scheme not in WEIGHTS:
        raise UnsupportedSpec(f"there is no weight compression {scheme}; choose one of {', '.join(WEIGHTS)}")
    result = round_constants(graph)
    losses = []
    for name in compressible(graph, keep):
        rounded = copy.copy(result.get_submodule(name))
        weight = rounded.get_parameter("weight").detach().numpy().astype(np.float16)
        _check_range(name, scheme, weight)
        compressed = compress(weight, scheme)
        losses.append(measure(name, scheme, _weight(graph, name), compressed))
        result.set_submodule(name, _with_weight(rounded, compressed))
    return result, tuple(losses)


def for_conversion(graph: fx.GraphModule, compressed: fx.GraphModule, scheme: str) -> fx.GraphModule:
    """Which graph to hand to the converter, so that compressing its package gives the constants of ``compressed``.

    For tables it is ``compressed`` itself: its values are listed, not searched for. For ``int8`` it is the float64
    ``graph`` rounded to FP16, since steps taken again from s q differ from s in the last place for some channels.
    """
    return compressed if scheme in TABLES else round_constants(graph)


def compressible(graph: fx.GraphModule, keep: Collection[str] = ()) -> tuple[str, ...]:
    """Names of the modules whose weight is compressed, in the order of the graph; those of blocks in ``keep`` stay."""
    return tuple(
        name
        for name in _maps(graph)
        if block_of(name) not in keep and graph.get_submodule(name).get_parameter("weight").numel() > THRESHOLD
    )


def check_blocks(graph: fx.GraphModule, keep: Collection[str]) -> None:
    """Raise UnsupportedSpec for a block in ``keep`` that the graph has no convolution or linear map in."""
    known = tuple(dict.fromkeys(block_of(name) for name in _maps(graph)))
    if unknown := [name for name in keep if name not in known]:
        raise UnsupportedSpec(f"no block is called '{unknown[0]}'; the blocks are {', '.join(known)}")


def _maps(graph: fx.GraphModule) -> tuple[str, ...]:
    calls = (str(node.target) for node in graph.graph.nodes if isinstance(g.module_of(graph, node), Map))
    return tuple(dict.fromkeys(calls))


def compress(weight: Float16s, scheme: str) -> Float16s:
    """W' of a weight (out, in, ...) of finite values, in its shape."""
    return to_int8(weight) if scheme == "int8" else to_table(weight, TABLES[scheme])


def to_int8(weight: Float16s) -> Float16s:
    """W' for whole numbers of eight bits with one step per output channel.

    All in FP16, as the module's docstring has it. Where the step underflows to zero the channel becomes zero.
    """
    rows = weight.reshape(len(weight), -1)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    step = (largest + largest) / np.float16(2 * _MOST)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # a step of zero; 0 / 0 becomes zero below
        whole = np.clip(np.round(rows / step), -_MOST, _MOST)
    whole = np.nan_to_num(whole, nan=0.0).astype(np.int8)
    compressed: Float16s = (whole.astype(np.float32) * step).astype(np.float16)
    return compressed.reshape(weight.shape)


def measure(name: str, scheme: str, weight: Float64s, compressed: Float16s) -> Loss:
    """Hold W' against the float64 weight it came from; raises InvariantError naming the module when it is too far."""
    moved = np.abs(compressed - weight)
    allowed = _half_steps(weight) if scheme == "int8" else _distance(weight, compressed)
    if not (moved <= allowed).all():
        place = np.unravel_index(int(np.argmax(moved - allowed)), weight.shape)
        index = ", ".join(str(axis) for axis in place)
        raise InvariantError(
            f"{scheme} moves weight[{index}] of {name} from {weight[place]:.6g} to {compressed[place]:.6g}, further "
            f"than the {allowed[place]:.3g} it may"
        )
    loss, bound = _relative(moved, weight), LARGEST_LOSS.get(scheme) or _relative(allowed, weight)
    if not loss <= bound:
        raise InvariantError(
            f"{scheme} moves the weights of {name} by {loss:.3g} of their root mean square, more than {bound:.3g}; "
            f"use a scheme of more bits"
        )
    return Loss(name, scheme, loss, bound)


def _half_steps(weight: Float64s) -> Float64s:
    """How far int8 may move each element: half a step of its channel, and what FP16 rounds off.

    In steps of s = max|W| / 127: half of one for rounding to whole numbers. Relative to |W|, 2^-11 each for rounding
    the weight, the quotient, the step and the product; below FP16's normal numbers 2^-25 for the weight and the
    product, and 127 times it for the step.
    """
    rows = weight.reshape(len(weight), -1)
    steps = np.abs(rows).max(axis=1) / _MOST
    halves = (0.5 * (1 + 4 * _HALF) * steps).reshape(-1, *[1] * (weight.ndim - 1))
    allowed: Float64s = halves + 4 * _HALF * (1 + _HALF) ** 3 * np.abs(weight) + (_MOST + 3) * _TINY
    return allowed


def _distance(weight: Float64s, compressed: Float16s) -> Float64s:
    """How far each element is from the nearest table value, with what FP16 rounds off the weight first.

    Where the nearest value is looked up for a weight that moved by r, it is at most 2r further than the weight's own.
    """
    table = np.unique(distinct(compressed)[0])
    least = np.abs(table.astype(np.float64)[nearest(table, weight)] - weight)
    allowed: Float64s = least + 2 * (_HALF * np.abs(weight) + _TINY)
    return allowed


def _relative(moved: Float64s, weight: Float64s) -> float:
    size = float(np.sqrt(np.square(weight).mean()))
    return float(np.sqrt(np.square(moved).mean())) / size if size else 0.0


def _check_range(name: str, scheme: str, weight: Float16s) -> None:
    limit = float(np.finfo(np.float16).max) / (2 if scheme == "int8" else 1)
    largest = float(np.abs(weight).max())
    if not largest <= limit:
        raise InvariantError(f"the weights of {name} reach {largest:.6g} in FP16; {scheme} needs them within {limit}")


def _weight(graph: fx.GraphModule, name: str) -> Float64s:
    weight: Float64s = graph.get_submodule(name).get_parameter("weight").detach().numpy()
    return weight


def _with_weight(module: nn.Module, weight: Float16s) -> nn.Module:
    fresh = copy.copy(module)
    fresh._parameters = dict(module._parameters)  # noqa: SLF001 - the copy must not share the table of parameters
    fresh.register_parameter("weight", nn.Parameter(torch.from_numpy(weight.astype(np.float32)), requires_grad=False))
    return fresh
