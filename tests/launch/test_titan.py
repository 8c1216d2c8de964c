"""The loop in the shape of torchtitan's: saved beside the training, and gone on with, on other ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from twins import assert_same_bits

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.ranks


def titan(out: Path, size: int, steps: int) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    arguments = [ROOT / "launch/titan/titan.py", "--out", out, "--steps", str(steps), "--save-every", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def test_a_loop_like_torchtitans_loses_nothing_when_a_checkpoint_is_incomplete_and_ranks_are_lost(tmp_path) -> None:
    told = titan(tmp_path, 4, 6)
    assert "step 2: live" in told and "step 6" in told
    whole = load_file(tmp_path / "export" / "model.safetensors")
    (tmp_path / "step-000006" / ".metadata").unlink()  # cut off
    assert "step 6" in titan(tmp_path, 4, 6)
    assert_same_bits(load_file(tmp_path / "export" / "model.safetensors"), whole)
    assert titan(tmp_path, 2, 6) == ""  # no step is left: the average as it was loaded
    assert_same_bits(load_file(tmp_path / "export" / "model.safetensors"), whole)
