"""Calibration images in, steps out: with progress, taken up again where it was interrupted, and done only once.

What is found depends on the graph, the images and what is asked, and on nothing else. All of that is in the key under
which it is kept, so what was found on another checkpoint or on other images can't be taken for it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nextvit_deploy.cache import cache_folder, not_kept
from nextvit_deploy.data import Pictures
from nextvit_deploy.pictures_check import check_pictures
from nextvit_exporters.errors import DeployError, OutputNotWritten
from nextvit_exporters.quantize.calibration import SCHEMA, Calibration
from nextvit_exporters.quantize.sealed import read_sealed, write_sealed
from nextvit_exporters.quantize_spec import QuantizeSpec
from nextvit_exporters.spec import ExportSpec, quantize_of

if TYPE_CHECKING:
    from torch import fx

    from nextvit_exporters.quantize.observe import Observer

OnStep = Callable[[str], None]

AT_A_TIME: Final = 4
"""Images a batch: enough to be quick, little enough to leave peak memory alone."""
SAVE_EVERY: Final = 16
"""Images behind which what was found so far is saved: what an interruption costs at most."""
LOOKS: Final = 8
"""How often the steps are looked at on the way."""

_SAVING: Final = 0.1
"""Share of the time that saving may take; where a disk is slow it is done less often."""
_ENTRIES: Final = 16
"""Calibrations that are kept; those that were not written to for longest go first."""


def calibrate(
    spec: ExportSpec, graph: fx.GraphModule, pictures: Pictures, on_step: OnStep
) -> tuple[Calibration, tuple[str, ...]]:
    """What ``pictures`` tell of ``graph``, the float64 graph behind the passes, and what is to be known of that.

    Raises DeployError for pictures that are unfit, InvariantError where a tensor is not finite on them. Where the cache
    can't be written it goes without, and says so.
    """
    from nextvit_exporters.quantize.identity import graph_hash

    asked = quantize_of(spec)
    source = f"calibrated on {len(pictures)} of {pictures.total} images in {pictures.folder.resolve().name}"
    on_step("look for an earlier calibration")
    images, identity = pictures.fingerprint, graph_hash(graph)
    entry = _Entry(cache_folder("calibration") / _key(spec, asked, images, identity))
    found = entry.finished()
    if found is not None and (found.images, found.graph, found.count) == (images, identity, len(pictures)):
        return found, (source, *found.notes, "calibration taken from the cache: same weights, images and settings")
    checked = check_pictures(pictures, on_step)
    observer = _observer(asked, graph, entry)
    try:
        again = observer.count
        _see_all(spec, observer, pictures, entry, on_step)
        found = _result(asked, graph, observer, (images, identity), on_step)
    finally:
        observer.close()
    found = replace(found, notes=(*checked, str(observer.convergence())))
    entry.keep(found)
    resumed = (f"calibration taken up again after {again} of {len(pictures)} images",) if again else ()
    return found, (source, *found.notes, *resumed, *entry.notes)


def split(pictures: Pictures, count: int) -> tuple[Pictures, Pictures]:
    """``count`` pictures to calibrate on, spread evenly over classes, and all others to judge the result on.

    The last of each class in turn are taken, so that the first, which artefacts are verified on, are left. Raises
    DeployError where none would be left.
    """
    if not 0 < count < len(pictures):
        raise DeployError(
            f"there are {len(pictures)} pictures, some of which are for judging the result; calibrate on "
            f"{len(pictures) - 1} at most"
        )
    classes: dict[str | None, list[Path]] = {}
    for path, label in zip(pictures.paths, pictures.labels, strict=True):
        classes.setdefault(label, []).append(path)
    rounds = zip_longest(*(reversed(each) for each in classes.values()))
    taken = set(islice((path for each in rounds for path in each if path is not None), count))
    first = replace(pictures, paths=tuple(path for path in pictures.paths if path in taken))
    return first, replace(pictures, paths=tuple(path for path in pictures.paths if path not in taken))


@dataclass(slots=True)
class _Entry:
    """One calibration's folder in the cache. What can't be read there is as good as absent."""

    folder: Path
    notes: tuple[str, ...] = ()
    saved_at: int = 0
    busy_until: float = 0.0
    writable: bool = True

    @property
    def _finished(self) -> Path:
        return self.folder / "calibration.safetensors"

    @property
    def _state(self) -> Path:
        return self.folder / "state.safetensors"

    def finished(self) -> Calibration | None:
        """What was found before under the same key."""
        with suppress(DeployError):
            return Calibration.load(self._finished)
        return None

    def resume(self, observer: Observer) -> None:
        """Let the observer go on from where an earlier command was interrupted."""
        with suppress(DeployError):
            arrays, facts = read_sealed(self._state)
            if facts.get("key") == self.folder.name:
                observer.restore(arrays)
        self.saved_at = observer.count

    def save(self, observer: Observer) -> None:
        """Keep what was found so far, when it is time."""
        start = time.monotonic()
        if observer.count - self.saved_at < SAVE_EVERY or start < self.busy_until or not self.writable:
            return
        self._write(lambda: write_sealed(self._state, observer.state(), {"key": self.folder.name}))
        self.saved_at = observer.count
        self.busy_until = time.monotonic() + (time.monotonic() - start) / _SAVING

    def keep(self, found: Calibration) -> None:
        """Keep what was found, and let go of the way to it and of the oldest entries."""
        if not self.writable:
            return
        self._write(lambda: found.save(self._finished))
        for path in _listed(self.folder):
            if path != self._finished:
                with suppress(OSError):  # the remains of commands that were killed, or another one's at work
                    path.unlink()
        for path in sorted(_listed(self.folder.parent), key=_written, reverse=True)[_ENTRIES:]:
            shutil.rmtree(path, ignore_errors=True)

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except (OSError, OutputNotWritten) as error:
            self.writable = False
            why = not_kept(self.folder.parent, error)
            self.notes = (f"{why}; the calibration is not kept, and an interrupted one starts anew",)


def _key(spec: ExportSpec, asked: QuantizeSpec, images: str, identity: str) -> str:
    """SHA-256 over everything that what is found depends on."""
    import torch

    told = {
        "schema": SCHEMA,
        "graph": identity,
        "images": images,
        "input": str(spec.input),
        "io": str(spec.io),
        "method": asked.method,
        "rounding": asked.rounding,
        "rest": asked.rest,
        "batch": AT_A_TIME,
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _observer(asked: QuantizeSpec, graph: fx.GraphModule, entry: _Entry) -> Observer:
    from nextvit_exporters.quantize.observe import Observer
    from nextvit_exporters.quantize.placement import placement

    observer = Observer(graph, placement(graph), grams=asked.rounding == "gptq")
    entry.resume(observer)
    return observer


def _see_all(spec: ExportSpec, observer: Observer, pictures: Pictures, entry: _Entry, on_step: OnStep) -> None:
    """Show the observer what it has not seen yet."""
    import torch

    from nextvit_deploy.references import graph_inputs

    total, method = len(pictures), quantize_of(spec).method
    while observer.count < total:
        on_step(f"calibrate, {observer.count} of {total} images")
        images = pictures.read(observer.count, observer.count + AT_A_TIME)
        looked = LOOKS * observer.count // total
        observer.see(torch.tensor(graph_inputs(spec, images)))  # a copy: pictures are read-only
        if LOOKS * observer.count // total > looked:
            observer.look(method)
        entry.save(observer)


def _result(
    asked: QuantizeSpec, graph: fx.GraphModule, observer: Observer, names: tuple[str, str], on_step: OnStep
) -> Calibration:
    found = observer.result(asked.method, *names)
    if asked.rounding != "gptq":
        return found
    from nextvit_exporters.quantize.codes import codes
    from nextvit_exporters.quantize.placement import placement

    return replace(found, codes=codes(graph, placement(graph), observer.grams(), asked.rest, on_step))


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
