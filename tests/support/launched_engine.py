"""A Trainer of transformers on DeepSpeed's engine, with an average: as its test in `test_transformers.py` launches it.

Not a test. It raises if the average is not the naive one, a resume is not as a run that never stopped, training is not
as without the callback, or the best averaged weights do not come back.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from deepspeeded import KINDS, imported, read_whole
from oracle import NaiveAverage
from safetensors.torch import load_file
from trained import MOMENTUM, StopAt, assert_alike, folders, trainer_of
from transformers import Trainer, TrainerCallback

from dist_ema import AttachError, ConfigError, ConstantSchedule
from dist_ema.integrations.transformers import EMACallback

SCHEDULE = ConstantSchedule(momentum=MOMENTUM)


class EngineTrainer(Trainer):
    """A Trainer whose accelerator runs DeepSpeed on a CPU, where accelerate would train with DDP."""

    def create_accelerator_and_postprocess(self) -> None:
        imported()
        PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
        PartialState._shared_state["device"] = torch.device("cpu")
        super().create_accelerator_and_postprocess()


class Whole(TrainerCallback):
    """The naive average of the weights that the engine has stepped, and these weights."""

    def __init__(self) -> None:
        self.average = NaiveAverage(lambda _: MOMENTUM)
        self.at: dict[int, dict[str, torch.Tensor]] = {}
        self.live: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        self.live = read_whole(model)
        self.average.update(self.live)
        self.at[state.global_step] = {name: value.clone() for name, value in self.average.values.items()}


def main(kind: str, folder: str) -> None:
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto")
    configuration = {**auto, "zero_allow_untested_optimizer": True, **KINDS[kind]}

    def trainer(name: str, *callbacks: Any, **arguments: Any) -> Trainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        precise = {"deepspeed": configuration, "bf16": kind.endswith("bf16"), "optim": "adamw_torch", "max_steps": 6}
        return trainer_of(os.path.join(folder, name), *callbacks, kind=EngineTrainer, **{**precise, **arguments})

    plain, alone = trainer("plain", whole := Whole(), save_strategy="no"), whole
    plain.train()
    assert plain.accelerator.distributed_type == DistributedType.DEEPSPEED and plain.accelerator.num_processes == 2

    callback, naive = EMACallback(SCHEDULE, evaluate="both", consolidate=True), Whole()
    uncut = trainer("uncut", callback, naive, save_total_limit=1)
    uncut.train()
    assert callback.ema is not None and callback.ema.num_updates == 6
    assert_alike(naive.live, alone.live)
    average = callback.ema.full_state_dict()
    if dist.get_rank() == 0:
        assert_alike({name: average[name] for name in naive.average.values}, naive.average.values)
        assert folders(os.path.join(folder, "uncut")) == {"checkpoint-6": True, "ema": False}
        exported = load_file(os.path.join(folder, "uncut", "ema", "model.safetensors"))
        assert all(torch.equal(exported[name], average[name]) for name in exported)
    assert uncut.evaluate().keys() >= {"eval_loss", "eval_ema_loss"}
    assert_alike(read_whole(uncut.model), alone.live)

    trainer("cut", EMACallback(SCHEDULE), StopAt(3)).train()
    resumed_callback, resumed_naive = EMACallback(SCHEDULE), Whole()
    resumed = trainer("cut", resumed_callback, resumed_naive)
    resumed.train(resume_from_checkpoint=True)
    assert_alike(resumed_naive.live, alone.live)
    assert resumed_callback.ema is not None
    again = resumed_callback.ema.full_state_dict()
    assert average.keys() == again.keys() and all(torch.equal(average[name], again[name]) for name in average)

    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    kept, kept_naive = EMACallback(SCHEDULE), Whole()
    put_back = trainer("best", kept, kept_naive, max_steps=4, save_total_limit=2, **best)
    put_back.train()
    assert put_back.state.best_global_step is not None
    of_best = kept_naive.at[put_back.state.best_global_step]
    dtype = next(iter(alone.live.values())).dtype
    assert_alike(read_whole(put_back.model), {name: value.to(dtype) for name, value in of_best.items()})
    try:
        put_back.train()
    except AttachError as raised:
        assert "transformers cannot do" in str(raised)
    else:
        raise AssertionError("transformers trains twice under DeepSpeed: the refusal can go")
    try:
        trainer("blended", EMACallback(SCHEDULE, blend_every=2), save_strategy="no").train()
    except ConfigError as raised:
        assert "write its masters over the blended weights" in str(raised)
    else:
        raise AssertionError("blends were undone by the next step, in silence")
    if dist.get_rank() == 0:
        print("nothing is lost:", kind, flush=True)
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in sys.argv[2:]:
        main(kind, os.path.join(sys.argv[1], kind))
    sys.stdout.flush()
    os._exit(0)  # destroy_process_group() aborts now and then in gloo's teardown
