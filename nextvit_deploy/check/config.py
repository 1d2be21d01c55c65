"""``nextvit-export.toml``: what to check, and what is allowed; read whole, or refused in one line that names the line.

``nextvit-export init`` writes one in which every key is explained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Final

from nextvit_deploy.check.cells import LANES, PASSES, PRECISIONS
from nextvit_deploy.check.limits import Limits
from nextvit_deploy.check.places import check_pictures, checkpoint_at, what_is
from nextvit_deploy.check.stated import by_lane, limits_of
from nextvit_deploy.check.tables import BadConfig, Table, choose, kind, read_tables, shown
from nextvit_exporters.spec import MIN_SIDE
from nextvit_exporters.tensorrt.backends import GPUS, gpu, plain_name
from nextvit_models.errors import DeployError

__all__ = ["DEMO", "Artefact", "BadConfig", "Combination", "Config", "Matrix", "read_config"]

DEMO: Final = "demo"
"""The bundled checkpoint's name in a configuration."""
SUFFIXES: Final = {".onnx": "onnx", ".engine": "trt", ".mlpackage": "coreml"}
"""Of artefacts, and the lane that each is of."""
_SECTIONS: Final = ("check", "matrix", "artefact", "tolerance", "budget", "regression")
_CHECK: Final = (
    *("output", "images", "count", "calibration", "calibration-size", "timeout"),
    *("baseline", "jobs", "layers", "latency"),
)
_MATRIX: Final = ("checkpoints", "targets", "precisions", "sizes", "batches", "passes", "gpu", "ema")
_ARTEFACT: Final = ("path", "checkpoint")
_LARGEST: Final = 16384
"""Pixels a side; beyond it even counting overflows."""
_MOST: Final = 999_999
_MOST_JOBS: Final = 1024
_TIME: Final = re.compile(r"(\d{1,6}(?:\.\d{1,3})?) *([a-z]+)", re.ASCII | re.IGNORECASE)
_SECONDS: Final = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1),
    **dict.fromkeys(("min", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hour", "hours"), 3600),
}


@dataclass(frozen=True, slots=True)
class Combination:
    """One cell's place in a matrix."""

    checkpoint: str | None
    ema: bool
    target: str
    precision: str
    size: tuple[int, int] | None
    batch: int
    passes: str
    gpu: str | None


@dataclass(frozen=True, slots=True)
class Matrix:
    """Every combination of these is a cell.

    A checkpoint is an absolute path or a hub id, None for the demo; a size (height, width), None for the checkpoint's
    own. ``gpu`` is who engines are built for; other targets don't ask.
    """

    checkpoints: tuple[str | None, ...]
    targets: tuple[str, ...]
    precisions: tuple[str, ...]
    sizes: tuple[tuple[int, int] | None, ...] = (None,)
    batches: tuple[int, ...] = (1,)
    passes: tuple[str, ...] = ("all",)
    gpu: str | None = None
    ema: bool = False

    def combinations(self) -> Iterator[Combination]:
        """All of them, the checkpoint changing last and the passes first."""
        axes = (self.checkpoints, self.targets, self.precisions, self.sizes, self.batches, self.passes)
        for checkpoint, target, precision, size, batch, passes in product(*axes):
            built_for = self.gpu if target == "trt" else None
            yield Combination(checkpoint, self.ema, target, precision, size, batch, passes, built_for)


@dataclass(frozen=True, slots=True)
class Artefact:
    """A saved artefact to verify as it is, and the checkpoint it is held against; None for the demo."""

    path: str
    checkpoint: str | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that a configuration says, with absolute paths; None where it says nothing."""

    path: Path | None
    """The file; None where there is none."""
    output: Path
    jobs: int | None = None
    timeout: float | None = None
    """Seconds for one cell."""
    baseline: Path | None = None
    images: Path | None = None
    count: int = 8
    calibration: Path | None = None
    calibration_size: int = 128
    layers: bool = True
    latency: bool = False
    matrices: tuple[Matrix, ...] = ()
    artefacts: tuple[Artefact, ...] = ()
    limits: Limits = field(default_factory=Limits)


def read_config(path: Path) -> Config:
    """The configuration in ``path``; relative paths in it begin at its folder.

    Raises BadConfig, in one line with file and line, for whatever in it is wrong, is not there, or contradicts itself.
    """
    root = read_tables(path)
    root.only("section", _SECTIONS, _section_of)
    check = root.table("check") or Table(path, {}, {})
    check.only("option", _CHECK)
    folder = path.absolute().parent
    calibration = _folder(check, "calibration", folder)
    latency = check.flag("latency", default=False)
    matrices = tuple(_matrix(each, folder, calibrated=calibration is not None) for each in root.tables("matrix"))
    artefacts = tuple(_artefact(each, folder) for each in root.tables("artefact"))
    if not matrices and not artefacts:
        raise root.bad("there is nothing to check; add a [[matrix]] or an [[artefact]]")
    _check_once(root, matrices, artefacts)
    limits = limits_of(root, latency=latency)
    _check_limits_count(root, matrices, artefacts)
    return Config(
        path=path.absolute(),
        output=_output(check, folder),
        jobs=check.whole("jobs", 2, _MOST_JOBS),
        timeout=_timeout(check),
        baseline=_baseline(check, folder),
        images=_folder(check, "images", folder),
        count=check.whole("count", 8, _MOST) or 8,
        calibration=calibration,
        calibration_size=check.whole("calibration-size", 128, _MOST) or 128,
        layers=check.flag("layers", default=True),
        latency=latency,
        matrices=matrices,
        artefacts=artefacts,
        limits=limits,
    )


def _section_of(key: str) -> str:
    """What to do about a key that stands outside of its section."""
    if key in _CHECK:
        return "write it below [check]"
    return "write it below [[matrix]]" if key in _MATRIX else ""


def _matrix(table: Table, folder: Path, *, calibrated: bool) -> Matrix:
    table.only("key of a matrix", _MATRIX)
    for key, example in (("checkpoints", f'["{DEMO}"]'), ("targets", '["onnx"]'), ("precisions", '["fp16"]')):
        if key not in table.values:
            raise table.bad(f"this matrix has no {key}; write for example {key} = {example}")
    matrix = Matrix(
        checkpoints=table.each("checkpoints", f'["{DEMO}"]', _checkpoints(table, "checkpoints", folder)),
        targets=table.choices("targets", "target", LANES),
        precisions=table.choices("precisions", "precision", PRECISIONS),
        sizes=table.each("sizes", '[224, "224x320"]', _sizes(table)) or (None,),
        batches=table.each("batches", "[1, 8]", _batches(table)) or (1,),
        passes=table.choices("passes", "set of passes", PASSES) or ("all",),
        gpu=_gpu(table),
        ema=table.flag("ema", default=False),
    )
    _check_possible(table, matrix, calibrated=calibrated)
    return matrix


def _check_possible(table: Table, matrix: Matrix, *, calibrated: bool) -> None:
    """Raise for what no export can do, before hours are spent on the rest."""
    if matrix.gpu is not None and "trt" not in matrix.targets:
        raise table.bad("gpu is who engines are built for, and trt is not among the targets; leave one out", "gpu")
    if "coreml" in matrix.targets and (several := [each for each in matrix.batches if each != 1]):
        place = matrix.batches.index(several[0])
        raise table.bad(
            f"coreml takes one picture at a time, not {several[0]}; put coreml into a [[matrix]] of its own",
            "batches",
            place,
        )
    own = next((each for each in matrix.checkpoints if each is not None), None)
    if own is not None and "int8" in matrix.precisions and not calibrated:
        raise table.bad(
            f"int8 of {Path(own).name} needs pictures to calibrate on; name their folder as calibration in [check]",
            "precisions",
            matrix.precisions.index("int8"),
        )


def _checkpoints(table: Table, key: str, folder: Path) -> Callable[[object, int | None], str | None]:
    """How a checkpoint is read: the demo, a file, or a hub id as it is."""

    def read(value: object, place: int | None) -> str | None:
        at = (key,) if place is None else (key, place)
        if not isinstance(value, str) or not value.strip():
            raise table.bad(f'a checkpoint is {kind(value)}; write "{DEMO}", a path or a hub id', *at)
        if value == DEMO:
            return None
        try:
            return checkpoint_at(value, _absolute(folder, value), f'"{DEMO}"')
        except DeployError as error:
            raise table.bad(str(error), *at) from error

    return read


def _sizes(table: Table) -> Callable[[object, int], tuple[int, int]]:
    def read(value: object, place: int) -> tuple[int, int]:
        found = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", str(value), re.ASCII | re.IGNORECASE)
        if isinstance(value, bool) or not isinstance(value, int | str) or found is None:
            raise table.bad(f'{shown(value)} is no size; write 224 or "224x320", height first', "sizes", place)
        size = int(found[1]), int(found[2] or found[1])
        if min(size) < MIN_SIDE or max(size) > _LARGEST:
            raise table.bad(f"a size of {shown(value)}; give sides of {MIN_SIDE} to {_LARGEST} pixels", "sizes", place)
        return size

    return read


def _batches(table: Table) -> Callable[[object, int], int]:
    def read(value: object, place: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
            raise table.bad(f"{shown(value)} is no batch; give a whole number from 1 to {_MOST}", "batches", place)
        return value

    return read


def _gpu(table: Table) -> str | None:
    name = table.text("gpu", "a10")
    if name is None:
        return None
    try:
        gpu(name)
    except DeployError as error:
        raise table.bad(
            f"there is no GPU {shown(name)}; {choose(name, tuple(GPUS))}, or sm75 and its like", "gpu"
        ) from error
    return plain_name(name)


def _artefact(table: Table, folder: Path) -> Artefact:
    table.only("key of an artefact", _ARTEFACT)
    value = table.text("path", "exports/model.onnx")
    if value is None:
        raise table.bad('this artefact has no path; write for example path = "exports/model.onnx"')
    path = _absolute(folder, value)
    if path.suffix not in SUFFIXES:
        raise table.bad(f"{shown(value)} is no artefact; give one that ends in {', '.join(SUFFIXES)}", "path")
    if not what_is(path):
        raise table.bad(f"there is no {path}; export it first, or leave it out", "path")
    checkpoint = table.text("checkpoint", DEMO)
    return Artefact(
        str(path), None if checkpoint is None else _checkpoints(table, "checkpoint", folder)(checkpoint, None)
    )


def _check_once(root: Table, matrices: tuple[Matrix, ...], artefacts: tuple[Artefact, ...]) -> None:
    """Raise where two tables ask for the same."""
    seen: dict[Combination, int] = {}
    for place, matrix in enumerate(matrices):
        for each in matrix.combinations():
            if seen.setdefault(each, place) != place:
                checkpoint = DEMO if each.checkpoint is None else Path(each.checkpoint).name
                raise root.bad(
                    f"this matrix asks again for {checkpoint} as {each.target} in {each.precision}, as number "
                    f"{seen[each] + 1} does; leave it out of one",
                    "matrix",
                    place,
                )
    for place, artefact in enumerate(artefacts):
        if artefact in artefacts[:place]:
            raise root.bad(f"{Path(artefact.path).name} is there twice; leave one out", "artefact", place)


def _check_limits_count(root: Table, matrices: tuple[Matrix, ...], artefacts: tuple[Artefact, ...]) -> None:
    """Raise for a limit to what nothing is exported to: it could never be exceeded."""
    lanes = {SUFFIXES[Path(each.path).suffix] for each in artefacts}
    made = {pair for each in matrices for pair in product(each.targets, each.precisions)}
    for section in ("tolerance", "budget"):
        for (lane, precision), _ in by_lane(root, section):
            if lane not in lanes and (lane, precision) not in made:
                raise root.bad(
                    f"nothing here is {lane} in {precision}, so this {section} limits nothing; add it to a [[matrix]] "
                    f"or leave the {section} out",
                    section,
                    lane,
                    precision,
                )


def _output(check: Table, folder: Path) -> Path:
    output = _absolute(folder, check.text("output", "exports/check") or "exports/check")
    if what_is(output) == "file":
        raise check.bad(f"{output} is a file, where the output's folder goes; name another", "output")
    return output


def _folder(check: Table, key: str, folder: Path) -> Path | None:
    value = check.text(key, "photos")
    if value is None:
        return None
    path = _absolute(folder, value)
    try:
        check_pictures(path, key)
    except DeployError as error:
        raise check.bad(str(error), key) from error
    return path


def _baseline(check: Table, folder: Path) -> Path | None:
    value = check.text("baseline", "releases/1.0")
    if value is None:
        return None
    path = _absolute(folder, value)
    if not what_is(path):
        raise check.bad(
            f"there is no {path} to compare with; keep an earlier check's output there, or leave it out", "baseline"
        )
    return path


def _timeout(check: Table) -> float | None:
    value = check.values.get("timeout")
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return check.ratio("timeout", 1800, 0.0, 'give seconds above 0, or a text such as "30 min"')
    text = check.text("timeout", "30 min") or ""
    found = _TIME.fullmatch(text.strip())
    unit = None if found is None else _SECONDS.get(found[2].lower())
    if found is None or unit is None or float(found[1]) <= 0:
        raise check.bad(f'{shown(text)} is no time; write for example "30 min", "90 s" or "2 h"', "timeout")
    return float(found[1]) * unit


def _absolute(folder: Path, value: str) -> Path:
    """A path from the configuration's folder on, without detours; the last name is kept, as a link has its own."""
    path = folder / value
    try:
        return path.resolve() if path.name in {"", ".."} else path.parent.resolve() / path.name
    except (OSError, RuntimeError, ValueError):  # links in a circle, names that can't be: nothing is there
        return path
