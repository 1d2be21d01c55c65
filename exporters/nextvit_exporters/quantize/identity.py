"""What a graph is, in one hash: everything that its outputs depend on, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final

from torch import Tensor, fx, nn

from nextvit_exporters.errors import InvariantError

_PLAIN: Final = (bool, int, float, str, tuple, type(None))


def graph_hash(graph: fx.GraphModule) -> str:
    """SHA-256 over operations, settings of modules, and every parameter and buffer the graph reads; 64 digits.

    Nodes go by name. Another weight, epsilon, order or stride is another hash; where a module lies in memory, what was
    noted on its nodes and what nobody calls are not in it. Raises InvariantError for a target that has no name.
    """
    digest = hashlib.sha256()
    for node in graph.graph.nodes:
        for part in _parts(graph, node):
            digest.update(part if isinstance(part, bytes | memoryview) else f"{len(part)} {part} ".encode())
    return digest.hexdigest()


def _parts(graph: fx.GraphModule, node: fx.Node) -> Iterator[str | bytes | memoryview]:
    yield node.op
    yield node.name
    yield _name_of(node.target)
    yield repr(fx.node.map_arg((node.args, node.kwargs), lambda each: _Named(each.name)))
    if node.op == "call_module":
        for name, module in graph.get_submodule(str(node.target)).named_modules():
            yield name
            yield from _settings(module)
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                yield key
                yield from _numbers(tensor)
    elif node.op == "get_attr":
        yield from _numbers(_attribute(graph, str(node.target)))


class _Named(str):
    """Another node's name, told from a text among the arguments."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"%{self}"


def _name_of(target: object) -> str:
    if isinstance(target, str):
        return target
    name = getattr(target, "__qualname__", getattr(target, "__name__", None))
    if not isinstance(name, str):
        raise InvariantError(f"{target!r} has no name, so the graph can't be told from another; call a function")
    return f"{getattr(target, '__module__', None)}.{name}"


def _settings(module: nn.Module) -> Iterator[str]:
    yield type(module).__name__
    plain = {k: v for k, v in vars(module).items() if isinstance(v, _PLAIN) and not k.startswith("_")}
    yield repr(sorted(plain.items(), key=lambda item: item[0]))


def _attribute(graph: fx.GraphModule, target: str) -> Tensor:
    owner, _, name = target.rpartition(".")
    value = getattr(graph.get_submodule(owner), name)
    if not isinstance(value, Tensor):
        raise InvariantError(f"{target} is no tensor, so the graph can't be told from another; make it a buffer")
    return value


def _numbers(tensor: Tensor) -> Iterator[str | memoryview]:
    array = tensor.detach().cpu().contiguous().numpy()
    yield f"{array.dtype} {array.shape}"
    yield array.reshape(-1).view("uint8").data
