"""Other people's clusters: Ray, Slurm, Kubernetes, and nodes without a common disk, each on loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import options
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.run import config_from_args, parse_args

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
        return [(process.wait(), text) for process in processes for text, _ in [process.communicate(timeout=400)]]
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
        script = (SUPPORT / "launched_nodes.py", tmp_path)
        torchrun = (
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "two-nodes"),
        )
        agents = [
            begin(*torchrun, "--local-addr", address, *script, NODE=node, ATTEMPT=attempt)
            for node, address in (("north", "127.0.0.1"), ("south", "127.0.0.2"))
        ]
        ended = end(*agents)
        told = "\n---\n".join(text for _, text in ended)
        assert [status == 0 for status, _ in ended] == [attempt == 1] * 2, told
        assert "AssertionError" not in told, told
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-by-rank-0", "done-by-rank-1"]


@pytest.mark.ranks
def test_a_run_under_ray_goes_on_after_a_worker_was_killed_as_if_never_stopped(tmp_path) -> None:
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


SRUN = """#!/usr/bin/env bash
# Two nodes on loopback: the command that Slurm would start on each of them.
set -euo pipefail
while [[ $1 == --* ]]; do shift; done
[[ $1 == .venv/bin/torchrun ]]
shift
"$PYTHON" -m torch.distributed.run "$@" & other=$!
"$PYTHON" -m torch.distributed.run "$@"
wait $other
"""
SCONTROL = """#!/usr/bin/env bash
[[ $* == 'show hostnames node[7-8]' ]]
printf 'localhost\\nnode8\\n'
"""


@pytest.mark.ranks
def test_a_job_that_slurm_queues_again_goes_on_from_its_newest_whole_checkpoint(tmp_path) -> None:
    fakes = {"srun": SRUN, "scontrol": SCONTROL}
    for name, text in fakes.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "text").mkdir()
    for index in range(40):
        (tmp_path / "text" / f"page{index}.txt").write_text(f"page {index}: the quick brown fox jumps\n" * 12)
    small = (
        *("--data", tmp_path / "text", "--out", tmp_path / "out", "--mixed-precision", "no", "--warmup-steps", 1),
        *("--width", 16, "--depth", 1, "--heads", 2, "--context", 16, "--batch-size", 4, "--eval-windows", 8),
        *("--steps", 4, "--save-every", 2, "--eval-every", 4),
    )
    job = {
        "SLURM_SUBMIT_DIR": ROOT,
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": free_port() - 20000,
        "SLURM_NNODES": 2,
        "SLURM_GPUS_ON_NODE": 1,
        "SLURM_CPUS_PER_TASK": 1,
        "PYTHON": sys.executable,
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    }

    def slurm(*more: object, **restarts: object) -> str:
        [(status, told)] = end(begin("bash", ROOT / "launch" / "slurm.sh", *small, *more, **job, **restarts))
        assert status == 0, told
        return told

    assert "resumed" not in slurm("--stop-at", 2)
    (tmp_path / "out" / "checkpoint-3" / "ema").mkdir(parents=True)  # the job was killed while it saved this one
    assert "resumed at step 2, 2 updates" in slurm(SLURM_RESTART_COUNT=1)
    manifest = json.loads((tmp_path / "out" / "checkpoint-4" / "ema" / "manifest.json").read_text())
    assert manifest["num_updates"] == 4 and manifest["written_by"]["world_size"] == 2


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / "pytorchjob.yaml").read_text())


def check_job(job: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "tests" / "fixtures" / "pytorchjob.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(job, schema)


def test_the_pytorchjob_is_of_its_schema_which_refuses_a_misspelt_one(job) -> None:
    check_job(job)
    spec, worker = job["spec"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    [container] = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"  # by which the operator finds it
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in worker["template"]["spec"]["volumes"]
    }
    for where, key, value in [
        (spec, "elasticpolicy", {}),
        (spec, "nprocPerNode", 8),  # a text, unlike the number of pods
        (spec["elasticPolicy"], "rdzvBackend", "static"),
        (worker, "restartPolicy", "Onfailure"),
        (container, "args", ["--steps", 20000]),
        (container["env"][0], "value", 8),
    ]:
        before = dict(where)
        where[key] = value
        with pytest.raises(Exception, match=r"unexpected|is not"):
            check_job(job)
        where.clear()
        where.update(before)


def test_what_the_pytorchjob_starts_is_a_command_that_torchrun_and_the_script_take(job, monkeypatch) -> None:
    elastic, worker = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert elastic["minReplicas"] == elastic["maxReplicas"] == worker["replicas"]
    # As the operator sets them for every pod of a job with an elasticPolicy.
    monkeypatch.setenv("PET_RDZV_ENDPOINT", f"{job['metadata']['name']}-worker-0:23456")
    monkeypatch.setenv("PET_RDZV_BACKEND", elastic["rdzvBackend"])
    monkeypatch.setenv("PET_NNODES", f"{elastic['minReplicas']}:{elastic['maxReplicas']}")
    monkeypatch.setenv("PET_MAX_RESTARTS", str(elastic["maxRestarts"]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    [container] = worker["template"]["spec"]["containers"]
    torchrun, *arguments = [*container["command"], *container["args"]]
    assert torchrun == ".venv/bin/torchrun"
    config, _, script = config_from_args(parse_args(arguments))
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 2, 8)
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "byte-lm-worker-0:23456")
    assert config.max_restarts == 0
    path = next(index for index, argument in enumerate(script) if argument.endswith(".py"))
    assert (ROOT / script[path]).is_file()
    asked = options.parse_options(list(script[path + 1 :]))
    assert asked.resume == Path("auto")
    mounts = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "runs"}
    assert {str(asked.out.parent)} == mounts
