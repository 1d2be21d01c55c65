"""What a package says of itself, for people and for manifests."""

from __future__ import annotations

from collections import Counter
from typing import Final

from nextvit_exporters.coreml.program import SPECIFICATION, WEIGHTS, Feature, Package
from nextvit_exporters.files import size_of

_FLOATS: Final = {"float16": "fp16", "float32": "fp32"}
_SHOWN: Final = 10


def dtypes_of(package: Package) -> str:
    """Operations by the floating type they write: ``131 of 132 operations in fp16``; casts and classify left out."""
    kinds = Counter(
        _FLOATS[each.outputs[0].type.dtype]
        for each in package.program.operations
        if each.kind not in {"const", "cast", "classify"}
        and not each.kind.startswith("constexpr")
        and each.outputs[0].type.dtype in _FLOATS
    )
    total = sum(kinds.values())
    return ", ".join(f"{count} of {total} operations in {kind}" for kind, count in sorted(kinds.items()))


def describe(package: Package) -> dict[str, object]:
    """Facts by name; JSON-ready."""
    ios = next((release for release, number in SPECIFICATION.items() if number == package.specification), None)
    facts: dict[str, object] = {
        "runs on": f"iOS {ios} or newer (specification {package.specification}, {package.program.opset})",
        "inputs": {each.name: _feature(each) for each in package.inputs},
        "outputs": {each.name: _feature(each) for each in package.outputs},
    }
    if package.labels:
        more = ", ..." if len(package.labels) > _SHOWN else ""
        facts["labels"] = f"{len(package.labels)}: {', '.join(package.labels[:_SHOWN])}{more}"
    if compressed := _compressed(package):
        facts["compressed weights"] = compressed
    if (package.path / WEIGHTS).is_file():
        facts["weights"] = f"{size_of(package.path / WEIGHTS) / 1e6:.1f} MB"
    if about := {name: text for name, text in package.about.items() if text}:
        facts["about"] = about
    facts["files"] = dict(package.files)
    return facts


def _compressed(package: Package) -> dict[str, int]:
    """How many weights are decompressed at run time, by the operation that does it."""
    found = Counter(each.kind for each in package.program.operations if each.kind.startswith("constexpr"))
    return dict(found)


def _feature(feature: Feature) -> str:
    """An input or output on one line."""
    if feature.kind != "image" and not feature.shape:
        return feature.kind + (f"; {feature.description}" if feature.description else "")
    shape = "x".join(map(str, feature.shape))
    sizes = f"{feature.color} {shape}" if feature.color else f"{shape} {feature.dtype}"
    if feature.allowed:
        sizes += f", one of {', '.join('x'.join(map(str, each)) for each in feature.allowed)}"
    if feature.ranges:
        sizes += f", from {' x '.join(str(low) if low == high else f'{low}:{high}' for low, high in feature.ranges)}"
    return f"{feature.kind} {sizes}" + (f"; {feature.description}" if feature.description else "")
