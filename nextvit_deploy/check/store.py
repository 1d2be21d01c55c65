"""Outcomes that are kept between checks, each under everything that it hangs on.

That is the cell, the bytes of the checkpoint, the pictures and the artefact, the versions of all packages that take
part, Python, the machine's kind, and this tool's own files. A cell whose key is known is not run again, as long as its
artefact is still what it was.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import nextvit_deploy
import nextvit_exporters
import nextvit_models
from nextvit_deploy.cache import cache_folder, not_kept
from nextvit_deploy.check.cells import Cell
from nextvit_deploy.check.result import Outcome
from nextvit_deploy.data import find_pictures
from nextvit_deploy.doctor import installed_versions
from nextvit_exporters.errors import DeployError, OutputNotWritten
from nextvit_exporters.files import atomic_write, sha256_of
from nextvit_models.demo import DEMO_CHECKPOINT, DEMO_IMAGES
from nextvit_models.preprocessing import Preprocessing

_CODE: Final = (nextvit_deploy, nextvit_exporters, nextvit_models)
_WITHOUT: Final = ("name", "checkpoint", "artefact", "images", "calibration")
"""Of a cell: what is in the key by its content."""


@dataclass(slots=True)
class Store:
    """Finished outcomes, one file each; with ``fresh`` none is taken, and what is found is kept all the same."""

    output: Path
    """The check's folder: the same cell for another one is another artefact."""
    threads: int
    """Of a cell's process; a calibration's sums hang on them in their last bits."""
    fresh: bool = False
    trouble: str = ""
    """Why outcomes can't be kept, where they can't."""
    _digests: dict[Path, str] = field(default_factory=dict)
    _ground: str = ""

    def find(self, cell: Cell) -> Outcome | None:
        """What the cell came to, where it is kept and its artefact is still there; None where it has to be run."""
        key = None if self.fresh else self.key_of(cell)
        if key is None:
            return None
        try:
            outcome = Outcome.from_dict(json.loads(_file(key).read_bytes()))
            manifest, artefact = outcome.manifest, outcome.artefact
            if manifest is None or artefact is None:
                return None
            return outcome if sha256_of(Path(artefact)) == manifest["artifact"]["sha256"] else None
        except (OSError, ValueError, TypeError, LookupError):  # gone, damaged, or of another version
            return None

    def add(self, cell: Cell, outcome: Outcome) -> None:
        """Keep an outcome that will be the same next time, whole or not at all; where that fails once, no more."""
        key = self.key_of(cell)
        if self.trouble or key is None or not outcome.finished:
            return
        try:
            atomic_write(_file(key), json.dumps(outcome.as_dict(), allow_nan=False).encode())
        except (OSError, OutputNotWritten) as error:
            self.trouble = not_kept(_file(key).parent, error)

    def key_of(self, cell: Cell) -> str | None:
        """SHA-256 over all that the outcome hangs on; None for what can't be told: a hub id, a file that is gone."""
        own = {name: value for name, value in cell.as_dict().items() if name not in _WITHOUT}
        try:
            read = {
                "checkpoint": self._digest(DEMO_CHECKPOINT if cell.checkpoint is None else Path(cell.checkpoint)),
                "artefact": None if cell.artefact is None else self._around(Path(cell.artefact)),
                "images": self._pictures(cell.images, cell.count),
                "calibration": cell.calibration and self._pictures(cell.calibration, cell.calibration_size),
            }
        except (OSError, DeployError):
            return None
        self._ground = self._ground or _ground()
        place = str(self.output.resolve() / cell.name)
        threads = self.threads if cell.precision == "int8" else None
        text = json.dumps([self._ground, place, own, read, threads], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _digest(self, path: Path) -> str:
        """A file's bytes, or those of all files of a folder; read once a check."""
        if path not in self._digests:
            self._digests[path] = sha256_of(path)
        return self._digests[path]

    def _pictures(self, folder: str | None, count: int) -> str:
        """The bytes of the pictures that are taken from a folder; of the demo's all."""
        if folder is None:
            return self._digest(DEMO_IMAGES) if DEMO_IMAGES.is_dir() else "noise"
        return find_pictures(Path(folder), count, (1, 1), Preprocessing()).fingerprint

    def _around(self, artefact: Path) -> list[str]:
        """An artefact and what lies beside it under its name: an engine's ONNX file, a calibration, a manifest."""
        beside = sorted(each for each in artefact.parent.iterdir() if each.name.startswith(artefact.stem))
        return [f"{each.name} {self._digest(each)}" for each in beside]


def _ground() -> str:
    """What every cell hangs on: versions, Python, the machine's kind, and this tool's own files."""
    found: dict[str, object] = {
        "versions": installed_versions(),
        "python": platform.python_version(),
        "machine": [platform.system(), platform.machine()],
        "code": _code(),
    }
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _code() -> str:
    """Of every file of the three packages: an editable installation changes without its version."""
    digest = hashlib.sha256()
    for path in _files([Path(next(iter(each.__path__))) for each in _CODE]):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(p for p in folder.rglob("*") if p.suffix in {".py", ".json", ".safetensors"} and p.is_file())


def _file(key: str) -> Path:
    return cache_folder("check") / f"{key}.json"
