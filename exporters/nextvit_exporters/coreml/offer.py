"""What a package offers an app, held against what was asked for: a size that nobody asked for is not verified."""

from __future__ import annotations

from nextvit_exporters.coreml.convert import INPUT, of_spec, shapes
from nextvit_exporters.coreml.program import SPECIFICATION, WEIGHTS, WEIGHTS_SHA256, Feature, Package
from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.spec import ExportSpec, InputKind


def check_offer(spec: ExportSpec, package: Package) -> None:
    """Raise BuildFailed where the package takes another input, or runs on other releases, than ``spec`` says.

    So too where it doesn't name its weights any more, as every package of this tool does.
    """
    asked = of_spec(spec)
    if package.specification != SPECIFICATION[asked.ios]:
        raise BuildFailed(
            f"{package.path.name} is of specification {package.specification}, and iOS {asked.ios} was asked for, "
            f"which is {SPECIFICATION[asked.ios]}; export it again"
        )
    if WEIGHTS in package.files and WEIGHTS_SHA256 not in package.metadata:
        raise BuildFailed(f"{package.path.name} doesn't say which weights it was written with; export it again")
    wanted = _input(spec)
    for each in package.inputs:
        found = each.kind, each.shape, sorted(each.allowed), each.ranges
        if found != (wanted.kind, wanted.shape, sorted(wanted.allowed), wanted.ranges):
            raise BuildFailed(
                f"{package.path.name} takes {_words(each)}, and {_words(wanted)} was asked for; export it again"
            )


def _input(spec: ExportSpec) -> Feature:
    """The input as a package of ``spec`` describes it; the order of colours is the package's own."""
    asked, every = of_spec(spec), shapes(spec)
    kind = "image" if spec.input is InputKind.IMAGE else "tensor"
    allowed = every if asked.sizes else ()
    side = asked.flexible
    ranges = () if side is None else ((spec.batch, spec.batch), (3, 3), side, side)
    return Feature(INPUT, kind, "", every[0], allowed=allowed, ranges=ranges)


def _words(feature: Feature) -> str:
    """An input's kind and every shape that it may have."""
    if feature.ranges:
        sizes = " x ".join(str(low) if low == high else f"{low}:{high}" for low, high in feature.ranges)
    else:
        sizes = " or ".join("x".join(map(str, each)) for each in feature.allowed or (feature.shape,))
    return f"{feature.kind} {sizes}"
