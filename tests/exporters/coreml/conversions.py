"""Next-ViT nano as a Core ML package of any kind of numbers, and what a saved one holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from nextvit_exporters import graph as g
from nextvit_exporters.coreml.convert import Converted, known, to_model
from nextvit_exporters.coreml.loading import heard
from nextvit_exporters.coreml.program import Constant, Operation, Package
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.coreml_spec import CoreMLSpec
from nextvit_exporters.passes.base import run_passes
from nextvit_exporters.passes.sets import NEURAL_ENGINE
from nextvit_exporters.spec import ExportSpec, Precision
from nextvit_models.preprocessing import Preprocessing
from tests import harness
from tests.exporters.passes_harness import nano

SIZE = 64


def spec_of(asked: CoreMLSpec, size: int = SIZE) -> ExportSpec:
    return ExportSpec(
        "nano", 10, "coreml", Precision.FP16, size, size, 1, 18, Preprocessing(image_size=size), coreml=asked
    )


def folded(size: int = SIZE) -> fx.GraphModule:
    """Nano as a float64 graph, every pass of the Neural Engine's list applied."""
    image = harness.images(1, 3, size, size, seed=1, dtype=torch.float64)
    graph, _ = run_passes(g.trace(nano()), NEURAL_ENGINE, [image], lambda _: None)
    return graph


def converted(graph: fx.GraphModule, ios: int = 16, size: int = SIZE) -> Converted:
    return to_model(spec_of(CoreMLSpec(ios=ios, head="logits"), size), graph)


def saved(model: Any, path: Path) -> Package:
    with heard():
        model.save(str(path))
    return read_package(path)


def constants(package: Package) -> dict[str, Constant]:
    return {each.outputs[0].name: each.attributes["val"] for each in package.program.operations if each.kind == "const"}


def parameters(package: Package, operation: Operation) -> Mapping[str, NDArray[np.generic]]:
    """The constants an operation takes, from its attributes and its inputs."""
    known = constants(package)
    found = {name: each.data for name, each in operation.attributes.items() if name != "name"}
    for name, (binding,) in operation.inputs.items():
        constant = known.get(binding) if isinstance(binding, str) else binding
        if constant is not None:
            found[name] = constant.data
    return found


def altered(package: Package, operation: Operation, name: str, edit: Callable[[NDArray[Any]], None]) -> Package:
    """The package with one parameter of one operation written in place, after ``edit`` has changed it."""
    values = np.array(parameters(package, operation)[name])
    edit(values)
    if name in operation.attributes:
        own = {**operation.attributes, name: replace(operation.attributes[name], data=values)}
        other = replace(operation, attributes=own)
    else:
        (binding,) = operation.inputs[name]
        held = binding if isinstance(binding, Constant) else constants(package)[binding]
        constant = replace(held, data=values)
        other = replace(operation, inputs={**operation.inputs, name: (constant,)})
    operations = tuple(other if each is operation else each for each in package.program.operations)
    return replace(package, program=replace(package.program, operations=operations))


def module_of(operation: Operation, modules: Mapping[str, str]) -> str:
    module = known(operation.outputs[0].name.removesuffix("_quantized").removesuffix("_palettized"), modules)
    assert module is not None
    return module
