"""Run a graph on calibration images and keep what they tell of it, in memory that doesn't grow with their number.

Of each quantized tensor a histogram; of the input of each INT8 map the mean of every number a weight is multiplied
with, and, where asked for, the products of every pair of them, which say what rounding one weight costs the others.
Everything is a sum over images, taken up a batch at a time; sums are kept in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.errors import DeployError, InvariantError
from nextvit_exporters.quantize.calibration import Calibration, Float64s
from nextvit_exporters.quantize.histograms import Histogram, step
from nextvit_exporters.quantize.patches import patches
from nextvit_exporters.quantize.placement import Map, Placement

State = Mapping[str, NDArray[Any]]

WITHIN: Final = 0.01
"""A step has settled when it stays this close to its last value, relative to it."""
SHARE: Final = 0.99
"""Of the steps that have to."""
_MOST_PATCHES: Final = 1 << 25
"""Numbers that are laid out as patches at once: 128 MiB of float32."""


@dataclass(frozen=True, slots=True)
class Convergence:
    """Whether more images would have changed the steps: by how many of ``count`` images 99 % of them had settled.

    ``after`` is None where they had not by the last time they were looked at before the end, after ``looked`` images;
    ``moved`` is how far 99 % of them moved at most from there to the end, as a share.
    """

    count: int
    after: int | None
    looked: int
    moved: float

    def __str__(self) -> str:
        if self.after is not None:
            return f"scales move < {WITHIN:.0%} after {self.after} of {self.count} images"
        return (
            f"scales still move by up to {self.moved:.1%} over the last {self.count - self.looked} of {self.count} "
            "images; give more"
        )


def convergence(counts: Sequence[int], steps: Float64s) -> Convergence:
    """When the steps had settled: ``steps`` is (looks, tensors), one row after each of ``counts`` images.

    They had after the first look from which on 99 % of them, at every look, are within 1 % of the last. Raises
    ValueError for fewer than two looks.
    """
    if len(counts) < 2:
        raise ValueError("whether steps have settled takes two looks at them")
    moves = np.sort(np.abs(steps[:-1] / steps[-1] - 1.0), axis=1)[:, math.ceil(SHARE * steps.shape[1]) - 1]
    unsettled = np.flatnonzero(moves > WITHIN)
    first = int(unsettled[-1]) + 1 if unsettled.size else 0
    after = counts[first] if first < len(moves) else None
    return Convergence(counts[-1], after, counts[-2], float(moves[-1]))


class Observer:
    """Sums over images of what a placement asks of a graph.

    ``graph`` is the float64 graph behind the passes; it is run as a copy in ``dtype``. With ``grams`` the products of
    pairs are kept too. Sums are the same bits for the same batches in the same order on as many threads.
    Raises InvariantError for a placement without maps.
    """

    def __init__(
        self, graph: fx.GraphModule, placement: Placement, *, grams: bool, dtype: torch.dtype = torch.float32
    ) -> None:
        if not placement.maps:
            raise InvariantError("nothing in this graph computes in INT8; export it in another precision")
        self.count = 0
        self._dtype = dtype
        self._graph = g.cast(graph, dtype)
        self._placement = placement
        self._histograms = {name: Histogram(name) for name in placement.tensors}
        self._leaders = _leaders(self._graph, placement)
        self._keeps_grams = grams
        self._sums: dict[str, Tensor] = {}
        self._products: dict[str, Tensor] = {}
        self._places: dict[str, int] = {}
        for name in dict.fromkeys(self._leaders.values()):
            groups, inner = _shape(_map(self._graph, name))
            self._places[name] = 0
            self._sums[name] = torch.zeros(groups, inner, dtype=torch.float64)
            if grams:
                self._products[name] = torch.zeros(groups, inner, inner, dtype=torch.float64)
        self._looks: list[tuple[int, Float64s]] = []

    @torch.no_grad()
    def see(self, images: Tensor) -> None:
        """Run the graph on a batch, as it reads them, and add what is found.

        Raises InvariantError, naming the tensor, where a quantized one is not finite; the sums are then of no use.
        """
        _Run(self._graph, self).run(images.to(self._dtype) if images.is_floating_point() else images)
        self.count += len(images)

    def look(self, method: str) -> None:
        """Remember where the steps stand now, for ``convergence``."""
        self._looks.append((self.count, np.array(list(self.steps(method).values()))))

    def steps(self, method: str) -> dict[str, float]:
        """The step of each quantized tensor, from the images so far."""
        return {name: step(histogram, method) for name, histogram in self._histograms.items()}

    def means(self) -> dict[str, Float64s]:
        """By map, the mean of what each weight is multiplied with, (groups, K)."""
        own = {name: (total / self._places[name]).numpy() for name, total in self._sums.items()}
        return {name: own[leader] for name, leader in self._leaders.items()}

    def grams(self) -> dict[str, Float64s]:
        """By map, the products of what each pair of weights is multiplied with, summed: (groups, K, K).

        Maps that read the same numbers in the same way share one array. Empty where none were asked for.
        """
        own = {name: total.numpy() for name, total in self._products.items()}
        return {name: own[leader] for name, leader in self._leaders.items() if leader in own}

    def convergence(self) -> Convergence:
        """When the steps had settled, from the looks so far."""
        return convergence([count for count, _ in self._looks], np.stack([steps for _, steps in self._looks]))

    def result(self, method: str, images: str, graph: str) -> Calibration:
        """What was found, with the fingerprint of the images and the hash of the graph; weights are left alone."""
        return Calibration(method, images, self.count, self.steps(method), self.means(), graph=graph)

    def close(self) -> None:
        """Let go of the copy of the graph; what was found stays."""
        g.release(self._graph)

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything found so far as arrays, not copied: ``restore`` goes on from them as if it had never stopped."""
        histograms = self._histograms.values()
        looks = [steps for _, steps in self._looks]
        return {
            "count": np.array([self.count], np.int64),
            "histograms": np.stack([each.counts for each in histograms]),
            "exponents": np.array([each.exponent for each in histograms], np.int64),
            "largest": np.array([each.largest for each in histograms], np.float64),
            "places": np.array(list(self._places.values()), np.int64),
            "looked": np.array([count for count, _ in self._looks], np.int64),
            "looks": np.stack(looks) if looks else np.zeros((0, len(self._histograms))),
            **{f"sums/{name}": total.numpy() for name, total in self._sums.items()},
            **{f"products/{name}": total.numpy() for name, total in self._products.items()},
        }

    def restore(self, state: State) -> None:
        """Go on from what ``state`` gave; raises DeployError, changing nothing, where it is of another graph."""
        own = self.state()
        looks = len(state["looked"]) if "looked" in state else 0
        own |= {"looked": np.zeros(looks, np.int64), "looks": np.zeros((looks, len(self._histograms)))}
        if {k: (v.dtype, v.shape) for k, v in own.items()} != {k: (v.dtype, v.shape) for k, v in state.items()}:
            raise DeployError("what was kept of an earlier calibration doesn't fit this graph; calibrate again")
        self.count = int(state["count"][0])
        rows = zip(state["histograms"], state["exponents"], state["largest"], strict=True)
        for histogram, (counts, exponent, largest) in zip(self._histograms.values(), rows, strict=True):
            histogram.counts, histogram.exponent, histogram.largest = counts.copy(), int(exponent), float(largest)
        self._places = dict(zip(self._places, map(int, state["places"]), strict=True))
        self._looks = [(int(count), steps.copy()) for count, steps in zip(state["looked"], state["looks"], strict=True)]
        for kind, kept in (("sums", self._sums), ("products", self._products)):
            for name, total in kept.items():
                total.copy_(torch.tensor(state[f"{kind}/{name}"]))

    def reads(self, node: fx.Node, inputs: Tensor) -> None:
        """Add what the map that ``node`` calls is given; nothing where another map reads the same in the same way."""
        name = str(node.target)
        if self._leaders.get(name) != name:
            return
        module = _map(self._graph, name)
        # patches are linear in the image, so those of the sum over images add up to the same
        together = patches(module, inputs.sum(0, keepdim=True, dtype=torch.float64))
        self._sums[name] += together.sum(1)
        self._places[name] += together.shape[1] * len(inputs)
        if self._keeps_grams:
            most = max(1, _MOST_PATCHES // (together.numel() or 1))
            for some in torch.split(inputs, most):
                each = patches(module, some)
                self._products[name] += torch.matmul(each.mT, each)

    def makes(self, node: fx.Node, value: Tensor) -> None:
        """Count the numbers of a tensor that is quantized; those of others are nobody's business."""
        if node.name in self._histograms:
            self._histograms[node.name].add(value)


class _Run(fx.Interpreter):
    """One batch through the graph; a tensor is let go when its last reader is done."""

    def __init__(self, graph: fx.GraphModule, observer: Observer) -> None:
        super().__init__(graph)
        self._observer = observer

    def run_node(self, n: fx.Node) -> g.Value:
        if isinstance(g.module_of(self.module, n), Map):  # type: ignore[arg-type]  # the interpreter's is a GraphModule
            self._observer.reads(n, self.env[n.all_input_nodes[0]])
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self._observer.makes(n, value)
        return value


def _leaders(graph: fx.GraphModule, placement: Placement) -> dict[str, str]:
    """By map, the first one that reads the same numbers in the same way."""
    first: dict[object, str] = {}
    calls = {str(node.target): node for node in graph.graph.nodes if node.op == "call_module"}
    return {
        name: first.setdefault((calls[name].all_input_nodes[0], _way(_map(graph, name))), name)
        for name in placement.maps
    }


def _way(module: Map) -> tuple[object, ...]:
    """How a map lays out what it reads; what it then makes of it is left out."""
    if isinstance(module, nn.Linear):
        return ("tokens", module.in_features)
    spread = module.kernel_size, module.stride, module.padding, module.dilation
    return (*spread, module.groups, module.in_channels, module.padding_mode)


def _shape(module: Map) -> tuple[int, int]:
    """Groups, and weights of one output channel."""
    return 1 if isinstance(module, nn.Linear) else module.groups, module.weight[0].numel()


def _map(graph: fx.GraphModule, name: str) -> Map:
    module = graph.get_submodule(name)
    if not isinstance(module, Map):
        raise TypeError(f"{name} is a {type(module).__name__}, which is no linear map")
    return module
