"""Reading and writing files without leaving half of one behind."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from nextvit_models.errors import OutputNotWritten

_CHUNK: Final = 1 << 20


def sha256_of(path: Path) -> str:
    """SHA-256 of the bytes of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a sibling of ``path`` to write to; it takes the name ``path`` only when the block succeeds.

    On any failure the sibling is removed and a file already at ``path`` is left as it was. An ``OSError`` (disk
    full, read-only, no such folder) becomes an ``OutputNotWritten``.
    """
    sibling = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield sibling
        sibling.replace(path)
    except OSError as error:
        raise OutputNotWritten(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            sibling.unlink()
