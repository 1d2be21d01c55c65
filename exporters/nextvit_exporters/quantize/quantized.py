"""A graph that computes in INT8, written in floating point: weights on their steps, activations brought onto theirs.

It is what every reading of an INT8 artefact is held against, and what the artefact is made from::

    y = conv(x, W, b)

becomes, with n = clamp(round(x / s), -128, 127) and W' = t q for whole numbers q and one step t per output channel,

    y = conv(s n, W', b')

Steps are numbers that the artefact's type holds exactly, so W' and what ``Quantizer`` gives are the artefact's own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.errors import InvariantError
from nextvit_exporters.passes import algebra
from nextvit_exporters.precision.fp16 import round_constants
from nextvit_exporters.quantize.bias import certify_bias, corrected_bias
from nextvit_exporters.quantize.calibration import Calibration, Float64s, Int8s
from nextvit_exporters.quantize.gptq import MOST_STEPS
from nextvit_exporters.quantize.placement import Map, Placement, placement, source
from nextvit_exporters.quantize.weights import LEVELS, nearest_codes, weight_of, weight_steps
from nextvit_exporters.quantize_spec import QuantizeSpec

_STEPS = "weight_steps"
_LOWEST, _HIGHEST = -128, 127


class Quantizer(nn.Module):
    """Brings a tensor onto whole steps of ``step`` from -128 to 127: (...) float to the same.

    Where it doesn't round it clips alone, to read a graph without the steps on whose edges values fall either way.
    """

    step: Tensor

    def __init__(self, step: float, *, rounds: bool = True) -> None:
        super().__init__()
        self.register_buffer("step", torch.tensor(step, dtype=torch.float64))
        self.rounds = rounds

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102 - the class docstring gives its shapes
        steps = x / self.step
        steps = torch.round(steps) if self.rounds else steps
        return torch.clamp(steps, _LOWEST, _HIGHEST) * self.step


@dataclass(frozen=True, slots=True, eq=False)
class MapSteps:
    """One INT8 map: the step of the tensor it reads, its weights' by output channel, (out,), and those in steps.

    ``codes`` is (out, K), K = input channels per group times kernel size, in the order of ``weight[0].flatten()``.
    """

    activation: float
    weights: Float64s
    codes: Int8s


def quantize_graph(graph: fx.GraphModule, spec: QuantizeSpec, found: Calibration) -> fx.GraphModule:
    """A copy of a float64 graph in INT8, still in float64; the argument stays.

    Raises InvariantError naming the module or tensor where the calibration holds none for it, or where its whole
    numbers are not those of this graph's weights.
    """
    placed = placement(graph, spec.keep)
    known = found.steps.keys() | found.means.keys()
    if missing := [name for name in (*placed.tensors, *placed.maps) if name not in known]:
        raise InvariantError(f"{missing[0]} was not calibrated; calibrate again")
    result = g.clone(graph)
    for name in placed.maps:
        result.set_submodule(name, _on_steps(name, g.module_as(graph, _call(graph, name), Map), spec, found))  # type: ignore[arg-type]
    _insert(result, placed, {name: _exact(found.steps[name], spec.rest) for name in placed.tensors})
    return result


def quantized_maps(graph: fx.GraphModule) -> tuple[str, ...]:
    """Names of the modules whose weights are on steps."""
    return tuple(name for name, module in graph.named_modules() if hasattr(module, _STEPS))


def clipped(graph: fx.GraphModule, rest: str) -> fx.GraphModule:
    """A float32 copy of a quantized float64 graph that clips activations without rounding them: the exact reference.

    Weights are on their steps, every other constant went through ``rest``.
    """
    maps = quantized_maps(graph)
    quantizers = [name for name, module in graph.named_modules() if isinstance(module, Quantizer)]
    if rest == "fp32":
        result = g.cast(graph, torch.float32)
    else:
        result = round_constants(graph, keep=(*maps, *quantizers))
        for name in maps:  # kept whole, for its weights; they are this copy's own
            bias = result.get_submodule(name)._parameters["bias"]  # noqa: SLF001 - there is no other name for it
            if bias is not None:
                bias.data = bias.data.half().float()
    for name in quantizers:
        quiet = copy.copy(result.get_submodule(name))
        quiet.rounds = False  # type: ignore[assignment]  # a flag, not a module
        result.set_submodule(name, quiet)
    return result


def map_steps(graph: fx.GraphModule) -> dict[str, MapSteps]:
    """What a quantized graph in any type has on steps, by module; nothing of a graph in floating point."""
    calls = [node for node in graph.graph.nodes if hasattr(g.module_of(graph, node), _STEPS)]
    return {str(node.target): _steps_of(graph, node) for node in calls}


def take_quantizers(graph: fx.GraphModule) -> dict[str, MapSteps]:
    """Remove the quantizers from a graph in any type, in place, and return what they and the weights were."""
    found = map_steps(graph)
    for node in [node for node in graph.graph.nodes if isinstance(g.module_of(graph, node), Quantizer)]:
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.graph.erase_node(node)
    for name in found:
        delattr(graph.get_submodule(name), _STEPS)
    g.finish(graph)
    return found


def _steps_of(graph: fx.GraphModule, call: fx.Node) -> MapSteps:
    module, quantizer = graph.get_submodule(str(call.target)), g.module_of(graph, source(graph, call))
    if not isinstance(module, Map) or not isinstance(quantizer, Quantizer):
        raise InvariantError(f"{call.target} reads what nothing brought onto steps")
    steps = getattr(module, _STEPS).detach().double().numpy()
    weight = module.weight.detach().double().numpy()
    codes = nearest_codes(weight.reshape(len(weight), -1), steps)
    return MapSteps(float(quantizer.step), steps, codes)


def _exact(step: float, rest: str) -> float:
    """The step as ``rest`` holds it, chosen as those of weights are."""
    return float(weight_steps(np.array([[LEVELS * step]]), rest)[0])


def _call(graph: fx.GraphModule, name: str) -> fx.Node:
    call: fx.Node = next(node for node in graph.graph.nodes if node.op == "call_module" and node.target == name)
    return call


def _on_steps(name: str, module: Map, spec: QuantizeSpec, found: Calibration) -> nn.Module:
    """The module with W' in place of W and b' in place of b, and the steps of W'."""
    weight = module.weight.detach().double().numpy()
    rows = weight.reshape(len(weight), -1)
    try:
        steps = weight_steps(rows, spec.rest)
    except InvariantError as error:
        raise InvariantError(f"{name}: {error}") from error
    codes = _codes(name, rows, steps, found)
    rounded = weight_of(codes, steps)
    bias, corrects = module.bias, module.bias is not None and spec.correct_bias
    if bias is not None and corrects:
        before = bias.detach().double().numpy()
        after = torch.from_numpy(corrected_bias(before, rows, rounded, found.means[name])[0])
        bias = nn.Parameter(after, requires_grad=False)
    fresh = algebra.with_weights(module, torch.from_numpy(rounded.reshape(weight.shape)), bias)
    if corrects:
        certify_bias(module, fresh, found.means[name])
    fresh._buffers = dict(fresh._buffers)  # noqa: SLF001 - a shallow module copy shares this dict
    fresh.register_buffer(_STEPS, torch.from_numpy(steps))
    return fresh


def _codes(name: str, rows: Float64s, steps: Float64s, found: Calibration) -> Int8s:
    """Whole numbers for a weight; those that were found are held against the weight they are for."""
    if name not in found.codes:
        return nearest_codes(rows, steps)
    codes = found.codes[name]
    if codes.size == rows.size:
        codes = codes.reshape(rows.shape)
        moved = np.abs(codes * steps[:, None] - rows) / steps[:, None]
        if float(moved.max()) <= MOST_STEPS + 0.5:
            return codes
    raise InvariantError(f"the calibration's numbers for {name} are not those of its weights; calibrate again")


def _insert(graph: fx.GraphModule, placed: Placement, steps: Mapping[str, float]) -> None:
    """Put a quantizer behind every tensor, in front of everybody who reads it."""
    nodes = {node.name: node for node in graph.graph.nodes}
    for name in placed.tensors:
        made = nodes[name]
        graph.add_module(f"quantize_{name}", Quantizer(steps[name]))
        with graph.graph.inserting_after(made):
            call = graph.graph.call_module(f"quantize_{name}", (made,))
        made.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)
        call.meta = dict(made.meta)
    g.finish(graph)
