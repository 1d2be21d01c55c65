"""The ONNX target: the graph through torch's exporter, simplified, checked, and the same bytes each time."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import onnx
import torch
from torch import fx

from nextvit_exporters import graph as g
from nextvit_exporters import targets
from nextvit_exporters.errors import BuildFailed, UnsupportedSpec
from nextvit_exporters.executors.base import Array
from nextvit_exporters.executors.onnx_runtime import OnnxRuntime
from nextvit_exporters.files import atomic_write
from nextvit_exporters.onnx_names import name_nodes, strip_provenance
from nextvit_exporters.onnx_rewrites import downgrade, simplify
from nextvit_exporters.opsets import DEFAULT_OPSET, NEWEST_OPSET, OLDEST_INT8_OPSET, OLDEST_OPSET
from nextvit_exporters.passes.base import Pass
from nextvit_exporters.passes.equalize_channels import EqualizeChannels
from nextvit_exporters.passes.normalize_input import MEAN, NormalizeInput
from nextvit_exporters.passes.sets import ONNX_RUNTIME, TENSORRT_PASSES, tensorrt_passes
from nextvit_exporters.precision.fp16 import round_constants, to_half
from nextvit_exporters.precision.read_back import check_precision, read_dtypes
from nextvit_exporters.quantize.explicit import quantize_onnx
from nextvit_exporters.quantize.modelopt import quantize_with_modelopt
from nextvit_exporters.quantize.quantized import clipped, take_quantizers
from nextvit_exporters.quantize.read_back import int8_nodes
from nextvit_exporters.quantize_spec import QuantizeSpec
from nextvit_exporters.spec import Artifact, ExportSpec, InputKind, Precision, Tolerance
from nextvit_exporters.targets import Examples, Saved
from nextvit_exporters.tensorrt.int8_cost import estimated

if TYPE_CHECKING:
    from collections.abc import Iterator

SUFFIX: Final = ".onnx"
PRECISIONS: Final[tuple[Precision, ...]] = (Precision.FP32, Precision.FP16, Precision.INT8)
INPUT: Final = "image"
OUTPUT: Final = "logits"
WRITERS: Final = ("nextvit-deploy", "torch", "onnx", "onnxscript", "onnxsim")
MANIFEST_KEY: Final = "nextvit_deploy.manifest"
_IO: Final = {Precision.FP32: torch.float32, Precision.FP16: torch.float16}

PASSES: Final[tuple[Pass, ...]] = tuple(
    {each.name: each for each in (*ONNX_RUNTIME, *TENSORRT_PASSES, EqualizeChannels())}.values()
)

SAME_NETWORK: Final[Mapping[Precision, Tolerance]] = MappingProxyType(
    {
        Precision.FP32: Tolerance(
            1e-5, "float32 alone: 2.5e-7 (nano) to 3.6e-7 (large); one weight of nano scaled by 1.001: 1.1e-4"
        ),
        Precision.FP16: Tolerance(1e-5, "the same arithmetic on FP16-valued constants, so the same bound as fp32"),
        Precision.INT8: Tolerance(1e-5, "real numbers in place of int8 steps, so the same bound as fp32"),
    }
)
PRECISION_COST: Final[Mapping[Precision, Tolerance]] = MappingProxyType(
    {
        Precision.FP32: Tolerance(1e-5, "folds rounded once from float64: 2.5e-7 (nano) to 4.4e-7 (large)"),
        Precision.FP16: Tolerance(
            1e-2, "emulated storage: 3.7e-4 (trained nano) to 7.0e-4 (large at 384, random weights)"
        ),
        Precision.INT8: Tolerance(1e-1, "8.1e-3 (trained nano) to 1.8e-2 (small, random weights)"),
    }
)
TOLERANCES: Final[Mapping[str, Mapping[Precision, Tolerance]]] = MappingProxyType(
    {targets.SAME_NETWORK: SAME_NETWORK, targets.PRECISION_COST: PRECISION_COST}
)


def check_spec(spec: ExportSpec) -> None:
    """Raise UnsupportedSpec for what this target can't build, with what it can."""
    if spec.precision not in PRECISIONS:
        msg = f"onnx can't build {spec.precision}; choose one of {', '.join(map(str, PRECISIONS))}"
        raise UnsupportedSpec(msg)
    if spec.precision is Precision.INT8:
        _check_quantized(spec)
    if spec.io is not Precision.FP32 and (spec.io is not spec.rest or spec.input is InputKind.FLOAT):
        msg = f"{spec.io} at input and output needs {spec.io} inside, and normalized or uint8 input"
        raise UnsupportedSpec(msg)
    if not OLDEST_OPSET <= spec.opset <= NEWEST_OPSET:
        msg = f"opset {spec.opset} can't be written; choose {OLDEST_OPSET} to {NEWEST_OPSET}"
        raise UnsupportedSpec(msg)
    names = {each.name for each in PASSES}
    if unknown := [name for name in spec.skip if name not in names]:
        msg = f"no pass is called '{unknown[0]}'; the passes are {', '.join(sorted(names))}"
        raise UnsupportedSpec(msg)
    if spec.labels and len(spec.labels) != spec.num_classes:
        msg = f"{len(spec.labels)} labels for {spec.num_classes} classes; give one label per class"
        raise UnsupportedSpec(msg)


def _check_quantized(spec: ExportSpec) -> None:
    if spec.quantize is None:
        raise UnsupportedSpec("INT8 needs a calibration; give images with --calibration DIR")
    if spec.opset < OLDEST_INT8_OPSET:
        raise UnsupportedSpec(f"INT8 needs opset {OLDEST_INT8_OPSET} or more, not {spec.opset}; drop --opset")


def passes_for(spec: ExportSpec) -> tuple[Pass, ...]:
    """The passes of this target in order, with what ``spec`` adds and leaves out."""
    paying = ONNX_RUNTIME
    if (spec.consumer or "").startswith("tensorrt"):
        paying = tensorrt_passes(spec.pass_set, dynamic_size=spec.dynamic_size)
    return (*(each for each in paying if each.name not in spec.skip), *int8_passes(spec), *input_passes(spec))


def int8_passes(spec: ExportSpec) -> tuple[Pass, ...]:
    """What makes a graph lose less in INT8, where it shall be in INT8."""
    equalize = EqualizeChannels()
    wanted = spec.quantize is not None and spec.quantize.equalize and equalize.name not in spec.skip
    return (equalize,) if wanted else ()


def input_passes(spec: ExportSpec) -> tuple[Pass, ...]:
    """What makes the graph read raw pixels, where it shall."""
    if spec.input is InputKind.NORMALIZED:
        return ()
    mean, std = spec.preprocessing.mean, spec.preprocessing.std
    last = spec.input is InputKind.UINT8_NHWC
    return (NormalizeInput(mean, std, uint8=spec.input.is_uint8, channels_last=last),)


def tolerance_for(spec: ExportSpec, question: str) -> Tolerance:
    """By question and precision alone."""
    return TOLERANCES[question][spec.precision]


def settle(spec: ExportSpec, graph: fx.GraphModule, examples: Array) -> ExportSpec:
    """Nothing to settle."""
    del graph, examples
    return spec


def lower(spec: ExportSpec, graph: fx.GraphModule) -> fx.GraphModule:
    """The float64 graph in the numbers the file will hold, rounded once.

    Raises UnsupportedSpec when raw pixels were asked for and the graph doesn't normalise them, or INT8 of a graph that
    was not quantized.
    """
    if spec.precision is Precision.INT8:
        _check_quantized(spec)
    if spec.input is not InputKind.NORMALIZED and not hasattr(graph, MEAN):
        msg = f"normalize-input was refused or rolled back, so {spec.input} input can't be had; ask for normalized"
        raise UnsupportedSpec(msg)
    if spec.rest is Precision.FP16:
        return to_half(graph, half_io=spec.io is Precision.FP16)
    return g.cast(graph, torch.float32)


def reference(spec: ExportSpec, graph: fx.GraphModule) -> fx.GraphModule:
    """The float64 graph in float32 arithmetic, carrying the constants the file will hold.

    A quantized one clips activations where the file does and leaves the rounding to steps out.
    """
    if spec.quantize is not None:
        return clipped(graph, spec.quantize.rest)
    return round_constants(graph) if spec.precision is Precision.FP16 else g.cast(graph, torch.float32)


def build(
    spec: ExportSpec,
    module: fx.GraphModule,
    path: Path,
    provenance: Mapping[str, object],
    on_step: Callable[[str], None],
    examples: Examples | None = None,
) -> Artifact:
    """Write ``module``, as ``lower`` left it, to ``path``, whole or not at all.

    ``provenance`` goes into the file's metadata; it must not hold anything that differs between two runs. Raises
    BuildFailed when torch, onnx-simplifier or the ONNX checker refuses, or a dtype read back is not what was asked.
    """
    steps = {} if spec.quantize is None else take_quantizers(module)
    on_step("torch.onnx export")
    model = _to_proto(spec, module)
    name_nodes(model)
    strip_provenance(model)
    if spec.opset < DEFAULT_OPSET:  # first, for the simplifier makes nodes that the older opset writes differently
        model = downgrade(model, spec.opset)
    if spec.simplify:
        on_step("onnx-simplifier")
        model = simplify(model, apart=spec.quantize is not None)
    name_nodes(model)  # the simplifier's own nodes too
    if spec.quantize is not None:
        on_step(f"quantize by {spec.quantize.quantizer}")
        own = spec.quantize.own_steps
        model = quantize_onnx(model, steps) if own else _by_modelopt(model, spec, spec.quantize, examples)
        name_nodes(model)
    on_step("check and write")
    check_precision(model, spec.rest)
    _describe(model, spec, provenance)
    _check(model)
    atomic_write(path, model.SerializeToString(deterministic=True))
    return Artifact.of(path)


def _by_modelopt(
    model: onnx.ModelProto, spec: ExportSpec, asked: QuantizeSpec, examples: Examples | None
) -> onnx.ModelProto:
    """In INT8 with steps that ModelOpt takes from ``examples``, in whole batches."""
    if examples is None:
        raise ValueError("ModelOpt needs images to calibrate on")
    starts = range(0, len(examples) - spec.batch + 1, spec.batch)
    batches = [{INPUT: examples[at : at + spec.batch]} for at in starts]
    return quantize_with_modelopt(model, batches, asked.keep, asked.method)


def source(path: Path) -> Path:
    """The file itself."""
    return path


def adopt(spec: ExportSpec, path: Path) -> ExportSpec:
    """The spec as it is recorded; a file that an engine was built from is an ONNX file all the same."""
    del path
    return replace(spec, target="onnx", engine=None)


def remarks(path: Path) -> tuple[str, ...]:
    """Nothing to remark."""
    del path
    return ()


def executors(spec: ExportSpec, path: Path) -> Mapping[str, OnnxRuntime]:
    """What can execute the file here, by the question it answers."""
    cost = "exact" if spec.rest is Precision.FP32 else "emulated"
    same = "unrounded" if spec.precision is Precision.INT8 else "exact"
    return {targets.SAME_NETWORK: OnnxRuntime(path, same), targets.PRECISION_COST: OnnxRuntime(path, cost)}


def read(path: Path) -> Saved:
    """Read a file's operations and dtypes, and its provenance where this tool wrote it.

    Raises BuildFailed when the file is missing or not ONNX.
    """
    if not path.is_file():
        raise BuildFailed(f"there is no file {path}; give the path of an artefact")
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's own errors share no public base class
        msg = f"{path.name} is not an ONNX file: {str(error).splitlines()[0]}"
        raise BuildFailed(msg) from error
    if not model.graph.node:
        msg = f"{path.name} is not an ONNX file, or holds no operations"
        raise BuildFailed(msg)
    ops: dict[str, int] = {}
    for node in model.graph.node:
        ops[node.op_type] = ops.get(node.op_type, 0) + 1
    entry = next((p.value for p in model.metadata_props if p.key == MANIFEST_KEY), None)
    provenance = json.loads(entry) if entry else None
    if "QuantizeLinear" in ops and not _tells_of_int8(provenance):  # by another tool, which keeps a stale record
        provenance = None
    by_count = dict(sorted(ops.items(), key=lambda item: (-item[1], item[0])))
    return Saved(provenance, by_count, _dtypes(model), facts=_facts(model, provenance))


def _dtypes(model: onnx.ModelProto) -> str:
    """What is in INT8, where something is, and what everything computes in."""
    stepped, among = int8_nodes(model)
    told = f"{len(stepped)} of {among} convolutions and products in int8, " if stepped else ""
    try:
        return f"{told}{read_dtypes(model)}"
    except BuildFailed as error:  # a wrong file can be read; executing it is what fails
        return f"{told}not known: {error}"


def _facts(model: onnx.ModelProto, provenance: object) -> dict[str, object]:
    """What INT8 costs and saves on a T4, of a file that is for TensorRT."""
    spec = provenance.get("spec") if isinstance(provenance, Mapping) else None
    asked = spec.get("quantize") if isinstance(spec, Mapping) else None
    for_tensorrt = isinstance(asked, Mapping) and asked.get("rest") == str(Precision.FP16)
    return estimated(model) if for_tensorrt else {}


def _tells_of_int8(provenance: object) -> bool:
    """Whether a file's own record says that it is in INT8."""
    spec = provenance.get("spec") if isinstance(provenance, Mapping) else None
    return isinstance(spec, Mapping) and bool(spec.get("quantize"))


def _to_proto(spec: ExportSpec, module: fx.GraphModule) -> onnx.ModelProto:
    batch = max(spec.batch, 2) if spec.dynamic_batch else spec.batch
    shape = (batch, *spec.input_shape[1:])
    dtype = torch.uint8 if spec.input.is_uint8 else _IO[spec.io]
    axes = _open_axes(spec)
    dynamic = (dict.fromkeys(axes, torch.export.Dim.DYNAMIC),) if axes else None
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (torch.ones(shape, dtype=dtype),),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=max(spec.opset, DEFAULT_OPSET),
                dynamic_shapes=dynamic,
            )
    except (torch.onnx.OnnxExporterError, torch.onnx.errors.OnnxExporterError) as error:
        msg = f"torch's ONNX exporter refused the graph: {str(error).splitlines()[0]}; try another --opset"
        raise BuildFailed(msg) from error
    if program is None:
        msg = "torch's ONNX exporter returned nothing"
        raise BuildFailed(msg)
    model: onnx.ModelProto = program.model_proto
    _name_axes(model, spec)
    return model


def _open_axes(spec: ExportSpec) -> dict[int, str]:
    """The input's open axes and their names."""
    height = 1 if spec.input is InputKind.UINT8_NHWC else 2
    return ({0: "batch"} if spec.dynamic_batch else {}) | (
        {height: "height", height + 1: "width"} if spec.dynamic_size else {}
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter writes its progress to stdout and its own deprecations as warnings; neither is the user's."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_axes(model: onnx.ModelProto, spec: ExportSpec) -> None:
    """Call the open axes batch, height and width, in place of the exporter's symbols."""
    wanted = _open_axes(spec)
    shape = model.graph.input[0].type.tensor_type.shape
    names = {shape.dim[axis].dim_param: name for axis, name in wanted.items()}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def _describe(model: onnx.ModelProto, spec: ExportSpec, provenance: Mapping[str, object]) -> None:
    model.ir_version = onnx.helper.find_min_ir_version_for(list(model.opset_import))  # what the opset's readers know
    model.producer_name = "nextvit-deploy"
    model.producer_version = version("nextvit-deploy")
    model.graph.name = spec.model
    del model.metadata_props[:]
    entries = {
        "class_names": list(spec.labels),
        "preprocessing": spec.preprocessing.as_dict() | {"input": str(spec.input)},
        MANIFEST_KEY: provenance,
    }
    onnx.helper.set_model_props(model, {key: json.dumps(value, sort_keys=True) for key, value in entries.items()})


def _check(model: onnx.ModelProto) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        msg = f"the ONNX checker refused the file: {str(error).splitlines()[0]}"
        raise BuildFailed(msg) from error
