"""A real Chromium, for tests that look at a page."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
NO_CHROMIUM = "no Chromium found: install one (Debian: apt-get install chromium) or name it in SEQRAY_CHROMIUM"


def chromium_path() -> str | None:
    """The browser of SEQRAY_CHROMIUM, else one on the PATH."""
    named = os.environ.get("SEQRAY_CHROMIUM")
    if named:
        return named if Path(named).is_file() else None
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser, by Playwright; asks nothing of other hosts."""
    from playwright.sync_api import sync_playwright

    arguments = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        # As root, as in most containers, Chromium starts without its sandbox only; the page is our own.
        browser = playwright.chromium.launch(
            executable_path=chromium_path(), args=arguments, chromium_sandbox=os.geteuid() != 0
        )
        try:
            yield browser
        finally:
            browser.close()
