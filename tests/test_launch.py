"""The scripts and configurations people start from."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "launch" / "configs").glob("*.yaml"))


def run(*command: object, **environment: str) -> str:
    told = [str(part) for part in command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        told,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        env=environment,
    )
    assert done.returncode == 0, f"{' '.join(told)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configuration_is_one_that_accelerate_loads(path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes >= 2
    written = yaml.safe_load(path.read_text())
    assert config.mixed_precision == written["mixed_precision"]
    if written["distributed_type"] == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"


def test_there_is_a_configuration_for_each_layout() -> None:
    assert {path.stem for path in CONFIGS} == {"cpu_gloo", "ddp", "fsdp2"}


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_parse(script) -> None:
    run("bash", "-n", script)


SMALL = [
    *("--width", 16, "--depth", 1, "--heads", 2, "--context", 16, "--batch-size", 4, "--steps", 6),
    *("--eval-every", 3, "--save-every", 4, "--eval-windows", 64, "--momentum", 0.1),
]


@pytest.fixture
def text(tmp_path) -> Path:
    """A small corpus with files on both sides of the split."""
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(40):
        (folder / f"page{index}.txt").write_text(f"page {index}: the quick brown fox jumps over the lazy dog\n" * 8)
    return folder


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "loss.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_pretraining_stops_on_2_processes_and_goes_on_with_1(tmp_path, text, sharding) -> None:
    out = tmp_path / "out"
    job = ["launch/pretrain.py", "--sharding", sharding, "--data", text, "--out", out, *SMALL]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    told = run(*torchrun, 2, *job, "--stop-at", 4)
    assert "averaged weights, bytes per rank:" in told
    # One process by plain python, or by torchrun.
    command = [sys.executable, *job] if sharding == "ddp" else [*torchrun, 1, *job]
    run(*command, "--resume", out / "checkpoint-4")
    assert [row["step"] for row in rows(out)] == ["3", "4", "6"]
    manifest = json.loads((out / "checkpoint-6" / "ema" / "manifest.json").read_text())
    assert manifest["num_updates"] == 6 and manifest["written_by"]["world_size"] == 1
    export = run(
        sys.executable, "launch/evaluate_export.py", out / "checkpoint-6" / "ema" / "model.safetensors",
        "--model", out / "model.json", "--data", text, "--eval-windows", 64,
    )  # fmt: skip
    assert json.loads(export)["loss"] == pytest.approx(float(rows(out)[-1]["averaged"]), abs=1e-4)
    run(sys.executable, "launch/curves.py", out / "loss.csv", out / "curves.png")
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_accelerate_launch_starts_the_script_with_the_cpu_configuration(tmp_path, text) -> None:
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/configs/cpu_gloo.yaml"]
    run(*launch, "launch/pretrain.py", "--data", text, "--out", out, *SMALL)
    manifest = json.loads((out / "checkpoint-6" / "ema" / "manifest.json").read_text())
    assert manifest["written_by"]["world_size"] == 2
