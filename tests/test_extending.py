"""docs/extending.md tells all the files to touch, and its answers lead to what it says."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import dist_ema

ROOT = Path(dist_ema.__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()


def files_of(folder: str, *suffixes: str) -> list[Path]:
    return [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in suffixes]


def names_in_code(path: Path, name: str) -> bool:
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    used |= {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.alias)}
    return name in used


RECIPES = ["A schedule", "An option", "A field of the manifest", "A layout"]
PATH = re.compile(r"`((?:dist_ema|docs|tests)/[\w./]*)`")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def naming(word: str) -> set[str]:
    """The files that a recipe must tell of: those that name its example."""
    files = [
        *files_of("dist_ema", ".py"),
        *files_of("docs", ".md", ".sh", ".svg"),
        *files_of("tests/golden", ".py", ".json"),
    ]
    named = {path.relative_to(ROOT).as_posix() for path in files if re.search(rf"\b{word}\b", path.read_text())}
    return {path for path in named if path != "docs/extending.md" and not path.startswith("docs/decisions/")}


def test_every_file_that_the_page_names_is_there() -> None:
    named = PATH.findall(PAGE)
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_names_all_the_files_of_its_example_and_no_other(title) -> None:
    text = section(title)
    example = re.search(r"^Example: `(\w+)`$", text, re.MULTILINE)[1]
    boxes = [PATH.findall(line) for line in text.splitlines() if line.startswith("- [ ]")]
    assert len(boxes) >= 3
    found = naming(example)
    told = {path for path in PATH.findall(text)}
    if title == "A layout":  # the word stands in many a sentence; the class in its file and the list
        code = {
            path.relative_to(ROOT).as_posix() for path in files_of("dist_ema", ".py") if names_in_code(path, example)
        }
        assert code <= told
    else:
        assert found <= told, f"{title}: the page does not tell of {sorted(found - told)}"
    for first, *_ in boxes:
        assert first.startswith("tests/") or first in found, f"{title}: {first} does not name {example}"


def test_the_page_answers_where_the_stages_of_a_save_are_and_who_owns_a_box() -> None:
    from dist_ema.boxes import owners
    from dist_ema.checkpoint import saving

    stages = re.findall(r"^ {4}(\d) ", saving.__doc__, re.MULTILINE)
    assert stages == sorted(stages) and len(stages) >= 4
    assert "owner" in owners.__doc__


def test_the_page_names_the_methods_of_a_layout() -> None:
    from dist_ema.topology.seam.layout import Layout

    methods = {name for name, each in vars(Layout).items() if inspect.isfunction(each) and not name.startswith("_")}
    text = section("A layout")
    assert len(methods) == 4 and [name for name in methods if f"`{name}`" not in text] == []
