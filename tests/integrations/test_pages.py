"""The complete scripts of docs/integrations/, as they stand, on one rank and on several."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from twins import assert_same_bits

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "integrations"
MOST_LINES = 40

pytestmark = pytest.mark.ranks


def script_of(page: str) -> str:
    """The first snippet of a page: its complete script."""
    return re.findall(r"```py(?:thon)?\n(.*?)```", (PAGES / page).read_text(), re.DOTALL)[0]


def run(page: str, folder: Path, size: int, *arguments: str) -> str:
    """What the script of a page writes to stderr on `size` ranks; on one it runs without a launcher."""
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(script_of(page))
    command = [sys.executable]
    if size > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, "train.py", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=180
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stderr


@pytest.mark.parametrize("page", sorted(path.name for path in PAGES.glob("*.md")))
def test_the_script_of_a_page_is_short(page) -> None:
    assert len(script_of(page).splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", ["accelerate.md", "torch.md"])
def test_the_script_of_a_page_runs_on_two_ranks_and_goes_on_from_its_checkpoint(page, tmp_path) -> None:
    assert "dist_ema" not in run(page, tmp_path, 2), "a healthy run has no warning"
    export = tmp_path / "run" / "export" / "model.safetensors"
    first = load_file(export)
    for each in tmp_path.glob("run/step-*8"):
        each.rename(tmp_path / "of-the-end")
    shutil.rmtree(export.parent)
    run(page, tmp_path, 1)
    assert load_file(export).keys() == first.keys() and (tmp_path / "of-the-end").exists()


def test_the_first_script_that_a_reader_runs_ends_without_a_warning(tmp_path) -> None:
    assert "dist_ema" not in run("../training.md", tmp_path, 1)


def test_the_loop_like_torchtitans_goes_on_bit_for_bit_and_on_other_ranks(tmp_path) -> None:
    run("torchtitan.md", tmp_path / "whole", 4, "8")
    run("torchtitan.md", tmp_path / "cut", 4, "3")
    run("torchtitan.md", tmp_path / "cut", 4, "8")
    whole, cut = (load_file(tmp_path / name / "outputs/export/model.safetensors") for name in ("whole", "cut"))
    assert_same_bits(whole, cut)
    run("torchtitan.md", tmp_path / "cut", 2, "8")  # it has no step left: the average as it was loaded
    assert_same_bits(whole, load_file(tmp_path / "cut" / "outputs/export/model.safetensors"))
