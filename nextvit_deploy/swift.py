"""A self-test for the app: the package asked about one known input on the phone, held against PyTorch's answer.

::

    FOLDER/
      NextViTSelfTest.swift   loads the compiled model, predicts, and says PASSED or FAILED
      golden.png              the picture, cut to size, or golden.bin: the tensor, float32 little-endian
      expected.json           what PyTorch answers, how far the phone may be off, and how pictures are prepared
      README.md               how to add it to an app
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from nextvit_deploy.data import ImageSet
from nextvit_deploy.folders import Kind, check_place, published_folder
from nextvit_deploy.references import artefact_inputs
from nextvit_deploy.swift_source import swift_source
from nextvit_exporters.coreml.program import Package
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.executors.base import LOGITS, PROBABILITIES, Array
from nextvit_exporters.executors.mil import MilReference
from nextvit_exporters.files import sha256_of
from nextvit_exporters.spec import ExportSpec, InputKind, Precision

HEADER: Final = "// Written by nextvit-deploy."
SOURCE: Final = "NextViTSelfTest.swift"
PICTURE: Final = "golden.png"
TENSOR: Final = "golden.bin"
EXPECTED: Final = "expected.json"
READ_ME: Final = "README.md"
SCHEMA: Final = 1
SHOWN: Final = 5
"""Classes that are compared."""
SPREAD: Final = 3.0
"""How much further than the emulations a phone may be; what it does inside an operation is not published."""
LEAST: Final = {Precision.FP32: 1e-4, Precision.FP16: 1e-3}
"""The least tolerance, as a share of the largest number that is possible: FP16 rounds by 5e-4 at each store."""
_README: Final = """\
# Self-test of {stem}

1. Add `{package}` and the files in this folder to the app's target in Xcode ("Copy items if needed").
2. In a debug build on the phone, call `print(try NextViTSelfTest.run())`, or `runOnEachUnit()` for CPU, GPU and Neural
   Engine one by one. It says PASSED where the {shown} classes that PyTorch puts first are within {bound:.1e} of its
   {what} (`expected.json` says how that was measured), and FAILED with both numbers where not.
3. {prepare}
4. {vision}
"""
_VISION: Final = (
    "Vision's `centerCrop` is not the same: it scales the largest rectangle of the input's form, by another filter, "
    "and so shows the model the whole short side, where it was trained on {share:.1%} of it. Resize yourself, with "
    "Core Image or vImage, and hand the model a buffer of exactly {width} x {height}."
)


def write_swift(
    folder: Path,
    spec: ExportSpec,
    package: Path,
    images: ImageSet,
    expected: Mapping[str, Array],
    labels: Sequence[str],
) -> None:
    """Write the self-test of ``package`` into ``folder``, whole or not at all; an earlier one is replaced.

    ``expected`` is float32 PyTorch's answer to ``images``, ``probabilities`` or ``logits`` (N, classes) after the
    package's head; ``labels`` names the classes. The picture whose first class is the most decided is taken. Raises
    UnsupportedSpec for what can't be tested so, OutputNotWritten where something else is in the folder's place.
    """
    head = _head(spec)
    read, answers = read_package(package), expected[_answer(head)]
    _check_given(spec, images, answers, labels)
    if read.labels != (tuple(labels) if head == "classify" else ()):
        raise UnsupportedSpec(f"the labels given are not those of {package.name}; export it again")
    chosen = _most_decided(answers)
    golden = artefact_inputs(spec, images)[chosen : chosen + 1]
    tolerance = _measure(spec, read, golden, answers[chosen], _answer(head))
    told = _expected(spec, package, read, _Golden(golden, images.names[chosen], answers[chosen], tolerance), labels)
    check_swift_place(folder)
    with published_folder(folder, _KIND) as inside:
        if spec.input is InputKind.IMAGE:
            Image.fromarray(golden[0].astype(np.uint8)).save(inside / PICTURE)
        else:
            (inside / TENSOR).write_bytes(_bytes(golden))
        _write(inside / EXPECTED, json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        _write(inside / SOURCE, _source(spec, package, told))
        _write(inside / READ_ME, _read_me(spec, package, tolerance.absolute))


def check_swift_place(folder: Path, spec: ExportSpec | None = None) -> None:
    """Raise where ``write_swift`` would write nothing into ``folder``, before any work; leaves nothing behind.

    OutputNotWritten where something else is in the way or the system refuses, UnsupportedSpec where ``spec``, if it
    is given, can't be tested so.
    """
    if spec is not None:
        _head(spec)
    check_place(folder, _KIND)


@dataclass(frozen=True, slots=True)
class _Tolerance:
    absolute: float
    measured: str


@dataclass(frozen=True, slots=True, eq=False)
class _Golden:
    """The input, (1, ...), where it is from, and what PyTorch answers, (classes,)."""

    values: Array
    name: str
    answer: Array
    tolerance: _Tolerance


def _head(spec: ExportSpec) -> str:
    """What the package returns; raises UnsupportedSpec where a self-test can't compare that."""
    if spec.coreml is None:
        raise UnsupportedSpec("a Swift self-test is for a Core ML package; use the coreml command")
    if spec.coreml.head == "features":
        raise UnsupportedSpec("a Swift self-test compares classes, and feature maps have none; leave --swift out")
    if spec.batch != 1:
        raise UnsupportedSpec(f"a Swift self-test asks about one picture, not {spec.batch}; use --batch 1")
    return spec.coreml.head


def _answer(head: str) -> str:
    return PROBABILITIES if head == "classify" else LOGITS


def _check_given(spec: ExportSpec, images: ImageSet, answers: Array, labels: Sequence[str]) -> None:
    if images.pixels.shape[1:] != (3, spec.height, spec.width):
        raise UnsupportedSpec(f"pictures of shape {images.pixels.shape} don't fit {spec.height}x{spec.width}")
    if answers.shape != (len(images), spec.num_classes):
        raise UnsupportedSpec(f"answers of shape {answers.shape} don't fit {len(images)} pictures")
    if len(labels) != spec.num_classes:
        raise UnsupportedSpec(f"{len(labels)} labels don't name {spec.num_classes} classes; give one for each")


def _most_decided(answers: Array) -> int:
    """The picture whose first class is furthest ahead of the second: rounding turns the order of others."""
    if answers.shape[1] < 2:
        return 0
    ordered = np.sort(answers.astype(np.float64), axis=1)
    return int(np.argmax(ordered[:, -1] - ordered[:, -2]))


def _measure(spec: ExportSpec, package: Package, golden: Array, answer: Array, output: str) -> _Tolerance:
    """Three times what the worse of two emulations is off, and never less than rounding alone explains."""
    worst = 0.0
    for mode in ("emulated", "pessimistic") if spec.precision is Precision.FP16 else ("emulated",):
        with MilReference(package, mode) as reference:
            found = reference.run({package.inputs[0].name: golden})[output]
        worst = max(worst, float(np.abs(found.astype(np.float64)[0] - answer).max()))
    least = LEAST[spec.precision] * (1.0 if output == PROBABILITIES else float(np.abs(answer).max()))
    return _Tolerance(
        max(SPREAD * worst, least),
        f"{SPREAD:.0f} times {worst:.1e}, the largest difference from PyTorch float32 over all classes of this input "
        f"when the package is executed with {spec.precision} rounding on a CPU"
        + (", sums of products rounded every 32 products included" if spec.precision is Precision.FP16 else "")
        + f"; at least {least:.1e}",
    )


def _expected(spec: ExportSpec, path: Path, package: Package, golden: _Golden, labels: Sequence[str]) -> dict[str, Any]:
    """What ``expected.json`` holds."""
    answer = golden.answer.astype(np.float64)
    first = np.argsort(-answer, kind="stable")[:SHOWN].tolist()
    ahead = answer[first[0]] - answer[first[1]] if len(first) > 1 else math.inf
    picture, cover = spec.input is InputKind.IMAGE, spec.preprocessing.cover
    return {
        "written_by": "nextvit-deploy",
        "schema": SCHEMA,
        "model": spec.model,
        "package": path.name,
        "package_sha256": sha256_of(path),
        "input": {
            "name": package.inputs[0].name,
            "kind": "picture, RGB" if picture else "tensor, float32 little-endian, (1, 3, height, width)",
            "file": PICTURE if picture else TENSOR,
            "width": spec.width,
            "height": spec.height,
            "shape": list(golden.values.shape),
            "sha256": hashlib.sha256(_bytes(golden.values)).hexdigest(),
            "from": golden.name,
        },
        "output": _outputs(package),
        "values": "probabilities" if package.is_classifier else "logits",
        "against": "PyTorch float32",
        "top": [{"index": i, "label": labels[i], "value": answer[i]} for i in first],
        "decided": bool(ahead > 2 * golden.tolerance.absolute),
        "tolerance": {"absolute": golden.tolerance.absolute, "measured": golden.tolerance.measured},
        "preprocessing": {
            "words": _prepare(spec),
            "resize_to_cover": {"width": cover(spec.width), "height": cover(spec.height)},
            "filter": spec.preprocessing.interpolation,
            "antialias": True,
            "crop": {"width": spec.width, "height": spec.height, "place": "centre"},
            "mean": list(spec.preprocessing.mean),
            "std": list(spec.preprocessing.std),
            "normalised_by": "the package" if picture else "the app",
        },
    }


def _outputs(package: Package) -> dict[str, str]:
    """The names of what is compared: ``name`` of the numbers, ``label`` of a classifier's label."""
    kinds = {each.kind: each.name for each in package.outputs}
    if package.is_classifier:
        return {"name": kinds["dictionary"], "label": kinds["string"]}
    return {"name": kinds["tensor"]}


def _prepare(spec: ExportSpec) -> str:
    """How an app prepares a picture, in words."""
    wanted = spec.preprocessing
    cover = wanted.cover(spec.width), wanted.cover(spec.height)
    size = (
        f"its short side has {cover[0]} pixels"
        if spec.width == spec.height
        else "it just covers {} x {}".format(*cover)
    )
    steps = (
        f"Turn the picture upright and make it RGB; resize it with antialiasing ({wanted.interpolation}) so that "
        f"{size}; cut {spec.width} x {spec.height} out of its centre"
    )
    if spec.input is InputKind.IMAGE:
        return f"{steps}. The package subtracts the mean and divides by the deviation itself."
    return (
        f"{steps}; make each value (value / 255 - mean) / std, with mean {list(wanted.mean)} and std "
        f"{list(wanted.std)} for red, green and blue, in the order (1, 3, height, width)."
    )


def _source(spec: ExportSpec, path: Path, told: Mapping[str, Any]) -> str:
    picture, output = spec.input is InputKind.IMAGE, told["output"]
    return swift_source(HEADER, path.stem, told["input"]["name"], output["name"], output.get("label"), picture=picture)


def _read_me(spec: ExportSpec, path: Path, bound: float) -> str:
    return _README.format(
        stem=path.stem,
        package=path.name,
        shown=min(SHOWN, spec.num_classes),
        bound=bound,
        what="probabilities" if _head(spec) == "classify" else "logits",
        prepare=_prepare(spec),
        vision=_VISION.format(share=spec.preprocessing.crop_pct, width=spec.width, height=spec.height),
    )


def _bytes(values: Array) -> bytes:
    """Pixels row by row in RGB, or little-endian float32."""
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values).tobytes()
    return np.ascontiguousarray(values, "<f4").tobytes()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _is_self_test(folder: Path) -> bool:
    """Whether ``write_swift`` wrote this folder."""
    try:
        with (folder / SOURCE).open(encoding="utf-8") as source:
            return source.readline().rstrip("\n") == HEADER
    except (OSError, UnicodeDecodeError):
        return False


_KIND: Final = Kind("Swift self-test", _is_self_test, (SOURCE, PICTURE, TENSOR, EXPECTED, READ_ME))
