"""The built site in a headless Chromium: for its test, and to look at pages.

    python launch/site/browser.py OUT training.html schedules.html    # PNG of each, light and dark, wide and narrow

It needs chromium and chromium-driver of the system (Debian: apt-get install chromium chromium-driver) and the extra
`browser`. Nothing is loaded from the network.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import http.server
import itertools
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver

SITE = Path(__file__).parents[2] / "site"
WIDTHS = {"wide": 1400, "narrow": 400}  # pixels


class MissingBrowserError(RuntimeError):
    """There is no Chromium, or no driver of it."""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which the folder is served while the context lasts."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def chromium(width: int = WIDTHS["wide"], *, dark: bool = False) -> Iterator[Any]:
    """A headless Chromium, `width` pixels wide, that keeps its console log and finds no network.

    Raises:
        MissingBrowserError: a program is missing.
    """
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        raise MissingBrowserError(
            f"chromium is {browser}, chromedriver is {driver}, expected both on the path: apt-get install chromium "
            "chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        resize(chrome, width, 900)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield chrome
    finally:
        chrome.quit()


def resize(chrome: Any, width: int, height: int) -> None:
    """Give the page a size in pixels, also one narrower than a window may be."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def picture_of(chrome: Any) -> bytes:
    """A PNG of what the window shows."""
    return base64.b64decode(chrome.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"])


def main() -> None:
    """Take pictures of pages."""
    parser = argparse.ArgumentParser(description="Take pictures of pages of the built site.")
    parser.add_argument("out", type=Path)
    parser.add_argument("pages", nargs="+", help="training.html, reference/errors.html#dist_ema.errors.SwapError")
    parser.add_argument("--height", type=int, default=1600, help="pixels of each picture (default: 1600)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kinds = itertools.product(options.pages, WIDTHS, ("light", "dark"))
    with served(SITE) as address:
        for page, width, scheme in kinds:
            # A Chromium of its own: one that has drawn many large pictures may stop answering on a busy machine.
            with chromium(WIDTHS[width], dark=scheme == "dark") as chrome:
                resize(chrome, WIDTHS[width], options.height)
                chrome.get(address + page)
                path = options.out / f"{page.replace('/', '-').replace('.html', '')}-{scheme}-{width}.png"
                path.write_bytes(picture_of(chrome))
                print(path)


if __name__ == "__main__":
    main()
