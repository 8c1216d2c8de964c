"""Runs docs/tutorial.ipynb from top to bottom; fails if a cell fails, or if it takes three minutes.

    python launch/notebook.py            # the copy in docs/ is left as it is
    python launch/notebook.py --write    # its output is put into docs/

It wants `pip install -e '.[notebook]'`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"
MOST_SECONDS = 180


def without_accidents(notebook: nbformat.NotebookNode) -> None:
    """Leave out of the output what differs from run to run, and warnings of the machine that it ran on."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the tutorial.")
    parser.add_argument("--write", action="store_true", help="put the output into docs/")
    options = parser.parse_args()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    began = time.monotonic()
    NotebookClient(notebook, timeout=4 * MOST_SECONDS, kernel_name="python3").execute()
    seconds = time.monotonic() - began
    print(f"the tutorial ran in {seconds:.0f} s")
    if options.write:
        without_accidents(notebook)
        nbformat.write(notebook, NOTEBOOK)
    if seconds >= MOST_SECONDS:
        sys.exit(f"it took {seconds:.0f} s, and may take {MOST_SECONDS}")


if __name__ == "__main__":
    main()
