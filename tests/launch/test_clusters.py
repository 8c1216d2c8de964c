"""Other people's clusters: Ray, Slurm, Kubernetes, and nodes without a common disk, each on loopback."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
CLUSTERS = ROOT / "launch" / "clusters"


def begin(*command: object, **environment: object) -> subprocess.Popen[str]:
    paths = (str(SUPPORT), str(CLUSTERS), os.environ.get("PYTHONPATH", ""))
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment}
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
    )


def end(*processes: subprocess.Popen[str]) -> list[tuple[int, str]]:
    """The exit status of each, and what it printed. None outlives this call."""
    try:
        return [(process.wait(), text) for process in processes for text, _ in [process.communicate(timeout=150)]]
    finally:
        for process in processes:
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.ranks
def test_two_nodes_go_on_after_a_kill_with_a_common_disk_and_with_disks_of_their_own(tmp_path) -> None:
    (tmp_path / "shared").mkdir()
    for attempt in (0, 1):
        torchrun = (
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "two-nodes"),
        )
        agents = [
            begin(*torchrun, SUPPORT / "launched_nodes.py", tmp_path, NODE=node, ATTEMPT=attempt)
            for node in ("north", "south")
        ]
        ended = end(*agents)
        told = "\n---\n".join(text for _, text in ended)
        assert [status == 0 for status, _ in ended] == [attempt == 1] * 2, told
        assert "AssertionError" not in told, told
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-by-rank-0", "done-by-rank-1"]


@pytest.mark.ranks
def test_a_run_under_ray_goes_on_after_a_worker_was_killed_as_if_never_stopped(tmp_path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    quiet = {
        "HOME": tmp_path / "home",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    }
    (tmp_path / "uncut").mkdir()
    [(status, told)] = end(begin(sys.executable, SUPPORT / "launched_ray.py", tmp_path, **quiet))
    assert status == 0, told
    # With no workers of its own Ray Train runs in the processes of torchrun: the same loop, never stopped.
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    options = ("--storage", tmp_path, "--workers", 0, "--steps", 8, "--save-every", 8)
    command = (*torchrun, CLUSTERS / "ray_train.py", *options)
    [(status, told)] = end(begin(*command, TMPDIR=tmp_path / "uncut", **quiet))
    assert status == 0, told

    went_on = tmp_path / "killed" / "checkpoint-8"
    [uncut] = (tmp_path / "uncut").glob("checkpoint-*")
    assert json.loads((went_on / "ema" / "manifest.json").read_text())["num_updates"] == 8
    assert sorted(path.name for path in went_on.iterdir()) == sorted(path.name for path in uncut.iterdir())
    for file in ("ema/model.safetensors", "model.safetensors"):
        first, second = load_file(went_on / file), load_file(uncut / file)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first), file
