"""Where outputs go: a folder that takes them is found out first, and an artefact comes with its manifest or not."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nextvit_exporters.errors import DeployError, OutputNotWritten
from nextvit_exporters.files import not_written


def check_writable(output: Path) -> None:
    """Raise OutputNotWritten where ``output`` can't be made, before minutes are spent on it; leaves nothing behind."""
    with folder_for(output):
        try:
            with tempfile.TemporaryFile(dir=output.parent):
                pass
        except OSError as error:
            raise _refused(output.parent, error) from error
        if output.is_dir():
            raise OutputNotWritten(f"{output} is a folder, where the output goes; remove it or choose another output")


@contextmanager
def published(artefact: Path) -> Iterator[Path]:
    """The artefact's place in a hidden folder beside it, to write it and whatever belongs beside it.

    All that is in that folder when the block succeeds takes its place beside the artefact, which comes last and may be
    a folder itself. On any exception whatever was at those places is still there. Raises OutputNotWritten.
    """
    draft = artefact.with_name(f".{artefact.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    with folder_for(artefact):
        try:
            draft.mkdir()
            with _named(draft, artefact.parent):
                yield draft / artefact.name
                _move(draft, artefact)
        except OSError as error:
            if draft in Path(str(error.filename)).parents:
                raise not_written(artefact, error) from error
            raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _move(draft: Path, artefact: Path) -> None:
    """Give every file of ``draft`` its place, the artefact last; all of them or none."""
    files = sorted((each for each in draft.iterdir()), key=lambda each: (each.name == artefact.name, each.name))
    earlier = draft / "earlier"
    moved: list[Path] = []
    try:
        earlier.mkdir()
        for file in files:
            place = artefact.with_name(file.name)
            try:
                if place.is_file() or (place.is_dir() and file.is_dir()):
                    _keep(place, earlier / file.name)
                moved.append(place)
                file.replace(place)
            except OSError as error:
                raise not_written(place, error) from error
    except BaseException:
        for place in moved:
            _restore(place, earlier / place.name)
        raise


def _keep(place: Path, kept: Path) -> None:
    """A second name for what is at ``place``, or a copy where the file system has no such thing; a folder moves."""
    if place.is_dir():
        place.replace(kept)
        return
    try:
        kept.hardlink_to(place)
    except OSError:
        shutil.copy2(place, kept)


def _restore(place: Path, kept: Path) -> None:
    if place.is_dir() and kept.is_dir():
        shutil.rmtree(place)
    if kept.exists():
        kept.replace(place)
    elif place.is_file():
        place.unlink()


@contextmanager
def folder_for(output: Path) -> Iterator[None]:
    """Make the folders above ``output``; those that are empty afterwards are removed again."""
    missing = [folder for folder in output.parents if not _exists(folder)]
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _refused(output.parent, error) from error
        yield
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _named(draft: Path, folder: Path) -> Iterator[None]:
    """Name outputs in errors by where they will be, not by where they are written."""
    try:
        yield
    except DeployError as error:
        error.args = (str(error).replace(str(draft), str(folder)),)
        raise


def _refused(folder: Path, error: OSError) -> OutputNotWritten:
    reason = "it is a file, not a folder" if isinstance(error, FileExistsError) else error.strerror
    return OutputNotWritten(f"{folder} can't be written: {reason}; choose another output")


def _exists(folder: Path) -> bool:
    """Whether something is there; what can't be asked, such as a name too long, is found out by writing."""
    try:
        return folder.exists()
    except OSError:
        return True
