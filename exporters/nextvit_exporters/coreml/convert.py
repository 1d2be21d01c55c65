"""A traced graph as a coremltools model: torch.export, names that lead back to modules, coremltools' own conversion.

What an app needs goes in here: the picture's colours and mean, the softmax, the labels. The graph's constants are
FP16 values already where the package is FP16, so coremltools' own rounding changes nothing.
"""

from __future__ import annotations

import operator
import tempfile
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

import numpy as np
import torch
from torch import fx

from nextvit_exporters import graph as g
from nextvit_exporters.coreml.loading import coremltools, heard, part
from nextvit_exporters.coreml.overflow import name_of
from nextvit_exporters.coreml_spec import CoreMLSpec
from nextvit_exporters.errors import BuildFailed, UnsupportedSpec
from nextvit_exporters.executors.base import FEATURES, LOGITS, PROBABILITIES
from nextvit_exporters.passes.normalize_input import MEAN
from nextvit_exporters.scopes import graph_scopes
from nextvit_exporters.signals import held
from nextvit_exporters.spec import ExportSpec, InputKind, Precision

INPUT: Final = "image"
SUFFIXES: Final = ("_cast_fp16", "_to_fp16", "_cast_fp32", "_quantized", "_palettized")
"""What coremltools appends to a name where it casts or compresses."""


@dataclass(frozen=True, slots=True, eq=False)
class Converted:
    """A coremltools model that is not saved yet.

    ``modules`` tells of its operations and parameters, by their names without the suffixes that coremltools appends,
    which torch module they come from.
    """

    model: Any
    modules: Mapping[str, str]


def of_spec(spec: ExportSpec) -> CoreMLSpec:
    """What ``spec`` asks of Core ML; raises UnsupportedSpec where that is nothing."""
    if spec.coreml is None:
        raise UnsupportedSpec("the spec asks for no Core ML package; name the iOS release and the head")
    return spec.coreml


def to_model(spec: ExportSpec, module: fx.GraphModule) -> Converted:
    """Convert ``module``, float32 arithmetic on the constants that the package shall hold.

    Raises BuildFailed when torch's exporter or coremltools refuses.
    """
    asked, ct = of_spec(spec), coremltools()
    graph = g.clone(module)
    mean = _take_mean(graph) if spec.input is InputKind.IMAGE else None
    if asked.head == "classify":
        _add_softmax(graph)
    for node in graph.graph.nodes:
        node.meta.setdefault("source", node.name)  # see _first_name
    scopes = graph_scopes(graph)
    with heard(), held([]):  # torch.export imports what swallows an interruption
        program = _export(spec, graph)
        sources = _rename(program, scopes) | _parameters(program, graph)
        kept = {node.name for node in graph.graph.nodes if name_of(node) in asked.keep_fp32}
        _count_anew()
        try:
            model = ct.convert(
                program,
                inputs=[_input(spec, mean)],
                outputs=_outputs(asked),
                classifier_config=_labels(spec),
                minimum_deployment_target=getattr(ct.target, f"iOS{asked.ios}"),
                compute_precision=_precision(spec, sources, kept),
                skip_model_load=True,
            )
        except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
            raise BuildFailed(_why(error)) from error
    return Converted(model, {name: scopes[source] for name, source in sources.items()})


def _count_anew() -> None:
    """Let coremltools number the operations it makes from zero; else names depend on what this process made before."""
    counted: dict[str, int] | None = getattr(part("converters.mil.mil.builder").Builder, "name_count", None)
    if counted is not None:
        counted.clear()


def _why(error: Exception) -> str:
    """What coremltools raised, in one line; it writes weights to the temporary folder as it converts."""
    if "FileWriter" in str(error):
        return f"coremltools can't write to {tempfile.gettempdir()}; free some space, or set TMPDIR to another folder"
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"coremltools refused the graph: {first.strip()}"


def shapes(spec: ExportSpec) -> tuple[tuple[int, int, int, int], ...]:
    """Every input shape, (B, 3, H, W), that the package enumerates; its own first."""
    own = (spec.height, spec.width)
    sizes = dict.fromkeys((own, *of_spec(spec).sizes))
    return tuple((spec.batch, 3, height, width) for height, width in sizes)


def known(name: str, names: Mapping[str, str]) -> str | None:
    """What ``names`` says of ``name``, which coremltools may have appended to; None where it made the name up."""
    while name not in names:
        suffix = next((each for each in SUFFIXES if name.endswith(each)), None)
        if suffix is None:
            return None
        name = name.removesuffix(suffix)
    return names[name]


def _take_mean(graph: fx.GraphModule) -> list[float]:
    """Take the subtraction of the input's mean out of the graph, to be the picture's bias; per channel."""
    mean: torch.Tensor | None = getattr(graph, MEAN, None)
    centred = next((node for node in graph.graph.nodes if node.target is operator.sub), None)
    if mean is None or centred is None:
        raise UnsupportedSpec(
            "normalize-input was refused or rolled back, so a picture can't be read; ask for --input tensor"
        )
    centred.replace_all_uses_with(centred.all_input_nodes[0])
    g.finish(graph)
    return [float(value) for value in mean.flatten()]


def _add_softmax(graph: fx.GraphModule) -> None:
    output = next(node for node in graph.graph.nodes if node.op == "output")
    (logits,) = output.all_input_nodes
    with graph.graph.inserting_before(output):
        probabilities = graph.graph.call_function(torch.softmax, (logits, -1))
    output.replace_input_with(logits, probabilities)
    g.finish(graph)


def _export(spec: ExportSpec, graph: fx.GraphModule) -> torch.export.ExportedProgram:
    """A program of torch.export's, with height and width open where several sizes are asked for."""
    open_axes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC} if spec.dynamic_size else {}
    example = torch.ones(shapes(spec)[0])
    try:
        traced = torch.export.export(graph, (example,), dynamic_shapes=(open_axes,))
        program: torch.export.ExportedProgram = traced.run_decompositions({})
    except (RuntimeError, torch.fx.experimental.symbolic_shapes.ConstraintViolationError) as error:
        first = str(error).strip().splitlines()[0]
        raise BuildFailed(f"torch.export refused the graph: {first}") from error
    return program


def _rename(program: torch.export.ExportedProgram, scopes: Mapping[str, str]) -> dict[str, str]:
    """Give every operation the name of the traced node it comes from, and return those by the new names."""
    sources: dict[str, str] = {}
    results = {node for output in program.graph.nodes if output.op == "output" for node in output.all_input_nodes}
    kept = {node.name for node in program.graph.nodes if node in results or node.op != "call_function"}
    for node in program.graph.nodes:
        source = _first_name(node)
        if node.op != "call_function" or source not in scopes:
            continue
        if node not in results:  # torch's signature knows those by name
            node.name = _free(source, kept | sources.keys())
        sources[node.name] = source
    return sources


def _parameters(program: torch.export.ExportedProgram, graph: fx.GraphModule) -> dict[str, str]:
    """The traced node behind each parameter's name."""
    callers = {str(node.target): node.name for node in graph.graph.nodes if node.op == "call_module"}
    owners = {name: full.rpartition(".")[0] for name, full in program.graph_signature.inputs_to_parameters.items()}
    return {name: callers[owner] for name, owner in owners.items() if owner in callers}


def _free(name: str, taken: AbstractSet[str]) -> str:
    """``name``, numbered where it is taken."""
    numbered = (f"{name}_{number}" for number in count(1))
    return name if name not in taken else next(each for each in numbered if each not in taken)


def _first_name(node: fx.Node) -> str:
    """The name of the node in the graph that was exported, at the bottom of torch's record.

    torch leaves nodes without any ``meta`` out of that record.
    """
    record = node.meta.get("from_node") or []
    name = node.name
    while record:
        name, record = str(record[-1].name), record[-1].from_node
    return name


def _input(spec: ExportSpec, mean: list[float] | None) -> Any:
    ct, asked = coremltools(), of_spec(spec)
    shape: Any = shapes(spec)[0]
    if asked.sizes:
        shape = ct.EnumeratedShapes(shapes=[list(each) for each in shapes(spec)], default=list(shape))
    elif asked.flexible is not None:
        low, high = asked.flexible
        sides = [ct.RangeDim(lower_bound=low, upper_bound=high, default=side) for side in (spec.height, spec.width)]
        shape = ct.Shape((spec.batch, 3, *sides))
    if mean is None:
        return ct.TensorType(name=INPUT, shape=shape, dtype=np.float32)
    bias = [-value for value in mean]
    return ct.ImageType(name=INPUT, shape=shape, scale=1.0, bias=bias, color_layout=ct.colorlayout.RGB)


def _outputs(asked: CoreMLSpec) -> Any:
    names = {"features": FEATURES, "logits": (LOGITS,), "classify": (PROBABILITIES,)}[asked.head]
    return [coremltools().TensorType(name=name, dtype=np.float32) for name in names]


def _labels(spec: ExportSpec) -> Any:
    if of_spec(spec).head != "classify":
        return None
    labels = list(labels_of(spec))  # without the name, coremltools takes the last operation that it happens to list
    return coremltools().ClassifierConfig(class_labels=labels, predicted_probabilities_output=PROBABILITIES)


def labels_of(spec: ExportSpec) -> tuple[str, ...]:
    """The class names, or numbers where the checkpoint has none."""
    return spec.labels or tuple(f"class {number}" for number in range(spec.num_classes))


def _precision(spec: ExportSpec, sources: Mapping[str, str], kept: AbstractSet[str]) -> Any:
    ct = coremltools()
    if spec.precision is Precision.FP32:
        return ct.precision.FLOAT32
    if not kept and not spec.dynamic_size:
        return ct.precision.FLOAT16

    def in_half(op: Any) -> bool:
        source = _source(op, sources)
        if source is None:  # with open axes, sizes are computed as well: those stay whole numbers
            return not spec.dynamic_size or op.op_type in {"linear", "cast"}
        return source not in kept

    return ct.transform.FP16ComputePrecision(op_selector=in_half)


def _source(op: Any, sources: Mapping[str, str]) -> str | None:
    """The traced node behind an operation of coremltools', by its own name or that of its weight."""
    weight = op.inputs.get("weight")
    found = known(op.name, sources)
    return found if found is not None or weight is None else known(weight.name, sources)
