"""Where work that can be taken up again is kept between two commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

VARIABLE: Final = "NEXTVIT_DEPLOY_CACHE"
"""Environment variable that names another folder."""


def cache_folder(kind: str) -> Path:
    """The folder for one kind of work, which may not exist yet: below the variable's, else the system's for caches.

    That is ``$XDG_CACHE_HOME`` or ``~/.cache``, on macOS ``~/Library/Caches``, on Windows ``%LOCALAPPDATA%``.
    """
    chosen = os.environ.get(VARIABLE)
    return (Path(chosen) if chosen else _of_system() / "nextvit-deploy") / kind


def _of_system() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    variable, default = ("LOCALAPPDATA", "AppData/Local") if os.name == "nt" else ("XDG_CACHE_HOME", ".cache")
    told = os.environ.get(variable)
    return Path(told) if told and Path(told).is_absolute() else Path.home() / default
