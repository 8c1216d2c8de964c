"""Ray Train on two CPU workers, one of which is killed: as its test in `test_clusters.py` starts it.

Not a test. It raises if the workers did not go on from a checkpoint in Ray's storage path.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

import ray
import ray_train

KILLED_AT = 5


class KillOnce:
    """Kills the worker of rank 1 before a step between two checkpoints, in the first of its lives."""

    def __init__(self, folder: Path) -> None:
        self.killed = folder / "was-killed"

    def __call__(self, step: int) -> None:
        with (self.killed.parent / "steps").open("a") as steps:
            steps.write(f"{os.environ['RANK']}:{step}\n")
        if step == KILLED_AT and os.environ["RANK"] == "1" and not self.killed.exists():
            self.killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path) -> None:
    options = ray_train.parse_options(
        ["--storage", str(folder), "--name", "killed", "--steps", "8", "--save-every", "2"]
    )
    result = ray_train.run(options, before_step=KillOnce(folder))
    assert result.error is None and result.metrics["num_updates"] == 8, result
    assert result.checkpoint.path == str(folder / "killed" / "checkpoint-8"), result
    kept = sorted(path.name for path in (folder / "killed").glob("checkpoint-*"))
    assert kept == ["checkpoint-6", "checkpoint-8"], kept
    # It went on from the latest checkpoint that Ray had taken in, of step 2 or 4, not from the start.
    steps = (folder / "steps").read_text().split()
    assert (folder / "was-killed").exists() and steps.count("1:5") == 2, steps
    assert steps.count("1:0") == steps.count("1:1") == steps.count("1:7") == 1, steps


if __name__ == "__main__":
    # Ray's sockets want a short path.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-") as temporary:
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8, _temp_dir=temporary
        )
        main(Path(sys.argv[1]))
        ray.shutdown()
