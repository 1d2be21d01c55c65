"""Folders that appear whole or not at all, and take the place only of an earlier one of the same kind."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nextvit_exporters.errors import OutputNotWritten
from nextvit_exporters.files import atomic_path


@contextmanager
def published_folder(folder: Path, what: str, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Give a hidden, empty sibling folder to fill; it takes the name ``folder`` when the block succeeds.

    An empty folder, or one that ``is_ours`` recognises, is replaced; on any exception it is still there, and folders
    made on the way are gone. ``what`` names the kind in errors: ``kit``. Raises OutputNotWritten where something
    else is in the way, or the system refuses.
    """
    check_replaceable(folder, what, is_ours)
    missing = [parent for parent in folder.parents if not parent.exists()]
    aside = folder.with_name(f".{folder.name}.old-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with atomic_path(folder) as sibling:
            sibling.mkdir()
            yield sibling
            with suppress(FileNotFoundError):
                folder.replace(aside)
    finally:
        if aside.exists() and not folder.exists():
            aside.replace(folder)  # the new one did not take its place
        shutil.rmtree(aside, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()


def check_replaceable(folder: Path, what: str, is_ours: Callable[[Path], bool]) -> None:
    """Raise OutputNotWritten where ``folder`` holds anything but an earlier ``what``; leaves nothing behind."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputNotWritten(f"{folder} is there and is no folder; choose another for the {what}")
    if folder.is_dir() and any(folder.iterdir()) and not is_ours(folder):
        raise OutputNotWritten(f"{folder} is there and is no {what} of this program; empty it or choose another")
