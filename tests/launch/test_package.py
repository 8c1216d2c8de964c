"""What is published: the files of the archives, the description, and where the package refuses to run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What setuptools adds to an sdist.
MADE = re.compile(r"PKG-INFO|setup\.cfg|dist_ema\.egg-info/.*")
# What only the repository itself needs.
OF_THE_REPOSITORY = re.compile(r"\.ci/.*|\.git.*")


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("an sdist has no list of tracked files")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {name for name in listed.split("\0") if name}


@pytest.fixture(scope="module")
def built(tracked: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both archives, after `twine check --strict`."""
    out = tmp_path_factory.mktemp("package") / "dist"
    done = subprocess.run(
        ["bash", "launch/package.sh", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2, done.stdout
    return out


def test_the_sdist_has_every_tracked_file_and_no_other(built: Path, tracked: set[str]) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {member.name.split("/", 1)[1] for member in opened if member.isfile()}
    assert {name for name in names if not MADE.fullmatch(name)} == {
        name for name in tracked if not OF_THE_REPOSITORY.fullmatch(name)
    }


def test_the_wheel_has_the_package_and_nothing_else(built: Path, tracked: set[str]) -> None:
    (archive,) = built.glob("*.whl")
    with zipfile.ZipFile(archive) as opened:
        names = set(opened.namelist())
        metadata = opened.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert {name for name in names if ".dist-info/" not in name} == {
        name for name in tracked if name.startswith("dist_ema/")
    }
    assert "dist_ema/py.typed" in names
    for extra in ("transformers", "lightning", "diffusers"):
        assert re.search(rf"^Requires-Dist: {extra}>=[0-9.]+; extra == \"{extra}\"$", metadata, re.MULTILINE), extra


def test_one_version_everywhere() -> None:
    import dist_ema

    version = re.escape(dist_ema.__version__)
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] in (dist_ema.__version__, "Unreleased")


def test_on_windows_the_import_says_where_it_runs() -> None:
    code = "import os; os.name = 'nt'\nimport dist_ema"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: dist_ema runs on POSIX systems alone") and "WSL" in last
