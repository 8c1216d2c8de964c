"""What a callback must know of its Trainer (transformers), which hands itself to no callback. No communication.

A Trainer calls its callbacks from within its own methods. So it is found among the callers, as `self`, by the callback
that it holds. From where a run resumes is an argument of its public method `train`. The tests of
tests/integrations/test_transformers.py fail if either changes.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate import DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from dist_ema.errors import AttachError
from dist_ema.integrations.accelerate import SERVED
from dist_ema.integrations.accelerate_steps import check_engine
from dist_ema.integrations.watch import callers

__all__ = [
    "check_trainer",
    "checkpoint_folder",
    "engine_of",
    "inner_optimizer",
    "resumes_from",
    "run_folder",
    "trainer_of",
]


def trainer_of(callback: Any) -> Any:
    """The Trainer that is calling a callback; None if there is no Trainer among the callers."""
    for frame in callers():
        owner: Any = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and any(held is callback for held in owner.callback_handler.callbacks):
            return owner
    return None


def resumes_from(trainer: Any) -> str | None:
    """The checkpoint from which the running `trainer.train()` resumes; None for a run from the start.

    Raises:
        AttachError: the run resumes, and the checkpoint is not known.
    """
    output_dir = trainer.args.output_dir
    for frame in callers():
        known = frame.f_locals
        if frame.f_code.co_name == "train" and known.get("self") is trainer and "resume_from_checkpoint" in known:
            path = known["resume_from_checkpoint"]
            path = get_last_checkpoint(output_dir) if path is True else path
            return os.fspath(path) if path else None
    if trainer.state.global_step > 0:
        raise AttachError(
            f"the Trainer ({type(trainer).__name__}) resumes at step {trainer.state.global_step}, but not from within "
            "train(resume_from_checkpoint=...) of transformers, so that EMACallback cannot know the checkpoint: its "
            "average would begin anew"
        )
    return None


def check_trainer(trainer: Any, callback_class: type[Any], world_size: int) -> None:
    """Refuse a Trainer in which the average would be lost or wrong.

    Args:
        trainer: the Trainer; None if it was not found.
        callback_class: the class of which a Trainer may have one callback.
        world_size: the number of ranks.

    Raises:
        AttachError: it has the reason and the way to go.
    """
    if trainer is None:
        raise AttachError(
            "EMACallback was called by no Trainer that holds it, expected callbacks=[EMACallback(...)] or "
            "trainer.add_callback(EMACallback(...))"
        )
    number = sum(isinstance(callback, callback_class) for callback in trainer.callback_handler.callbacks)
    if number > 1:
        raise AttachError(
            f"the Trainer has {number} callbacks EMACallback, expected one: they would evaluate over each other. For "
            "several averages give one of them EMACallback({track_name: schedule, ...})"
        )
    accelerator = trainer.accelerator
    if accelerator.distributed_type not in SERVED:
        raise AttachError(
            f"the Trainer runs under {accelerator.distributed_type!s}, expected one process, DDP, FSDP or DeepSpeed: "
            "that engine steps its own copies of the weights, which EMACallback does not follow. Train with fsdp=... "
            "of TrainingArguments, or without that engine"
        )
    if accelerator.num_processes != world_size:
        raise AttachError(
            f"the Trainer counts {accelerator.num_processes} process(es), the process group {world_size}: the ranks "
            "train apart, and an average would mix different models. Give TrainingArguments before anything else "
            "starts accelerate's state, and on a CPU use_cpu=True"
        )


def engine_of(trainer: Any) -> Any:
    """DeepSpeed's engine, within `trainer.train()`; None where the Trainer runs without DeepSpeed.

    Raises:
        AttachError: its steps cannot be followed.
    """
    if trainer.accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    engine = trainer.model_wrapped
    if getattr(trainer.accelerator, "deepspeed_engine_wrapped", engine) is None:
        raise AttachError(
            "a Trainer under DeepSpeed trains for a second time, which transformers cannot do: its accelerator has "
            "released the engine. Make a new Trainer, with an EMACallback of its own"
        )
    check_engine(engine, inner_optimizer(trainer))
    return engine


def inner_optimizer(trainer: Any) -> Any:
    """The torch optimizer, whose step hook fires once for each real step: accelerate's wrapper refuses hooks."""
    optimizer = trainer.optimizer
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def run_folder(trainer: Any) -> str:
    """The folder of the run's checkpoints: `args.output_dir`, or that of the trial in a hyperparameter search."""
    if not trainer.state.is_hyper_param_search:
        return str(trainer.args.output_dir)
    return str(trainer._get_output_dir(trainer._trial))


def checkpoint_folder(trainer: Any) -> str:
    """The folder of the checkpoint of the present step."""
    return os.path.join(run_folder(trainer), f"checkpoint-{trainer.state.global_step}")
