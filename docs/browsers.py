"""Where a browser is that can be driven without a screen: for whoever looks at reports before people do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")
_ON_MACS: Final = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
OPTIONS: Final = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
"""With these it asks nobody on the network for anything."""


def find_browser() -> str | None:
    """``$CHROMIUM``, one on the PATH, or Chrome where macOS keeps it; None where there is none."""
    given = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    return given or (str(_ON_MACS) if _ON_MACS.is_file() else None)
