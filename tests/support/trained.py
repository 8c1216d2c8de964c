"""A tiny model in a Trainer of transformers, the naive average beside it, and what a run leaves behind."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from cpu_fsdp import force_fsdp
from oracle import NaiveAverage
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

MOMENTUM = 0.25


def tiny_gpt2() -> GPT2LMHeadModel:
    """With dropout, so that every random number of training counts."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0))


DATA = [{key: (torch.arange(8) * number) % 61 for key in ("input_ids", "labels")} for number in range(48)]


class FSDPTrainer(Trainer):
    """A Trainer whose accelerator shards on a CPU, where accelerate would ignore the plugin."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            state_dict_type="SHARDED_STATE_DICT",
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["GPT2Block"],
            cpu_ram_efficient_loading=False,
        )
        force_fsdp(self.accelerator, plugin)
        self.is_fsdp_enabled = True


def trainer_of(
    folder: str | os.PathLike[str],
    *callbacks: TrainerCallback,
    kind: type[Trainer] = Trainer,
    model: nn.Module | None = None,
    beside: dict[str, Any] | None = None,
    **arguments: Any,
) -> Trainer:
    """A Trainer of 8 steps of two accumulated batches, that saves and evaluates every second step."""
    defaults: dict[str, Any] = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(os.fspath(folder), **{**defaults, **arguments})
    datasets = {"train_dataset": DATA, "eval_dataset": DATA[:6], **(beside or {})}
    return kind(model=tiny_gpt2() if model is None else model, args=args, callbacks=list(callbacks), **datasets)


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a model, whole, as copies. Under FSDP collective."""
    for module in model.modules():  # an evaluation leaves the root whole
        if isinstance(module, FSDPModule):
            module.reshard()
    with torch.no_grad():
        return {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
            for name, value in model.named_parameters()
        }


class Naive(TrainerCallback):
    """The naive average of whole tensors; at the steps of evaluations it keeps a copy."""

    def __init__(self, momentum: float = MOMENTUM) -> None:
        self.average = NaiveAverage(lambda _: momentum)
        self.at: dict[int, dict[str, torch.Tensor]] = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        self.average.update(whole(model))
        self.at[state.global_step + 1] = copy.deepcopy(self.average.values)


class StopAt(TrainerCallback):
    """Ends the run in the middle, between two checkpoints."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        control.should_training_stop = state.global_step == self.step
        control.should_save = control.should_save and not control.should_training_stop


def outcome(trainer: Trainer) -> dict[str, Any]:
    """What training has made: weights, the optimizer's state, random numbers and losses."""
    losses = [each[key] for each in trainer.state.log_history for key in ("loss", "grad_norm") if key in each]
    state = trainer.optimizer.state_dict()["state"]
    moments = {f"{key}.{name}": local(value) for key, each in state.items() for name, value in each.items()}
    return {"losses": losses, "random": torch.get_rng_state(), **moments, **whole(trainer.model)}


def local(value: Any) -> Any:
    return value.to_local().clone() if isinstance(value, DTensor) else copy.deepcopy(value)


def assert_alike(one: dict[str, Any], other: dict[str, Any], *, without: tuple[str, ...] = ()) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys() and len(one) > 10
    for key, value in one.items():
        if key not in without:
            same = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
            assert same, key


def folders(path: str | os.PathLike[str]) -> dict[str, bool]:
    """The checkpoints of a run, and whether each has a whole average."""
    return {
        each.name: (each / "ema" / "manifest.json").exists() for each in sorted(Path(path).iterdir()) if each.is_dir()
    }
