"""What was built: every kernel of an engine with its ONNX layers, torch modules and types, read from TensorRT itself.

Two sources say the same: the list of layers in the builder's detailed log, and the engine inspector's JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, Final

from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.spec import Precision

_SECTION: Final = re.compile(r"(Inputs|Constants|Outputs): \[(.*?)\](?=, (?:Constants|Outputs|TacticName|StreamId))")
_TENSOR: Final = re.compile(r"\{ Name: (.*?), Dimensions: \[([-\d,]*)\].*?(?:, Datatype: (\w+))?, Format: ([^}]*?) \}")
_LAYER: Final = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_EDGE: Final = re.compile(r" Name: (.*?), IOMode: ")
_MEMORY: Final = {
    "activation": re.compile(r"Total Activation Memory: (\d+)"),
    "weights": re.compile(r"Total Weights Memory: (\d+)"),
    "scratch": re.compile(r"Max Scratch Memory: (\d+)"),
}
_WORDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "FP16": "Half",
        "Half": "Half",
        "FP32": "Float",
        "Float": "Float",
        "Int8": "Int8",
        "INT8": "Int8",
        "UInt8": "UInt8",
        "UINT8": "UInt8",
        "Int32": "Int32",
        "BF16": "BFloat16",
        "BFloat16": "BFloat16",
        "FP8": "FP8",
    }
)
_UNKNOWN: Final = "unknown"
_FLOATS: Final = frozenset({"Float", "Half", "BFloat16", "BF16", "Double", "FP8", _UNKNOWN})
"""What counts as floating point; a type that can't be read counts too, so that it is never passed over."""
_NAMES: Final[Mapping[str, str]] = MappingProxyType({"Half": "fp16", "Float": "fp32", "Int8": "int8"})


@dataclass(frozen=True, slots=True)
class KernelTensor:
    """A tensor as a kernel sees it; ``dtype`` in TensorRT's words, ``Half``."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch on the GPU: what it reads and writes, and the ONNX layers it carries out."""

    name: str
    kind: str
    inputs: tuple[KernelTensor, ...]
    constants: tuple[KernelTensor, ...]
    outputs: tuple[KernelTensor, ...]
    tactic: str
    layers: tuple[str, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """The torch modules behind its layers, each once, in order."""
        return tuple(dict.fromkeys(layer.rpartition("/")[0] for layer in self.layers if "/" in layer))

    def dtypes(self, edges: frozenset[str]) -> frozenset[str]:
        """Types it computes in: those of its tensors, without the network's own inputs and outputs (``edges``).

        Constants of one number are factors of a matrix product, which are float32 whatever the product is; those
        beside the network's input are its mean.
        """
        tensors = [each for each in (*self.inputs, *self.outputs) if each.name not in edges]
        if not any(each.name in edges for each in self.inputs):
            tensors += [each for each in self.constants if prod(each.shape) > 1]
        return frozenset(each.dtype for each in tensors)


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What TensorRT says of an engine; memory in bytes, None where it does not tell."""

    kernels: tuple[Kernel, ...]
    edges: frozenset[str]
    activation: int | None
    weights: int | None
    scratch: int | None

    def count(self) -> dict[str, int]:
        """Kernels by kind, most first."""
        found: dict[str, int] = {}
        for kernel in self.kernels:
            found[kernel.kind] = found.get(kernel.kind, 0) + 1
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def dtypes(self) -> str:
        """Computing kernels by the types they compute in: ``150 kernels in fp16``."""
        found: dict[str, int] = {}
        for kernel in self.compute():
            types = "/".join(sorted(_NAMES.get(each, each) for each in kernel.dtypes(self.edges)))
            found[types] = found.get(types, 0) + 1
        return ", ".join(f"{count} kernels in {types}" for types, count in found.items())

    def compute(self) -> tuple[Kernel, ...]:
        """The kernels that compute on something other than the network's own inputs and outputs."""
        return tuple(each for each in self.kernels if each.dtypes(self.edges) & (_FLOATS | {"Int8"}))


def read_log(lines: Sequence[str]) -> EngineReport:
    """The report in the lines of a builder's log; raises BuildFailed when it holds no list of layers."""
    listed = [_from_line(line) for line in lines if line.startswith("Name: ") and ", LayerType: " in line]
    inspected = [found for line in lines if (found := _inspected(line))]
    kernels = listed or [_from_json(layer) for found in inspected for layer in found["Layers"]]
    if not kernels:
        raise BuildFailed("TensorRT's log lists no layers, so what it built can't be read back")
    edges = {match[1] for line in lines if (match := _EDGE.match(line))}
    edges |= {str(name).partition(" [")[0] for found in inspected for name in found.get("Bindings", ())}
    memory = {name: _last(pattern, lines) for name, pattern in _MEMORY.items()}
    return EngineReport(tuple(kernels), frozenset(edges), **memory)


def check_dtypes(report: EngineReport, precision: Precision) -> str:
    """Say what was asked and what was built; raise BuildFailed where the two differ.

    FP16 and FP32 mean every computing kernel. INT8 means that some are in INT8; the others are as the graph says.
    """
    kernels = report.compute()
    wanted = {Precision.FP16: "Half", Precision.FP32: "Float", Precision.INT8: "Int8"}[precision]
    if precision is Precision.INT8:
        right = [each for each in kernels if wanted in each.dtypes(report.edges)]
        wrong = []
    else:
        right = [each for each in kernels if each.dtypes(report.edges) & _FLOATS == {wanted}]
        wrong = [each for each in kernels if each not in right]
    asked = f"{precision} asked, {len(right)} of {len(kernels)} computing kernels in {precision}"
    if wrong or not right:
        first = f"; the first other one is {_described(wrong[0], report.edges)}" if wrong else ""
        raise BuildFailed(f"{asked}{first}")
    return asked


def _described(kernel: Kernel, edges: frozenset[str]) -> str:
    types = ", ".join(sorted(_NAMES.get(each, each) for each in kernel.dtypes(edges)))
    where = ", ".join(kernel.modules) or kernel.name
    return f"{kernel.name} ({where}) in {types}"


def _from_line(line: str) -> Kernel:
    """A line of the log's list of layers."""
    head = re.match(r"Name: (.*?), LayerType: (\w+)", line)
    if head is None:
        raise BuildFailed(f"a line of TensorRT's list of layers can't be read: {line[:80]}")
    sections = {name: tuple(map(_tensor, _TENSOR.finditer(body))) for name, body in _SECTION.findall(line)}
    tactic = re.search(r"TacticName: (.*?), StreamId", line)
    return Kernel(
        name=head[1],
        kind=head[2],
        inputs=sections.get("Inputs", ()),
        constants=sections.get("Constants", ()),
        outputs=sections.get("Outputs", ()),
        tactic=tactic[1] if tactic else "",
        layers=tuple(_LAYER.findall(line)),
    )


def _tensor(found: re.Match[str]) -> KernelTensor:
    shape = tuple(int(size) for size in found[2].split(",") if size)
    return KernelTensor(found[1], shape, found[3] or _dtype_of_format(found[4]))


def _dtype_of_format(text: str) -> str:
    """Where the type is only in the words of the format: ``Row major linear FP16 format``."""
    return next((dtype for word, dtype in _WORDS.items() if re.search(rf"\b{word}\b", text)), _UNKNOWN)


def _inspected(line: str) -> Mapping[str, Any]:
    """The engine inspector's JSON, which the builder logs on one line; empty when ``line`` is something else."""
    start = line.find("{")
    if start < 0 or '"Layers"' not in line:
        return {}
    try:
        found = json.loads(line[start:])
    except ValueError:
        return {}
    layers = found.get("Layers") if isinstance(found, dict) else None
    detailed = isinstance(layers, list) and all(isinstance(layer, dict) for layer in layers)
    return found if detailed else {}  # without details, layers are names alone


def _from_json(layer: Mapping[str, Any]) -> Kernel:
    return Kernel(
        name=str(layer.get("Name", "")),
        kind=str(layer.get("LayerType", "")),
        inputs=_tensors(layer.get("Inputs", ())),
        constants=_tensors(layer.get("Constants", ())),
        outputs=_tensors(layer.get("Outputs", ())),
        tactic=str(layer.get("TacticName", "")),
        layers=tuple(_LAYER.findall(str(layer.get("Metadata", "")))),
    )


def _tensors(entries: Iterable[Mapping[str, Any]]) -> tuple[KernelTensor, ...]:
    return tuple(
        KernelTensor(
            str(each.get("Name", "")),
            tuple(each.get("Dimensions", ())),
            str(each.get("Datatype") or _dtype_of_format(str(each.get("Format/Datatype", each.get("Format", ""))))),
        )
        for each in entries
    )


def _last(pattern: re.Pattern[str], texts: Iterable[str]) -> int | None:
    found = [match for text in texts for match in pattern.findall(text)]
    return int(found[-1]) if found else None
