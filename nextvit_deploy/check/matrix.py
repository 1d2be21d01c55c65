"""From what a configuration names to cells: a stable order, and a name for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from nextvit_deploy.check.cells import PRECISIONS, Cell
from nextvit_deploy.check.config import DEMO, Combination, Config, Matrix
from nextvit_exporters.spec import Precision
from nextvit_exporters.tensorrt.backends import BACKENDS, DEFAULT_GPU, gpu

_LONGEST: Final = 48
"""Characters of a label: names of folders end at 255 bytes, and other parts follow."""
_IOS_FOR_INT8: Final = 17
"""The oldest that computes with int8 activations, which is what int8 means for coreml."""


def cells_of(config: Config) -> tuple[Cell, ...]:
    """The cells of every matrix in the file's order, then the artefacts; the same file gives the same cells."""
    made = [each for matrix in config.matrices for each in matrix.combinations()]
    labels = _labels([each.checkpoint for each in made])
    cells = [_cell(each, labels[each.checkpoint], config) for each in made]
    files = _labels([each.path for each in config.artefacts], whole=True)
    images = None if config.images is None else str(config.images)
    cells += [
        Cell(
            name=files[each.path],
            checkpoint=each.checkpoint,
            artefact=each.path,
            images=images,
            count=config.count,
            layers=config.layers,
            latency=config.latency,
        )
        for each in config.artefacts
    ]
    return tuple(
        replace(cell, name=name) for cell, name in zip(cells, _apart(each.name for each in cells), strict=True)
    )


def default_matrix(
    checkpoint: str | None, lanes: Sequence[str], calibration: str | None = None, built_for: str | None = None
) -> tuple[Cell, ...]:
    """Every lane in every precision that it takes, lane by lane, at the checkpoint's own size.

    ``built_for`` is the engines' GPU. TensorRT-RTX has no float32 for some, the T4 among them, so engines are in
    float32 only where it has. INT8 of a checkpoint of the user's needs a folder to calibrate on, and is left out
    without ``calibration``. Paths are absolute.
    """
    able = tuple(each for each in PRECISIONS if each != "int8" or checkpoint is None or calibration is not None)
    config = Config(path=None, output=Path(), calibration=None if calibration is None else Path(calibration))
    label = _labels([checkpoint])[checkpoint]
    cells: list[Cell] = []
    for lane in lanes:
        takes = tuple(each for each in able if lane != "trt" or _engines(each, built_for))
        matrix = Matrix((checkpoint,), (lane,), takes, gpu=built_for)
        cells += [_cell(each, label, config) for each in matrix.combinations()]
    return tuple(cells)


def _engines(precision: str, built_for: str | None) -> bool:
    """Whether TensorRT-RTX builds engines in ``precision`` for the GPU."""
    refused = BACKENDS["tensorrt-rtx"].refused
    return Precision(precision) not in refused.get(gpu(built_for or DEFAULT_GPU).capability, {})


def _cell(made: Combination, label: str, config: Config) -> Cell:
    """The cell; of the configuration only what changes it, so that the rest can change and what is kept still holds."""
    int8 = made.precision == "int8"
    calibration = config.calibration if int8 else None
    return Cell(
        name=_name(made, label),
        checkpoint=made.checkpoint,
        ema=made.ema,
        lane=made.target,
        precision=made.precision,
        size=made.size,
        batch=made.batch,
        passes=made.passes,
        gpu=made.gpu,
        ios=_IOS_FOR_INT8 if int8 and made.target == "coreml" else None,
        images=None if config.images is None else str(config.images),
        count=config.count,
        calibration=None if calibration is None else str(calibration),
        calibration_size=config.calibration_size if int8 else 128,
        layers=config.layers,
        latency=config.latency,
    )


def _name(made: Combination, label: str) -> str:
    """``demo-onnx-fp16-64-b1``: what is the usual is left out."""
    parts = [label, made.target, made.precision]
    if made.size is not None:
        height, width = made.size
        parts.append(str(height) if height == width else f"{height}x{width}")
    parts.append(f"b{made.batch}")
    if made.gpu is not None:
        parts.append(made.gpu)
    if made.passes == "none":
        parts.append("nopasses")
    if made.ema:
        parts.append("ema")
    return "-".join(parts)


def _labels(sources: Iterable[str | None], *, whole: bool = False) -> dict[str | None, str]:
    """A short name for each checkpoint, or for each artefact with its suffix if ``whole``.

    It is the file's name, with as many folders in front as tell it from others.
    """
    parts = {each: _parts(each, whole=whole) for each in sources}
    depths = dict.fromkeys(parts, 1)
    while True:
        labels = {each: "-".join(names[-depths[each] :]) for each, names in parts.items()}
        told = [label.casefold() for label in labels.values()]
        deeper = [
            each
            for each, label in labels.items()
            if told.count(label.casefold()) > 1 and depths[each] < len(parts[each])
        ]
        if not deeper:
            return {each: label[-_LONGEST:].lstrip("-.") for each, label in labels.items()}
        for each in deeper:
            depths[each] += 1


def _parts(source: str | None, *, whole: bool) -> list[str]:
    """The names in a path, fit for a folder's name; of a file the last without its suffix."""
    if source is None:
        return [DEMO]
    path = Path(source)
    last = path.name.replace(".", "-") if whole else path.stem if path.is_absolute() else path.name
    names = [re.sub(r"[^\w.]+", "-", each).strip("-.") for each in (*path.parent.parts, last)]
    return [each for each in names if each] or ["checkpoint"]


def _apart(names: Iterable[str]) -> Iterator[str]:
    """The names, with a number behind those that are there already, in any case of letters."""
    taken: set[str] = set()
    for name in names:
        number, free = 2, name
        while free.casefold() in taken:
            number, free = number + 1, f"{name}-{number}"
        taken.add(free.casefold())
        yield free
