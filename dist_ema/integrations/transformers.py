"""An average in the Trainer of transformers, and in what derives from it (TRL): one callback.

    on_train_begin   the average is built from the prepared model, and loaded if the run resumes
    optimizer step   a hook of the torch optimizer updates it: once for a real step, not for a skipped one
    evaluation       the averaged weights are in the model
    on_save          `checkpoint-N/<name>/` is written by all ranks, after the Trainer has written the rest
    on_train_end     the best averaged weights are put back, and a model folder is written

The Trainer is found by `integrations/trainer.py`, its evaluations are those of `integrations/trainer_evaluation.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import TrainerCallback

from dist_ema.checks import folder_name
from dist_ema.ema import ShardedEMA
from dist_ema.errors import AttachError, CheckpointNotFoundError, ConfigError
from dist_ema.integrations.accelerate_steps import check_blending, follow_engine
from dist_ema.integrations.resume import checked_load_arguments, load_or_begin
from dist_ema.integrations.trainer import (
    check_trainer,
    checkpoint_folder,
    engine_of,
    inner_optimizer,
    resumes_from,
    run_folder,
    trainer_of,
)
from dist_ema.integrations.trainer_evaluation import (
    Evaluated,
    evaluate_averages,
    is_averaged_metric,
    tell_at_evaluation,
)
from dist_ema.integrations.watch import Watch, is_state_initialisation
from dist_ema.live.blending import Blending
from dist_ema.options import check_names, checked_schedules
from dist_ema.ranks.calls import ended_for_all
from dist_ema.ranks.exchange import Exchange
from dist_ema.schedules.base import Schedule

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dist_ema.options import OptionArguments

__all__ = ["EMACallback"]

Schedules = Schedule | Mapping[str, Schedule]

# What the Trainer and accelerate look for among the folders of a checkpoint and of a run, as a part of their names.
_TAKEN = ("checkpoint-", "optimizer", "pytorch_model_fsdp")

_NONE_THERE = (
    "If the run that saved it had no EMACallback, give EMACallback(..., on_missing='live'): the average then begins "
    "with the loaded weights. If it was stopped while the Trainer wrote this checkpoint, resume from an older one"
)

_ELSEWHERE = (
    "the EMACallback of this Trainer averages the model of another Trainer by now: this evaluation is one of the live "
    "weights. Give each Trainer an EMACallback of its own"
)


class EMACallback(TrainerCallback):  # type: ignore[misc]
    """Average the model that a Trainer trains: `Trainer(..., callbacks=[EMACallback(schedule)])`.

    Collective: all ranks train, and every rank has the callback. After `train()` the model holds the live weights, or
    the best ones with `load_best_model_at_end`: the best averaged ones if `metric_for_best_model` is a metric of
    averaged weights. A further `train()` begins a new average.

    Args:
        schedule: a schedule; `{track_name: schedule}`, of which the first track is evaluated; or a function that makes
            either from the number of optimizer steps of the run: `lambda steps: CosineSchedule(total_steps=steps)`.
        name: the folder of the average within a checkpoint, and within `output_dir` with `consolidate`.
        evaluate: whose weights `evaluate` and `predict` of the Trainer measure, in training and after it: "averaged",
            with metrics "eval_..."; "live"; or "both", with live metrics "eval_..." and averaged ones "eval_ema_...".
            The predictions are then of the live weights.
        on_missing: what a resume does with a checkpoint without an average: "error", or "live" to begin with the loaded
            weights.
        on_load: keywords of `ShardedEMA.load` for a resume, such as `dict(new_tracks={"slow": "live"})`.
        consolidate: whether the end of the training writes the average as a model folder, `output_dir/<name>`; of
            several tracks one folder each in it.
        blend_every: as in `attach`: with n, the average of the (first) track is blended into the live weights after
            every n updates; and `blend_weight`, the weight of the average in it.
        blend_weight: see `blend_every`.
        **options: the options of `ShardedEMA`, which `OptionArguments` lists for editors.

    Attributes:
        ema: the average; None before `train()`. With a best averaged model put back it is that one.

    Raises:
        ConfigError: an option is unknown or out of range.
        AttachError: the Trainer cannot be served; when it is made, or when `train` begins.
    """

    def __init__(
        self,
        schedule: Schedules | Callable[[int], Schedules],
        *,
        name: str = "ema",
        evaluate: Evaluated = "averaged",
        on_missing: Literal["error", "live"] = "error",
        on_load: Mapping[str, Any] | None = None,
        consolidate: bool = False,
        blend_every: int | None = None,
        blend_weight: float = 0.5,
        **options: Unpack[OptionArguments],
    ) -> None:
        _check_name(name)
        for argument, value, allowed in (
            ("evaluate", evaluate, ("averaged", "live", "both")),
            ("on_missing", on_missing, ("error", "live")),
            ("consolidate", consolidate, (True, False)),
        ):
            if value not in allowed:
                raise ConfigError(f"{argument} is {value!r}, expected one of {', '.join(map(repr, allowed))}")
        check_names("EMACallback", options)
        blending = Blending.of(blend_every, blend_weight, options.get("interval", 1))
        self._is_function = callable(schedule) and not isinstance(schedule, Schedule)
        if not self._is_function:
            checked_schedules(schedule)  # type: ignore[arg-type]
        self._schedule: Any = schedule
        self._name = name
        self._evaluated = evaluate
        self._on_missing = on_missing
        self._on_load = checked_load_arguments(on_load)
        self._consolidates = consolidate
        self._options = options
        self._blending = blending
        self._trainer: Any = None
        self._exchange: Exchange | None = None
        self._stop_updates: Callable[[], None] | None = None
        self._saved_step: int | None = None
        self.ema: ShardedEMA | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a Trainer that cannot be served, before it trains. No communication."""
        trainer = trainer_of(self)
        if trainer is not None:
            check_trainer(trainer, EMACallback, trainer.accelerator.num_processes)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Collective: every rank must call it. Build the average, and load it if the run resumes.

        Raises:
            AttachError: the Trainer cannot be served.
            ConfigError: blends are asked for under DeepSpeed, or the function gave no schedule.
            UnsupportedModelError: the model cannot be averaged exactly as it is.
            CheckpointNotFoundError: the checkpoint has no average.
            CheckpointError: its average is of another model or other tracks, or damaged.
        """
        former = self._trainer
        self._leave()  # a former run, or one that auto_find_batch_size begins again
        exchange = Exchange()

        def check() -> tuple[Any, Any, Schedules, str | None]:
            trainer = trainer_of(self)
            check_trainer(trainer, EMACallback, exchange.world_size)
            check_blending(self._blending, trainer.accelerator)
            schedule = self._schedule(state.max_steps) if self._is_function else self._schedule
            return trainer, engine_of(trainer), checked_schedules(schedule), resumes_from(trainer)

        with ended_for_all(exchange, "train"):
            exchange.arrive("train", hurried=False)
            trainer, engine, schedule, checkpoint = exchange.agree_alike("train", check, lambda made: made[3])
        ema = ShardedEMA(trainer.model if engine is None else engine, schedule, **self._options)
        if checkpoint is not None:
            folder = os.path.join(checkpoint, self._name)
            load_or_begin(ema, exchange, folder, on_missing=self._on_missing, hint=_NONE_THERE, on_load=self._on_load)
        if ema.num_updates == 0:  # a resume may have no step left, and end with other weights: those of the best model
            exchange.agree("train", ema.expect_updates)
        self._trainer, self._exchange, self._saved_step, self.ema = trainer, exchange, None, ema
        self._stop_updates = self._follow(inner_optimizer(trainer), engine, ema, exchange)
        ema.on_detach(self._stop_updates)

        def is_wanted() -> bool:
            return self.ema is ema and self._is_in(trainer)

        evaluate_averages(trainer, ema, ema.tracks[0], self._evaluated, is_wanted)
        if former is not None and former is not trainer and self._evaluated != "live":
            tell_at_evaluation(former, _ELSEWHERE, lambda: self._trainer is not former and self._is_in(former))

    def _is_in(self, trainer: Any) -> bool:
        return any(callback is self for callback in trainer.callback_handler.callbacks)

    def _follow(self, optimizer: Any, engine: Any, ema: ShardedEMA, exchange: Exchange) -> Callable[[], None]:
        """Update after each step of the optimizer, or of DeepSpeed's engine, until the returned function is called."""
        watch = Watch(
            ema,
            self._name,
            rank=exchange.rank,
            ends=self._options.get("into") is None,
            hook="EMACallback",
            save_it="a checkpoint of the Trainer has them (save_strategy), EMACallback(consolidate=True) exports them",
            blending=self._blending,
        )

        def after_step(stepped: torch.optim.Optimizer, *_: Any) -> None:
            if not is_state_initialisation():
                # Only a fused optimizer under a GradScaler has a `found_inf`, and only during its step.
                watch.update(ema, getattr(stepped, "found_inf", None))

        # A compiled step traces its hooks too.
        if engine is not None:
            return follow_engine(engine, ema, torch.compiler.disable(lambda: watch.update(ema, None)))
        hook = optimizer.register_step_post_hook(torch.compiler.disable(after_step))
        return hook.remove  # type: ignore[no-any-return]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Collective: every rank must call it. Write the average into the checkpoint of this step.

        Raises:
            AttachError: the callback was added while the Trainer trained.
            CheckpointError: some rank could not write; the same on all ranks.
        """
        if self.ema is None or self._exchange is None:
            raise AttachError(
                "EMACallback was added to a Trainer that trains already, expected Trainer(..., callbacks=[...]) or "
                "trainer.add_callback(...) before train()"
            )
        # Rank 0 may have written the model and the optimizer alone, for long.
        self._exchange.arrive("on_save", hurried=False)
        self.ema.save(os.path.join(checkpoint_folder(self._trainer), self._name))
        self._saved_step = state.global_step

    def _save_just_in_time(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Collective: every rank must call it. Save if the Trainer did, on SIGTERM, without `on_save`.

        `enable_jit_checkpoint` makes a checkpoint within these events, in a callback that comes before this one.
        """
        asked = args.enable_jit_checkpoint and control.should_training_stop
        if asked and self._saved_step != state.global_step and os.path.isdir(checkpoint_folder(self._trainer)):
            self.on_save(args, state, control)

    on_step_begin = on_pre_optimizer_step = on_step_end = on_epoch_end = _save_just_in_time

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Collective: every rank must call it. Put the best average back, export, and end the updates.

        Raises:
            CheckpointError: the best average could not be read, or the export not be written; the same on all ranks.
        """
        ema, exchange = self.ema, self._exchange
        if ema is None or exchange is None:
            return
        if self._stop_updates is not None:
            self._stop_updates()
        is_averaged = is_averaged_metric(self._evaluated, args.metric_for_best_model)
        if args.load_best_model_at_end and is_averaged:
            best = exchange.broadcast_object(state.best_model_checkpoint)
            if best is not None:
                self._put_back(ema, exchange, best)
        if self._consolidates:
            folder = os.path.join(run_folder(self._trainer), self._name)
            for track in ema.tracks:
                ema.consolidate(folder if len(ema.tracks) == 1 else os.path.join(folder, track), track=track)

    def _put_back(self, ema: ShardedEMA, exchange: Exchange, best: str) -> None:
        """Collective: every rank must call it. The Trainer has put the live weights of the best checkpoint back."""
        try:
            ema.load(os.path.join(best, self._name), **self._on_load)  # it may be of before those changes
        except CheckpointNotFoundError:
            is_gone = exchange.on_rank_0("train", lambda: not os.path.isdir(best))
            exchange.warn(
                f"the best checkpoint {best} is not there any more: the model keeps the last live weights, and "
                "callback.ema the last average"
                if is_gone
                else f"the best checkpoint {best} has no average {self._name!r}: the live weights that it has stay in "
                "the model. It is of a part of the run without EMACallback"
            )
            return
        ema.copy_to_model(ema.tracks[0])

    def _leave(self) -> None:
        """End what is left of the former run. No communication."""
        if self.ema is not None:
            self.ema.detach()
        self._trainer = self._exchange = self._stop_updates = self._saved_step = self.ema = None


def _check_name(name: str) -> None:
    folder_name("name", name)
    for part in _TAKEN:
        if part in name:
            raise ConfigError(
                f"name is {name!r}, expected a name without {part!r}: the Trainer would take it for its own"
            )
