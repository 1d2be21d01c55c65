"""The configuration that ``init`` writes: for one checkpoint, what works here, and every key explained."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nextvit_deploy.check.config import DEMO
from nextvit_deploy.doctor import Lane
from nextvit_exporters.files import atomic_write
from nextvit_models.errors import DeployError

if TYPE_CHECKING:
    from nextvit_models.checkpoint import Checkpoint

_DOORS: Final = {"onnx": ("onnx",), "trt": ("trt-rtx", "trt"), "coreml": ("coreml",)}
"""By target, the doctor's lanes that open it: any one of them."""
_FOR: Final = {
    "onnx": "ONNX files, for everything that reads ONNX.",
    "trt": "TensorRT engines, for a T4 unless gpu says otherwise.",
    "coreml": "Core ML packages, for iPhone. int8 means int8 activations too, and iOS 17; the others take iOS 16.",
}
_PRECISIONS: Final = {
    "onnx": '"int8" as well, once calibration above is given',
    "trt": '"fp32" needs another gpu than a T4: TensorRT-RTX has no float32 for Turing',
    "coreml": '"int8" as well, once calibration above is given',
}
_COLUMN: Final = 32
"""Where explanations begin."""

_HEAD: Final = """\
# What `nextvit-export check` makes and judges. Every combination that a [[matrix]] names is a cell: it is exported in a
# process of its own, the saved file is executed and compared with PyTorch, and the result is held against the limits
# below. What has not changed since the last check is not made again. Lines that begin with # are choices not taken.
#
# Written for {about}

[check]
output = "exports/check"        # where artefacts and results go; paths begin at this file's folder
# images = "photos"             # a folder of pictures to verify on; without it the demo's digits
count = 8                       # how many of them
# calibration = "photos"        # a folder of pictures of your task to calibrate int8 on, 128 or more
calibration-size = 128          # how many of them
timeout = "30 min"              # for one cell, which is then ended and failed: "90 s", "2 h"
# jobs = 2                      # cells at a time; without it as many as pay on this machine
# baseline = "releases/1.0"     # an earlier check's output, or one manifest, to tell what has moved since
layers = true                   # measure the error of every layer too, so that a failure names one
latency = false                 # time artefacts on this machine's CPU, in turns with PyTorch; a ratio, no promise
"""

_LIMITS: Final = """
# An artefact that is there already is verified as it is, against its checkpoint; the demo's without one.
# [[artefact]]
# path = "exports/model.onnx"
# checkpoint = {checkpoint}

# The worst error that is allowed, as a root mean square relative to PyTorch's outputs, by question. Each target has a
# tolerance of its own, which stays in force, so that these can only be tighter.
#   same-network             the saved constants in exact arithmetic: is it the same network?
#   precision-cost           with every number rounded as it is stored: what does the precision cost?
#   precision-cost-at-worst  coreml in fp16 and int8: where running sums are rounded too
#   on-the-device            trt and coreml: what the real runtime answers, where it is there
# [tolerance.onnx]
# fp32 = {{ same-network = 1e-6, precision-cost = 1e-6 }}
# fp16 = {{ same-network = 1e-6, precision-cost = 2e-3 }}

# The most that an artefact may take: its size, and its kernels (nodes of an ONNX file, operations of a package).
# latency-ratio is to PyTorch in float32 on this CPU, and needs latency = true.
# [budget.onnx]
# fp16 = {{ size = "64 MB", kernels = 500 }}

# How far figures may move from the baseline's, as ratios; 1.0 allows no growth.
# [regression]
# error-ratio = 1.5             # of each question's error
# error-floor = 1e-6            # below which an error is noise, whatever its ratio
# size-ratio = 1.02
# kernels-ratio = 1.0
# latency-ratio = 1.2           # needs latency = true
"""


@dataclass(frozen=True, slots=True)
class Written:
    """A configuration that was written, the targets it checks, and those that wait for something to be installed."""

    path: Path
    targets: tuple[str, ...]
    waiting: tuple[str, ...]


def write_config(source: str | None, path: Path, lanes: Sequence[Lane], *, ema: bool, force: bool) -> Written:
    """Open a checkpoint, None for the demo, and write a configuration for it to ``path``.

    ``lanes`` are the doctor's. Raises DeployError where something is there and ``force`` isn't given, and whatever is
    wrong with the checkpoint.
    """
    if not force and os.path.lexists(path):
        raise DeployError(f"{path} is there already; --force replaces it, --output FILE writes another")
    from nextvit_deploy.pipeline import open_checkpoint

    checkpoint = open_checkpoint(source, ema=ema)
    atomic_write(path, config_text(_named(source, path), checkpoint, lanes, ema=ema).encode())
    open_now = tuple(each for each in _DOORS if _door(each, lanes).works)
    return Written(path, open_now, tuple(each for each in _DOORS if each not in open_now))


def config_text(name: str, checkpoint: Checkpoint, lanes: Sequence[Lane], *, ema: bool) -> str:
    """A configuration for the checkpoint of that name in the file; targets without their packages are comments."""
    side = checkpoint.preprocessing.image_size
    about = (
        f"{checkpoint.name}: {checkpoint.model.config.name}, {checkpoint.num_classes} classes, {side}x{side} pixels."
    )
    if name == DEMO:
        about += " Put your checkpoint in its place."
    blocks = [_block(target, _quoted(name), side, _door(target, lanes), ema=ema) for target in _DOORS]
    head = _HEAD.format(about="".join(letter if letter.isprintable() else "?" for letter in about))
    return "\n".join([head, *blocks]) + _LIMITS.format(checkpoint=_quoted(name))


def _block(target: str, name: str, side: int, door: Lane, *, ema: bool) -> str:
    """The matrix of one target; all of it comments, with what opens the door, where that is closed."""
    precisions = ["fp16"] if target == "trt" else ["fp32", "fp16"]
    demo = name == _quoted(DEMO)
    if demo:
        precisions.append("int8")
    keys = [
        (f"checkpoints = [{name}]", f'files, hub ids, or "{DEMO}", the bundled one'),
        (f'targets = ["{target}"]', ""),
        (
            f"precisions = [{', '.join(map(_quoted, precisions))}]",
            "" if demo and target != "trt" else _PRECISIONS[target],
        ),
        (f"sizes = [{side}]", 'pixels; "224x320" is height and width; without sizes, the checkpoint\'s own'),
        ("batches = [1]", "images at a time" if target != "coreml" else ""),
        ('passes = ["all"]', '"none" as well: without the graph rewrites, but for folded norms in fp16 and int8'),
        (f"ema = {str(ema).lower()}", "whether averaged weights are taken where a checkpoint holds both"),
    ]
    if target == "trt":
        keys.append(('# gpu = "a10"', "who engines are built for: t4, a10, l4, rtx4090, ..., or sm75"))
    lines = ["[[matrix]]", *(f"{key:{_COLUMN - 1}} # {why}" if why else key for key, why in keys)]
    if not door.works:
        why = f"Not on this machine: {door.reason}."
        lines = [
            f"# {why}" + (f" It opens with: {door.remedy}" if door.remedy else ""),
            *(f"# {each}" for each in lines),
        ]
    return "\n".join([f"# {_FOR[target]}", *lines, ""])


def _door(target: str, lanes: Sequence[Lane]) -> Lane:
    """The lane that opens a target, or the first that would."""
    found = {lane.name: lane for lane in lanes}
    doors = [found[name] for name in _DOORS[target]]
    return next((each for each in doors if each.works), doors[0])


def _named(source: str | None, path: Path) -> str:
    """The checkpoint as the file names it: from the file's folder on where it lies below, else by its whole path."""
    if source is None:
        return DEMO
    if not Path(source).exists():
        return source  # a hub id
    whole, folder = Path(os.path.normpath(Path(source).absolute())), Path(os.path.normpath(path.absolute().parent))
    name = whole.relative_to(folder).as_posix() if whole.is_relative_to(folder) else str(whole)
    return str(whole) if name == DEMO else name


def _quoted(text: str) -> str:
    """A TOML string: JSON's, and TOML escapes DEL as well."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
