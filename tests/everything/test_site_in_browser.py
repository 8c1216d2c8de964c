"""The built site in a headless Chromium, as a reader uses it. `bash launch/docs.sh` builds it first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import browser
import pytest

WAIT_S = 30.0  # a busy machine


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    if not (browser.SITE / "index.html").exists():
        pytest.fail("there is no site/index.html: run bash launch/docs.sh first")
    with browser.served(browser.SITE) as served:
        yield served


@pytest.fixture(scope="module")
def chrome(address) -> Iterator[Any]:
    """A missing Chromium fails: a skipped test would say that the site is good."""
    try:
        with browser.chromium() as running:
            yield running
    except browser.MissingBrowserError as error:
        pytest.fail(str(error))


def wait_for(chrome: Any, script: str, *arguments: object) -> Any:
    """The value of a script once it is true."""
    end = time.monotonic() + WAIT_S
    while True:
        value = chrome.execute_script(f"return {script}", *arguments)
        if value or time.monotonic() > end:
            assert value, f"never true: {script} {arguments} at {chrome.current_url}"
            return value
        time.sleep(0.05)


def load(chrome: Any, url: str) -> None:
    chrome.get(url)
    wait_for(chrome, "document.readyState == 'complete'")


def complaints(chrome: Any) -> list[str]:
    """What the console has got since the last call: errors of scripts, files that were not served."""
    return [entry["message"] for entry in chrome.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


# Of a page: every address that it leads to, and what a reader would see to be missing.
LINKS = "[...new Set([...document.querySelectorAll('a[href]')].map(a => a.href))]"
ANCHORS = "[...document.querySelectorAll('[id]')].map(e => e.id)"
MISSING_PICTURES = """[...document.images].filter(i => {i.loading = 'eager'; return !(i.complete && i.naturalWidth)})
    .map(i => i.src)"""
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def pages(chrome, address) -> dict[str, dict[str, Any]]:
    """Every page that can be reached from the home page by links -> its links, anchors and faults."""
    complaints(chrome)
    read: dict[str, dict[str, Any]] = {}
    waiting = [address + "index.html"]
    while waiting:
        page = waiting.pop()
        load(chrome, page)
        pictures = chrome.execute_script("return document.images.length")
        wait_for(chrome, f"({MISSING_PICTURES}).length == 0")
        links = [link for link in chrome.execute_script(f"return {LINKS}") if link.startswith(address)]
        read[page] = {
            "links": links,
            "anchors": set(chrome.execute_script(f"return {ANCHORS}")),
            "pictures": pictures,
            "complaints": complaints(chrome),
        }
        targets = {whole(link.partition("#")[0]) for link in links}
        waiting += sorted(target for target in targets - read.keys() - {*waiting} if target.endswith(".html"))
    return read


def whole(link: str) -> str:
    return link + "index.html" if link.endswith("/") else link


def test_every_page_is_reached_by_links_and_none_of_them_complains(pages, address) -> None:
    built = {address + path.relative_to(browser.SITE).as_posix() for path in browser.SITE.rglob("*.html")}
    assert built - pages.keys() <= {address + "404.html"}
    assert {page: read["complaints"] for page, read in pages.items() if read["complaints"]} == {}


def test_every_internal_link_leads_to_its_place(pages, address) -> None:
    broken = []
    for page, read in pages.items():
        for link in read["links"]:
            target, _, anchor = link.partition("#")
            if whole(target) not in pages:
                is_there = (browser.SITE / target.removeprefix(address)).is_file()
                broken += [] if is_there else [f"{page}: {link}"]
            elif anchor and anchor not in pages[whole(target)]["anchors"]:
                broken.append(f"{page}: {link}")
    assert broken == []
    assert sum(len(read["links"]) for read in pages.values()) > 1000


def test_no_picture_is_missing(pages) -> None:
    """`pages` has waited until every picture of each page was there."""
    shown = {path.name for path in (browser.SITE / "pictures").rglob("*.svg")}
    assert sum(read["pictures"] for read in pages.values()) >= len(shown) > 10


def test_a_reader_clicks_through_the_navigation(chrome, address) -> None:
    load(chrome, address + "index.html")
    tabs = chrome.execute_script("return [...document.querySelectorAll('.md-tabs__link')].map(a => a.innerText)")
    assert "API reference" in tabs and len(tabs) > 6
    for tab in tabs:
        find = "[...document.querySelectorAll('.md-tabs__link')].find(a => a.innerText == arguments[0])"
        wait_for(chrome, find, tab).click()
        wait_for(chrome, "document.readyState == 'complete' && document.querySelector('.md-content h1') != null")
        active = "document.querySelector('.md-tabs__item--active').innerText.trim() == arguments[0]"
        wait_for(chrome, active, tab)
        number = "document.querySelectorAll('.md-nav--primary .md-nav__item--active a.md-nav__link').length"
        wait_for(chrome, f"{number} > 0")


@pytest.mark.parametrize("question", ["FSDP2", "SwapError", "PowerSchedule"])
def test_the_search_answers(chrome, address, question) -> None:
    load(chrome, address + "index.html")
    wait_for(chrome, "document.querySelector('.md-search__input')")
    chrome.execute_script("document.querySelector('#__search').click()")
    typed = chrome.find_element("css selector", ".md-search__input")
    typed.send_keys(question)
    hit = wait_for(chrome, "[...document.querySelectorAll('.md-search-result__link')].map(a => a.href)[0]")
    load(chrome, hit)
    assert hit.startswith(address) and question in chrome.execute_script("return document.body.innerText")
    assert complaints(chrome) == []


def test_no_page_is_wider_than_a_telephone(chrome, address, pages) -> None:
    browser.resize(chrome, browser.WIDTHS["narrow"], 900)
    try:
        wide = []
        for page in pages:
            load(chrome, page)
            if chrome.execute_script(f"return {TOO_WIDE}") > 0:
                wide.append(page)
        assert wide == []
    finally:
        browser.resize(chrome, browser.WIDTHS["wide"], 900)
