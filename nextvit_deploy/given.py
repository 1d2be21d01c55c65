"""Build an engine from an ONNX file that is there already, this tool's or another's, and prove it as any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nextvit_deploy import verify as v
from nextvit_deploy.handover import check_places, hand_over, withheld
from nextvit_deploy.manifest import Manifest, manifest_of, manifest_path
from nextvit_deploy.origin import FLOATS, check_same_model, differences, read, recorded_spec, strangers_spec
from nextvit_deploy.outputs import published
from nextvit_deploy.pipeline import (
    Clock,
    OnStep,
    describe,
    exact_reference,
    open_checkpoint,
    open_images,
    original_outputs,
)
from nextvit_deploy.quantization import bring_along, knows_steps
from nextvit_deploy.request import Request, check_names, engine_for, notes_for, notes_on_images, spec_for
from nextvit_exporters import to_onnx, to_tensorrt
from nextvit_exporters.engine_spec import ONE, Range
from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.files import atomic_write
from nextvit_exporters.opsets import TENSORRT_OPSET
from nextvit_exporters.passes.base import PassRecord
from nextvit_exporters.spec import ExportSpec, InputKind, Precision
from nextvit_exporters.targets import PRECISION_COST, SAME_NETWORK
from nextvit_exporters.tensorrt.backends import backend, load
from nextvit_exporters.tensorrt.choice import choose
from nextvit_exporters.tensorrt.onnx_input import check_onnx, read_onnx

if TYPE_CHECKING:
    from onnx import ModelProto


def export_given(request: Request, given: Path, on_step: OnStep) -> Manifest:
    """Build ``given`` as it is; its precision and shapes are what the file says.

    A file of this tool is held against PyTorch carrying its constants. Any other is held against what ONNX Runtime
    reads in it, and its cost against the checkpoint. Raises a DeployError for anything the user can mend.
    """
    clock = Clock(on_step)
    check_names(request)
    if request.skip or request.pass_set is not None:
        raise UnsupportedSpec(f"no pass runs on {given.name}, which is built as it is; drop --pass-set and --skip-pass")
    with clock.step("load the checkpoint"):
        model = read_onnx(given)
        check_input(request, model, given)
        saved = read(to_onnx, given)
        recorded = saved.provenance
        checkpoint = open_checkpoint(request.checkpoint, ema=request.ema)
        names = v.Names(to_onnx.INPUT, to_onnx.OUTPUT)
        if recorded:
            made = recorded_spec(recorded)
            check_same_model(given, made, checkpoint)
        else:
            made, names = strangers_spec(given, spec_for(replace(request, engine=None), checkpoint))
        spec = spec_of_given(request, made, given)
        check_names_of(given, names, request)
        to_tensorrt.check_spec(replace(spec, opset=TENSORRT_OPSET))  # its own is read, not written
        path = request.output / (spec.stem + to_tensorrt.SUFFIX)
        check_places(request, spec, path)
        images = open_images(request.images, request.count, (spec.height, spec.width), checkpoint)
        cases = v.cases_for(spec, images)
        notes = (*notes_for(request, spec, checkpoint), *notes_on_images(request))
    with clock.step("references"):
        references = {PRECISION_COST: original_outputs(spec, checkpoint, cases)}
        passes: tuple[PassRecord, ...] = ()
        if recorded:
            exact, passes, why = exact_reference(made, checkpoint, given, cases, on_step)
            references |= {} if exact is None else {SAME_NETWORK: exact}
            notes = (*notes, *why, *differences(given, recorded, made, checkpoint, passes))
        if not (recorded and knows_steps(made)):
            references[SAME_NETWORK] = v.onnx_outputs(spec, given, cases, names)
    with published(path) as draft:
        with clock.step("build tensorrt"):
            atomic_write(to_tensorrt.onnx_of(draft), model.SerializeToString(deterministic=True))
            built = to_tensorrt.assemble(spec, draft, on_step)
            if SAME_NETWORK in references:
                bring_along(spec, given, draft)
        with clock.step("verify the saved file"):
            checks = v.verify(spec, draft, cases, references, names)
            saved = to_tensorrt.read(draft)
            notes = (*notes, *to_tensorrt.remarks(draft), *withheld(request, checks))
        manifest = manifest_of(
            spec, describe(checkpoint), replace(built, path=path), passes, saved, checks, notes, clock.seconds
        )
        manifest.write(manifest_path(draft))
    hand_over(request, manifest, images, references[PRECISION_COST].outputs[0], on_step)
    return manifest


def check_input(request: Request, model: ModelProto, given: Path) -> None:
    """Raise BuildFailed or UnsupportedSpec, in the file's own name, for what the backend won't take."""
    if request.engine is None:
        raise ValueError("the request asks for no engine")
    chosen = backend(choose(request.engine.backend, request.engine.gpu).backend)
    edges = {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} & FLOATS
    if len(edges) > 1:
        raise UnsupportedSpec(f"{given.name} has float32 on one side and float16 on the other; give both one type")
    check_onnx(model, given.name, chosen, str(load(chosen).__version__), request.precision)


def check_names_of(given: Path, names: v.Names, request: Request) -> None:
    """Raise UnsupportedSpec where a kit or a model repository is asked for, whose names are this tool's own."""
    wanted = v.Names(to_onnx.INPUT, to_onnx.OUTPUT)
    if names != wanted and request.engine is not None and (request.engine.kit or request.engine.triton):
        raise UnsupportedSpec(
            f"{given.name} calls its tensors {names.input} and {names.output}; --kit and --triton take {wanted.input} "
            f"and {wanted.output}, so rename them or leave those options out"
        )


def spec_of_given(request: Request, made: ExportSpec, given: Path) -> ExportSpec:
    """The spec of the engine to build from ``given``, which ``made`` describes.

    Raises UnsupportedSpec where the precision asked for is not the file's, or the ranges don't fit its axes.
    """
    if request.engine is None:
        raise ValueError("the request asks for no engine")
    precision = request.precision
    if precision is not Precision.INT8 and precision is not made.precision:
        raise UnsupportedSpec(f"{given.name} is in {made.precision}, not {precision}; ask for --{made.precision}")
    asked = request.engine
    batch = asked.batch or ONE if made.dynamic_batch else Range.of(made.batch)
    size = asked.size if made.dynamic_size else (Range.of(made.height), Range.of(made.width))
    if request.io is not Precision.FP32 and request.io is not made.io:
        raise UnsupportedSpec(f"{given.name} has {made.io} at input and output; drop --io, or export it so")
    if request.input is not InputKind.NORMALIZED and request.input is not made.input:
        raise UnsupportedSpec(f"{given.name} reads {made.input} input; drop --input, or export it so")
    if not made.dynamic_batch and asked.batch not in {None, batch}:
        raise UnsupportedSpec(f"{given.name} takes {made.batch} images at a time; drop --batch, or export it open")
    if asked.size is not None and not made.dynamic_size and size != asked.size:
        raise UnsupportedSpec(f"{given.name} reads {made.height}x{made.width}; drop --size, or export it open")
    engine = engine_for(replace(asked, batch=batch, size=size), (made.height, made.width))
    return replace(
        made,
        target="tensorrt",
        precision=precision,
        engine=engine,
        batch=engine.batch.optimum,
        height=engine.height.optimum,
        width=engine.width.optimum,
        consumer=None,
        pass_set=None,
    )
