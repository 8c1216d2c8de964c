"""A Trainer of transformers on several ranks, with an average: as its test in `test_transformers.py` launches it.

Not a test. It raises if the average is not the naive one, a resume is not as a run that never stopped, training is not
as without the callback, the best averaged weights do not come back, or ranks are told different things.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from trained import MOMENTUM, FSDPTrainer, Naive, StopAt, assert_alike, folders, outcome, trainer_of, whole
from transformers import Trainer

from dist_ema import CheckpointMismatchError, CheckpointNotFoundError, ConstantSchedule
from dist_ema.integrations.transformers import EMACallback

SCHEDULE = ConstantSchedule(momentum=MOMENTUM)


def main(layout: str, folder: str) -> None:
    kind: type[Trainer] = FSDPTrainer if layout == "fsdp2" else Trainer

    def trainer(name: str, *callbacks: Any, **arguments: Any) -> Trainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return trainer_of(os.path.join(folder, name), *callbacks, kind=kind, **arguments)

    plain = trainer("plain", max_steps=6, save_strategy="no")
    assert plain.accelerator.num_processes == dist.get_world_size() == 2
    plain.train()
    without = outcome(plain)
    assert isinstance(next(plain.model.parameters()), DTensor) == (layout == "fsdp2")

    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_ema_loss", "greater_is_better": True}
    callback, naive = EMACallback(SCHEDULE, evaluate="both", consolidate=True), Naive()
    uncut = trainer("uncut", callback, naive, max_steps=6, save_total_limit=1)
    uncut.train()
    assert callback.ema is not None and callback.ema.num_updates == 6
    assert_alike(outcome(uncut), without)
    average = callback.ema.full_state_dict()
    if dist.get_rank() == 0:
        assert_alike({name: average[name] for name in naive.average.values}, naive.average.values)
        assert folders(os.path.join(folder, "uncut")) == {"checkpoint-6": True, "ema": False}
        exported = load_file(os.path.join(folder, "uncut", "ema", "model.safetensors"))
        assert all(torch.equal(exported[name], average[name]) for name in exported)
    live = whole(uncut.model)
    averaged_loss = uncut.evaluate()["eval_ema_loss"]
    assert_alike(whole(uncut.model), live)
    with callback.ema.average_parameters():
        uncut.remove_callback(callback)
        assert uncut.evaluate()["eval_loss"] == averaged_loss

    trainer("cut", EMACallback(SCHEDULE), StopAt(3), max_steps=6).train()
    resumed_callback, resumed_naive = EMACallback(SCHEDULE, evaluate="both"), Naive()
    resumed = trainer("cut", resumed_callback, resumed_naive, max_steps=6, save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert_alike(outcome(resumed), without, without=("losses",))
    again = resumed_callback.ema.full_state_dict()
    assert average.keys() == again.keys() and all(torch.equal(average[name], again[name]) for name in average)

    kept, kept_naive = EMACallback(SCHEDULE, evaluate="both"), Naive()
    put_back = trainer("best", kept, kept_naive, max_steps=4, save_total_limit=2, **best)
    put_back.train()
    assert put_back.state.best_global_step == 2
    assert_alike(whole(put_back.model), kept_naive.at[2])
    further_naive = Naive()
    put_back.remove_callback(kept_naive)
    put_back.add_callback(further_naive)
    put_back.train()
    assert_alike(whole(put_back.model), further_naive.at[put_back.state.best_global_step])

    tracks = EMACallback({"fast": SCHEDULE, "slow": ConstantSchedule(momentum=0.1)})
    for stopped, error in ((tracks, CheckpointMismatchError), (EMACallback(SCHEDULE), CheckpointNotFoundError)):
        checkpoint = os.path.join(folder, "best", "checkpoint-4")
        if error is CheckpointNotFoundError and dist.get_rank() == 0:
            shutil.rmtree(os.path.join(checkpoint, "ema"))
        dist.barrier()
        try:
            trainer("best", stopped, max_steps=6).train(resume_from_checkpoint=checkpoint)
        except error as raised:
            texts = [None] * 2
            dist.all_gather_object(texts, str(raised))
            assert texts[0] == texts[1]
        else:
            raise AssertionError(f"no {error.__name__}")
    if dist.get_rank() == 0:
        print("nothing is lost:", layout, flush=True)
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # destroy_process_group() aborts now and then in gloo's teardown
