"""The smallest piece of an artefact that still fails, with all that somebody else needs to see it fail."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Final

import numpy as np

from nextvit_deploy.bisect.bundle_issue import Told, issue, title, versions
from nextvit_deploy.bisect.bundle_shrink import shrink
from nextvit_deploy.bisect.bundle_trial import Trial, Way, limit_of, relative_rms, run, way_for
from nextvit_deploy.bisect.cut import Cut
from nextvit_deploy.bisect.record import Bisection, Series
from nextvit_deploy.folders import Kind, check_place, published_folder
from nextvit_deploy.manifest import plain
from nextvit_exporters.coreml.program import MANIFEST_JSON, MODEL, WEIGHTS
from nextvit_exporters.cutting.onnx import stand_in
from nextvit_exporters.errors import OutputNotWritten
from nextvit_exporters.executors.base import Array
from nextvit_exporters.files import sha256_of

KIND: Final = "nextvit-deploy repro"
SCHEMA: Final = 1
BUNDLE: Final = "bundle.json"
ARCHIVE: Final = "bundle.zip"
ISSUE: Final = "issue.md"
SCRIPT: Final = "repro.py"
_ARRAYS: Final = ("inputs.npz", "expected.npz", "got.npz")
_STAND_INS: Final = tuple(f"cut.{mode}.onnx" for mode in ("emulated", "exact", "unrounded"))
_PIECES: Final = ("cut.onnx", *_STAND_INS, *(f"cut.mlpackage/{name}" for name in (MANIFEST_JSON, MODEL, WEIGHTS)))
_ALONE: Final = "the cut alone agrees: the difference needs what comes before"
_MADE_HERE: Final = 2.0
"""How many times as far from PyTorch as from the whole artefact a piece is that has the whole's failure."""
_DATE: Final = (1980, 1, 1, 0, 0, 0)
"""What every file in an archive is dated, so that its bytes don't depend on the day; the earliest there is."""
_MODE: Final = 0o100644

OnStep = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Bundle:
    """What was written. ``fails`` says that the piece alone, executed from its file, shows the failure.

    ``error`` is the piece's relative root mean square error, infinite where it can't be executed, None where nothing in
    PyTorch answers to what comes out. ``operations`` are those left in it.
    """

    folder: Path
    archive: Path
    fails: bool
    error: float | None
    operations: tuple[str, ...]
    notes: tuple[str, ...]


def write_bundle(folder: Path, artefact: Path, cut: Cut, bisection: Bisection, on_step: OnStep) -> Bundle:
    """Cut the piece out of ``artefact``, make it smaller as long as it fails, and write the bundle to ``folder``.

    An earlier bundle is replaced; it comes whole or not at all. Raises OutputNotWritten where something else is in the
    way; what ``way_for`` and cutting raise where the artefact can't be cut there; NotExecutable or MissingExtra where
    the piece can't be executed here.
    """
    check_bundle_place(folder)
    series = next((each for each in bisection.series if cut.parting in each.partings), None)
    if series is None:
        raise ValueError("the cut's parting is none of the bisection's")
    way = way_for(artefact, series.question)
    with published_folder(folder, _KIND) as draft, _named(draft, folder):
        scratch = draft / "scratch"
        scratch.mkdir()
        trial, notes, limit = _smallest(way, cut, series, scratch, on_step)
        on_step("write the bundle")
        told = Told(
            artefact=artefact.name,
            sha256=bisection.sha256,
            way=way,
            series=series,
            parting=cut.parting,
            trial=trial,
            limit=limit,
            fails=_fails(trial, cut, limit),
            readings=(),
            notes=notes,
            remarks=bisection.notes,
        )
        (shutil.copytree if trial.path.is_dir() else shutil.copyfile)(trial.path, draft / way.name)
        shutil.rmtree(scratch)
        _write(draft, told, cut, folder.name)
    operations = tuple(each.name for each in trial.piece.operations)
    return Bundle(folder, folder / ARCHIVE, told.fails, trial.error, operations, notes)


@contextmanager
def _named(draft: Path, folder: Path) -> Iterator[None]:
    """Name what could not be written by where it would be."""
    try:
        yield
    except OutputNotWritten as error:
        error.args = (str(error).replace(str(draft), str(folder)),)
        raise


def check_bundle_place(folder: Path) -> None:
    """Raise OutputNotWritten where ``write_bundle`` could not write ``folder``, before any work."""
    check_place(folder, _KIND)


def is_bundle(folder: Path) -> bool:
    """Whether ``write_bundle`` wrote this folder."""
    try:
        told = json.loads((folder / BUNDLE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(told, dict) and told.get("kind_of_folder") == KIND


_KIND: Final = Kind("repro bundle", is_bundle, (*_PIECES, *_ARRAYS, BUNDLE, ARCHIVE, ISSUE, SCRIPT))


def _smallest(
    way: Way, cut: Cut, series: Series, scratch: Path, on_step: OnStep
) -> tuple[Trial, tuple[str, ...], float]:
    """The smallest piece that fails, or all of it where it doesn't, what was found on the way, and the limit.

    The piece, given what the whole was, must give what the whole gave; as far as it doesn't, since its inputs were
    rounded to be kept, nothing can be told, so the limit is never below that.
    """
    on_step("cut the piece out")
    whole = scratch / "whole" / way.name
    whole.parent.mkdir()
    piece = way.cut(way.source, list(cut.inputs), list(cut.expected or cut.got), whole, cut.inputs)
    on_step("execute the piece")
    trial = run(way, whole, piece, cut.inputs, cut.expected)
    allowed, rounded = limit_of(series.tolerance, cut.parting.error), _MADE_HERE * _from_whole(trial, cut)
    limit = max(allowed, rounded)
    if not _fails(trial, cut, limit):
        return trial, (_why_not(trial, cut, allowed),), limit
    on_step("make the piece smaller")
    found = shrink(way, trial, scratch, lambda each: _fails(each, cut, limit), series.tolerance)
    return found.trial, found.notes, limit


def _fails(trial: Trial, cut: Cut, limit: float) -> bool:
    """Whether this is the failure of the whole: about as far off, and broken only where that is."""
    if trial.error is None:
        return False
    if trial.broken or not np.isfinite(trial.error):
        return not np.isfinite(cut.parting.error)
    return trial.error > limit


def _from_whole(trial: Trial, cut: Cut) -> float:
    """How far what comes out of the piece is from what came out there in the whole; 0 where they can't be compared."""
    apart = (relative_rms(trial.got[name], cut.got[name]) for name in trial.got if name in cut.got)
    return max((each for each in apart if np.isfinite(each)), default=0.0)


def _why_not(trial: Trial, cut: Cut, allowed: float) -> str:
    if trial.error is None:
        return "nothing in PyTorch answers to what comes out of the cut, so it is not known whether it fails"
    if trial.broken:
        return f"the cut alone can't be executed, while the whole artefact can: {trial.broken}"
    figures = f"alone it differs by {trial.error:.1e}, the whole by {cut.parting.error:.1e}"
    if trial.error <= allowed:
        return f"{_ALONE} ({figures})"
    return (
        f"it can't be told whether the cut alone fails ({figures}): what goes in and comes out was rounded to be kept"
    )


def _write(draft: Path, told: Told, cut: Cut, name: str) -> None:
    """Everything that the folder holds, the archive last."""
    trial = told.trial
    told = replace(told, readings=tuple(_readings(draft, told)))
    for file, arrays in zip(_ARRAYS, (trial.inputs, trial.expected, trial.got or cut.got), strict=True):
        (draft / file).write_bytes(_npz(arrays))
    shutil.copyfile(Path(__file__).with_name("bundle_repro.py"), draft / SCRIPT)
    hashes = {each.relative_to(draft).as_posix(): sha256_of(each) for each in _files(draft)}
    (draft / BUNDLE).write_text(_json(_described(told, hashes)), encoding="utf-8")
    (draft / ISSUE).write_text(issue(told, hashes), encoding="utf-8")
    held = [(f"{name}/{each.relative_to(draft).as_posix()}", each.read_bytes()) for each in _files(draft)]
    (draft / ARCHIVE).write_bytes(_zip(held, zipfile.ZIP_DEFLATED))


def _readings(draft: Path, told: Told) -> Iterable[Mapping[str, str]]:
    """The files that ``repro.py`` executes; the verdict is that of the first."""
    if told.way.kind == "onnx":
        made = stand_in(draft / told.way.name, told.way.mode)
        if made is not None:
            file = f"cut.{told.mode}.onnx"
            (draft / file).write_bytes(made)
            yield {"file": file, "what": f"{told.mode}, in float32"}
    yield {"file": told.way.name, "what": "as it is"}


def _described(told: Told, hashes: Mapping[str, str]) -> dict[str, object]:
    parting, trial, series = told.parting, told.trial, told.series
    return {
        "kind_of_folder": KIND,
        "schema": SCHEMA,
        "kind": told.way.kind,
        "tensorrt": told.way.module or None,
        "title": title(told),
        "artefact": told.artefact,
        "sha256": told.sha256,
        "question": series.question,
        "executor": series.executor,
        "mode": told.mode,
        "against": series.against,
        "tolerance": series.tolerance,
        "limit": told.limit,
        "module": parting.module,
        "carries": list(parting.carries),
        "whole": {"error": parting.error, "input_error": parting.input_error, "why": parting.why},
        "operations": [each.name for each in trial.piece.operations],
        "inputs": [edge.name for edge in trial.piece.inputs],
        "outputs": [edge.name for edge in trial.piece.outputs],
        "times": trial.times,
        "readings": [dict(each) for each in told.readings],
        "error": trial.error,
        "broken": trial.broken,
        "fails": told.fails,
        "notes": [*told.remarks, *told.notes],
        "versions": versions(),
        "files": dict(hashes),
    }


def _files(folder: Path) -> list[Path]:
    return sorted(each for each in folder.rglob("*") if each.is_file())


def _npz(arrays: Mapping[str, Array]) -> bytes:
    """What ``np.savez`` writes, which can't take a tensor called ``file``."""
    held = []
    for name, values in arrays.items():
        data = BytesIO()
        np.lib.format.write_array(data, np.asarray(values, order="C"), allow_pickle=False)
        held.append((f"{name}.npy", data.getvalue()))
    return _zip(held, zipfile.ZIP_STORED)


def _zip(files: Iterable[tuple[str, bytes]], compression: int) -> bytes:
    """An archive of the same bytes each time."""
    data = BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive:
        for name, content in files:
            entry = zipfile.ZipInfo(name, _DATE)
            entry.compress_type, entry.external_attr, entry.create_system = compression, _MODE << 16, 3
            archive.writestr(entry, content)
    return data.getvalue()


def _json(values: Mapping[str, object]) -> str:
    """Strict JSON; numbers that are none are strings."""
    return json.dumps(plain(values), indent=2, sort_keys=True, allow_nan=False) + "\n"
