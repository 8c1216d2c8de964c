"""The documentation site: it builds without a warning, and its reference has every public name in full."""

from __future__ import annotations

import html
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cli_page
import pytest
import yaml

import dist_ema
from dist_ema import errors
from dist_ema.integrations import lightning, transformers
from dist_ema.live.state_dicts.stateful import StatefulAverages

ROOT = Path(dist_ema.__file__).parents[1]
CONFIG = ROOT / "launch" / "site" / "mkdocs.yml"

PUBLIC = {f"dist_ema.{name}": getattr(dist_ema, name) for name in dist_ema.__all__ if name != "__version__"}
ELSEWHERE = {
    "dist_ema.integrations.transformers.EMACallback": transformers.EMACallback,
    "dist_ema.integrations.lightning.EMACallback": lightning.EMACallback,
    "dist_ema.live.state_dicts.stateful.StatefulAverages": StatefulAverages,
}
ENTRIES = {**PUBLIC, **ELSEWHERE}

# Methods that are for integrations, for records, or for the package itself.
NOT_FOR_READERS = {"use", "to_json", "can_be_rebuilt", "patterns", "declares", "numbers", "number_at"}
# What may raise nothing: it computes, or keeps what it is given.
RAISES_NOTHING = {"kept", "momentum", "weight", "on_detach", "steps_around"}


def build(folder: Path, config: Path = CONFIG) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", folder]
    environ = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environ, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(folder)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def entries(site) -> dict[str, str]:
    """Full name -> the HTML of its entry in the reference, up to the next entry."""
    found: dict[str, str] = {}
    for page in (site / "reference").glob("*.html"):
        for entry in page.read_text(encoding="utf-8").split('<div class="doc doc-object ')[1:]:
            heading = re.search(r'<h\d id="([\w.]+)"', entry)
            if heading:
                found[heading[1]] = entry
    return found


def name_of(name: str, made: Any, entries: dict[str, str]) -> str:
    """The name of an entry: that of `dist_ema`, or where it is defined."""
    return name if name in entries else f"{made.__module__}.{made.__qualname__}"


def methods_of(kind: type) -> dict[str, Any]:
    """The public functions and properties that the classes of this package define."""
    owners = [owner for owner in kind.__mro__ if owner.__module__.startswith("dist_ema")]
    members = {name: member for owner in owners for name, member in vars(owner).items() if not name.startswith("_")}
    return {name: made for name, made in members.items() if inspect.isfunction(made) or isinstance(made, property)}


def all_entries(entries: dict[str, str]) -> dict[str, Any]:
    """Name in the reference -> what users call, but errors: functions, classes, and their methods and properties."""
    found = {}
    for public, made in ENTRIES.items():
        if not (inspect.isclass(made) and issubclass(made, errors.DistEMAError)):
            name = found_name = name_of(public, made, entries)
            found[name] = made
            if inspect.isclass(made) and not name.endswith("EMACallback"):  # a trainer calls its methods
                methods = methods_of(made).items()
                found |= {f"{found_name}.{name}": made for name, made in methods if name not in NOT_FOR_READERS}
    return found


def text_of(entry: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", entry))


def test_every_public_name_and_method_has_an_entry_in_the_reference(entries) -> None:
    wanted = {name_of(name, made, entries) for name, made in ENTRIES.items()} | all_entries(entries).keys()
    assert len(wanted) > 80
    assert sorted(wanted - entries.keys()) == []


def test_an_entry_has_every_argument_with_its_type_and_the_errors(entries) -> None:
    lacking = {}
    for name, made in all_entries(entries).items():
        if isinstance(made, property) or name.endswith(".momentum"):
            continue
        entry = entries[name]
        rows = re.findall(r"<b><code>\**(\w+)</code></b>\s*\(<code>(.*?)</code>", entry, re.DOTALL)
        typed = {argument for argument, kind in rows if text_of(kind).strip()}
        arguments = inspect.signature(made).parameters.keys() - {"self", "unnamed"}  # the latter is always refused
        if name.endswith("StatefulAverages"):  # `stateful` makes it
            continue
        if arguments - typed:
            lacking[name] = sorted(arguments - typed)
        elif arguments and "Raises:" not in text_of(entry) and name.rpartition(".")[2] not in RAISES_NOTHING:
            lacking[name] = ["Raises"]
    assert lacking == {}


def test_an_entry_says_who_must_call(entries) -> None:
    kinds = ("ShardedEMA", "StatefulAverages", "EMACallback")
    functions = ("dist_ema.attach", "dist_ema.consolidate_checkpoint", "dist_ema.merge", "dist_ema.synthesize")
    silent = []
    for name, made in all_entries(entries).items():
        is_property = isinstance(made, property) and not name.endswith(".state_dict")
        is_asked = any(kind in name for kind in kinds) or name in functions
        if is_asked and not is_property and not name.endswith("StatefulAverages") and "callers" not in entries[name]:
            silent.append(name)
    assert silent == []


def test_no_error_class_lacks_its_entry_with_what_to_do() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^### |\Z)", page, re.MULTILINE | re.DOTALL))
    assert sections.keys() == set(errors.__all__)
    assert [name for name, text in sections.items() if "\nDo: " not in text and "| do |" not in text] == []


def test_every_page_is_in_the_navigation_once() -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    nav = yaml.load(CONFIG.read_text(), Loader)["nav"]
    listed = pages_in(nav)
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    of_decisions = {page for page in there if page.startswith("decisions/0")}
    made = {"index.md", "tutorial.md", "changelog.md", "contributing.md", "security.md", "decisions/index.md"}
    assert sorted(listed) == sorted((there - of_decisions) | made)


def pages_in(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages_in(part)]


def test_a_link_to_a_page_that_is_not_there_fails_the_build(tmp_path) -> None:
    folder = tmp_path / "launch" / "site"
    folder.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    config = re.sub(r"^nav:.*?^not_in_nav", "not_in_nav", CONFIG.read_text(), flags=re.MULTILINE | re.DOTALL)
    (folder / "mkdocs.yml").write_text(config)
    shutil.copytree(CONFIG.parent / "theme", folder / "theme")
    (folder / "hooks.py").write_text("")
    (tmp_path / "docs" / "index.md").write_text("# Home\n\n[here](index.md#home), [nowhere](index.md#nowhere)\n")
    built = build(tmp_path / "site", folder / "mkdocs.yml")
    assert built.returncode == 1 and "nowhere" in built.stderr and "#home" not in built.stderr


def test_links_to_files_that_the_site_lacks_are_text_and_others_lead_to_pages(site) -> None:
    reference = (site / "reference" / "sharded_ema.html").read_text()
    assert "<code>dist_ema/ema.py</code>" in reference and 'href="../../dist_ema' not in reference
    home = (site / "index.html").read_text()
    assert 'href="tests/' not in home and 'title="tests/boxes/test_owners.py"' in home
    assert 'href="docs/' not in home and 'href="training.html"' in home and 'href="decisions/index.html"' in home


def test_a_search_finds_pages_for_users_and_neither_decisions_nor_the_changelog(site) -> None:
    places = [entry["location"] for entry in json.loads((site / "search" / "search_index.json").read_text())["docs"]]
    assert "questions.html#what-about-lora" in places and "security.html" in places
    assert [place for place in places if place.startswith(("decisions/", "changelog"))] == []


def test_nothing_is_loaded_from_elsewhere_when_a_page_is_read(site) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*?src="([^"]+)"|<link[^>]*?href="([^"]+)"', text)
        assert [address for pair in loaded for address in pair if "//" in address] == [], page


def test_no_page_names_the_machine_that_built_it(site) -> None:
    for page in site.rglob("*.html"):
        assert str(ROOT) not in page.read_text(encoding="utf-8"), page


def test_the_page_of_the_command_line_is_its_help_of_now() -> None:
    written, now = cli_page.PAGE.read_text(), cli_page.page()
    assert written.split() == now.split(), "run launch/site/cli_page.py"


def test_the_tutorial_is_a_page_with_what_its_code_drew(site) -> None:
    page = (site / "tutorial.html").read_text()
    assert page.count('src="tutorial_') == 3 and "equal bit for bit" in page and 'href="tutorial.html"' in page
    assert (site / "tutorial_3.png").read_bytes().startswith(b"\x89PNG")
