"""Build an artefact again from what it records of itself and its checkpoint, and say what differs.

What an artefact records is enough for that: the spec, the settled decisions in it (what is kept in float32, which
blocks stay in floating point), and the fingerprints of the weights and of what it was calibrated on.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nextvit_deploy import pipeline
from nextvit_deploy.calibration_again import Again, calibrated_again
from nextvit_deploy.contents import Difference, compare, contents_of, other_entries
from nextvit_deploy.manifest import manifest_path, provenance
from nextvit_deploy.origin import check_same_model, read, recorded_spec
from nextvit_deploy.outputs import published
from nextvit_deploy.quantization import bring_along
from nextvit_exporters import graph as g
from nextvit_exporters import targets, to_onnx
from nextvit_exporters.errors import DeployError, NotExecutable, OutputNotWritten, UnsupportedSpec
from nextvit_exporters.files import sha256_of, size_of
from nextvit_exporters.spec import ExportSpec
from nextvit_models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from nextvit_exporters.targets import Target

OnStep = Callable[[str], None]
_ENGINE: Final = ".engine"


@dataclass(frozen=True, slots=True)
class Request:
    """What the user typed: the artefact, what it was made from, and where the rebuilt one shall stay."""

    artefact: Path
    checkpoint: str | None = None
    ema: bool = False
    calibration: Path | None = None
    keep: Path | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """A file that is given and the same one built here, by SHA-256 and size in bytes."""

    file: str
    sha256: str
    bytes: int
    rebuilt_sha256: str
    rebuilt_bytes: int

    @property
    def identical(self) -> bool:
        """Whether both hold the same bytes."""
        return self.sha256 == self.rebuilt_sha256


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What came of it: each file beside its rebuilt one, what differs in the order of causes, and what to know."""

    artefact: str
    checkpoint: str
    files: tuple[Pair, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    kept: str | None
    seconds: Mapping[str, float]

    @property
    def identical(self) -> bool:
        """Whether every file is byte-identical."""
        return all(each.identical for each in self.files)

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        files = [asdict(each) | {"identical": each.identical} for each in self.files]
        result = "byte-identical" if self.identical else "differs"
        return {"result": result, **asdict(self), "files": files}


@dataclass(frozen=True, slots=True)
class _Recorded:
    """What an artefact says of itself, and of an engine what the log beside it says."""

    target: Target
    made: ExportSpec
    """The spec of the graph, of an engine that of its ONNX file."""
    spec: ExportSpec
    """The spec of the artefact."""
    source: Path
    """Where the graph is: the artefact, or the ONNX file beside an engine."""
    record: Mapping[str, object]


def reproduce(request: Request, on_step: OnStep) -> Reproduction:
    """Build the artefact again in a temporary place, or in ``keep``, and compare the bytes.

    Raises NotExecutable where it can't be built here, so that nothing is known: it records nothing of itself, its
    calibration or an optional dependency is gone, or the tool that built it refuses here. Raises any other DeployError
    for what the user can mend.
    """
    clock = pipeline.Clock(on_step)
    with clock.step("load the checkpoint"):
        told = _recorded(request.artefact)
        checkpoint = pipeline.open_checkpoint(request.checkpoint, ema=request.ema)
        check_same_model(request.artefact, told.made, checkpoint)
        _check_buildable(told)
        _check_apart(request)
    with clock.step("certify passes"):
        graph, passes = pipeline.rewrite(told.made, checkpoint, on_step)
    with _place(request) as draft:
        written = provenance(told.made, pipeline.describe(checkpoint), passes)
        with clock.step("calibrate it again"):
            again = calibrated_again(told.made, graph, told.source, request.calibration, on_step)
            if again.graph is not graph:
                g.release(graph)
        with clock.step("build it again"), _not_here(told):
            notes = (*again.notes, *_build(told, again, draft, written, on_step))
        with clock.step("compare"):
            places = [(request.artefact, draft)]
            if told.source != request.artefact:
                places.insert(0, (told.source, told.target.source(draft)))
            pairs = tuple(map(_pair, *zip(*places, strict=True)))
            found = () if all(each.identical for each in pairs) else _causes(told, written, checkpoint, again)
            for (given, built), pair in zip(places, pairs, strict=True):
                found = (*found, *_in_bytes(given, built, pair))
            if not found and not all(each.identical for each in pairs):
                found = (Difference("bytes", "the same network and entries, written in other bytes"),)
        if request.keep is not None:
            bring_along(told.made, told.source, draft)
    kept = None if request.keep is None else str(request.keep / request.artefact.name)
    notes = (*notes, *_only_recorded(found))
    return Reproduction(
        str(request.artefact), checkpoint.name, pairs, _in_order(found), notes, kept, dict(clock.seconds)
    )


def _recorded(path: Path) -> _Recorded:
    """What the artefact was built from; raises NotExecutable where it doesn't say."""
    target = targets.of_file(path)
    saved = read(target, path)  # first, for it tells what is damaged
    source = path
    if path.suffix == _ENGINE:
        from nextvit_exporters.to_tensorrt import log_of, onnx_of

        source = onnx_of(path)
        if not source.is_file() or not log_of(path).is_file():
            raise NotExecutable(f"{source.name} and {log_of(path).name} are not both beside {path.name}; bring them")
        saved = read(to_onnx, source)
    if not saved.provenance:
        raise NotExecutable(f"{source.name} says nothing of how it was made ({saved.without_provenance})")
    made = recorded_spec(saved.provenance)
    of_onnx = made.target in {"onnx", "tensorrt"}
    if of_onnx is not (source.suffix == to_onnx.SUFFIX):
        raise UnsupportedSpec(f"the manifest inside {source.name} tells of another target, {made.target}")
    spec = target.adopt(made, path)
    if path.suffix == _ENGINE and spec.engine is None:
        raise NotExecutable(f"the log beside {path.name} does not say how it was built")
    return _Recorded(target, made, spec, source, saved.provenance)


def _check_buildable(told: _Recorded) -> None:
    """Raise NotExecutable where the tool that built it is not here."""
    with _not_here(told):
        targets.load(told.made.target).check_spec(told.made)
        if told.source.suffix == to_onnx.SUFFIX and told.target is not targets.load("onnx") and told.spec.engine:
            from nextvit_exporters.tensorrt.choice import choose

            choose(told.spec.engine.backend, told.spec.engine.gpu)


def _check_apart(request: Request) -> None:
    """Raise UnsupportedSpec where the rebuilt artefact would take the place of the one that it is compared with."""
    if request.keep is not None and (request.keep / request.artefact.name).resolve() == request.artefact.resolve():
        raise UnsupportedSpec(f"{request.keep} is where {request.artefact.name} is; give another folder with --keep")


@contextmanager
def _not_here(told: _Recorded) -> Iterator[None]:
    """Say of anything that a builder refuses that it can't be built here; an output's own trouble passes."""
    try:
        yield
    except (NotExecutable, OutputNotWritten):
        raise
    except DeployError as error:
        raise NotExecutable(f"{told.source.name} can't be built again here: {error}") from error


@contextmanager
def _place(request: Request) -> Iterator[Path]:
    """Where to build, under the artefact's own name; gone afterwards, or kept whole."""
    if request.keep is not None:
        with published(request.keep / request.artefact.name) as draft:
            yield draft
        return
    with tempfile.TemporaryDirectory(prefix="nextvit-reproduce-") as folder:
        yield Path(folder) / request.artefact.name


def _build(
    told: _Recorded, again: Again, draft: Path, written: Mapping[str, object], on_step: OnStep
) -> tuple[str, ...]:
    """Write the artefact as its exporter did, an engine behind its ONNX file; returns what to know of it."""
    builder: Target = to_onnx if told.source.suffix == to_onnx.SUFFIX else told.target
    module = builder.lower(told.made, again.graph)
    g.release(again.graph)
    first = draft if told.source.suffix != to_onnx.SUFFIX else draft.with_suffix(to_onnx.SUFFIX)
    builder.build(told.made, module, first, written, on_step, again.examples)
    g.release(module)
    if draft.suffix != _ENGINE or told.spec.engine is None:
        return ()
    from nextvit_exporters.to_tensorrt import assemble

    engine, cache = told.spec.engine, told.spec.engine.timing_cache
    notes: tuple[str, ...] = ()
    if cache is not None:  # its name alone is recorded
        beside = told.source.with_name(cache.name)
        engine = replace(engine, timing_cache=draft.with_name(cache.name))
        if beside.is_file():
            shutil.copy(beside, draft.with_name(cache.name))
        where = "taken from beside it" if beside.is_file() else "which is not beside it, so kernels were timed anew"
        notes = (f"it was built with the timing cache {cache.name}, {where}",)
    assemble(replace(told.spec, engine=engine), draft, on_step)
    return notes


def _pair(given: Path, built: Path) -> Pair:
    return Pair(given.name, sha256_of(given), size_of(given), sha256_of(built), size_of(built))


def _causes(
    told: _Recorded, written: Mapping[str, object], checkpoint: Checkpoint, again: Again
) -> tuple[Difference, ...]:
    """Why the bytes may differ: other weights, other tools, other passes, another calibration."""
    found: list[Difference] = []
    before, after = (_mapping(each.get("checkpoint")) for each in (told.record, written))
    if before.get("fingerprint") != after.get("fingerprint"):
        weights = str(before.get("fingerprint"))[:12]
        found.append(
            Difference("checkpoint", f"it was made from other weights ({weights}) than {checkpoint.name} holds")
        )
    elif before != after:
        found.extend(other_entries("checkpoint", "the checkpoint was read in another layout", before, after))
    versions = (_mapping(each.get("versions")) for each in (told.record, written))
    found.extend(other_entries("versions", "it was written by other versions than are installed", *versions))
    passes = _mapping(told.record.get("passes")), _mapping(written.get("passes"))
    found.extend(other_entries("passes", "other passes ran, or found other places to rewrite", *passes))
    found.extend(again.differences)
    return tuple(found)


def _in_bytes(given: Path, built: Path, pair: Pair) -> tuple[Difference, ...]:
    """Whether a file was changed after it was written, and what in it differs."""
    if pair.identical:
        return ()
    found: tuple[Difference, ...] = ()
    others = {name: sha for name, sha in _recorded_hashes(given) if sha != pair.sha256}
    if others:
        same = "; what is built here is what was written then" if {*others.values()} == {pair.rebuilt_sha256} else ""
        since = f"{' and '.join(others)} {'was' if len(others) == 1 else 'were'} written"
        found = (Difference("changed", f"{given.name} has changed since {since}{same}"),)
    held = _engines(given, built) if given.suffix == _ENGINE else compare(contents_of(given), contents_of(built))
    return (*found, *held)


def _engines(given: Path, built: Path) -> tuple[Difference, ...]:
    """What the headers and the builder's logs tell of two engines."""
    from nextvit_exporters.to_tensorrt import read as read_engine

    before, after = read_engine(given), read_engine(built)
    facts = [{name: str(each.facts.get(name)) for name in ("built by", "for")} for each in (before, after)]
    if facts[0] != facts[1]:
        return other_entries("engine", "it was built by another TensorRT, or for another GPU", facts[0], facts[1])
    if not before.ops:
        return (Difference("engine", "other bytes; its log does not tell of them, so its kernels are not known"),)
    if before.ops != after.ops:
        return other_entries("engine", "the builder chose other kernels, counted by kind", before.ops, after.ops)
    first, second = given.read_bytes(), built.read_bytes()
    at = next((at for at, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), -1)
    where = f"the first other byte is at {at}" if at >= 0 else "one is the other's beginning"
    return (Difference("engine", f"the same kernels in {len(first)} bytes, here {len(second)}; {where}"),)


def _recorded_hashes(path: Path) -> Iterator[tuple[str, str]]:
    """Who else recorded the file's SHA-256, and that: the manifest beside it, and an engine's log."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        yield manifest_path(path).name, str(json.loads(manifest_path(path).read_bytes())["artifact"]["sha256"])
    from nextvit_exporters.to_tensorrt import Origin, log_of

    log = log_of(path.with_suffix(_ENGINE))
    if path.suffix not in {_ENGINE, to_onnx.SUFFIX} or not log.is_file():
        return
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    origin = Origin.of_line(lines[-1]) if lines else None
    if origin is not None:
        yield log.name, origin.engine if path.suffix == _ENGINE else origin.onnx


def _only_recorded(found: tuple[Difference, ...]) -> tuple[str, ...]:
    """That the network is the same, where nothing but what is recorded of its making differs."""
    causes = {each.cause for each in found}
    alike = causes and causes <= {"versions", "metadata", "bytes"}
    return ("operations, their wiring and every constant are the same",) if alike else ()


def _in_order(found: tuple[Difference, ...]) -> tuple[Difference, ...]:
    """Causes first, each once; then what they led to."""
    order = (
        "checkpoint",
        "versions",
        "passes",
        "calibration",
        "changed",
        "structure",
        "constants",
        "metadata",
        "engine",
        "bytes",
    )
    return tuple(sorted(dict.fromkeys(found), key=lambda each: order.index(each.cause)))


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
