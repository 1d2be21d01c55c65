"""Error against depth: every layer of the model that the artefact has an operation for, and how far they are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Final

import numpy as np

from nextvit_deploy.bisect.known import Known, Node
from nextvit_deploy.bisect.match import Match, apart
from nextvit_deploy.bisect.record import Layer
from nextvit_deploy.bisect.traced import Traced

OTHERS: Final = frozenset(
    {"cast", "Cast", "CAST", "quantize", "QuantizeLinear", "QUANTIZE", "DequantizeLinear", "DEQUANTIZE", "dequantize"}
)
"""Kinds of operations that are never what a module computes."""


def anchors(traced: Traced, known: Known, matches: Mapping[str, Match]) -> dict[str, str]:
    """The artefact's tensor for what each layer of PyTorch gives, by node: told by its numbers, else by its name."""
    found: dict[str, str] = {}
    for step in traced.steps:
        for tensor in step.outputs:
            for name in matches[tensor].nodes if tensor in matches else ():
                # of several with these numbers that which bears the module's name, else the first
                if name not in found or (step.module == known.nodes[name].module != traced.makers[found[name]].module):
                    found[name] = tensor
    for node in known.nodes.values():
        if node.leaf and node.name not in found and (named := by_name(node, traced, matches)):
            found[node.name] = named
    return {name: tensor for name, tensor in found.items() if known.nodes[name].leaf}


def by_name(node: Node, traced: Traced, matches: Mapping[str, Match]) -> str | None:
    """The nearest tensor of the node's size among those that operations of its module give, and that match nothing."""
    free = [tensor for tensor in _own(node, traced) if tensor not in matches]
    return min(free, key=lambda tensor: apart(traced.values[tensor], node.value), default=None)


def own_tensor(node: Node, traced: Traced, known: Known, matches: Mapping[str, Match]) -> str | None:
    """What operations of a layer's module give in its place: nothing of PyTorch's, or what other layers do.

    None where one of them gives what the layer does, or none is there.
    """
    own = _own(node, traced)
    if any(node.name in matches[tensor].nodes for tensor in own if tensor in matches):
        return None
    others = [t for t in own if t in matches and all(known.nodes[n].module != node.module for n in matches[t].nodes)]
    return by_name(node, traced, matches) or next(iter(others), None)


def _own(node: Node, traced: Traced) -> list[str]:
    """Tensors of a node's size that operations of its module give."""
    return [
        tensor
        for step in traced.steps
        if step.module == node.module and step.kind not in OTHERS
        for tensor in step.outputs
        if tensor in traced.moving and traced.is_real(tensor) and traced.values[tensor].size == node.value.size
    ]


def layers(traced: Traced, known: Known, anchored: Mapping[str, str]) -> tuple[Layer, ...]:
    """Each layer of PyTorch's in its order; those that the artefact has no tensor for have no error."""
    found = []
    for node in known.nodes.values():
        if not node.leaf:
            continue
        tensor = anchored.get(node.name)
        if tensor is None or tensor not in traced.values:
            found.append(Layer(node.module, "", "", None))
            continue
        step = traced.makers[tensor]
        values = traced.values[tensor]
        error = apart(values, node.value) if np.isfinite(values).all() else math.inf
        found.append(Layer(node.module, step.operation, step.kind, error))
    return tuple(found)


def largest_jump(series: tuple[Layer, ...]) -> tuple[Layer, float] | None:
    """The layer at which the error grows most, and by what; None where there are not two with an error."""
    known = [each for each in series if each.error is not None and math.isfinite(each.error)]
    jumps = [(after, (after.error or 0.0) - (before.error or 0.0)) for before, after in pairwise(known)]
    return max(jumps, key=lambda pair: pair[1], default=None)
