"""The scripts and configurations people start from."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import layouts
import options
import pytest
import torch
import yaml
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from byte_lm import ByteLM, ByteLMConfig
from safetensors.torch import load_file

from dist_ema import CosineSchedule, ShardedEMA

ROOT = Path(__file__).parents[2]
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
        assert config.fsdp_config["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"


def test_there_is_a_configuration_for_each_layout_that_accelerate_knows() -> None:
    assert {path.stem for path in CONFIGS} | {"pp"} == {"cpu_gloo", *layouts.LAYOUTS}


@pytest.fixture
def launched_with(monkeypatch):
    """Set the variables that accelerate launch sets for a configuration."""

    def set_environment(path: Path) -> None:
        told = launch_command_parser().parse_args(["--config_file", str(path), "launch/pretrain/pretrain.py"])
        arguments, _, _ = _validate_launch_command(told)
        arguments.deepspeed_fields_from_accelerate_config = ""
        by_deepspeed = arguments.use_deepspeed
        environment = prepare_deepspeed_cmd_env(arguments)[1] if by_deepspeed else prepare_multi_gpu_env(arguments)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return set_environment


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configuration_chooses_its_own_layout(path, launched_with) -> None:
    launched_with(path)
    chosen = options.parse_options([]).sharding
    assert chosen == ("ddp" if path.stem == "cpu_gloo" else path.stem)
    if chosen == "ddp" or chosen.startswith("zero"):
        return
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == (1 if chosen == "fsdp1" else 2)
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert plugin.transformer_cls_names_to_wrap == ["Block"]
    if chosen == "fsdp1":
        assert plugin.sharding_strategy.name == "FULL_SHARD" and plugin.use_orig_params
    else:
        assert plugin.reshard_after_forward is True


@pytest.mark.parametrize(
    ("sharding", "key", "option"), [("hsdp", "replicate_size", "replicas"), ("fsdp2_tp", "tp_size", "tp-size")]
)
def test_sizes_of_a_mesh_come_from_the_option_then_the_configuration(
    tmp_path, launched_with, sharding, key, option
) -> None:
    def size(*arguments: str) -> int:
        return getattr(options.parse_options([*arguments]), option.replace("-", "_"))

    three = tmp_path / "three.yaml"
    of_two = (ROOT / "launch" / "configs" / f"{sharding}.yaml").read_text()
    three.write_text(of_two.replace(f"{key}: 2", f"{key}: 3"))
    assert size() == 2
    launched_with(three)
    assert size() == 3
    assert size(f"--{option}", "4") == 4
    with pytest.raises(SystemExit):
        size("--sharding", "fsdp2", f"--{option}", "4")


@pytest.mark.parametrize(("num_processes", "replicas"), [(1, 2), (2, 2), (3, 2), (4, 1), (4, 4), (6, 4)])
def test_hsdp_refuses_what_leaves_nothing_to_shard_or_to_replicate(monkeypatch, num_processes, replicas) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(num_processes))
    asked = options.parse_options(["--sharding", "hsdp", "--replicas", str(replicas)])
    with pytest.raises(ValueError, match=f"--replicas {replicas} cannot divide {num_processes} processes"):
        layouts.LAYOUTS["hsdp"].open(asked)


@pytest.mark.parametrize(
    ("num_processes", "arguments", "text"),
    [
        (2, ["--sharding", "fsdp2_tp"], "--tp-size 2 cannot divide 2 processes"),
        (6, ["--sharding", "fsdp2_tp", "--tp-size", "4"], "--tp-size 4 cannot divide 6 processes"),
        (1, ["--sharding", "pp"], "needs a process for each of at least 2 stages"),
        (4, ["--sharding", "pp", "--depth", "3"], "cannot cut --depth 3 blocks into 4 stages"),
    ],
)
def test_a_mesh_or_a_pipeline_that_does_not_fit_is_refused(monkeypatch, num_processes, arguments, text) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(num_processes))
    asked = options.parse_options(arguments)
    with pytest.raises(ValueError, match=text):
        layouts.LAYOUTS[asked.sharding].open(asked)


@pytest.mark.parametrize("sharding", layouts.LAYOUTS)
def test_a_model_that_accelerate_left_plain_is_noticed(monkeypatch, sharding) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True, num_processes=4)
    asked = options.parse_options(["--sharding", sharding])
    with pytest.raises(RuntimeError, match=f"asked for {sharding}"):
        layouts.LAYOUTS[sharding].check(accelerator, torch.nn.Linear(2, 2), asked)


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_parse(script) -> None:
    run("bash", "-n", script)


SMALL = [
    *("--width", 16, "--depth", 3, "--heads", 2, "--context", 16, "--batch-size", 4, "--steps", 6),
    *("--eval-every", 3, "--save-every", 4, "--eval-windows", 64, "--momentum", 0.1, "--end-momentum", 0),
    *("--lr", 0.02, "--warmup-steps", 1, "--mixed-precision", "no"),
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
# Port 0: a free one; the default one may be in use by another run on the machine.
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A small corpus with files on both sides of the split."""
    folder = tmp_path_factory.mktemp("text")
    for index in range(40):
        (folder / f"page{index}.txt").write_text(f"page {index}: the quick brown fox jumps over the lazy dog\n" * 8)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, text) -> Path:
    """OUT of the same run in one process, without a stop."""
    out = tmp_path_factory.mktemp("uninterrupted")
    run(sys.executable, "launch/pretrain/pretrain.py", "--sharding", "ddp", "--data", text, "--out", out, *SMALL)
    return out


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "loss.csv").open() as file:
        return list(csv.DictReader(file))


def manifest(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "ema" / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("start", "go_on"),
    [
        ([*TORCHRUN, 2, "--sharding", "ddp"], [sys.executable, "--sharding", "ddp"]),
        ([*ACCELERATE, "launch/configs/fsdp1.yaml", "--num_processes", 2], [*TORCHRUN, 1, "--sharding", "fsdp1"]),
        ([*TORCHRUN, 2, "--sharding", "fsdp2"], [*TORCHRUN, 1, "--sharding", "fsdp2"]),
        ([*ACCELERATE, "launch/configs/hsdp.yaml", "--num_processes", 4], [*TORCHRUN, 2, "--sharding", "fsdp2"]),
        ([*ACCELERATE, "launch/configs/fsdp2_tp.yaml", "--num_processes", 4], [*TORCHRUN, 2, "--sharding", "fsdp2"]),
        (
            [*ACCELERATE, "launch/configs/ddp.yaml", "--num_processes", 3, "--sharding", "pp"],
            [*TORCHRUN, 2, "--sharding", "pp"],
        ),
        # DeepSpeed's own files fit the same number of processes only.
        ([*ACCELERATE, "launch/configs/zero2.yaml", "--num_processes", 2], [*TORCHRUN, 2, "--sharding", "zero2"]),
        ([*ACCELERATE, "launch/configs/zero3.yaml", "--num_processes", 2], [*TORCHRUN, 2, "--sharding", "zero3"]),
    ],
    ids=[
        "ddp from 2 to 1",
        "fsdp1 from 2 to 1",
        "fsdp2 from 2 to 1",
        "hsdp on 4 to fsdp2 on 2",
        "fsdp2_tp on 4 to fsdp2 on 2",
        "pp from 3 to 2",
        "zero2 on 2",
        "zero3 on 2",
    ],
)
@pytest.mark.ranks
def test_pretraining_goes_on_with_another_number_of_processes(tmp_path, text, uninterrupted, start, go_on) -> None:
    out = tmp_path / "out"

    def pretrain(how: list[object], *more: object) -> str:
        at = how.index("--sharding") if "--sharding" in how else len(how)
        return run(*how[:at], "launch/pretrain/pretrain.py", *how[at:], "--data", text, "--out", out, *SMALL, *more)

    pytest.importorskip("deepspeed") if "zero" in str(start) else None
    assert "averaged weights, bytes per rank:" in pretrain(start, "--stop-at", 4)
    assert_average_is_the_file(out, step=4)
    first, last = manifest(out / "checkpoint-4"), pretrain(go_on, "--resume", out / "checkpoint-4")
    assert "resumed at step 4, 4 updates" in last
    assert [row["step"] for row in rows(out)] == ["3", "4", "6"]
    # A resume that loses the optimizer's state, say, shows in the live loss.
    for column in ("live", "averaged"):
        assert float(rows(out)[-1][column]) == pytest.approx(float(rows(uninterrupted)[-1][column]), abs=1e-5)
    final = manifest(out / "checkpoint-6")
    assert final["num_updates"] == 6
    world_sizes = tuple(saved["written_by"]["world_size"] for saved in (first, final))
    assert world_sizes == tuple(next((n for n in how if isinstance(n, int) and n), 1) for how in (start, go_on))


def assert_average_is_the_file(out: Path, *, step: int) -> None:
    """One process that loads what several ranks wrote has the very tensors of the file."""
    folder = out / f"checkpoint-{step}" / "ema"
    model = ByteLM(ByteLMConfig.read(out / "model.json"))
    ema = ShardedEMA(model, CosineSchedule(momentum=0.1, end_momentum=0.0, total_steps=6))
    ema.load(folder)
    written = load_file(folder / "model.safetensors")
    with ema.average_parameters():
        loaded = model.state_dict()
        assert loaded.keys() == written.keys()
        assert all(torch.equal(loaded[name], written[name]) for name in written)


def test_the_export_has_the_loss_that_the_trainer_saw(uninterrupted, text, tmp_path) -> None:
    weights = uninterrupted / "checkpoint-6" / "ema" / "model.safetensors"
    export = run(
        sys.executable, "launch/pretrain/evaluate_export.py", weights,
        "--model", uninterrupted / "model.json", "--data", text, "--eval-windows", 64,
    )  # fmt: skip
    assert json.loads(export)["loss"] == pytest.approx(float(rows(uninterrupted)[-1]["averaged"]), abs=1e-4)
    run(sys.executable, "launch/pretrain/curves.py", uninterrupted / "loss.csv", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.ranks
def test_accelerate_launch_starts_the_script_with_the_cpu_configuration(tmp_path, text) -> None:
    out = tmp_path / "out"
    command = [*ACCELERATE, "launch/configs/cpu_gloo.yaml", "launch/pretrain/pretrain.py"]
    run(*command, "--data", text, "--out", out, *SMALL)
    assert manifest(out / "checkpoint-6")["written_by"]["world_size"] == 2
