"""Where work that can be taken up again is kept between two commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from nextvit_exporters.errors import DeployError, OutputNotWritten

VARIABLE: Final = "NEXTVIT_DEPLOY_CACHE"
"""Environment variable that names another folder."""


def cache_folder(kind: str) -> Path:
    """The folder for one kind of work, which may not exist yet: below the variable's, else the system's for caches.

    That is ``$XDG_CACHE_HOME`` or ``~/.cache``, on macOS ``~/Library/Caches``, on Windows ``%LOCALAPPDATA%``.
    Raises DeployError where the user has no home and the variable names none.
    """
    chosen = os.environ.get(VARIABLE)
    return (Path(chosen) if chosen else _of_system() / "nextvit-deploy") / kind


def not_kept(folder: Path, error: OSError | OutputNotWritten) -> str:
    """Why nothing can be kept in ``folder``, without what to do about an output, which it is not."""
    reason = error.strerror if isinstance(error, OSError) else str(error).partition(" was not written: ")[2]
    return f"{folder} can't be written: {(reason or 'it refuses').partition(';')[0]}"


def _of_system() -> Path:
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches"
    variable, default = ("LOCALAPPDATA", "AppData/Local") if os.name == "nt" else ("XDG_CACHE_HOME", ".cache")
    told = os.environ.get(variable)
    return Path(told) if told and Path(told).is_absolute() else _home() / default


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise DeployError(f"there is no home folder to keep unfinished work in; name one in {VARIABLE}") from error
