"""Whether INT8 is worth building for a T4, told from a Q/DQ file alone: an estimate, never executed on a GPU.

Each kernel takes as long as its arithmetic at the T4's published peak, or as moving its bytes at the published
bandwidth, or as the least that any kernel takes, whichever is longest::

    65 TFLOPS FP16, 130 TOPS INT8, 8.1 TFLOPS FP32   NVIDIA T4 data sheet (two operations a multiply-accumulate)
    320 GB/s                                         NVIDIA T4 product brief PB-09256-001
    3 microseconds a kernel                          an assumption: NVIDIA measured 3.4 for a kernel in a CUDA graph
                                                     on a V100 (developer.nvidia.com/blog/cuda-graphs)

Bytes are weights and what a kernel reads and writes: 1 for a number on INT8 steps, 2 in FP16, 4 in float32. Both sums
are far below what a clock will show, for no kernel reaches the peaks; the ratio is what they are for. Attention, which
TensorRT fuses, counts as its products and its softmax, alike in both sums.

Where INT8 meets floating point, numbers are brought from one type to the other: in front of an INT8 layer whose input
was not made by an INT8 layer, or is read unquantized as well; and behind steps that something else than INT8 reads. How
much that costs, and how fast INT8 layers are, is not published, so there are three cases:

* *best*: conversions cost nothing, every INT8 layer has INT8's peak, and kernels are over as soon as their work is;
* *expected*: a conversion reads and writes its tensor once; grouped convolutions, and layers whose channels are no
  multiple of 32, have FP16's peak;
* *worst*: INT8 has FP16's peak everywhere, and a grouped convolution is one kernel for each group.

Why grouped convolutions count as slow: https://github.com/NVIDIA/TensorRT/issues/4529 (open, 2025) reports that
TensorRT splits an INT8 convolution with groups into one for each group, slower than FP16. Next-ViT has one, 32 channels
a group, in every block. That INT8 tensor cores take channels in 32s, and others are padded, is NVIDIA's own remark in
https://github.com/NVIDIA/TensorRT/issues/1310. And networks of this kind were measured on a T4: a ViT-L by ModelOpt at
batch 8 takes 131.8 ms in INT8 and 65.6 in FP16 (https://github.com/NVIDIA/Model-Optimizer/issues/167), FasterViT-0 1.46
ms with INT8 allowed and 1.36 without (https://github.com/NVIDIA/TensorRT/issues/3186).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import onnx
from onnx import TensorProto

from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.tensorrt.int8_advice import DOUBTFUL, ESTIMATE, GO, NO_GO, WORTH, advise
from nextvit_exporters.tensorrt.int8_graph import CONVOLUTIONS, FLOATS, LAYERS, Graph, Kernel, Op, Reading, read_graph

HALF: Final = 65e12
INT8: Final = 130e12
SINGLE: Final = 8.1e12
BANDWIDTH: Final = 320e9
LEAST: Final = 3e-6
SOURCES: Final = "65 TFLOPS FP16, 130 TOPS INT8 (NVIDIA T4 data sheet), 320 GB/s (product brief PB-09256-001)"
LABEL: Final = "an estimate, never executed on a GPU"
_RTX: Final = (
    "TensorRT-RTX computes INT8 convolutions in FP16 on SM75: its engines never show a T4's INT8 speed; the kit builds "
    "with TensorRT itself"
)
_TENSOR_CORE: Final = 32
"""Channels that INT8 tensor cores take at once."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is assumed where nothing is published: seconds of the shortest kernel, and what INT8 layers reach."""

    name: str
    least: float
    conversions: bool
    narrow_at_half: bool
    all_at_half: bool


CASES: Final = (
    Case("best", 0.0, conversions=False, narrow_at_half=False, all_at_half=False),
    Case("expected", LEAST, conversions=True, narrow_at_half=True, all_at_half=False),
    Case("worst", LEAST, conversions=True, narrow_at_half=True, all_at_half=True),
)
_EXPECTED: Final = CASES[1]


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or matrix product, with what is fused to it; times in microseconds, as expected.

    ``module`` is the node's, ``limit`` what its time in INT8's file comes from: compute, memory or launch.
    """

    module: str
    kind: str
    macs: int
    int8: bool
    groups: int
    channels: int
    fp16_us: float
    int8_us: float
    limit: str
    fused: int
    """Operations on its result that run in the same kernel."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A place where INT8 meets floating point; ``kind`` is quantize or dequantize, ``microseconds`` one pass."""

    kind: str
    tensor: str
    module: str
    numbers: int
    microseconds: float


@dataclass(frozen=True, slots=True)
class Island:
    """Kernels in floating point that hang together, among INT8 layers."""

    modules: tuple[str, ...]
    kernels: int
    layers: int
    macs: int


@dataclass(frozen=True, slots=True)
class Total:
    """Microseconds of one inference in one of the cases."""

    case: str
    fp16_us: float
    int8_us: float

    @property
    def ratio(self) -> float:
        """INT8's time by FP16's."""
        return self.int8_us / self.fp16_us if self.fp16_us else 1.0


@dataclass(frozen=True, slots=True)
class Int8Cost:
    """The estimate: layers with the most expensive first, and the totals of the three cases."""

    layers: tuple[Layer, ...]
    conversions: tuple[Conversion, ...]
    islands: tuple[Island, ...]
    totals: tuple[Total, ...]
    others: int
    """Kernels without a convolution or matrix product."""
    notes: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """INT8's time by FP16's, as expected."""
        return next(each.ratio for each in self.totals if each.case == _EXPECTED.name)

    @property
    def band(self) -> tuple[float, float]:
        """The least and the largest ratio of the cases."""
        ratios = [each.ratio for each in self.totals]
        return min(ratios), max(ratios)

    @property
    def recommendation(self) -> str:
        """``go`` where even the worst case saves 5 %, ``no-go`` where nothing is INT8 or the expected saves nothing."""
        if not any(layer.int8 for layer in self.layers):
            return NO_GO
        return advise(self.ratio, self.band[1])

    @property
    def sentence(self) -> str:
        """What is INT8, what to expect and what to do, in one sentence."""
        convolutions = [each for each in self.layers if each.kind in CONVOLUTIONS]
        products = [each for each in self.layers if each.kind not in CONVOLUTIONS]
        counted = " and ".join(
            f"{sum(each.int8 for each in found)} of {len(found)} {name}"
            for name, found in (("convolutions", convolutions), ("matrix products", products))
            if found
        )
        if not any(each.int8 for each in self.layers):
            return f"nothing is INT8 ({counted or 'no layers'}): {ADVICE[NO_GO]} ({LABEL})"
        low, high = self.band
        told = f"quantized {counted}; expected {self.ratio:.2f} times FP16's time on a T4 ({low:.2f} to {high:.2f})"
        return f"{told}: {ADVICE[self.recommendation]} ({LABEL})"

    def as_dict(self) -> dict[str, object]:
        """JSON-ready. ``basis``, ``recommendation`` and ``sentence`` are what counts; measured times replace them."""
        short = {"recommendation": self.recommendation, "sentence": self.sentence}
        told = {"ratio": self.ratio, "band": list(self.band), "sources": SOURCES, "worth_below": WORTH}
        return {"basis": ESTIMATE, **short, "estimate": {**short, **told, **_lists(asdict(self))}}


ADVICE: Final[Mapping[str, str]] = {
    GO: "go, build it and measure with the kit",
    DOUBTFUL: "doubtful, build both and measure with the kit",
    NO_GO: "no-go, build FP16",
}


def estimate(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]] | None = None) -> Int8Cost:
    """What INT8 is expected to cost and to save on a T4; ``shapes`` of the inputs are for axes that are left open.

    Reads the graph, no weights. Without ``shapes``, an open first axis counts as 1 and any other as 224. Raises
    BuildFailed for a file whose shapes ONNX can't infer.
    """
    graph = read_graph(model, shapes)
    plan, half = _Plan.of(graph), _Plan.of(graph.in_half())
    conversions = plan.conversions()
    totals = []
    for case in CASES:
        converting = sum(each.microseconds for each in conversions) if case.conversions else 0.0
        totals.append(Total(case.name, half.total(case), plan.total(case) + converting))
    notes = [_RTX]
    if graph.opened:
        notes.append(f"the file leaves axes open; taken as {', '.join(graph.opened)}")
    layers = _layers(plan, half)
    return Int8Cost(layers, conversions, plan.islands(), tuple(totals), len(plan.kernels) - len(layers), tuple(notes))


def estimated(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]] | None = None) -> dict[str, object]:
    """The estimate as a file's facts hold it, ``int8``, or why there is none, ``int8 not estimated``."""
    try:
        return {"int8": estimate(model, shapes).as_dict()}
    except BuildFailed as error:
        return {"int8 not estimated": str(error)}


def _layers(plan: _Plan, half: _Plan) -> tuple[Layer, ...]:
    """Every convolution and matrix product, the most expensive first."""
    alone = {each.head.writes: half.seconds(each, _EXPECTED)[0] for each in half.kernels}
    found = []
    for kernel in plan.kernels:
        op = kernel.head
        if op.kind in LAYERS:
            seconds, limit = plan.seconds(kernel, _EXPECTED)
            times = _microseconds(alone[op.writes]), _microseconds(seconds)
            what = _module(op.name), op.kind, op.macs, op.int8, op.groups, op.channels
            found.append(Layer(*what, *times, limit, len(kernel.ops) - 1))
    return tuple(sorted(found, key=lambda each: -max(each.fp16_us, each.int8_us)))


@dataclass(frozen=True, slots=True)
class _Plan:
    """A graph as kernels, and who reads each tensor: on which steps, and whether as it is."""

    graph: Graph
    kernels: tuple[Kernel, ...]
    steps: Mapping[str, frozenset[str]]
    plain: frozenset[str]

    @classmethod
    def of(cls, graph: Graph) -> _Plan:
        steps: dict[str, set[str]] = {}
        plain = set(graph.outputs)
        for each in (each for op in graph.ops for each in op.reads):
            if each.steps is None:
                plain.add(each.tensor)
            else:
                steps.setdefault(each.tensor, set()).add(each.steps)
        frozen = {name: frozenset(each) for name, each in steps.items()}
        return cls(graph, graph.kernels(), frozen, frozenset(plain))

    def total(self, case: Case) -> float:
        """Microseconds of all kernels, without conversions."""
        return sum(self.seconds(each, case)[0] for each in self.kernels) * 1e6

    def seconds(self, kernel: Kernel, case: Case) -> tuple[float, str]:
        """How long a kernel takes, and what that comes from."""
        compute = 2 * kernel.head.macs / self._peak(kernel.head, case)
        moved = self._bytes(kernel, case) / BANDWIDTH
        launches = kernel.head.groups if kernel.head.int8 and case.all_at_half else 1
        limits = (compute, "compute"), (moved, "memory"), (launches * case.least, "launch")
        return max(limits, key=lambda each: each[0])

    def _peak(self, op: Op, case: Case) -> float:
        """Operations a second."""
        if not op.int8:
            single = bool(op.writes) and self.graph.types.get(op.writes[0]) == TensorProto.FLOAT
            return SINGLE if single else HALF
        narrow = op.groups > 1 or op.channels % _TENSOR_CORE != 0
        return HALF if case.all_at_half or (narrow and case.narrow_at_half) else INT8

    def _bytes(self, kernel: Kernel, case: Case) -> int:
        """What a kernel moves; one that isn't INT8 fetches steps only where conversions cost nothing."""
        on_steps = kernel.head.int8 or not case.conversions
        moved = sum(each.count * each.size for op in kernel.ops for each in op.constants)
        for each in kernel.reads:
            size = 1 if each.steps is not None and on_steps else self._size(each.tensor)
            moved += self.graph.counts[each.tensor] * size
        for name in kernel.writes:
            moved += self.graph.counts[name] * self._written(kernel, name, case)
        return moved

    def _written(self, kernel: Kernel, name: str, case: Case) -> int:
        """Bytes that a kernel writes for each number of its result."""
        size, steps = self._size(name), len(self.steps.get(name, ()))
        if case.conversions:
            return 1 if self._is_fused(kernel, name) else size
        return steps + (size if name in self.plain or not steps else 0)

    def _is_fused(self, kernel: Kernel | None, name: str) -> bool:
        """Whether an INT8 layer's kernel brings its result onto steps itself: all who read it read the same steps."""
        is_int8 = kernel is not None and kernel.head.int8
        return is_int8 and len(self.steps.get(name, ())) == 1 and name not in self.plain

    def _size(self, name: str) -> int:
        """Bytes of a number; what is neither a weight nor an activation (an index, a size) weighs nothing."""
        return FLOATS.get(self.graph.types.get(name, 0), 0)

    def conversions(self) -> tuple[Conversion, ...]:
        """Where INT8 meets floating point, the most expensive first."""
        makers = {name: kernel for kernel in self.kernels for name in kernel.writes}
        found: dict[tuple[str, Reading], Conversion] = {}
        for kernel in self.kernels:
            for each in (each for each in kernel.reads if each.steps is not None):
                maker = makers.get(each.tensor)
                if not self._is_fused(maker, each.tensor):
                    name = maker.head.name if maker else each.tensor
                    found.setdefault(("quantize", each), self._conversion("quantize", each.tensor, name))
                if not kernel.head.int8:
                    name = kernel.head.name
                    found.setdefault(("dequantize", each), self._conversion("dequantize", each.tensor, name))
        return tuple(sorted(found.values(), key=lambda each: -each.microseconds))

    def _conversion(self, kind: str, tensor: str, name: str) -> Conversion:
        numbers = self.graph.counts[tensor]
        seconds = max(numbers * (self._size(tensor) + 1) / BANDWIDTH, LEAST)
        return Conversion(kind, tensor, _module(name), numbers, _microseconds(seconds))

    def islands(self) -> tuple[Island, ...]:
        """Regions of kernels in floating point, in order; none where nothing is INT8."""
        if not any(each.head.int8 for each in self.kernels):
            return ()
        regions: list[tuple[list[Kernel], set[str]]] = []
        for kernel in (each for each in self.kernels if not each.head.int8):
            touched = {each.tensor for each in kernel.reads if each.steps is None} | set(kernel.writes)
            joined = [each for each in regions if each[1] & touched]
            regions = [each for each in regions if not each[1] & touched]
            members = [member for each in joined for member in each[0]]
            regions.append(([*members, kernel], touched.union(*(each[1] for each in joined))))
        return tuple(_island(kernels) for kernels, _ in regions)


def _lists(value: dict[str, Any]) -> dict[str, Any]:
    """Tuples as lists, as JSON reads them back."""
    return {
        name: [_lists(each) if isinstance(each, dict) else each for each in item] if isinstance(item, tuple) else item
        for name, item in value.items()
    }


def _island(kernels: Sequence[Kernel]) -> Island:
    layers = [each.head for each in kernels if each.head.kind in LAYERS]
    modules = dict.fromkeys(_module(each.head.name) for each in kernels)
    return Island(tuple(modules), len(kernels), len(layers), sum(op.macs for op in layers))


def _module(name: str) -> str:
    """The module of ``module/OpType``; any other name as it is."""
    return name.rpartition("/")[0] or name


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)
