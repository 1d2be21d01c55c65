"""Read a folder of artefacts: manifests, bisections, evaluations and a check, wherever they lie in it.

Nothing of the folder is trusted. What can't be used is skipped and named with the reason, and an artefact that isn't
the one its manifest tells of is not verified, whatever the manifest says.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from nextvit_deploy.bisect.record import Bisection, Layer, Parting, Series
from nextvit_deploy.report.facts import Collected, Evaluated, Item, Latency, Made, Move, Picture, ordered
from nextvit_deploy.report.fields import Fields, Unreadable, clean, read
from nextvit_deploy.report.manifests import made_of, verdict_of
from nextvit_deploy.verdict import Verdict, worst
from nextvit_exporters.errors import DeployError
from nextvit_exporters.files import sha256_of

CHECK: Final = "check.json"
_LAYERS: Final = ".layers.json"
_EVALUATION: Final = ".evaluation.json"
_KIT: Final = "kit.json"
_KITS: Final = frozenset({_KIT, "verdict.json"})
"""Files of a kit that tell nothing which its manifest.json doesn't."""
_FILES: Final = 2000
"""JSON files that are read; a check of the whole matrix writes about a hundred."""
_THUMBNAIL: Final = re.compile(r"/9j/[A-Za-z0-9+/]{20,60000}={0,2}", re.ASCII)
"""A JPEG in base64; those that an evaluation writes have four thousand characters."""


@dataclass(slots=True)
class _Found:
    """What was read so far, by kind; paths are relative to the folder."""

    manifests: list[tuple[Path, Made]] = field(default_factory=list)
    layers: list[tuple[Path, Bisection]] = field(default_factory=list)
    evaluated: list[tuple[Path, Evaluated]] = field(default_factory=list)
    rows: list[Item] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    baseline: str = ""

    def skip(self, path: Path, why: object) -> None:
        """Leave a file out."""
        self.skipped.append((clean(path.as_posix()), clean(str(why))))


def collect(folder: Path) -> Collected:
    """Everything that ``folder`` holds; raises DeployError where that is no artefact and no check."""
    if not folder.is_dir():
        raise DeployError(f"{folder} is not a folder; name the one that the artefacts were written to")
    found = _Found()
    for path in _json_files(folder, found):
        try:
            _sort_in(folder, path, found)
        except Unreadable as error:
            found.skip(path, error)
    items = ordered(_items(folder, found))
    if not items:
        raise DeployError(
            f"{folder} holds no manifest of an artefact and no {CHECK}{_skipped(found)}; export into it first, such as "
            "with: nextvit-export onnx --output DIR"
        )
    return Collected(
        name=clean(folder.resolve().name, 80),
        items=items,
        skipped=tuple(sorted(found.skipped)),
        notes=tuple(found.notes),
        baseline=found.baseline,
    )


def _skipped(found: _Found) -> str:
    """Of what was left out the number and the first."""
    if not found.skipped:
        return ""
    (name, why), count = found.skipped[0], len(found.skipped)
    return f" ({count} JSON {'file was' if count == 1 else 'files were'} skipped: {name}: {why})"


def _json_files(folder: Path, found: _Found) -> list[Path]:
    """The JSON files in their order; hidden names, packages and what lies behind links are passed over."""
    paths: list[Path] = []

    def refuse(error: OSError) -> None:
        found.skip(Path(str(error.filename)).relative_to(folder), f"it can't be listed: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not name.endswith(".mlpackage"))
        here = Path(parent).relative_to(folder)
        ours = _KITS if _KIT in files else frozenset()
        wanted = (name for name in sorted(files) if name.endswith(".json") and not name.startswith("."))
        paths += [here / name for name in wanted if name not in ours]
        if len(paths) > _FILES:
            found.skipped.append(("", f"the folder holds more than {_FILES} JSON files; those beyond are left out"))
            return paths[:_FILES]
    return paths


def _sort_in(folder: Path, path: Path, found: _Found) -> None:
    fields = read(folder / path)
    if path.name == CHECK:
        _read_check(fields, path, found)
    elif path.name.endswith(_LAYERS):
        found.layers.append((path, _bisection(fields)))
    elif path.name.endswith(_EVALUATION):
        found.evaluated.append((path, _evaluated(fields)))
    elif {"artifact", "checks"} <= fields.values.keys():
        found.manifests.append((path, made_of(fields)))
    else:
        raise Unreadable("it is no manifest, bisection, evaluation or check of this tool")


def _read_check(fields: Fields, path: Path, found: _Found) -> None:
    found.notes += fields.texts("notes")
    found.baseline = found.baseline or "/".join(fields.text_or("baseline").split("/")[-2:])
    for number, row in enumerate(fields.many("rows")):
        try:
            found.rows.append(_row(row))
        except Unreadable as error:
            found.skip(path, f"row {number + 1}: {error}")


def _row(row: Fields) -> Item:
    cell, outcome = row.one("cell"), row.one("outcome")
    told = outcome.one_or_none("manifest")
    made = None if told is None else made_of(told)
    problems = tuple(each.text("message", 1000) for each in row.many("problems"))
    verdicts = [verdict_of(row), *([Verdict.NOT_VERIFIED] if made is None else [])]
    layers = outcome.one_or_none("layers")
    return Item(
        title=cell.text("name"),
        lane=cell.text_or("lane") or (made.lane if made else ""),
        precision=cell.text_or("precision") or (made.precision if made else ""),
        verdict=worst(verdicts),
        problems=problems,
        made=made,
        latencies=(*_ratio(outcome), *(made.latencies if made else ())),
        layers=None if layers is None else _bisection(layers),
        moves=tuple(_move(each) for each in row.many("moves")),
    )


def _ratio(outcome: Fields) -> Iterator[Latency]:
    ratio = outcome.number_or_none("latency")
    if ratio is not None:
        yield Latency("measured", f"{ratio:.2f}x PyTorch", f"{ratio:.2f} times PyTorch's in float32, on one CPU")


def _move(fields: Fields) -> Move:
    what, before, after = (fields.text(name) for name in ("what", "before", "after"))
    return Move(what, before, after, fields.text_or("allowed"), fields.flag("regression"))


def _bisection(fields: Fields) -> Bisection:
    return Bisection(
        artefact=fields.text("artefact"),
        sha256=fields.sha256("sha256"),
        series=tuple(_series(each) for each in fields.many("series")),
        notes=fields.texts("notes"),
    )


def _series(fields: Fields) -> Series:
    question, executor, against = (fields.text(name) for name in ("question", "executor", "against"))
    layers = (
        Layer(each.text("module"), each.text("operation"), each.text("kind"), each.number_or_none("error"))
        for each in fields.many("layers")
    )
    partings = (
        Parting(
            module=each.text("module"),
            operations=each.texts("operations"),
            kind=each.text("kind"),
            error=each.number("error"),
            input_error=each.number("input_error"),
            carries=each.texts("carries"),
            why=each.text_or("why"),
        )
        for each in fields.many("partings")
    )
    return Series(question, executor, against, fields.number("tolerance"), tuple(layers), tuple(partings))


def _evaluated(fields: Fields) -> Evaluated:
    artefact, dataset, figures = (fields.one(name) for name in ("artefact", "dataset", "figures"))
    ours, theirs = figures.one_or_none("artefact"), figures.one_or_none("pytorch")
    known = fields.one_or_none("thumbnails")
    thumbnails = {} if known is None else known.values
    return Evaluated(
        file=artefact.text("file"),
        sha256=artefact.sha256("sha256"),
        folder=dataset.text("folder"),
        count=figures.whole("count"),
        agreement=figures.number("agreement"),
        flipped=sum(each.whole("count") for each in figures.many("flips")),
        can_flip=figures.whole("can_flip"),
        not_finite=figures.whole("not_finite"),
        sqnr_db=figures.number("sqnr_db"),
        top1=None if ours is None or theirs is None else (ours.number("top1"), theirs.number("top1")),
        pictures=tuple(_picture(each, thumbnails) for each in fields.one("worst").many("by_margin")[:24]),
    )


def _picture(fields: Fields, thumbnails: Mapping[str, object]) -> Picture:
    return Picture(
        name=fields.text("name"),
        label=None if fields.values.get("label") is None else fields.text("label", 80),
        pytorch=fields.text("pytorch", 80),
        artefact=fields.text("artefact", 80),
        margin=fields.number("margin"),
        relative_rms=fields.number("relative_rms"),
        thumbnail=_thumbnail(thumbnails.get(str(fields.whole("index")))),
    )


def _thumbnail(value: object) -> str | None:
    """A data URI; None for what is no JPEG in base64."""
    if not isinstance(value, str) or _THUMBNAIL.fullmatch(value) is None:
        return None
    try:
        base64.b64decode(value, validate=True)
    except ValueError:
        return None
    return f"data:image/jpeg;base64,{value}"


def _items(folder: Path, found: _Found) -> list[Item]:
    """Rows of the check and manifests that are in none of them, with what belongs to each by its hash."""
    known: dict[str, Item] = {}
    for path, made in sorted(found.manifests, key=lambda each: (len(each[0].parts), each[0])):
        item = _of_manifest(folder, path, made)
        earlier = known.get(made.sha256)
        if earlier is None or (not earlier.place and item.place):
            known[made.sha256] = item
    items, used = [], set()
    for row in found.rows:
        disk = known.get(row.made.sha256) if row.made else None
        items.append(row if disk is None else _joined(row, disk))
        used.add(disk.made.sha256 if disk and disk.made else "")
    items += [item for sha256, item in known.items() if sha256 not in used]
    return _with_findings(items, found)


def _of_manifest(folder: Path, path: Path, made: Made) -> Item:
    """A manifest's artefact; not verified where the file beside it is another one than it tells of."""
    beside = folder / path.with_name(path.name.removesuffix(".json"))
    item = Item(made.file, made.lane, made.precision, made.verdict, _reasons(made), made, made.latencies)
    try:
        if not beside.exists():
            return item
        same = sha256_of(beside) == made.sha256
    except OSError as error:
        return _doubted(item, f"{beside.name} can't be read: {error.strerror}")
    if not same:
        return _doubted(item, f"the file beside its manifest is another one than was verified: {beside.name}")
    return replace(item, place=beside.relative_to(folder).as_posix())


def _doubted(item: Item, why: str) -> Item:
    verdict = Verdict.FAILED if item.verdict is Verdict.FAILED else Verdict.NOT_VERIFIED
    return replace(item, verdict=verdict, problems=(clean(f"{why}; run verify on it"), *item.problems))


def _reasons(made: Made) -> tuple[str, ...]:
    return tuple(dict.fromkeys(f"{each.question}: {each.why}" for each in made.checks if each.why))


def _joined(row: Item, disk: Item) -> Item:
    """A check's row and the manifest beside the artefact, which may have been added to since."""
    latencies = tuple(dict.fromkeys((*row.latencies, *disk.latencies)))
    told = _reasons(disk.made) if disk.made else ()
    problems = (*(each for each in disk.problems if each not in told), *(row.problems or told))
    verdict = worst([row.verdict, disk.verdict])
    return replace(row, verdict=verdict, problems=problems, made=disk.made, latencies=latencies, place=disk.place)


def _with_findings(items: list[Item], found: _Found) -> list[Item]:
    """The items with their bisections and evaluations; those of no item are named as skipped."""
    hashes = {each.made.sha256 for each in items if each.made}
    layers, evaluated = {}, {}
    for path, bisected in found.layers:
        layers[bisected.sha256] = bisected
        if bisected.sha256 not in hashes:
            found.skip(path, f"it tells of {bisected.artefact}, of which no manifest is here; bisect it again")
    for path, figures in found.evaluated:
        evaluated[figures.sha256] = figures
        if figures.sha256 not in hashes:
            found.skip(path, f"it tells of {figures.file}, of which no manifest is here; evaluate it again")
    return [
        replace(
            each,
            layers=layers.get(each.made.sha256, each.layers),
            evaluated=evaluated.get(each.made.sha256),
        )
        if each.made
        else each
        for each in items
    ]
