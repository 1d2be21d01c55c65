"""Where outputs go: a folder that takes them is found out first, and an artefact comes with its manifest or not."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from nextvit_exporters.errors import DeployError, OutputNotWritten
from nextvit_exporters.files import atomic_path, atomic_write


def check_writable(output: Path) -> None:
    """Raise OutputNotWritten where ``output`` can't be made, before minutes are spent on it; leaves nothing behind."""
    with _folder_for(output):
        try:
            with tempfile.TemporaryFile(dir=output.parent):
                pass
        except OSError as error:
            raise _refused(output.parent, error) from error
        if output.is_dir():
            raise OutputNotWritten(f"{output} is a folder, where the output goes; remove it or choose another output")


@contextmanager
def published(artefact: Path, manifest: Path) -> Iterator[tuple[Path, Path]]:
    """Siblings of both to write, which take the two names together when the block succeeds.

    On any exception whatever was at both places is still there. Raises OutputNotWritten.
    """
    earlier = _bytes_of(manifest)
    with _folder_for(artefact):
        try:
            with (
                atomic_path(artefact) as sibling,
                atomic_path(manifest) as manifest_sibling,
                _named({sibling.name: artefact.name, manifest_sibling.name: manifest.name}),
            ):
                yield sibling, manifest_sibling
        except BaseException:
            if _bytes_of(manifest) != earlier:  # it took its name first, and the artefact could not follow
                _restore(manifest, earlier)
            raise


@contextmanager
def _folder_for(output: Path) -> Iterator[None]:
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
def _named(names: Mapping[str, str]) -> Iterator[None]:
    """Call outputs by their own names in errors, not by those they have while they are written."""
    try:
        yield
    except DeployError as error:
        message = str(error)
        for temporary, name in names.items():
            message = message.replace(temporary, name)
        raise type(error)(message) from error


def _refused(folder: Path, error: OSError) -> OutputNotWritten:
    reason = "it is a file, not a folder" if isinstance(error, FileExistsError) else error.strerror
    return OutputNotWritten(f"{folder} can't be written: {reason}; choose another output")


def _bytes_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _restore(path: Path, earlier: bytes | None) -> None:
    if earlier is None:
        path.unlink(missing_ok=True)
    else:
        atomic_write(path, earlier)


def _exists(folder: Path) -> bool:
    """Whether something is there; what can't be asked, such as a name too long, is found out by writing."""
    try:
        return folder.exists()
    except OSError:
        return True
