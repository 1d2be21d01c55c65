"""What INT8 in some blocks alone does to the logits, without a graph for every choice of blocks.

A block in INT8 differs from the float graph in its maps and in the tensors they read, so everything before the first
of those tensors is the float graph's. The float graph is run once, and wherever a choice begins to differ the rest is
run from the tensors alive there::

    float     n1 ── n2 ── n3 ── n4 ── logits
    {b2}             └── n3' ─ n4' ─ logits'

A map's INT8 form does not depend on what else is in INT8 (``quantize_graph`` makes one from the map, its calibration
and its block's being in INT8 or not), so one quantized graph holds the parts for all choices. Trying each of B blocks
alone costs about 1 + B/2 forwards, where B graphs would cost 1 + B and B copies of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.errors import InvariantError
from nextvit_exporters.quantize.calibration import Calibration
from nextvit_exporters.quantize.placement import Map, Placement, block_of, blocks, placement
from nextvit_exporters.quantize.quantized import quantize_graph
from nextvit_exporters.quantize_spec import QuantizeSpec


@dataclass(frozen=True, slots=True)
class BlockSize:
    """INT8 maps of a block, and their multiply-accumulates on one image."""

    maps: int
    macs: int


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """What some blocks are in INT8: modules by name, and quantizers by the node whose result they bring onto steps."""

    modules: Mapping[str, nn.Module]
    quantizers: Mapping[str, nn.Module]


class _Walk(fx.Interpreter):
    """Runs a graph node by node from tensors that are there, with parts of it in INT8."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.parts = _Parts({}, {})

    def step(self, node: fx.Node, values: dict[fx.Node, g.Value], parts: _Parts) -> None:
        """Add a node's value to ``values``, and drop what nobody reads any more."""
        self.env, self.parts = values, parts
        value = self.run_node(node)
        quantizer = parts.quantizers.get(node.name)
        values[node] = value if quantizer is None else quantizer(value)
        for dead in self.user_to_last_uses.get(node, ()):
            del values[dead]

    def call_module(self, target: fx.node.Target, args: tuple[g.Value, ...], kwargs: dict[str, g.Value]) -> g.Value:
        """The module in INT8 where it is among the parts."""
        module = self.parts.modules.get(str(target))
        return super().call_module(target, args, kwargs) if module is None else module(*args, **kwargs)


class BlockwiseInt8:
    """A float graph, any blocks of which can be run in INT8.

    ``graph`` is the float64 graph behind the passes, one input and one output; it stays as it is. Everything is
    computed in ``dtype``. ``blocks`` are those that can be in INT8, in the order of the graph; what ``spec.keep`` names
    is looked at as any other. Raises InvariantError where the calibration is another graph's.
    """

    def __init__(
        self, graph: fx.GraphModule, spec: QuantizeSpec, found: Calibration, dtype: torch.dtype = torch.float32
    ) -> None:
        self.placed = placement(graph)
        self.blocks = blocks(self.placed)
        self._int8 = _all_parts(graph, replace(spec, keep=()), found, self.placed, dtype)
        self._graph = g.cast(graph, dtype)
        for module in self._graph.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]  # a flag; what it would write over, others still read
        self._walk = _Walk(self._graph)
        self._nodes = list(self._graph.graph.nodes)

    def logits(self, images: Tensor, choices: Sequence[Collection[str]]) -> Iterator[tuple[int | None, Tensor]]:
        """The logits, (B, classes), with each choice of blocks in INT8, as pairs of the choice's index and them.

        They come as the graph is walked, not in the order of ``choices``; those of the float graph come last, under
        None. ``images`` are (B, 3, H, W) as the graph reads them. Raises InvariantError for a block that isn't there.
        """
        waiting: dict[str | None, list[tuple[int, _Parts]]] = {}
        for index, choice in enumerate(choices):
            parts = self._parts(choice)
            waiting.setdefault(self._first(parts), []).append((index, parts))
        values: dict[fx.Node, g.Value] = {}
        for place, node in enumerate(self._nodes):
            for index, parts in waiting.get(node.name, ()):
                yield index, self._run(images, place, dict(values), parts)
            if node.op == "output":
                break
            self._step(images, node, values, _Parts({}, {}))
        whole = self._run(images, len(self._nodes) - 1, values, _Parts({}, {}))
        for index, _ in waiting.get(None, ()):
            yield index, whole
        yield None, whole

    def sizes(self, image: Tensor) -> dict[str, BlockSize]:
        """How large each block is in INT8 when the graph reads ``image``, (1, 3, H, W)."""
        g.measure(self._graph, image)
        found = dict.fromkeys(self.blocks, BlockSize(0, 0))
        for node in self._nodes:
            module = g.module_of(self._graph, node)
            if isinstance(module, Map) and node.target in self.placed.maps:
                block, macs = block_of(str(node.target)), math.prod(node.meta["shape"]) * module.weight[0].numel()
                found[block] = BlockSize(found[block].maps + 1, found[block].macs + macs)
        return found

    def _parts(self, choice: Collection[str]) -> _Parts:
        """What the blocks of a choice are in INT8."""
        if unknown := sorted(set(choice) - set(self.blocks)):
            raise InvariantError(f"there is no block {unknown[0]} to quantize; the blocks are {', '.join(self.blocks)}")
        maps = {name: source for name, source in self.placed.maps.items() if block_of(name) in choice}
        return _Parts(
            {name: self._int8.modules[name] for name in maps},
            {source: self._int8.quantizers[source] for source in maps.values()},
        )

    def _first(self, parts: _Parts) -> str | None:
        """The first node whose result is another one; None where none is."""
        return next((node.name for node in self._nodes if node.name in parts.quantizers), None)

    def _run(self, images: Tensor, place: int, values: dict[fx.Node, g.Value], parts: _Parts) -> Tensor:
        """The logits, from the node at ``place`` on."""
        for node in self._nodes[place:]:
            if node.op == "output":
                (result,) = g.flat(fx.node.map_arg(node.args[0], values.__getitem__))
                return result
            self._step(images, node, values, parts)
        raise InvariantError("the graph has no output")

    @torch.no_grad()
    def _step(self, images: Tensor, node: fx.Node, values: dict[fx.Node, g.Value], parts: _Parts) -> None:
        if node.op == "placeholder":
            quantizer = parts.quantizers.get(node.name)
            values[node] = images if quantizer is None else quantizer(images)
        else:
            self._walk.step(node, values, parts)


def _all_parts(
    graph: fx.GraphModule, spec: QuantizeSpec, found: Calibration, placed: Placement, dtype: torch.dtype
) -> _Parts:
    """Every block's parts, taken from a graph that is in INT8 as a whole."""
    exact = quantize_graph(graph, spec, found)
    whole = g.cast(exact, dtype)
    g.release(exact)
    parts = _Parts(
        {name: whole.get_submodule(name) for name in placed.maps},
        {name: whole.get_submodule(f"quantize_{name}") for name in placed.tensors},
    )
    g.release(whole)
    return parts
