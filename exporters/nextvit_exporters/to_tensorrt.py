"""The TensorRT target: a strongly typed ONNX file, the engine built from its bytes, and the builder's log beside both.

An engine ``x.engine`` comes with ``x.onnx``, the bytes that went into the builder, and ``x.engine.log``, everything
TensorRT said, whose last line names the SHA-256 of both. The engine itself can only run on its own GPU; what TensorRT
understood, the network it parsed from ``x.onnx``, is executed here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

import onnx
from torch import fx

from nextvit_exporters import targets, to_onnx
from nextvit_exporters.cuda.driver import probe_driver
from nextvit_exporters.cuda.loading import check_device, check_version
from nextvit_exporters.engine_spec import EngineSpec
from nextvit_exporters.errors import BuildFailed, MissingExtra, NotExecutable, UnsupportedSpec
from nextvit_exporters.executors.base import Array, Executor
from nextvit_exporters.executors.tensorrt_device import TensorRTDevice
from nextvit_exporters.executors.tensorrt_network import Mode, TensorRTNetwork
from nextvit_exporters.files import atomic_write, sha256_of
from nextvit_exporters.passes.base import Pass
from nextvit_exporters.passes.equalize_channels import EqualizeChannels
from nextvit_exporters.passes.sets import TENSORRT_PASSES, tensorrt_passes
from nextvit_exporters.spec import MIN_SIDE, Artifact, ExportSpec, Precision, Tolerance
from nextvit_exporters.targets import Examples, Saved
from nextvit_exporters.tensorrt.backends import backend, check_precision, gpu, load
from nextvit_exporters.tensorrt.builder import BuiltEngine, build_engine
from nextvit_exporters.tensorrt.header import read_header
from nextvit_exporters.tensorrt.int8_cost import estimated
from nextvit_exporters.tensorrt.kernels import EngineReport, check_dtypes, read_log
from nextvit_exporters.tensorrt.onnx_input import check_onnx, read_onnx
from nextvit_exporters.tensorrt.report import describe

SUFFIX: Final = ".engine"
PRECISIONS: Final[tuple[Precision, ...]] = (Precision.FP32, Precision.FP16, Precision.INT8)
INPUT: Final = to_onnx.INPUT
OUTPUT: Final = to_onnx.OUTPUT
WRITERS: Final = to_onnx.WRITERS
PASSES: Final = (*TENSORRT_PASSES, EqualizeChannels())

SAME_NETWORK: Final[Mapping[Precision, Tolerance]] = MappingProxyType(
    {
        Precision.FP32: Tolerance(1e-5, "float32 alone: 1.6e-7 (nano) to 4.6e-7 (large)"),
        Precision.FP16: Tolerance(1e-5, "the same arithmetic on FP16-valued constants, so the same bound as fp32"),
        Precision.INT8: Tolerance(1e-5, "real numbers in place of int8 steps: 1.6e-7 (nano) to 4.0e-7 (small)"),
    }
)
PRECISION_COST: Final[Mapping[Precision, Tolerance]] = MappingProxyType(
    {
        Precision.FP32: Tolerance(1e-5, "folds rounded once from float64: 2.5e-7 (nano) to 4.4e-7 (large)"),
        Precision.FP16: Tolerance(
            1e-2, "emulated storage: 3.7e-4 (trained nano) to 7.9e-4 (large at 384, random weights)"
        ),
        Precision.INT8: Tolerance(
            1e-1, "convolutions and head in INT8: 1.0e-2 (trained nano), 2.6e-2 (small, random weights)"
        ),
    }
)
ON_DEVICE: Final[Mapping[Precision, Tolerance]] = MappingProxyType(
    {
        Precision.FP32: Tolerance(1e-4, "sums in another order than PyTorch's; not yet measured on a GPU"),
        Precision.FP16: Tolerance(1e-2, "as emulated; two sound FP16 executions differ by 5e-4; no GPU's figure yet"),
        Precision.INT8: Tolerance(1e-1, "as emulated; two sound INT8 executions differ by 2e-2; no GPU's figure yet"),
    }
)
TOLERANCES: Final[Mapping[str, Mapping[Precision, Tolerance]]] = MappingProxyType(
    {targets.SAME_NETWORK: SAME_NETWORK, targets.PRECISION_COST: PRECISION_COST, targets.ON_DEVICE: ON_DEVICE}
)
_RECORD: Final = "nextvit-deploy built"


@dataclass(frozen=True, slots=True)
class Origin:
    """What an engine was built from: SHA-256 of both files, the precision asked for and the engine's spec.

    The log beside them records it in its last line.
    """

    engine: str
    onnx: str
    precision: Precision
    spec: EngineSpec

    def line(self) -> str:
        """For the log."""
        fields = {"engine": self.engine, "onnx": self.onnx, "precision": str(self.precision)}
        return f"{_RECORD} {json.dumps(fields | {'spec': self.spec.as_dict()}, sort_keys=True)}"

    @classmethod
    def of_line(cls, line: str) -> Origin | None:
        """Read what ``line`` wrote; None when it is something else."""
        try:
            fields = json.loads(line.removeprefix(_RECORD))
            spec = EngineSpec.from_dict(fields["spec"])
            return cls(str(fields["engine"]), str(fields["onnx"]), Precision(fields["precision"]), spec)
        except (ValueError, LookupError, TypeError, UnsupportedSpec):
            return None


def onnx_of(path: Path) -> Path:
    """The ONNX file beside an engine; an ONNX file is its own."""
    return path.with_suffix(to_onnx.SUFFIX)


def log_of(path: Path) -> Path:
    """The builder's log beside an engine."""
    return path.with_name(f"{path.name}.log")


def check_spec(spec: ExportSpec) -> None:
    """Raise UnsupportedSpec for what can't be built, with what can."""
    if spec.engine is None:
        raise UnsupportedSpec("the spec asks for no engine; name backend, GPU and sizes")
    if min(smallest := spec.engine.minimum[1:]) < MIN_SIDE:
        raise UnsupportedSpec(f"{smallest[0]}x{smallest[1]} is too small; start the range at {MIN_SIDE} or more")
    tensorrt_passes(spec.pass_set, dynamic_size=spec.dynamic_size)  # refuses a set that isn't there
    chosen = backend(spec.engine.backend)
    check_precision(chosen, gpu(spec.engine.gpu), spec.precision)
    if spec.quantize is not None and spec.rest is Precision.FP32:
        try:
            check_precision(chosen, gpu(spec.engine.gpu), spec.rest)
        except UnsupportedSpec as error:
            raise UnsupportedSpec(
                "the file computes in float32 beside INT8, which can't be built here; export it with --for tensorrt-10"
            ) from error
    if spec.engine.timing_cache is not None and chosen.without_timings:
        raise UnsupportedSpec(f"{chosen.name} takes no timing cache: {chosen.without_timings}; drop --timing-cache")
    known = {each.name for each in PASSES}
    if unknown := [name for name in spec.skip if name not in known]:
        raise UnsupportedSpec(f"no pass is called '{unknown[0]}'; the passes are {', '.join(sorted(known))}")
    if spec.precision is not Precision.INT8 or spec.quantize is not None:  # else its graph is given, not written
        to_onnx.check_spec(replace(spec, skip=()))


def passes_for(spec: ExportSpec) -> tuple[Pass, ...]:
    """The passes of the chosen set in order, with what ``spec`` adds and leaves out."""
    paying = tensorrt_passes(spec.pass_set, dynamic_size=spec.dynamic_size)
    return (
        *(each for each in paying if each.name not in spec.skip),
        *to_onnx.int8_passes(spec),
        *to_onnx.input_passes(spec),
    )


def tolerance_for(spec: ExportSpec, question: str) -> Tolerance:
    """By question and precision alone."""
    return TOLERANCES[question][spec.precision]


def settle(spec: ExportSpec, graph: fx.GraphModule, examples: Array) -> ExportSpec:
    """Nothing to settle."""
    del graph, examples
    return spec


def lower(spec: ExportSpec, graph: fx.GraphModule) -> fx.GraphModule:
    """As the ONNX target does."""
    return to_onnx.lower(spec, graph)


def reference(spec: ExportSpec, graph: fx.GraphModule) -> fx.GraphModule:
    """As the ONNX target does."""
    return to_onnx.reference(spec, graph)


def build(
    spec: ExportSpec,
    module: fx.GraphModule,
    path: Path,
    provenance: Mapping[str, object],
    on_step: Callable[[str], None],
    examples: Examples | None = None,
) -> Artifact:
    """Write the ONNX file, the engine built from it and the builder's log; raises BuildFailed or UnsupportedSpec."""
    to_onnx.build(spec, module, onnx_of(path), provenance, on_step, examples)
    return assemble(spec, path, on_step)


def assemble(spec: ExportSpec, path: Path, on_step: Callable[[str], None]) -> Artifact:
    """Build the engine ``path`` from the ONNX file beside it, and write its log.

    Raises BuildFailed with TensorRT's own reasons, also where the kernels' types are not what was asked.
    """
    if spec.engine is None:
        raise UnsupportedSpec("the spec asks for no engine; name backend, GPU and sizes")
    chosen = backend(spec.engine.backend)
    module = load(chosen)
    model = onnx_of(path)
    check_onnx(read_onnx(model), model.name, chosen, str(module.__version__), spec.precision)
    cache = spec.engine.timing_cache
    earlier = None if cache is None else (cache.read_bytes() if cache.is_file() else b"")
    on_step("TensorRT: parse the ONNX file")
    built = build_engine(chosen, module, model.read_bytes(), spec, on_step, earlier)
    check_dtypes(read_log(built.log.lines()), spec.precision)
    atomic_write(path, built.data)
    if cache is not None and built.timing_cache is not None:
        atomic_write(cache, built.timing_cache)
    artifact = Artifact.of(path)
    _write_log(path, built, Origin(artifact.sha256, sha256_of(model), spec.precision, spec.engine))
    return artifact


def source(path: Path) -> Path:
    """The ONNX file beside an engine, known to be what the engine was built from.

    Raises NotExecutable where it or the log is missing, BuildFailed where they tell of another engine.
    """
    beside, log = onnx_of(path), log_of(path)
    origin = _origin(log)
    if origin is None or not beside.is_file():
        raise NotExecutable(f"{beside.name} and {log.name} are not both beside {path.name}; export it again")
    for file, recorded in ((path, origin.engine), (beside, origin.onnx)):
        if sha256_of(file) != recorded:
            raise BuildFailed(f"{file.name} is not the file that {log.name} tells of; export it again")
    return beside


def adopt(spec: ExportSpec, path: Path) -> ExportSpec:
    """``spec``, which the ONNX file records, with what the engine was built as; the log beside it says so."""
    origin = _origin(log_of(path))
    if origin is None:
        return spec
    batch, height, width = origin.spec.optimum
    return replace(
        spec,
        target="tensorrt",
        precision=origin.precision,
        engine=origin.spec,
        batch=batch,
        height=height,
        width=width,
    )


def executors(spec: ExportSpec, path: Path) -> Mapping[str, Executor]:
    """The network that TensorRT parses from the ONNX file beside the engine, by the question it answers.

    Where the engine's own GPU and TensorRT are here, the engine itself answers one more. Raises as ``source`` does, and
    UnsupportedSpec where the spec asks for no engine.
    """
    if spec.engine is None:
        raise UnsupportedSpec(f"{path.name} names no engine; export it again")
    parsed_from = source(path) if path.suffix == SUFFIX else path
    chosen = backend(spec.engine.backend)
    same: Mode = "unrounded" if spec.precision is Precision.INT8 else "exact"
    cost: Mode = "exact" if spec.precision is Precision.FP32 else "emulated"
    return {
        targets.SAME_NETWORK: TensorRTNetwork(parsed_from, same, chosen),
        targets.PRECISION_COST: TensorRTNetwork(parsed_from, cost, chosen),
        **_on_device(path),
    }


def _on_device(path: Path) -> Mapping[str, Executor]:
    """The engine on the GPU at hand, where there is one that it can run on."""
    if path.suffix != SUFFIX or not probe_driver().devices or why_not_here(path):
        return {}
    return {targets.ON_DEVICE: TensorRTDevice(path, read_header(path).backend)}


def why_not_here(path: Path) -> str | None:
    """Why the GPU at hand can't run the engine; None where it can, or where there is none."""
    devices = probe_driver().devices
    if not devices:
        return None
    header = read_header(path)
    try:
        check_device(path, header, devices[0])
        check_version(path, header, str(load(backend(header.backend)).__version__))
    except (MissingExtra, BuildFailed, UnsupportedSpec) as error:
        return str(error)
    return None


def remarks(path: Path) -> tuple[str, ...]:
    """That the engine was not executed on the GPU at hand, where there is one, and why."""
    why = why_not_here(path)
    return (f"not executed on the GPU here: {why}",) if why else ()


def read(path: Path) -> Saved:
    """What the engine's header says and, where its log and ONNX file are beside it, kernels, memory and provenance.

    Raises BuildFailed when it is missing or no engine.
    """
    header = read_header(path)
    origin = _origin(log_of(path))
    if origin is None or origin.engine != sha256_of(path):
        why = "is not beside it" if origin is None else "tells of another engine"
        unknown = f"not known: {log_of(path).name} {why}"
        return Saved(None, {}, unknown, "kernels", unknown, describe(header, None))
    report = read_log(log_of(path).read_text(encoding="utf-8").splitlines())
    beside, dtypes = onnx_of(path), _dtypes(report, origin.precision)
    if not beside.is_file() or origin.onnx != sha256_of(beside):
        unknown = f"not known: {beside.name} is not beside it, or not what it was built from"
        return Saved(None, report.count(), dtypes, "kernels", unknown, describe(header, report))
    made = to_onnx.read(beside)
    facts = describe(header, report)
    if origin.precision is Precision.INT8:
        facts = facts | _estimate(read_onnx(beside), origin.spec)
    return Saved(made.provenance, report.count(), dtypes, "kernels", made.without_provenance, facts)


def _estimate(model: onnx.ModelProto, spec: EngineSpec) -> dict[str, object]:
    """What INT8 costs and saves on a T4 at the sizes that the engine is tuned for."""
    constants = {tensor.name for tensor in model.graph.initializer}
    image = next(value for value in model.graph.input if value.name not in constants)
    batch, height, width = spec.optimum
    last = [dim.dim_value for dim in image.type.tensor_type.shape.dim][-1:] == [3]
    shape = (batch, height, width, 3) if last else (batch, 3, height, width)
    return estimated(model, {image.name: shape})


def _dtypes(report: EngineReport, asked: Precision) -> str:
    """What was asked against what was built."""
    try:
        return f"{check_dtypes(report, asked)} ({report.dtypes()})"
    except BuildFailed as error:
        return str(error)


def _write_log(path: Path, built: BuiltEngine, origin: Origin) -> None:
    text = "\n".join([*built.log.lines(), origin.line(), ""])
    atomic_write(log_of(path), text.encode("utf-8", "backslashreplace"))


def _origin(log: Path) -> Origin | None:
    """The record in the last line of a log, None where there is none or it isn't whole."""
    if not log.is_file():
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return Origin.of_line(lines[-1]) if lines and lines[-1].startswith(_RECORD) else None
