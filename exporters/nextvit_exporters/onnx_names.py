"""ONNX nodes named after the torch modules they come from.

A report that says ``features.7.e_mhsa.q/Conv`` can be acted on; ``node_conv2d_41`` can't.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import onnx

from nextvit_exporters.scopes import fill_scopes

_NAMESPACE: Final = "namespace"
_NOWHERE: Final = "_empty_nn_module_stack_from_metadata_hook"
"""What torch's exporter writes in place of a module for the sizes of an open axis."""


def name_nodes(model: onnx.ModelProto) -> None:
    """Rename every node to ``module/OpType``, numbered where a module has several.

    torch's exporter records the module a node was traced in; a node that is named already keeps its module. Any
    other (a sum, a matrix product, what onnx-simplifier made) gets the innermost module that its named neighbours
    share.
    """
    scopes = [_scope(node) for node in model.graph.node]
    makers = {name: index for index, node in enumerate(model.graph.node) for name in node.output}
    neighbours: list[set[int]] = [set() for _ in scopes]
    for index, node in enumerate(model.graph.node):
        for name in node.input[:1] if node.op_type == "Reshape" else node.input:  # a size comes from anywhere
            if name in makers:
                neighbours[index].add(makers[name])
                neighbours[makers[name]].add(index)
    seen: Counter[str] = Counter()
    for node, scope in zip(model.graph.node, fill_scopes(scopes, neighbours), strict=True):
        name = f"{scope}/{node.op_type}" if scope else node.op_type
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def strip_provenance(model: onnx.ModelProto) -> None:
    """Remove stack traces and source paths: they hold the machine's folders, so bytes would depend on them."""
    model.doc_string = ""
    model.graph.doc_string = ""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    for item in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        item.doc_string = ""
        del item.metadata_props[:]
    for tensor in model.graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]


def _scope(node: onnx.NodeProto) -> str:
    """The innermost module of ``stem: Sequential/stem.0: ConvBNReLU/.../conv2d: aten.conv2d``."""
    recorded = next((p.value for p in node.metadata_props if p.key == _NAMESPACE), None)
    if recorded is None:
        return node.name.rpartition("/")[0]
    *modules, _ = recorded.split("/")
    scope = modules[-1].partition(":")[0].strip() if modules else ""
    return "" if scope == _NOWHERE else scope
