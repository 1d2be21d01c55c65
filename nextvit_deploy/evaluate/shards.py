"""The pictures in shards that don't hang on who works on them, and where finished shards are kept until all are."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from nextvit_deploy.cache import cache_folder, not_kept
from nextvit_deploy.data import Pictures
from nextvit_deploy.evaluate.results import ROW, Rows
from nextvit_exporters.errors import OutputNotWritten
from nextvit_exporters.files import atomic_write
from nextvit_exporters.spec import ExportSpec

_SHARD: Final = 32
"""Images: enough to make starting one cheap, few enough to lose little."""
_AT_A_TIME: Final = 8
"""Images for an artefact that takes any number: little enough to leave peak memory alone."""
_DIGEST: Final = hashlib.sha256().digest_size
_TRIES: Final = 5
"""How often a file is written whose folder another command removes, having finished."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Some pictures that follow each other, the first of them ``start`` (from 0) of all."""

    start: int
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __str__(self) -> str:
        return f"images {self.start + 1} to {self.start + len(self)}"


def at_a_time(spec: ExportSpec) -> int:
    """Images to feed the artefact at a time: about eight, and a multiple of what it takes."""
    least = 1 if spec.engine is None else spec.engine.batch.minimum
    return _multiple(_AT_A_TIME, least if spec.dynamic_batch else spec.batch)


def shards_of(pictures: Pictures, spec: ExportSpec) -> tuple[Shard, ...]:
    """About 32 pictures each, whole batches of them."""
    size = _multiple(_SHARD, at_a_time(spec))
    return tuple(Shard(start, tuple(pictures.paths[start : start + size])) for start in range(0, len(pictures), size))


def _multiple(least: int, unit: int) -> int:
    return -(-least // unit) * unit


@dataclass(slots=True)
class Store:
    """Finished shards of the work called ``key``, one file each; what is damaged counts as not finished.

    Another command may be at the same work: it writes the same, and either may remove it when it has all.
    """

    key: str
    trouble: str = ""
    """Why shards can't be kept, where they can't."""

    @property
    def folder(self) -> Path:
        """Where they are; may not exist."""
        return cache_folder("evaluate") / self.key

    def finished(self, shards: Sequence[Shard]) -> dict[int, Rows]:
        """What is there, by the shard's place in ``shards``."""
        found = {index: self._read(shard) for index, shard in enumerate(shards)}
        return {index: rows for index, rows in found.items() if rows is not None}

    def add(self, shard: Shard, rows: Rows) -> None:
        """Keep one, whole or not at all; where that fails once, no more are kept."""
        if self.trouble:
            return
        data = rows.tobytes()
        for _ in range(_TRIES):
            try:
                atomic_write(self._file(shard), self._digest(shard, data) + data)
            except FileNotFoundError:  # the folder was removed between two steps
                continue
            except (OSError, OutputNotWritten) as error:
                self.trouble = not_kept(self.folder.parent, error)
            return

    def remove(self) -> None:
        """Forget all; what another command writes meanwhile it removes itself."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.parent.rmdir()

    def _read(self, shard: Shard) -> Rows | None:
        try:
            data = self._file(shard).read_bytes()
        except OSError:
            return None
        digest, data = data[:_DIGEST], data[_DIGEST:]
        if digest != self._digest(shard, data) or len(data) != len(shard) * ROW.itemsize:
            return None
        return np.frombuffer(data, ROW)

    def _digest(self, shard: Shard, data: bytes) -> bytes:
        """Of the rows and of whose they are."""
        return hashlib.sha256(f"{self.key} {shard.start} {len(shard)} ".encode() + data).digest()

    def _file(self, shard: Shard) -> Path:
        return self.folder / f"{shard.start:09d}.rows"
