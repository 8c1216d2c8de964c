"""Writes docs/reference/cli.md, the help of the command line: `PYTHONPATH=. python launch/site/cli_page.py`."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

from dist_ema.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"

_HEAD = """# Command line

`dist-ema` comes with the package, and answers without loading torch where it converts no tensor. The texts below are its
own help; `launch/site/cli_page.py` writes this page. [Checkpoints](../checkpoints.md#from-the-command-line) has examples.

An exit code of 0 says that the answer is good, 1 that it is bad or a folder cannot be read, 2 that an option is wrong,
130 that it was interrupted.
"""


def help_of(*command: str) -> str:
    """The help of the command line, or of a command; as wide as the page has room for."""
    text = io.StringIO()
    before = dict(os.environ)
    os.environ.update(COLUMNS="100", NO_COLOR="1")
    try:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main([*command, "--help"])
    finally:
        os.environ.clear()
        os.environ.update(before)
    return text.getvalue().strip()


def page() -> str:
    """The whole page."""
    commands = re.findall(r"^    (\w+)", help_of(), re.MULTILINE)
    parts = [_HEAD, f"```text\n{help_of()}\n```\n"]
    parts += [f"## dist-ema {name}\n\n```text\n{help_of(name)}\n```\n" for name in commands]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
