"""The notebook as a page: its text, its code, and what the code gave when it ran, with the pictures as files."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["pages_of"]


def pages_of(notebook: Path) -> Mapping[str, str | bytes]:
    """The page and its pictures, by their places in the site.

    Args:
        notebook: of Jupyter, format 4, with its output.
    """
    name = notebook.stem
    pictures: dict[str, bytes] = {}
    parts: list[str] = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            parts.append(_shown(output, f"{name}_{len(pictures) + 1}.png", pictures))
    return {f"{name}.md": "\n\n".join(part for part in parts if part) + "\n", **pictures}


def _shown(output: Mapping[str, Any], free: str, pictures: dict[str, bytes]) -> str:
    """One output as text of the page; a picture is put among the others."""
    data = output.get("data", {})
    if "image/png" in data:
        pictures[free] = base64.b64decode("".join(data["image/png"]))
        return f"![What the code above draws]({free})"
    text = "".join(output.get("text") or data.get("text/plain", ""))
    return f"```text\n{text.rstrip()}\n```" if text else ""
