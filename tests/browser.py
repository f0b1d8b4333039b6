"""A real Chromium, and a server of the application in a thread, for tests that look at a page."""

import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

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


@contextmanager
def serving(application: Any) -> Iterator[str]:
    """The URL of the application on a free port of loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(application, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + 30
            while not server.started and thread.is_alive() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert server.started
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=30)
