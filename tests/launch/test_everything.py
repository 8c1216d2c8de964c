"""launch/everything.sh runs what is there, and leaves nothing out."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "everything.sh"


def test_every_file_that_it_runs_is_there() -> None:
    named = re.findall(r"\b(?:launch|tests)/[\w/]+\.(?:py|sh)", SCRIPT.read_text())
    assert len(named) >= 6 and [path for path in named if not (ROOT / path).exists()] == []


def test_no_sweep_and_no_long_test_is_left_out() -> None:
    text = SCRIPT.read_text()
    sweeps = [path.stem for path in (ROOT / "launch" / "crash").glob("*.py") if "__main__" in path.read_text()]
    assert len(sweeps) >= 8 and [name for name in sweeps if not re.search(rf"\b{name}\b", text)] == []
    tests = [path.name for path in (ROOT / "tests" / "everything").glob("test_*.py")]
    assert tests and [name for name in tests if name not in text] == []


def test_no_test_that_skips_itself_for_want_of_a_library_is_left_out() -> None:
    text = SCRIPT.read_text()
    paths = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    skipping = [path for path in paths if re.search(r"importorskip\(|skipif\(importlib", path.read_text())]
    names = [path.relative_to(ROOT).as_posix() for path in skipping]
    assert len(names) >= 6
    assert [name for name in names if name not in text and not name.startswith("tests/integrations/")] == []


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout in which nothing is to be set up."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "setup.sh").write_text("")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    return tmp_path


def run(checkout: Path, parts: str, *wanted: str) -> subprocess.CompletedProcess[str]:
    """The script with other parts."""
    text, count = re.subn(r"(?ms)^parts\(\) \{.*?^\}$", lambda _: f"parts() {{\n{parts}\n}}", SCRIPT.read_text())
    assert count == 1
    script = checkout / "launch" / "everything.sh"
    script.write_text(text)
    command = ["bash", script, *wanted]
    # A shell cannot trap a signal that it was started without, as what runs in the background is without Ctrl-C.
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.run(
        command, capture_output=True, text=True, env=dict(os.environ), check=False, preexec_fn=heeding
    )


def test_a_part_that_fails_is_told_of_and_the_others_run_on(checkout) -> None:
    made = run(checkout, "$1 bad bash -c 'echo why; exit 3'\n$1 good echo '5 points, 0 bad'")
    assert made.returncode == 1 and "why" in made.stdout
    assert re.search(r"^bad +FAILED .*why$", made.stdout, re.MULTILINE)
    assert re.search(r"^good +passed .*5 points, 0 bad$", made.stdout, re.MULTILINE)


def test_a_part_in_which_a_test_is_skipped_has_not_passed(checkout) -> None:
    made = run(checkout, "$1 bad echo '===== 7 passed, 1 skipped in 3.20s ====='\n$1 good echo '= 8 passed in 3s ='")
    assert made.returncode == 1
    assert re.search(r"^bad +SKIPPED", made.stdout, re.MULTILINE)
    assert re.search(r"^good +passed", made.stdout, re.MULTILINE)


def test_a_run_that_is_stopped_leaves_its_table_and_begins_no_other_part(checkout) -> None:
    """A part may answer an interrupt by an ordinary end."""
    made = run(checkout, "$1 first true\n$1 second bash -c 'kill -INT $PPID; exit 0'\n$1 third touch begun")
    assert made.returncode == 130 and not (checkout / "begun").exists()
    table = (checkout / "runs" / "everything" / "table.txt").read_text()
    assert re.search(r"^first +passed", table, re.MULTILINE) and table in made.stdout


def test_a_part_that_is_not_there_is_no_success(checkout) -> None:
    made = run(checkout, "$1 good touch begun", "good", "godo")
    assert made.returncode == 2 and "there is no part godo: good" in made.stderr
    assert not (checkout / "begun").exists(), "the name is checked before hours are spent"
    assert run(checkout, "$1 good touch begun", "good").returncode == 0
