"""Traced models: from an ``nn.Module`` to a ``torch.fx`` graph, and the few operations every pass needs.

A graph is a ``torch.fx.GraphModule`` in eval mode and float64. Its modules are never changed in place: a pass
replaces a module by a new one under the same name, so an earlier graph stays valid and costs no copy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, fx, nn

from nextvit_exporters.errors import InvariantError
from nextvit_models.blocks import DropPath

Value = Any  # what an fx node may hold: a tensor, a number, a shape, a tuple of those
ModuleT = TypeVar("ModuleT", bound=nn.Module)
_PLAIN: Final = (bool, int, float, str, tuple, type(None))


class _Tracer(fx.Tracer):
    """torch's own layers are leaves, and so is stochastic depth, so that stripping it can be counted."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, DropPath) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """Trace ``model`` into a float64 graph of its own; the model's weights are left as they are.

    Raises InvariantError when the model, or a part of it, is in training mode or can't be traced symbolically.
    """
    training = next((name or "the model" for name, module in model.named_modules() if module.training), None)
    if training:
        msg = f"{training} is in training mode; call .eval() before tracing"
        raise InvariantError(msg)
    try:
        traced = fx.GraphModule(model, _Tracer().trace(model))
    except fx.proxy.TraceError as error:
        msg = f"the model can't be traced: {error}; control flow on tensor values must go"
        raise InvariantError(msg) from error
    graph = cast(traced, torch.float64)
    release(traced)
    return graph


def release(graph: fx.GraphModule) -> None:
    """Let go of the modules of a graph that nobody needs any more; those that other graphs use stay.

    A graph and its nodes refer to each other, so without this its weights would wait for the next garbage
    collection: half a gigabyte at the peak of a small model's export.
    """
    graph._modules.clear()  # noqa: SLF001 - torch offers no public way to drop all submodules


def clone(graph: fx.GraphModule) -> fx.GraphModule:
    """A second graph over the same modules; editing or replacing in one leaves the other alone."""
    nodes = fx.Graph()
    nodes.output(nodes.graph_copy(graph.graph, {}))
    return fx.GraphModule(graph, nodes)


def cast(graph: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """A copy with every floating parameter and buffer rounded to ``dtype``, one module at a time."""
    result = clone(graph)
    for target in _targets(result, "call_module"):
        result.set_submodule(target, copy.deepcopy(result.get_submodule(target)).to(dtype))
    for target in _targets(result, "get_attr"):  # last: a called module that owns one is a copy by now
        _cast_attribute(result, target, dtype)
    return result


def _targets(graph: fx.GraphModule, op: str) -> tuple[str, ...]:
    """What nodes of this kind name, each once, in order."""
    return tuple(dict.fromkeys(str(node.target) for node in graph.graph.nodes if node.op == op))


def _cast_attribute(graph: fx.GraphModule, target: str, dtype: torch.dtype) -> None:
    owner_name, _, name = target.rpartition(".")
    owner = graph.get_submodule(owner_name)
    value = getattr(owner, name)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return
    value = value.detach().to(dtype)
    if name in owner._parameters:  # noqa: SLF001 - torch offers no public test for "is a parameter of"
        value = nn.Parameter(value, requires_grad=False)
    setattr(owner, name, value)


class _Recorder(fx.Interpreter):
    """Runs a graph and leaves on each node what the passes ask about it: a tensor's shape, or the value."""

    def run_node(self, n: fx.Node) -> Value:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            n.meta["shape"] = tuple(value.shape)
        else:
            n.meta["value"] = value
        return value


@torch.no_grad()
def measure(graph: fx.GraphModule, inputs: Tensor) -> tuple[Tensor, ...]:
    """Execute ``graph`` on ``inputs``, note every node's shape in its ``meta``, and return the outputs in order."""
    return flat(_Recorder(graph).run(inputs))


def count_macs(graph: fx.GraphModule) -> int:
    """Multiply-accumulates of convolutions, linear maps and matrix products, at the sizes last measured."""
    total = 0
    for node in graph.graph.nodes:
        module = module_of(graph, node)
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            total += math.prod(node.meta["shape"]) * module.weight[0].numel()
        elif is_op(node, "matmul", "bmm"):
            total += math.prod(node.meta["shape"]) * node.all_input_nodes[0].meta["shape"][-1]
        elif is_op(node, "scaled_dot_product_attention"):
            total += _attention_macs(node)
    return total


def _attention_macs(node: fx.Node) -> int:
    given = dict(zip(("query", "key", "value"), node.args, strict=False)) | node.kwargs
    shapes = [each.meta["shape"] for each in map(given.get, ("query", "key", "value")) if isinstance(each, fx.Node)]
    query, key, value = shapes
    macs: int = math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return macs


@torch.no_grad()
def execute(graph: nn.Module, inputs: Tensor) -> tuple[Tensor, ...]:
    """The outputs of ``graph`` on ``inputs``, flattened in order."""
    return flat(graph(inputs))


def flat(result: Value) -> tuple[Tensor, ...]:
    """A model's result as a flat tuple of tensors; raises InvariantError when it holds anything else."""
    if isinstance(result, Tensor):
        return (result,)
    if not isinstance(result, tuple | list):
        msg = (
            f"the model returns a {type(result).__name__}; only tensors, and tuples and lists of them, can be compared"
        )
        raise InvariantError(msg)
    return tuple(tensor for item in result for tensor in flat(item))


def module_of(graph: fx.GraphModule, node: object) -> nn.Module | None:
    """The module a node calls; None for any other kind of node."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        return graph.get_submodule(str(node.target))
    return None


def module_as(graph: fx.GraphModule, node: fx.Node, kind: type[ModuleT]) -> ModuleT:
    """The module a node calls, known to be a ``kind``; raises TypeError when it is not."""
    module = graph.get_submodule(str(node.target))
    if not isinstance(module, kind):
        msg = f"{node.target} is a {type(module).__name__}, not a {kind.__name__}"
        raise TypeError(msg)
    return module


def calls_once(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node's module is called nowhere else, and none of its parameters is read elsewhere."""
    if sum(other.op == "call_module" and other.target == node.target for other in graph.graph.nodes) != 1:
        return False
    if any(other.op == "get_attr" and str(other.target).startswith(f"{node.target}.") for other in graph.graph.nodes):
        return False
    own = {id(p) for p in graph.get_submodule(str(node.target)).parameters()}
    others = (
        p
        for name, module in graph.named_modules()
        if name != node.target and not list(module.children())
        for p in module.parameters(recurse=False)
    )
    return not any(id(p) in own for p in others)


def nodes(graph: fx.GraphModule) -> int:
    """Operations in the graph: every node but inputs and the output."""
    return sum(node.op not in {"placeholder", "output"} for node in graph.graph.nodes)


def parameters(graph: fx.GraphModule) -> int:
    """Trained numbers the graph still reads, normalisation statistics included."""
    tensors: dict[int, Tensor] = {}
    for node in graph.graph.nodes:
        if (module := module_of(graph, node)) is not None:
            tensors |= {id(t): t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()}
    return sum(t.numel() for t in tensors.values())


def fingerprint(graph: fx.GraphModule) -> tuple[object, ...]:
    """What the graph's modules hold; another value later means that one was changed in place.

    Tensors are told apart by identity, torch's count of in-place operations, and the sum of their numbers, which
    costs milliseconds where a hash of every byte would cost as much as running the model.
    """
    found: list[object] = []
    for name, module in graph.named_modules():
        found.append((name, id(module)))
        found += [item for item in vars(module).items() if isinstance(item[1], _PLAIN)]
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            writes = tensor._version  # noqa: SLF001 - torch has no public name for it
            found.append((id(tensor), writes, tuple(tensor.shape), str(tensor.detach().sum().item())))
    return tuple(found)


def inputs_of(node: fx.Node) -> Iterable[fx.Node]:
    """The nodes this one reads."""
    return node.all_input_nodes


def is_op(node: object, *names: str) -> bool:
    """Whether a node is one of these tensor operations, written as method, function or operator."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_method":
        return node.target in names
    if node.op == "call_function":
        target: str | Callable[..., object] = node.target
        return getattr(target, "__name__", "") in names
    return False


def finish(graph: fx.GraphModule) -> None:
    """Drop what nobody reads any more, check the graph, and make it runnable."""
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
