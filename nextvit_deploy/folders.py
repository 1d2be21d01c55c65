"""Folders that appear whole or not at all, and take the place only of an earlier one of the same kind."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nextvit_deploy.outputs import check_writable, folder_for
from nextvit_exporters.errors import OutputNotWritten
from nextvit_exporters.files import atomic_path


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of folder that this program writes.

    ``name`` is its name in errors: ``kit``. ``is_marked`` tells such a folder by what stands in it. ``files`` is
    everything that one may hold, as paths relative to it: what else is there is the user's, and is never deleted.
    """

    name: str
    is_marked: Callable[[Path], bool]
    files: Collection[str]


@contextmanager
def published_folder(folder: Path, kind: Kind) -> Iterator[Path]:
    """Give a hidden, empty sibling folder to fill; it takes the name ``folder`` when the block succeeds.

    An empty folder, or an earlier one of ``kind`` with nothing else in it, is replaced; on any exception it is still
    there, and folders made on the way are gone. Raises OutputNotWritten where something else is in the way, or the
    system refuses.
    """
    check_replaceable(folder, kind)
    aside = folder.with_name(f".{folder.name}.old-{os.getpid()}-{secrets.token_hex(4)}")
    with folder_for(folder):
        try:
            with atomic_path(folder) as sibling:
                sibling.mkdir()
                yield sibling
                check_replaceable(folder, kind)  # something may have come into it meanwhile
                with suppress(FileNotFoundError):
                    folder.replace(aside)
        finally:
            if aside.exists() and not folder.exists():
                aside.replace(folder)  # the new one did not take its place
            shutil.rmtree(aside, ignore_errors=True)


def check_place(folder: Path, kind: Kind) -> None:
    """Raise OutputNotWritten where ``published_folder`` would, before any work; leaves nothing behind."""
    check_replaceable(folder, kind)
    check_writable(folder.with_name(f".{folder.name}.tmp"))


def check_replaceable(folder: Path, kind: Kind) -> None:
    """Raise OutputNotWritten where ``folder`` is there and is anything but an earlier one of ``kind``."""
    if not is_filled(folder, kind.name):
        return
    if not kind.is_marked(folder):
        raise OutputNotWritten(f"{folder} is there and is no {kind.name} of this program; empty it or choose another")
    foreign = _first_foreign(folder, kind.files)
    if foreign is not None:
        raise OutputNotWritten(
            f"{folder} holds {foreign} besides the {kind.name}; move it away or choose another folder"
        )


def is_filled(folder: Path, what: str) -> bool:
    """Whether the folder is there with something in it; raises OutputNotWritten where it can't be one for ``what``."""
    if folder.name in {"", ".."}:
        raise OutputNotWritten(f"{folder} has no name of its own; choose a folder with one for the {what}")
    try:
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise OutputNotWritten(f"{folder} is there and is no folder; choose another for the {what}")
        return folder.is_dir() and any(folder.iterdir())
    except OSError as error:
        raise OutputNotWritten(f"{folder} can't be looked into: {error.strerror}; choose another") from error


def _first_foreign(folder: Path, files: Collection[str]) -> str | None:
    """The first entry, in order of names and at any depth, that is neither in ``files`` nor a folder on the way."""
    folders = {parent.as_posix() for file in files for parent in PurePosixPath(file).parents}
    for each in sorted(folder.rglob("*")):
        name = each.relative_to(folder).as_posix()
        known = folders if each.is_dir() else files
        if name not in known or each.is_symlink():
            return name
    return None
