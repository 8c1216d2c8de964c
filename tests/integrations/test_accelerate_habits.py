"""What users of accelerate are used to doing, with an average attached: each with the real library."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from accelerated import SCHEDULE, accelerator_of, prepared, take_step
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel
from twins import assert_same_bits
from zoo import local_values

from dist_ema import CheckpointNotFoundError, CosineSchedule, ShardedEMA, after, attach

ROOT = Path(__file__).parents[2]


def gpt2(accelerator: Accelerator, layout: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    model = GPT2LMHeadModel(config)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    assert (layout == "fsdp2") == isinstance(next(model.parameters()), DTensor)
    return model, optimizer


def saved_in_a_swap(layout: str, folder: str) -> None:
    """Everything that saves a model writes the average inside the block, and the live weights after it."""
    with accelerator_of(layout) as accelerator:
        model, optimizer = gpt2(accelerator, layout)
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        for step in range(3):
            tokens = torch.randint(0, 13, (2, 8), generator=torch.Generator().manual_seed(step))
            accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
            optimizer.step()
            optimizer.zero_grad()
        averaged = ema.full_state_dict()
        before = local_values(model)
        live = {name: value.clone() for name, value in accelerator.get_state_dict(model).items()}

        def save(kind: str) -> dict[str, torch.Tensor]:
            """On rank 0: what the habits have saved, all of them the same."""
            state = accelerator.get_state_dict(model)
            copied = {name: value.clone() for name, value in state.items()}  # save_pretrained empties it
            accelerator.save_model(model, f"{folder}/{kind}/model")
            accelerator.unwrap_model(model).save_pretrained(
                f"{folder}/{kind}/pretrained",
                is_main_process=accelerator.is_main_process,
                save_function=accelerator.save,
                state_dict=state,
            )
            if layout == "ddp":
                accelerator.unwrap_model(model).save_pretrained(
                    f"{folder}/{kind}/plain", is_main_process=accelerator.is_main_process
                )
            accelerator.wait_for_everyone()
            for name in os.listdir(f"{folder}/{kind}") if accelerator.is_main_process else ():
                for key, value in load_file(f"{folder}/{kind}/{name}/model.safetensors").items():
                    assert torch.equal(value, copied[key]), (kind, name, key)
            return copied

        with ema.average_parameters():
            inside = save("inside")
        outside = save("outside")
        if accelerator.is_main_process:
            assert set(averaged) == set(inside) == set(outside)
            assert_same_bits(inside, averaged)
            assert_same_bits(outside, live)
            assert any(not torch.equal(inside[name], outside[name]) for name in inside)
            again = GPT2LMHeadModel.from_pretrained(f"{folder}/inside/pretrained").state_dict()
            assert all(torch.equal(again[name], averaged[name]) for name in averaged)
        assert_same_bits(local_values(model), before)
        accelerator.wait_for_everyone()


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_what_accelerate_and_transformers_save_inside_a_swap_is_the_average(world, tmp_path, layout) -> None:
    world(2).run(saved_in_a_swap, layout, str(tmp_path))


# What kills leave in a checkpoint's folder: a folder being written, a former one, and one that could not be removed.
LEFTOVERS = (".ema.staging", ".ema.staging-0123456789abcdef", ".ema.old", ".ema.trash-00ff")


def beside_leftovers(folder: str) -> None:
    configuration = ProjectConfiguration(project_dir=folder, automatic_checkpoint_naming=True, total_limit=2)
    checkpoints = Path(folder, "checkpoints")
    with accelerator_of("ddp", project_config=configuration) as accelerator:
        model, optimizer = prepared(accelerator, "ddp")
        ema = attach(accelerator, model, optimizer, SCHEDULE)
        for step in range(4):
            take_step(model, optimizer, step)
            accelerator.save_state()
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                for name in LEFTOVERS:
                    left = checkpoints / f"checkpoint_{step}" / name
                    left.mkdir()
                    (left / "model.safetensors").write_bytes(b"cut off")
            accelerator.wait_for_everyone()
        take_step(model, optimizer, 9)
        accelerator.load_state()  # the latest
        assert ema.num_updates == 4
        if accelerator.is_main_process:  # a save of checkpoint_3 that was killed before the average was in place
            (checkpoints / "checkpoint_3" / "ema").rename(checkpoints / "checkpoint_3" / ".ema.staging-ffff")
            (checkpoints / "checkpoint_3" / ".ema.old" / "model.safetensors").unlink()
            for name in (".ema.staging", ".ema.old"):
                for path in (checkpoints / "checkpoint_3" / name).iterdir():
                    path.unlink()
        accelerator.wait_for_everyone()
        with pytest.raises(CheckpointNotFoundError, match="older checkpoint"):
            accelerator.load_state()
        accelerator.load_state(str(checkpoints / "checkpoint_2"))
        assert ema.num_updates == 3
        accelerator.wait_for_everyone()  # the next save removes what is loaded here
        accelerator.save_state()
        accelerator.wait_for_everyone()
        accelerator.load_state()
        assert ema.num_updates == 3


def test_leftovers_of_killed_saves_do_not_stop_the_naming_nor_the_limit_of_checkpoints(world, tmp_path) -> None:
    world(2).run(beside_leftovers, str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint_3", "checkpoint_4"]


FSDP = (
    *("--dynamo_backend", "no", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
    *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    *("--fsdp_transformer_layer_cls_to_wrap", "Block", "--fsdp_state_dict_type", "SHARDED_STATE_DICT"),
)
LAUNCHES = {
    "dynamo": ("--config_file", "launch/configs/cpu_gloo.yaml", "--dynamo_backend", "eager"),
    "fsdp": (*FSDP, "--fsdp_cpu_ram_efficient_loading", "true", "--fsdp_activation_checkpointing", "true"),
    "context-parallel": (
        *(*FSDP, "--fsdp_cpu_ram_efficient_loading", "false"),
        *("--use_parallelism_config", "--parallelism_config_cp_size", "2"),
    ),
}


@pytest.mark.parametrize("habit", LAUNCHES)
@pytest.mark.ranks
def test_a_launch_that_changes_how_the_model_is_prepared_averages_and_resumes_as_any_other(habit) -> None:
    """--dynamo_backend; --fsdp_cpu_ram_efficient_loading with activation checkpointing; context parallelism, whose
    weights lie on the flattened axis dp_shard_cp.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *LAUNCHES[habit]]
    path = os.pathsep.join([str(ROOT), str(ROOT / "launch" / "pretrain")])
    done = subprocess.run(
        [*command, "tests/support/launched_habits.py", habit],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert f"the average is right: {habit} 4" in done.stdout
    assert "dist_ema" not in done.stderr, "a healthy run warns of something"


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_resume_with_other_total_steps_says_which_count_and_how_to_keep_the_former(tmp_path, wrapped) -> None:
    def average(total_steps: int) -> ShardedEMA:
        schedule = CosineSchedule(total_steps=total_steps)
        return ShardedEMA(nn.Linear(2, 2), after(2, schedule) if wrapped else schedule)

    first = average(10)
    for _ in range(4):
        first.update()
    first.save(tmp_path / "ema")
    longer = average(20)
    with pytest.warns(UserWarning, match=r"saved with .*total_steps=10.* goes on with .*total_steps=20") as caught:
        longer.load(tmp_path / "ema")
    told = str(caught[0].message)
    assert "the new schedule alone counts, from update number 4" in told
    assert "keep the former schedule" in told and "total_steps=10 included" in told and "restart()" in told
    assert longer.num_updates == 4
    assert_same_bits(longer.full_state_dict(), first.full_state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average(10).load(tmp_path / "ema")  # as the message says


def resumed_elsewhere(folder: str) -> list[str]:
    with accelerator_of("ddp") as accelerator:
        model, optimizer = prepared(accelerator, "ddp")
        attach(accelerator, model, optimizer, CosineSchedule(total_steps=4))
        take_step(model, optimizer, 0)
        accelerator.save_state(folder)
    with accelerator_of("ddp") as accelerator:
        model, optimizer = prepared(accelerator, "ddp")
        attach(accelerator, model, optimizer, CosineSchedule(total_steps=8))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            accelerator.load_state(folder)
        return [str(each.message) for each in caught if "total_steps" in str(each.message)]


def test_rank_0_alone_tells_of_the_other_total_steps_of_a_resume(world, tmp_path) -> None:
    first, second = world(2).run(resumed_elsewhere, str(tmp_path / "ckpt"))
    assert len(first) == 1 and not second
