"""Whole files or none: outputs are written beside their place and renamed onto it."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from nextvit_models.errors import OutputNotWritten

_CHUNK: Final = 1 << 20
_REMEDY: Final = {
    errno.ENOSPC: "no space left on the disk; free some or choose another output",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another output",
    errno.EFBIG: "the file is too large for this file system; choose another output",
    errno.EACCES: "no permission to write there; choose another output",
    errno.EPERM: "no permission to write there; choose another output",
    errno.EIO: "the disk reports an error; choose another output",
    errno.EROFS: "the file system is read-only; choose another output",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another output",
    errno.EEXIST: "a part of the path is a file, not a folder; choose another output",
    errno.EISDIR: "it is a folder; name a file",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter output",
}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a hidden sibling of ``path`` to write; it takes the name ``path`` when the block succeeds.

    Missing parent folders are made. On any exception, KeyboardInterrupt included, the sibling (a file or a folder)
    is removed and whatever was at ``path`` is still there. Raises OutputNotWritten when the system refuses the
    output itself; an OSError about any other file passes unchanged.
    """
    if path.name in {"", ".."}:
        raise OutputNotWritten(f"{path} was not written: it is a folder; name a file")
    sibling = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield sibling
        sibling.replace(path)
    except OSError as error:
        if _is_about(error, sibling, path):
            raise not_written(path, error) from error
        raise
    finally:
        _remove(sibling)


def atomic_write(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, all of it or nothing. Raises OutputNotWritten."""
    with atomic_path(path) as sibling:
        sibling.write_bytes(data)


def not_written(path: Path, error: OSError) -> Exception:
    """Why the system refused the output ``path``, with what to do; ``error`` itself where there is no advice."""
    if error.errno not in _REMEDY:
        return error
    return OutputNotWritten(f"{path} was not written: {_REMEDY[error.errno]}")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits; of a folder that of its files' paths and hashes, by name."""
    digest = hashlib.sha256()
    if path.is_dir():
        for each in _files(path):
            digest.update(f"{sha256_of(each)}  {each.relative_to(path).as_posix()}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in _files(path)) if path.is_dir() else path.stat().st_size


def _files(folder: Path) -> list[Path]:
    return sorted(each for each in folder.rglob("*") if each.is_file())


def _is_about(error: OSError, sibling: Path, path: Path) -> bool:
    """Whether the refused file is the output: named so, or unnamed, as a full disk is by ``write``."""
    if not isinstance(error.filename, str | bytes):
        return True
    refused = Path(os.fsdecode(error.filename))
    return refused in {sibling, *path.parents} or sibling in refused.parents


def _remove(sibling: Path) -> None:
    """Remove a file or a folder; what is gone already, or was never there, is as wanted."""
    with suppress(OSError):
        sibling.unlink()
    shutil.rmtree(sibling, ignore_errors=True)
