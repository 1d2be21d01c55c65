"""PyTorch's side of a bisection: what every node of a traced graph gives, and which module it belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.executors.base import LOGITS, PROBABILITIES, Array
from nextvit_exporters.quantize.quantized import Quantizer
from nextvit_exporters.scopes import fill_scopes
from nextvit_models.blocks import DropPath

_GIVEN: Final = frozenset({"placeholder", "get_attr"})
_INERT: Final = (nn.Dropout, nn.Identity, DropPath, Quantizer)
"""Modules that are no layers: in a trained model they change nothing, or are not the model's."""


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One tensor of PyTorch's: ``value`` is (runs, ...), ``inputs`` are the tensors it is computed from.

    ``module`` is the model's; a ``leaf`` is what the module itself gives, any other something within or between.
    What is ``given`` is the input, or constant.
    """

    name: str
    module: str
    kind: str
    leaf: bool
    given: bool
    inputs: tuple[str, ...]
    value: Array


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """Every tensor of a graph by name, in the order of execution, and who reads it.

    ``modules`` are all names that an operation of this model may bear; ``carried`` tells, by module, which others of
    the model were folded into it.
    """

    against: str
    nodes: Mapping[str, Node]
    readers: Mapping[str, tuple[str, ...]]
    modules: frozenset[str]
    outputs: Mapping[str, str]
    """The node behind each of the model's results, by the result's name."""
    carried: Mapping[str, tuple[str, ...]]

    def of_first(self, runs: int) -> Known:
        """The same on the first ``runs`` runs alone."""
        nodes = {name: replace(node, value=node.value[:runs]) for name, node in self.nodes.items()}
        return replace(self, nodes=nodes)

    def behind(self, name: str, most: int) -> Iterator[Node]:
        """What is computed from a node, nearest first, at most so many."""
        seen, queue = {name}, [name]
        while queue and len(seen) <= most:
            for reader in self.readers.get(queue.pop(0), ()):
                if reader not in seen:
                    seen.add(reader)
                    queue.append(reader)
                    yield self.nodes[reader]

    def leaves(self, module: str) -> tuple[Node, ...]:
        """What a module gives, each time it is called."""
        return tuple(node for node in self.nodes.values() if node.leaf and node.module == module)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what every node gives."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.seen[n.name] = value
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(self.fetch_attr(target), "inplace", False):  # what was kept must stay as it is
            args = tuple(each.clone() if isinstance(each, Tensor) else each for each in args)
        return super().call_module(target, args, kwargs)


@torch.inference_mode()
def record(
    graph: fx.GraphModule,
    runs: Sequence[Array],
    against: str,
    names: Sequence[str],
    carried: Mapping[str, tuple[str, ...]],
) -> Known:
    """Execute ``graph`` on each of ``runs`` and keep everything; ``names`` are those of its results.

    The numbers are of the graph's own type. Behind ``logits`` their probabilities are a node of their own where
    ``names`` ask for them.
    """
    dtype = next((p.dtype for p in graph.parameters()), torch.float32)
    seen: dict[str, list[Array]] = {}
    for each in runs:
        recorder, given = _Recorder(graph), torch.tensor(each)
        recorder.run(given.to(dtype) if given.is_floating_point() else given)
        for name, value in recorder.seen.items():
            if isinstance(value, Tensor):
                seen.setdefault(name, []).append(value.contiguous().numpy())
    scopes = scopes_of(graph)
    stacked = {name: values[0][None] if len(values) == 1 else np.stack(values) for name, values in seen.items()}
    nodes = {
        node.name: _node(graph, node, scopes[node.name], stacked)
        for node in graph.graph.nodes
        if node.name in stacked and node.op != "output"
    }
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    outputs = dict(zip(names, (each.name for each in output.all_input_nodes), strict=False))
    if PROBABILITIES in names:
        nodes[PROBABILITIES] = _probabilities(nodes[outputs[LOGITS]])
        outputs[PROBABILITIES] = PROBABILITIES
    readers: dict[str, tuple[str, ...]] = {}
    for node in nodes.values():
        for name in node.inputs:
            readers[name] = (*readers.get(name, ()), node.name)
    return Known(against, nodes, readers, _modules(scopes.values()), outputs, carried)


def _node(graph: fx.GraphModule, node: fx.Node, module: str, values: Mapping[str, Array]) -> Node:
    called = g.module_of(graph, node)
    kind = str(getattr(node.target, "__name__", node.target)) if called is None else type(called).__name__
    return Node(
        name=node.name,
        module=module,
        kind=kind,
        leaf=called is not None and not isinstance(called, _INERT),
        given=node.op in _GIVEN,
        inputs=tuple(dict.fromkeys(_tensors(node, values))),
        value=values[node.name],
    )


def _tensors(node: fx.Node, values: Mapping[str, Array]) -> Iterator[str]:
    """The tensors a node reads, those behind a tuple too; sizes are left out."""
    for each in node.all_input_nodes:
        if each.name in values:
            yield each.name
        elif g.is_op(each, "split", "chunk", "unbind", "tensor_split"):
            yield from _tensors(each, values)


def _probabilities(logits: Node) -> Node:
    value = torch.softmax(torch.from_numpy(np.array(logits.value)), -1).numpy()
    return Node(PROBABILITIES, logits.module, "softmax", leaf=False, given=False, inputs=(logits.name,), value=value)


def scopes_of(graph: fx.GraphModule) -> dict[str, str]:
    """The module of every node, by the node's name: its own, else the innermost that its neighbours share.

    What brings a tensor onto int8 steps belongs where the tensor was made.
    """
    nodes = list(graph.graph.nodes)
    index = {node: number for number, node in enumerate(nodes)}
    own = [
        str(node.target) if node.op == "call_module" and not isinstance(g.module_of(graph, node), Quantizer) else ""
        for node in nodes
    ]
    neighbours: list[set[int]] = [set() for _ in nodes]
    for node in nodes:
        sizes = node.target in {"reshape", "view"}  # a size comes from anywhere
        for other in node.all_input_nodes[:1] if sizes else node.all_input_nodes:
            neighbours[index[node]].add(index[other])
            neighbours[index[other]].add(index[node])
    return dict(zip((node.name for node in nodes), fill_scopes(own, neighbours), strict=True))


def _modules(scopes: Iterator[str] | Any) -> frozenset[str]:
    """Every module of these names, and those around it."""
    parts = (scope.split(".") for scope in set(scopes) if scope)
    return frozenset(".".join(each[: at + 1]) for each in parts for at in range(len(each)))


def carried_by(original: fx.GraphModule, rewritten: fx.GraphModule) -> dict[str, tuple[str, ...]]:
    """Which modules of the traced model are in others of the rewritten graph, by the latter's names.

    A module that is gone belongs to the one that took its place beside it (``k`` to ``k_v``), else to the map in front
    where it is a norm behind one, else to those that read it.
    """
    calls = [node for node in original.graph.nodes if node.op == "call_module"]
    left = {str(node.target) for node in rewritten.graph.nodes if node.op == "call_module"}
    fresh = left - {str(node.target) for node in calls}
    found: dict[str, list[str]] = {}
    for node in calls:
        name = str(node.target)
        if name in left or isinstance(g.module_of(original, node), _INERT):
            continue
        for owner in _owners(original, node, left, fresh):
            if name not in found.setdefault(owner, []):
                found[owner].append(name)
    return {owner: tuple(names) for owner, names in found.items()}


def _owners(graph: fx.GraphModule, node: fx.Node, left: set[str], fresh: set[str]) -> list[str]:
    name = str(node.target)
    parent, _, last = name.rpartition(".")
    beside = [
        each for each in fresh if each.rpartition(".")[0] == parent and last in each.rpartition(".")[2].split("_")
    ]
    if beside:
        return sorted(beside)
    (made,) = node.all_input_nodes[:1] or (None,)
    if made is not None and _holds(graph, made, left) and len(made.users) == 1:
        return [str(made.target)]
    owners, seen, queue = list[str](), {node}, list(node.users)
    while queue:
        reader = queue.pop(0)
        if reader in seen or reader.op == "output":
            continue
        seen.add(reader)
        if _holds(graph, reader, left):
            owners.append(str(reader.target))
        elif reader.op == "call_module" and str(reader.target) not in left:
            owners += _owners(graph, reader, left, fresh)
        else:
            queue += reader.users
    return list(dict.fromkeys(owners))


def _holds(graph: fx.GraphModule, node: fx.Node, left: set[str]) -> bool:
    """Whether a node calls a module that is there still and has numbers to fold something into."""
    module = g.module_of(graph, node)
    return module is not None and str(node.target) in left and any(True for _ in module.parameters())
