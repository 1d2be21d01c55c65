"""Whole numbers for the weights of a graph, each rounded with what the others owe in mind."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import fx

from nextvit_exporters.errors import InvariantError
from nextvit_exporters.quantize.gptq import feedback_codes
from nextvit_exporters.quantize.placement import Map, Placement
from nextvit_exporters.quantize.weights import weight_steps


def codes(
    graph: fx.GraphModule,
    placement: Placement,
    grams: Mapping[str, NDArray[np.float64]],
    rest: str,
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, NDArray[np.int8]]:
    """By map of ``placement``, whole numbers from -127 to 127 in its weight's shape, times ``weight_steps``.

    ``grams`` are what an ``Observer`` found on the same float64 graph: (groups, K, K) by map; each group of output
    channels is rounded against its own. ``rest`` is the type steps are held in. Raises InvariantError where a map has
    no products, or of another shape.
    """
    result = {}
    for index, name in enumerate(placement.maps):
        on_step(f"round weights, {index} of {len(placement.maps)} maps")
        module = graph.get_submodule(name)
        if not isinstance(module, Map):
            raise InvariantError(f"{name} is a {type(module).__name__}, which is no linear map")
        weight = module.weight.detach().double().numpy()
        result[name] = _of_groups(name, weight.reshape(len(weight), -1), grams, rest).reshape(weight.shape)
    return result


def _of_groups(
    name: str, rows: NDArray[np.float64], grams: Mapping[str, NDArray[np.float64]], rest: str
) -> NDArray[np.int8]:
    """Of the (out, K) weights of one map."""
    products = grams.get(name)
    inner = rows.shape[1]
    if products is None or products.shape[1:] != (inner, inner) or len(rows) % len(products):
        raise InvariantError(f"{name} was not calibrated for rounding with feedback; calibrate again")
    steps = weight_steps(rows, rest)
    parts = zip(np.split(rows, len(products)), np.split(steps, len(products)), products, strict=True)
    return np.concatenate([feedback_codes(part, own, gram) for part, own, gram in parts])
