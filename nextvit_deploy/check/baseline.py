"""What an earlier export or check came to: read from its manifests, and found again by what was asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from nextvit_deploy.check import figures
from nextvit_deploy.check.cells import Cell
from nextvit_deploy.check.result import Outcome, Row
from nextvit_exporters.errors import DeployError

CHECK: Final = "check.json"
_MANIFESTS: Final = (".onnx.json", ".engine.json", ".mlpackage.json")
"""How manifests are called; one that can't be read is an error, another JSON file is none of ours."""
_OURS: Final = ("spec", "artifact", "checks")
_PLAIN: Final = ("model", "target", "precision", "height", "width", "batch")
_OPTIONAL: Final[Mapping[str, object]] = {
    "task": "classify",
    "input": "normalized",
    "io": "fp32",
    "dynamic_batch": False,
    "dynamic_size": False,
    "consumer": None,
    "pass_set": None,
}
_ENGINE: Final = ("gpu", "batch", "height", "width")
_COREML: Final = ("ios", "head", "sizes", "flexible", "weights", "activations")
_QUANTIZE: Final = ("rest", "method", "rounding", "quantizer", "equalize", "correct_bias")
_DAMAGE: Final = (KeyError, TypeError, ValueError, AttributeError, RecursionError)


@dataclass(frozen=True, slots=True, eq=False)
class BaselineEntry:
    """One artefact of the baseline; ``why`` says why nothing can be compared with it, where that is so.

    ``name`` is that of its cell; empty where it comes from a manifest alone, which knows of no latency either.
    """

    manifest: Mapping[str, Any]
    latency: float | None = None
    name: str = ""
    place: str = ""
    why: str = ""

    @property
    def fingerprint(self) -> str:
        """Of the weights."""
        return str(self.manifest["checkpoint"]["fingerprint"])

    @property
    def sha256(self) -> str:
        """Of the artefact."""
        return str(self.manifest["artifact"]["sha256"])

    def __str__(self) -> str:
        return self.name or self.place


@dataclass(frozen=True, slots=True)
class Baseline:
    """Artefacts of earlier; ``without`` names cells that came to nothing then."""

    entries: tuple[BaselineEntry, ...]
    without: tuple[str, ...] = ()
    cells: frozenset[str] = frozenset()
    """Names of the cells of now; what was one of them is nobody else's predecessor."""

    def among(self, names: Collection[str]) -> Baseline:
        """The same, told which cells there are now."""
        return replace(self, cells=frozenset(names))

    def before(self, cell: Cell, manifest: Mapping[str, Any]) -> BaselineEntry | None:
        """What the cell came to then, None where it is new.

        Where several were asked for alike, the weights tell them apart, then the cell's name, then the checkpoint's.
        Where that leaves several, the entry that comes back says so and compares with nothing.
        """
        found = self._candidates(cell, manifest)
        if len({each.sha256 for each in found}) > 1:
            names = " and ".join(map(str, found[:2]))
            more = f" and {len(found) - 2} more" if len(found) > 2 else ""
            why = f"the baseline has several of it, {names}{more}, and none of these weights; name one as the baseline"
            return replace(found[0], why=why)
        return found[0] if found else None

    def gone(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """Notes on what is only in the baseline, and on what could not be compared since it came to nothing there."""
        used: set[BaselineEntry] = set()
        unknown: list[Cell] = []
        for row in rows:
            if row.outcome.manifest is None:
                unknown.append(row.cell)
            else:
                used.update(self._candidates(row.cell, row.outcome.manifest))
        missing = [
            each for each in self.entries if each not in used and not any(_may_be(each, cell) for cell in unknown)
        ]
        now = {row.cell.name for row in rows}
        return (
            *(f"gone since the baseline: {each}" for each in missing),
            *(f"the baseline has no figures of {name}, so nothing is compared" for name in self.without if name in now),
        )

    def _candidates(self, cell: Cell, manifest: Mapping[str, Any]) -> list[BaselineEntry]:
        """The nearest entries that were asked for alike."""
        key, checkpoint = asked(manifest), manifest["checkpoint"]
        alike = [
            each
            for each in self.entries
            if (each.name == cell.name or each.name not in self.cells) and asked(each.manifest) == key
        ]
        levels: tuple[Callable[[BaselineEntry], bool], ...] = (
            lambda each: each.fingerprint == checkpoint["fingerprint"] and each.name == cell.name,
            lambda each: each.fingerprint == checkpoint["fingerprint"],
            lambda each: each.name == cell.name,
            lambda each: each.manifest["checkpoint"].get("name") == checkpoint.get("name"),
        )
        for level in levels:
            if nearer := [each for each in alike if level(each)]:
                return nearer
        return alike


def entry_of(outcome: Outcome) -> BaselineEntry | None:
    """An outcome as a baseline; None where it has no figures."""
    return None if outcome.manifest is None else BaselineEntry(outcome.manifest, outcome.latency)


def asked(manifest: Mapping[str, Any]) -> tuple[object, ...]:
    """What was asked for, without what only the tools' versions or the checkpoint decide."""
    spec = manifest["spec"]
    parts = [spec[name] for name in _PLAIN] + [spec.get(name, usual) for name, usual in _OPTIONAL.items()]
    parts.append(_skipped(manifest))
    for name, keys in (("engine", _ENGINE), ("coreml", _COREML), ("quantize", _QUANTIZE)):
        about = spec.get(name)
        parts.append(None if about is None else tuple(about.get(key) for key in keys))
    return tuple(json.dumps(part) for part in parts)


def read_baseline(path: Path) -> Baseline:
    """Read a manifest, an earlier check's ``check.json``, or all that a folder and the folders in it hold of them.

    Where a folder holds a ``check.json``, that speaks for everything below. Raises DeployError when there is nothing to
    compare with, something is damaged, or two artefacts can't be told apart.
    """
    if not path.exists():
        raise DeployError(f"{path}: no such file or folder; name a manifest, a {CHECK} or a folder of them as baseline")
    entries: list[BaselineEntry] = []
    without: list[str] = []
    for place, found in _walk(path) if path.is_dir() else _one(path):
        if _is_check(found):
            _read_check(place, found, entries, without)
        else:
            entries.append(_sound(BaselineEntry(found, place=str(place))))
    if not entries:
        raise DeployError(f"{path} holds no manifest and no {CHECK} with one; export or check something there first")
    _tell_apart(path, entries)
    return Baseline(tuple(entries), tuple(without))


def _one(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    found = _json(path)
    if found is None or not (_is_check(found) or _is_manifest(found)):
        raise DeployError(
            f"{path} is no manifest and no {CHECK}; a manifest lies beside its artefact and ends in .json"
        )
    yield path, found


def _walk(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Manifests and checks below a folder, in the order of their names."""
    for place, folders, files in os.walk(folder, onerror=_refuse):
        check = Path(place, CHECK)
        if CHECK in files and (found := _json(check)) is not None and _is_check(found):
            yield check, found
            folders.clear()
            continue
        folders[:] = sorted(each for each in folders if not each.startswith(".") and not each.endswith(".mlpackage"))
        for name in sorted(each for each in files if each.endswith(".json")):
            path = Path(place, name)
            found = _json(path)
            if found is not None and _is_manifest(found):
                yield path, found
            elif name.endswith(_MANIFESTS):
                raise DeployError(f"{path} is no whole manifest; export again, or remove it from the baseline")


def _refuse(error: OSError) -> None:
    raise DeployError(f"the baseline can't be read: {error}") from error


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where it isn't one. Raises DeployError where the file can't be read."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise DeployError(f"the baseline can't be read: {error}") from error
    except (ValueError, RecursionError) as error:
        if path.name == CHECK or path.name.endswith(_MANIFESTS):
            raise DeployError(f"{path} is damaged: {error}; export again, or remove it from the baseline") from error
        return None
    return found if isinstance(found, dict) else None


def _is_manifest(found: Mapping[str, Any]) -> bool:
    return all(key in found for key in _OURS)


def _is_check(found: Mapping[str, Any]) -> bool:
    return isinstance(found.get("rows"), list) and "output" in found


def _read_check(place: Path, found: Mapping[str, Any], entries: list[BaselineEntry], without: list[str]) -> None:
    """Add the rows of a check, and the names of those that came to nothing."""
    try:
        for row in found["rows"]:
            outcome = Outcome.from_dict(row["outcome"])
            name = str(row["cell"]["name"])
            if outcome.manifest is None:
                without.append(name)
            else:
                latency = None if outcome.latency is None else figures.number(outcome.latency)
                entries.append(_sound(BaselineEntry(outcome.manifest, latency, name, str(place))))
    except _DAMAGE as error:
        raise DeployError(f"{place} is damaged: {_what(error)}; check again, or name another baseline") from error


def _sound(entry: BaselineEntry) -> BaselineEntry:
    """The entry, with every figure in it that is going to be read."""
    manifest = entry.manifest
    try:
        asked(manifest)
        figures.errors(manifest)
        figures.size(manifest)
        figures.kernels(manifest)
        for text in (manifest["unit"], entry.fingerprint, entry.sha256):
            if not isinstance(text, str):
                raise TypeError(f"{text!r} is no text")
        dict(manifest["versions"])
    except _DAMAGE as error:
        place = entry.place + (f", {entry.name}," if entry.name else "")
        raise DeployError(f"{place} is damaged: {_what(error)}; export again, or name another baseline") from error
    return entry


def _what(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else figures.one_line(str(error))


def _tell_apart(path: Path, entries: Sequence[BaselineEntry]) -> None:
    """Raise DeployError for two artefacts that nothing tells apart: of one cell and the same weights, yet different."""
    seen: dict[tuple[object, ...], BaselineEntry] = {}
    for each in entries:
        other = seen.setdefault((asked(each.manifest), each.fingerprint, each.name), each)
        if other.sha256 != each.sha256:
            places = f"{other.place} and {each.place}"
            named = f" of {each.name}" if each.name else ""
            raise DeployError(
                f"{path} holds two different artefacts{named} that were asked for alike: {places}; name one"
            )


def _skipped(manifest: Mapping[str, Any]) -> object:
    """The passes that were left out; where all were, the names don't matter, for a new version may have others."""
    skip = sorted(manifest["spec"].get("skip", ()))
    rewrites = sum(int(each["rewrites"]) for each in manifest.get("passes", ()))
    return "all" if skip and not rewrites else skip


def _may_be(entry: BaselineEntry, cell: Cell) -> bool:
    """Whether a cell that came to nothing could be this one."""
    if entry.name:
        return entry.name == cell.name
    if cell.artefact is not None:
        return True
    spec = entry.manifest["spec"]
    lane, precision = figures.lane_and_precision(replace(cell, artefact=""), entry.manifest)
    return (lane, precision, spec["batch"]) == (cell.lane, cell.precision, cell.batch)
