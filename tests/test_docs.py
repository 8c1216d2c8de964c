"""Every Python snippet in the documentation runs as it stands, and every link points at something."""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from dist_ema.schedules.records import schedule_from_text

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPETS = [
    pytest.param(code, id=f"{page.name}-{index}")
    for page in PAGES
    for index, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec", "ignore:The '.*_dataloader' does not have many")
@pytest.mark.parametrize("code", SNIPPETS)
def test_snippet_runs(code, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    try:
        exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_at_something(page) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


MOST_LINES_OF_A_PAGE = 150
WRITTEN = [page for page in PAGES if page.is_relative_to(ROOT / "docs") and page.name != "cli.md"]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_is_short_enough_to_be_read(page) -> None:
    """A page has one job; what is longer is two pages. The help of the command line writes its own page."""
    lines = page.read_text().count("\n")
    assert lines <= MOST_LINES_OF_A_PAGE, f"{page.name} has {lines} lines, expected at most 150: split it by the job"


def test_every_trap_names_tests_that_exist() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "traps.md").read_text() + (ROOT / "CHANGELOG.md").read_text())
    assert len(named) >= 35
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_pictures_are_drawn_by_their_script_from_schedules_as_they_are_now() -> None:
    folder = ROOT / "docs" / "pictures"
    drawn = {"profile"}
    for line in (folder / "make.sh").read_text().replace("\\\n", "").splitlines():
        if line.startswith("draw "):
            _, name, _, *texts = shlex.split(line)
            drawn.add(name)
            picture = html.unescape((folder / f"{name}.svg").read_text())
            for text in texts:
                schedule_from_text(text)
                assert text.replace("_000", "000") in picture.replace("_000", "000"), f"{name}.svg does not show {text}"
    measured = {path.stem for path in folder.glob("growth_*.svg")}
    assert drawn == {path.stem for path in folder.glob("*.svg")} - measured


def test_pictures_of_growth_are_those_that_their_benchmark_draws_and_the_page_shows() -> None:
    measured = {path.name for path in (ROOT / "docs" / "pictures").glob("growth_*.svg")}
    benchmark = (ROOT / "launch" / "bench" / "growth.py").read_text()
    drawn = {f"growth_{name}.svg" for name in re.findall(r'^    "(\w+)": Growth\(', benchmark, re.MULTILINE)}
    page = (ROOT / "docs" / "performance" / "growth.md").read_text()
    assert measured == drawn == set(re.findall(r"\(\.\./pictures/(growth_\w+\.svg)\)", page)) != set()
