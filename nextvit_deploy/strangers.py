"""Core ML packages of other tools: what their description tells of the spec that they could have been made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nextvit_deploy.verify import Names
from nextvit_exporters.coreml.program import SPECIFICATION, Feature, Package
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.coreml_spec import CoreMLSpec
from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.spec import ExportSpec, InputKind, Precision


def strange_package(path: Path, spec: ExportSpec) -> tuple[ExportSpec, Names]:
    """``spec`` with what a package of another tool tells of itself: shapes, colours, precision, head, and its names.

    Raises UnsupportedSpec unless it reads one picture, or one (N, 3, H, W) tensor, and returns a class or one tensor.
    """
    package = read_package(path)
    if len(package.inputs) != 1:
        raise UnsupportedSpec(f"{path.name} has {len(package.inputs)} inputs; only a classifier's one can be compared")
    (image,) = package.inputs
    if len(image.shape) != 4 or image.shape[1] != 3:
        shape = "x".join(map(str, image.shape))
        raise UnsupportedSpec(f"{path.name} reads {image.name} of shape {shape}; only (N, 3, H, W) can be compared")
    head, output = _head(package)
    batch, _, height, width = image.shape
    sizes, flexible = _sizes(image)
    ios = next((release for release, number in SPECIFICATION.items() if number == package.specification), 16)
    half = any(out.type.dtype == "float16" for each in package.program.operations for out in each.outputs)
    told = replace(
        spec,
        target="coreml",
        precision=Precision.FP16 if half else Precision.FP32,
        batch=batch,
        height=height,
        width=width,
        input=InputKind.IMAGE if image.kind == "image" else InputKind.NORMALIZED,
        labels=package.labels or spec.labels,
        dynamic_size=bool(sizes or flexible),
        coreml=CoreMLSpec(ios=ios, head=head, sizes=sizes, flexible=flexible),
    )
    return told, Names(image.name, output)


def _head(package: Package) -> tuple[str, str | None]:
    """What it returns, and its one tensor's name."""
    if package.is_classifier:
        return "classify", None
    if len(package.outputs) != 1:
        what = f"{len(package.outputs)} outputs"
        raise UnsupportedSpec(f"{package.path.name} has {what}; only a classifier's one can be compared")
    return "logits", package.outputs[0].name


def _sizes(image: Feature) -> tuple[tuple[tuple[int, int], ...], tuple[int, int] | None]:
    """Further enumerated sizes, and the range of both sides where there is one."""
    enumerated = tuple((shape[2], shape[3]) for shape in image.allowed if shape[2:] != image.shape[2:])
    ranges = image.ranges[2:]
    if len(ranges) != 2 or all(low == high for low, high in ranges):
        return enumerated, None
    low, high = max(low for low, _ in ranges), min(high for _, high in ranges)
    return (), (low, high) if low < high else None
