"""launch/everything.sh runs what is there, and leaves nothing out."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

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


def run(tmp_path: Path, parts: str, *wanted: str) -> subprocess.CompletedProcess[str]:
    """The script with other parts, in an empty checkout."""
    head, _, rest = SCRIPT.read_text().partition("names=()\n")
    tail = rest[rest.index("for name in $wanted") :]
    script = tmp_path / "launch" / "everything.sh"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f"{head}names=()\n{parts}\n{tail}")
    return subprocess.run(["bash", script, *wanted], capture_output=True, text=True, env=dict(os.environ), check=False)


def test_a_part_that_fails_is_told_of_and_the_others_run_on(tmp_path) -> None:
    made = run(tmp_path, "part bad bash -c 'echo why; exit 3'\npart good true")
    assert made.returncode == 1 and "why" in made.stdout
    assert re.search(r"^bad +FAILED", made.stdout, re.MULTILINE)
    assert re.search(r"^good +passed", made.stdout, re.MULTILINE)


def test_a_part_that_is_not_there_is_no_success(tmp_path) -> None:
    made = run(tmp_path, "part good true", "godo")
    assert made.returncode == 2 and "there is no part godo: good" in made.stderr
    assert run(tmp_path, "part good true", "good").returncode == 0
