"""Every row of docs/coming_from.md, with the real library: its file goes on here as it goes on there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
PAGE = (ROOT / "docs" / "coming_from.md").read_text()
TABLES = [re.findall(r"^\| ([\w-]+) \|", part, re.MULTILINE) for part in PAGE.split("| coming from |")[1:]]
NUM_UPDATES = {"TRL": 17}  # 13 updates, and its lag


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What the libraries' own averages and those that go on from their files came to, all in one process."""
    folder = tmp_path_factory.mktemp("coming")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{SUPPORT}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SUPPORT / "launched_coming.py"), str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())  # type: ignore[no-any-return]


def test_both_tables_have_the_rows_that_are_run(results) -> None:
    assert len(TABLES) == 2 and TABLES[0] == TABLES[1] == list(results)


@pytest.mark.parametrize("library", TABLES[0])
def test_an_average_of_another_library_goes_on_from_its_file(results, library) -> None:
    """To 1e-6 over 5 updates; with another counter it would be another average, so the counter is read right."""
    cases = dict(results[library])
    wrong = cases.pop("another counter", None)
    for case, result in cases.items():
        assert result["distance"] < 1e-6 < result["moved"] / 1000, case
        if case != "state dict":  # the one file without a counter, and with a schedule that does not ask for it
            assert result["begun"] == NUM_UPDATES.get(library, 13), case
    assert wrong is None or wrong["distance"] > 1e-3
