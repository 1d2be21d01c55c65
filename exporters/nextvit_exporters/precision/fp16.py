"""Whole-graph FP16 with float32 inputs and outputs.

The float64 graph is rounded to FP16 once, after all folds, and a cast is put behind the input and in front of
each output. Where the graph subtracts the input's mean itself, the cast comes behind that subtraction: raw
pixels are exact in FP16, a mean of 123.675 is not.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import fx

from nextvit_exporters import graph as g
from nextvit_exporters.passes.normalize_input import MEAN


def to_half(graph: fx.GraphModule, *, half_io: bool = False) -> fx.GraphModule:
    """A copy of a float64 graph in FP16 that reads and returns float32 (or reads uint8, as before).

    With ``half_io`` it returns FP16, and reads FP16 where it doesn't read raw pixels.
    """
    half = g.cast(graph, torch.float16)
    _insert_casts(half, half_io=half_io)
    if hasattr(half, MEAN):
        setattr(half, MEAN, getattr(graph, MEAN).float())
    g.finish(half)
    return half


def round_constants(graph: fx.GraphModule, *, keep: Collection[str] = ()) -> fx.GraphModule:
    """A float32 copy of a float64 graph whose every constant went through FP16: the exact reference.

    The constants of modules in ``keep`` are rounded to float32 alone. A number that a tensor is multiplied with, as in
    attention whose scale was not folded, is a constant of the file too.
    """
    half = g.cast(graph, torch.float16)
    rounded = g.cast(half, torch.float32)
    g.release(half)
    for name in keep:
        if any(node.op == "call_module" and node.target == name for node in rounded.graph.nodes):
            rounded.set_submodule(name, copy.deepcopy(graph.get_submodule(name)).float())
    if hasattr(rounded, MEAN):
        setattr(rounded, MEAN, getattr(graph, MEAN).float())
    for node in rounded.graph.nodes:
        if g.is_op(node, "mul"):
            node.args = tuple(_in_half(each) if isinstance(each, float) else each for each in node.args)
    rounded.recompile()
    return rounded


def _in_half(value: float) -> float:
    return torch.tensor(value, dtype=torch.float16).item()


def _insert_casts(half: fx.GraphModule, *, half_io: bool) -> None:
    nodes = half.graph
    image = next(node for node in nodes.nodes if node.op == "placeholder")
    output = next(node for node in nodes.nodes if node.op == "output")
    centred = [user for user in image.users if g.is_op(user, "sub")]
    source = centred[0] if centred else image
    if half_io and not centred:
        return
    with nodes.inserting_after(source):
        cast = nodes.call_method("to", (source, torch.float16))
    source.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast and not g.is_op(user, "sub"))
    if half_io:
        return
    for result in output.all_input_nodes:
        with nodes.inserting_before(output):
            back = nodes.call_method("to", (result, torch.float32))
        output.replace_input_with(result, back)
