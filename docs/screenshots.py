"""The README's pictures of a report: the demo's page in a real browser, on a desktop and on a phone.

    python -m docs.screenshots [FOLDER]

FOLDER is what ``nextvit-export all`` wrote; without one it is made anew. It takes Chromium or Chrome (``$CHROMIUM``, or
one on the PATH) and the ``dev`` extra.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Final, Literal

from PIL import Image
from playwright.sync_api import sync_playwright

from docs.browsers import OPTIONS, find_browser
from nextvit_deploy.report.page import REPORT, write_report

PLACE: Final = Path(__file__).parent
_COLOURS: Final = 128
SHOTS: Final[tuple[tuple[str, int, int, Literal["light", "dark"]], ...]] = (
    ("report-desktop", 1280, 1400, "light"),
    ("report-phone", 390, 844, "dark"),
)
"""Name, width, height in pixels, and the reader's theme."""


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="what nextvit-export all wrote; made anew when left out")
    folder: Path | None = parser.parse_args().folder
    browser = find_browser()
    if browser is None:
        sys.exit("no browser: set CHROMIUM, or install Chromium or Chrome")
    with tempfile.TemporaryDirectory() as name:
        if folder is None:
            folder = Path(name) / "exports"
            subprocess.run([sys.executable, "-m", "nextvit_deploy", "all", "--output", str(folder)], check=True)
        take(write_report(folder, Path(name) / REPORT), browser)


def take(page: Path, browser: str) -> None:
    """Open ``page`` at each size, and write what is seen beside this script."""
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=browser, args=list(OPTIONS))
        for name, width, height, scheme in SHOTS:
            context = launched.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=1, offline=True
            )
            shown = context.new_page()
            shown.goto(page.as_uri())
            picture = Image.open(BytesIO(shown.screenshot())).convert("RGB").quantize(_COLOURS)
            picture.save(PLACE / f"{name}.png", optimize=True)
            print(f"{PLACE / name}.png")
            context.close()
        launched.close()


if __name__ == "__main__":
    main()
