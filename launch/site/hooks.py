"""What the site has beyond the pages of docs/: the files beside docs/ as pages, links between all of them, marks.

A link in a page is one of the repository, so that the page works on a file host too. Here a link to a page becomes one
within the site, and a link to another file becomes plain text, since the site does not have that file.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from tutorial_page import pages_of

_ROOT = Path(__file__).parents[2]

# Pages that name everything, so that a search would find them first: the site's search leaves them out.
_NOT_SEARCHED = ("changelog.md", "decisions/")

# File of the repository -> its page. All of docs/ has its own name there, without "docs/".
_BESIDE_DOCS = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "docs/decisions": "decisions/index.md",
}

_FENCE = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^][]|\[[^]]*\])*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
# Links of a table, whose targets stand below it.
_DEFINITION = re.compile(r"^\[(?P<name>[^]]+)\]: (?P<target>\S+)\n", re.MULTILINE)
_REFERENCE = re.compile(r"\[(?P<text>[^][]+)\]\[(?P<name>[^][]+)\]")
_TITLE = re.compile(r"^# (.+)$", re.MULTILINE)
_PAGE_NAMED = re.compile(r"\bdocs/([\w/]+)\.md\b")
# How a docstring says who must call: a sentence of its first paragraph.
_PARAGRAPH = re.compile(r"<p>.*?</p>", re.DOTALL)
_CALLERS = re.compile(
    r"(?<![\w,] )Collective(?::| where| after)(?:[^.<]|<code>.*?</code>)*\."
    r"|No communication\.|Any one process; no communication\.|Every rank must call it; no communication here\.",
    re.DOTALL,
)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are no files of docs/."""
    for source, page in _BESIDE_DOCS.items():
        path = _ROOT / source
        text = decisions_page(path) if path.is_dir() else path.read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for place, content in pages_of(_ROOT / "docs" / "tutorial.ipynb").items():
        files.append(File.generated(config, place, content=content))
    return files


def decisions_page(folder: Path) -> str:
    """The list of all notes in a folder, newest first, by their titles."""
    lines = []
    for path in sorted(folder.glob("0*.md"), reverse=True):
        title = _TITLE.search(path.read_text(encoding="utf-8"))
        lines.append(f"- [{title[1] if title else path.stem}]({path.name})")
    head = "# Decisions\n\nEach note says what was chosen, why, and what would change our mind. The newest is first.\n\n"
    return head + "\n".join(lines) + "\n"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links of the repository into links of the site, or into text; code is left as it is."""
    if page.parent is None:  # nothing stands beside it
        page.meta["hide"] = ["navigation"]
    here = page.file.src_uri
    if here.startswith(_NOT_SEARCHED):
        page.meta["search"] = {"exclude": True}
    source = next((name for name, made in _BESIDE_DOCS.items() if made == here), f"docs/{here}")
    folder = source if not source.endswith(".md") else posixpath.dirname(source)

    def linked(match: re.Match[str]) -> str:
        return site_link(match, folder, here, files)

    parts = _FENCE.split(with_links_in_place(markdown, folder))
    return "".join(part if part.startswith("```") else _LINK.sub(linked, part) for part in parts)


def with_links_in_place(markdown: str, folder: str) -> str:
    """The page with each `[text][name]` as a link; a file that the site lacks is shown when the text is pointed at."""
    targets = {match["name"]: match["target"] for match in _DEFINITION.finditer(markdown)}

    def in_place(match: re.Match[str]) -> str:
        target = targets.get(match["name"])
        if target is None:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if "://" in target or path.startswith("docs/"):
            return f"[{match['text']}]({target})"
        return f'<abbr title="{path}">{match["text"]}</abbr>'

    return _REFERENCE.sub(in_place, _DEFINITION.sub("", markdown)) if targets else markdown


def site_link(match: re.Match[str], folder: str, here: str, files: Files) -> str:
    """One link of a page `here`, whose source lies in `folder` of the repository."""
    target = match["target"]
    if "://" in target:
        return match[0]
    path = posixpath.normpath(posixpath.join(folder, target))
    page = _BESIDE_DOCS.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
    page = page and page.replace(".ipynb", ".md")
    if page is not None and page.endswith((".md", ".svg", ".png")):
        # A page that is missing stays a link too, which the strict build refuses.
        place = posixpath.relpath(page, posixpath.dirname(here) or ".")
        return f"{match['image']}[{match['text']}]({place}{match['anchor'] or ''})"
    if match["image"]:
        raise ValueError(f"{here} shows the picture {target}, expected one that lies in docs/")
    text = match["text"]
    if path in text or Path(path).name in text:
        return text if "`" in text else f"`{text}`"
    return f"{text} (`{path}`)"


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """In the API reference: mark who must call, and link the pages that docstrings name."""
    if not page.file.src_uri.startswith("reference/"):
        return html

    def linked(match: re.Match[str]) -> str:
        file = files.get_file_from_path(f"{match[1]}.md")
        if file is None:
            raise ValueError(f"a docstring names {match[0]}, which is not there")
        return f'<a href="{file.url_relative_to(page.file)}">{match[1]}</a>'

    def marked(match: re.Match[str]) -> str:
        kind = "collective" if match[0].startswith("Collective") else "silent"
        return f'<span class="callers callers-{kind}">{match[0]}</span>'

    def marked_in(paragraph: re.Match[str]) -> str:
        return _CALLERS.sub(marked, paragraph[0], count=1)

    return _PARAGRAPH.sub(marked_in, _PAGE_NAMED.sub(linked, html))
