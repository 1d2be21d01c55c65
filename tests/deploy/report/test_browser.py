"""The pages in a real browser: nothing fails, nothing shifts, all of it accessible, from a small phone to a desktop."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]  # it ships no types
from playwright.sync_api import Browser, BrowserContext, Dialog, Page, sync_playwright

from docs.browsers import BROWSERS, OPTIONS, find_browser
from nextvit_deploy.evaluate.report import page
from nextvit_deploy.report.page import write_report
from tests.deploy.report.support_report import checked, evaluated, whole

Scheme = Literal["light", "dark"]

_SHIFTS: Final = """
window.shifts = 0;
new PerformanceObserver(list => { for (const each of list.getEntries()) window.shifts += each.value; })
  .observe({ type: "layout-shift", buffered: true });
"""
_WHOLE: Final = "document.querySelectorAll('details').forEach(each => each.open = true)"
_SIZES: Final = ((320, 640), (390, 844), (1280, 900))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_browser()
    if path is None:
        why = f"no browser: set CHROMIUM, or install one of {', '.join(BROWSERS)}"
        if "CI" in os.environ:
            pytest.fail(why)
        pytest.skip(why)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=list(OPTIONS))
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "evaluation.html").write_text(page(evaluated()))
    made = {"failed": checked(folder / "failed"), "verified": whole(folder / "verified")}
    written = {name: write_report(each, folder / f"{name}.html") for name, each in made.items()}
    return written | {"evaluation": folder / "evaluation.html"}


class Watched:
    """A page with what went wrong on it."""

    def __init__(self, context: BrowserContext, path: Path) -> None:
        self.trouble: list[str] = []
        self.requests: list[str] = []
        self.page: Page = context.new_page()
        self.page.on("console", lambda each: self.trouble.append(each.text))
        self.page.on("pageerror", lambda each: self.trouble.append(str(each)))
        self.page.on("requestfailed", lambda each: self.trouble.append(each.url))
        self.page.on("request", lambda each: self.requests.append(each.url))
        self.page.on("dialog", self._dialog)
        self.page.goto(path.as_uri())

    def _dialog(self, shown: Dialog) -> None:
        self.trouble.append(shown.message)
        shown.dismiss()


def opened(browser: Browser, path: Path, size: tuple[int, int], scheme: Scheme = "light") -> Watched:
    """The page without a network; its policy is lifted for our own measuring only where a test says so."""
    width, height = size
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=True, bypass_csp=True
    )
    context.add_init_script(_SHIFTS)
    return Watched(context, path)


def close(watched: Watched) -> None:
    watched.page.context.close()


@pytest.mark.parametrize("name", ["failed", "verified", "evaluation"])
@pytest.mark.parametrize("size", _SIZES, ids=lambda size: str(size[0]))
def test_nothing_fails_shifts_or_sticks_out(
    browser: Browser, pages: dict[str, Path], name: str, size: tuple[int, int]
) -> None:
    watched = opened(browser, pages[name], size)
    shown = watched.page
    for step in ("0", "document.body.scrollHeight"):
        shown.evaluate(f"window.scrollTo(0, {step})")
        shown.wait_for_timeout(50)
    assert shown.evaluate("window.shifts") == 0
    shown.evaluate(_WHOLE)
    assert shown.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert watched.trouble == []
    assert [url for url in watched.requests if not url.startswith("data:")] == [pages[name].as_uri()]
    close(watched)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", _SIZES[1:], ids=lambda size: str(size[0]))
def test_all_of_it_is_accessible(
    browser: Browser, pages: dict[str, Path], size: tuple[int, int], scheme: Scheme
) -> None:
    for name in ("failed", "evaluation"):
        watched = opened(browser, pages[name], size, scheme)
        watched.page.evaluate(_WHOLE)
        results = Axe().run(watched.page)
        assert results.violations_count == 0, results.generate_report()
        assert len(results.response["passes"]) > 15
        close(watched)


def test_a_cards_link_opens_its_artefact(browser: Browser, pages: dict[str, Path]) -> None:
    watched = opened(browser, pages["verified"], _SIZES[1])
    closed = watched.page.locator("details.artefact:not([open])")
    assert closed.count() == 3
    watched.page.locator(".card h3 a").last.click()
    assert closed.count() == 2
    close(watched)


def test_thumbnails_are_shown_in_a_box_that_is_there_before(browser: Browser, pages: dict[str, Path]) -> None:
    watched = opened(browser, pages["verified"], _SIZES[1])
    watched.page.evaluate(_WHOLE)
    image = watched.page.locator("figure img").first
    wide, high, width, height = image.evaluate("e => [e.naturalWidth, e.naturalHeight, e.width, e.height]")
    assert (wide, high) == (96, 64)
    assert width == height > 64
    close(watched)


def test_light_and_dark_look_their_part(browser: Browser, pages: dict[str, Path]) -> None:
    """Charts follow: their colours are the page's."""
    seen = []
    for scheme in ("light", "dark"):
        watched = opened(browser, pages["verified"], _SIZES[1], "dark" if scheme == "dark" else "light")
        ask = "each => getComputedStyle(each).fill"
        seen.append(
            (
                watched.page.locator(".drawn svg text").first.evaluate(ask),
                watched.page.evaluate("getComputedStyle(document.body).backgroundColor"),
            )
        )
        close(watched)
    (light_text, light_page), (dark_text, dark_page) = seen
    assert light_text != dark_text
    assert light_page != dark_page


def test_the_policy_holds_off_whatever_is_put_in(browser: Browser, tmp_path: Path, pages: dict[str, Path]) -> None:
    """Were text ever to become markup: nothing of it would load or run."""
    text = pages["verified"].read_text()
    evil = '<img src="http://127.0.0.1:9/x.png"><script>document.title = "run"</script>'
    (tmp_path / "evil.html").write_text(text.replace("<main>", f"<main>{evil}"))
    context = browser.new_context(offline=True)
    watched = Watched(context, tmp_path / "evil.html")
    assert watched.page.title() == "Verified: verified"
    assert len([each for each in watched.trouble if "Content Security Policy" in each]) == 2
    close(watched)
