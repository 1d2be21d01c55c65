"""INT8 steps and whole numbers that are others than PyTorch's, which executing a file may not show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnx

from nextvit_deploy.bisect.record import Parting
from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.quantize.quantized import MapSteps
from nextvit_exporters.quantize.read_back import OPERATIONS, check_steps, difference_of, steps_of
from nextvit_exporters.tensorrt.onnx_input import read_onnx


def wrong_steps(path: Path, expected: Mapping[str, MapSteps]) -> list[Parting]:
    """The maps of an ONNX file whose steps or whole numbers are others than ``expected``; none where all agree."""
    model = read_onnx(path)
    try:
        found = steps_of(model)
    except BuildFailed as error:
        return [_told(model, str(error))]
    wrong = [f"{name} is {'' if name in found else 'not '}in INT8" for name in sorted(found.keys() ^ expected.keys())]
    both = sorted(found.keys() & expected.keys())
    wrong += [f"{name} {what}" for name in both if (what := difference_of(found[name], expected[name]))]
    if not wrong:
        try:
            check_steps(model, expected)
        except BuildFailed as error:
            return [_told(model, str(error))]
    return [_told(model, each) for each in wrong]


def _told(model: onnx.ModelProto, why: str) -> Parting:
    """The parting of a sentence whose first word is the module."""
    module = why.partition(" ")[0]
    nodes = [str(node.name) for node in model.graph.node if node.op_type in OPERATIONS]
    own = tuple(name for name in nodes if name.rpartition("/")[0] == module)
    return Parting(module, own, "steps", math.inf, 0.0, (), why)
