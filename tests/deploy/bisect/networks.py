"""A network of a few numbers on both sides of a bisection, for what tells them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from nextvit_deploy.bisect.known import Known, Node
from nextvit_deploy.bisect.match import match
from nextvit_deploy.bisect.places import Evidence
from nextvit_deploy.bisect.traced import Traced
from nextvit_exporters.errors import DeployError
from nextvit_exporters.executors.base import Array, Step

Values = NDArray[np.float64]
TOLERANCE: Final = 1e-5
RUNS: Final = 3


def numbers(seed: int, size: int = 8) -> Values:
    """Numbers of order one, (runs, 1, size), that no other seed gives."""
    return np.random.default_rng(seed).standard_normal((RUNS, 1, size))


def node(name: str, inputs: Sequence[str], value: Array, *, leaf: bool = True, kind: str = "Conv2d") -> Node:
    """What PyTorch's module ``name`` gives; the name's first part is the module of what is no leaf."""
    return Node(name, name if leaf else name.partition(".")[0], kind, leaf, not inputs, tuple(inputs), value)


def known(*nodes: Node, carried: Mapping[str, tuple[str, ...]] | None = None) -> Known:
    readers: dict[str, tuple[str, ...]] = {}
    for each in nodes:
        for name in each.inputs:
            readers[name] = (*readers.get(name, ()), each.name)
    modules = frozenset(each.module for each in nodes if not each.given)
    return Known(
        "PyTorch", {each.name: each for each in nodes}, readers, modules, {"logits": nodes[-1].name}, carried or {}
    )


def step(module: str, inputs: Sequence[str], output: str, kind: str = "Conv") -> Step:
    return Step(f"{module}/{kind}", kind, module, tuple(inputs), (output,), ("float32",))


def traced(steps: Sequence[Step], values: Mapping[str, Array], failure: DeployError | None = None) -> Traced:
    return Traced("an executor", tuple(steps), dict(values), {"x"}, failure)


def evidence(found: Traced, right: Known, *, named: bool = True) -> Evidence:
    return Evidence.of(found, right, match(found, right, TOLERANCE), named=named)
