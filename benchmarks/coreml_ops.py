"""Operations of the saved ML program: the usual conversion against this tool's packages. Nothing is executed.

The usual conversion is ``torch.jit.trace`` of the model as it is, and ``coremltools.convert`` with its defaults for
iOS 16. Ours are the packages that ``nextvit-export coreml`` writes: a picture in, logits or a classifier out. Counted
are the operations that the saved packages hold, without constants.

    python -m benchmarks.coreml_ops [--variants small,base,large] [--size 224]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters import to_coreml
from nextvit_exporters.coreml.loading import coremltools, heard
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.coreml_spec import CoreMLSpec
from nextvit_exporters.errors import MissingExtra
from nextvit_exporters.opsets import DEFAULT_OPSET
from nextvit_exporters.passes.base import run_passes
from nextvit_exporters.spec import ExportSpec, InputKind, Precision
from nextvit_models.config import VARIANTS
from nextvit_models.nextvit import NextViT
from nextvit_models.preprocessing import Preprocessing
from tests.harness import images, randomise

IOS = 16
BOUND = {"small": 248, "base": 362, "large": 476}
"""Operations of either package, at 224; the usual conversion has 305, 451 and 597."""
JUDGED = 224
_CERTIFIED = 64
"""Largest side, in pixels, that the passes are certified on."""
Counts = Mapping[str, int]


def main() -> int:
    """Convert each variant three ways, print the table, and judge the larger of ours."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default="small,base,large")
    parser.add_argument("--size", type=int, default=JUDGED)
    arguments = parser.parse_args()
    try:
        version = coremltools().__version__
    except MissingExtra as error:
        print(error, file=sys.stderr)
        return 1
    size, missed = arguments.size, False
    print(f"coremltools {version}, iOS {IOS}, FP16, {size} pixels; operations of the saved program without constants")
    print(
        f"{'variant':9}{'package':24}{'operations':>11}{'batch_norm':>12}{'transpose':>11}{'reshape':>9}{'linear':>8}"
    )
    for variant in arguments.variants.split(","):
        counted = packages(f"nextvit_{variant}", size)
        for package, ops in counted.items():
            kinds = (ops.get(kind, 0) for kind in ("batch_norm", "transpose", "reshape", "linear"))
            columns = "".join(f"{number:>{width}}" for number, width in zip(kinds, (12, 11, 9, 8), strict=True))
            print(f"{variant:9}{package:24}{sum(ops.values()):>11}{columns}", flush=True)
        if size == JUDGED and (bound := BOUND.get(variant)) is not None:
            ours = max(sum(counted[head].values()) for head in ("logits", "classify"))
            missed |= ours > bound
            print(f"{variant}: {ours} operations; bound {bound}: {'MISSED' if ours > bound else 'met'}")
    return int(missed)


def packages(name: str, size: int) -> dict[str, Counts]:
    """What the saved packages of a variant hold, operations by kind: the usual one's, and ours by head."""
    model = randomise(NextViT(VARIANTS[name]), seed=0)
    counted: dict[str, Counts] = {}
    with tempfile.TemporaryDirectory() as folder:
        usual = Path(folder, "usual.mlpackage")
        convert_usually(model, size, usual)
        counted["usual conversion"] = read_package(usual).program.count()
        graph = rewritten(model, spec_of(name, size, "logits"))
        for head in ("logits", "classify"):
            spec, path = spec_of(name, size, head), Path(folder, f"{head}.mlpackage")
            to_coreml.build(spec, to_coreml.lower(spec, graph), path, {}, lambda _: None)
            counted[head] = read_package(path).program.count()
    return counted


def spec_of(name: str, size: int, head: str) -> ExportSpec:
    """A package that takes a picture and returns ``head``."""
    return ExportSpec(
        name,
        1000,
        "coreml",
        Precision.FP16,
        size,
        size,
        1,
        DEFAULT_OPSET,
        Preprocessing(),
        input=InputKind.IMAGE,
        coreml=CoreMLSpec(IOS, head),
    )


def rewritten(model: nn.Module, spec: ExportSpec) -> fx.GraphModule:
    """The model behind the passes of ``spec``, each certified, on a smaller picture, for it costs minutes otherwise."""
    height, width = min(spec.height, _CERTIFIED), min(spec.width, _CERTIFIED)
    image = images(1, 3, height, width, seed=1, dtype=torch.float64)
    graph, records = run_passes(g.trace(model), to_coreml.passes_for(spec), [image], consume=True)
    if undone := [record.name for record in records if not record.certified]:
        raise SystemExit(f"{', '.join(undone)} moved the outputs and was rolled back")
    return graph


def convert_usually(model: nn.Module, size: int, path: Path) -> None:
    """Trace, convert and save as coremltools' own guide does it, for iOS 16."""
    ct, example = coremltools(), torch.rand(1, 3, size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated, and still what most people use
        traced = torch.jit.trace(model, example)  # type: ignore[no-untyped-call]
    with heard():
        converted = ct.convert(
            traced,
            inputs=[ct.TensorType(name="image", shape=tuple(example.shape))],
            minimum_deployment_target=getattr(ct.target, f"iOS{IOS}"),
            skip_model_load=True,
        )
        converted.save(str(path))


if __name__ == "__main__":
    sys.exit(main())
