"""Wiring into accelerate: the average follows the optimizer's steps, and its checkpoints have the average.

- step: `register_step_post_hook` of the inner torch optimizer fires once per real step, not per micro-batch.
  Accelerate's wrapper refuses hooks. `accelerate_steps.py` also follows several optimizers, and DeepSpeed's engine.
- save and load: `register_save_state_pre_hook` and `register_load_state_pre_hook` run on every rank.
  `register_for_checkpointing` would write rank 0's part only.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from dist_ema.checks import folder_name
from dist_ema.ema import ShardedEMA
from dist_ema.errors import AttachError, ConfigError
from dist_ema.integrations.accelerate_steps import (
    around,
    check_blending,
    check_engine,
    follow_engine,
    follow_optimizers,
)
from dist_ema.integrations.resume import checked_load_arguments, load_or_begin
from dist_ema.integrations.watch import Watch, is_of_a_trainer
from dist_ema.live.blending import Blending
from dist_ema.messages import tell
from dist_ema.options import check_names
from dist_ema.ranks.calls import ended_for_all
from dist_ema.ranks.exchange import Exchange
from dist_ema.schedules.functions import ScheduleLike
from dist_ema.topology.names import unwrapped
from dist_ema.topology.parts import module_of, parts_of, whole_model
from dist_ema.topology.planning import trained_parameters

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dist_ema.options import OptionArguments

__all__ = ["SERVED", "attach"]

_log = logging.getLogger(__name__)

# What accelerate may run a model with.
SERVED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
)

_NOT_IN_A_TRAINER = (
    "the accelerator is that of a Trainer of transformers, which writes its checkpoints without "
    "accelerator.save_state: none of them will hold the average {name!r}, and a resume begins it anew. Give "
    "the Trainer a callback in its place, which saves, resumes and evaluates it: Trainer(..., "
    "callbacks=[EMACallback(schedule, name={name!r})]) of dist_ema.integrations.transformers"
)

# The names in use on an accelerator: two averages of one name would overwrite each other's folder.
_attached_names: weakref.WeakKeyDictionary[Accelerator, set[str]] = weakref.WeakKeyDictionary()


def attach(
    accelerator: Accelerator,
    model: nn.Module | Sequence[nn.Module],
    optimizer: AcceleratedOptimizer | Sequence[AcceleratedOptimizer],
    schedule: ScheduleLike | Mapping[str, ScheduleLike],
    *,
    name: str = "ema",
    on_missing: Literal["error", "live"] = "error",
    on_load: Mapping[str, Any] | None = None,
    background: bool = False,
    blend_every: int | None = None,
    blend_weight: float = 0.5,
    **options: Unpack[OptionArguments],
) -> ShardedEMA:
    """Average a prepared model from now on. Collective: every rank must call it, after `accelerator.prepare`.

    A hook calls `update` after every real optimizer step. `accelerator.save_state(dir)` also writes `dir/<name>/`, and
    `accelerator.load_state(dir)` reads it, on any number of ranks. `ema.detach()` undoes all of this.

    Args:
        accelerator: the accelerator that prepared model and optimizer.
        model: the model as `prepare` returned it (its unwrapped module is accepted too). The parts of a pipeline that
            this rank has are a list: prepare each by `accelerator.prepare_model(part, evaluation_mode=True)`, which
            does not take it for a replica, or shard it first.
        optimizer: the optimizer as `prepare` returned it; or a list of several that step this model (Muon and AdamW, a
            GAN's two). Then an update follows when each of them has stepped at least once since the last update.
        schedule: a schedule, or `{track_name: schedule}`.
        name: the folder of this average within a checkpoint.
        on_missing: what `load_state` does with a checkpoint that has no such folder: "error", or "live" to start the
            average anew from the loaded weights, at the first update. With `into` attach after `load_state` instead.
        on_load: keywords of `ShardedEMA.load` for `load_state`: `dict(new_tracks={"slow": "live"})` for a run that has
            one more track than its checkpoint, `dict(new="head.*")` for one with a new head.
        background: make `save_state` return before the average is written; see `ShardedEMA.save`. The checkpoint is
            complete only once `ema.wait()`, or the next save, has returned.
        blend_every: with n, the average of the (first) track is blended into the live weights after every n updates:
            `copy_to_model(weight=blend_weight)`. It follows from `num_updates`, so a resume keeps the rhythm. Where
            `interval` leaves out that update, the blend waits for the next one that averages.
        blend_weight: the weight of the average in what becomes live, above 0, at most 1.
        **options: the options of `ShardedEMA`, which `OptionArguments` lists for editors.

    Raises:
        AttachError: model or optimizer was not prepared, the optimizer is not the model's, or is given twice, the list
            is empty, or the name is taken.
        ConfigError: an option is out of range.
        UnsupportedModelError: the model cannot be averaged exactly as it is.
    """
    exchange = Exchange()
    optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]

    def check() -> Blending | None:
        _check(accelerator, model, optimizers, name, exchange.world_size, options)
        checked_load_arguments(on_load)
        if on_missing not in ("error", "live"):
            raise ConfigError(f"on_missing is {on_missing!r}, expected 'error' or 'live'")
        blending = Blending.of(blend_every, blend_weight, options.get("interval", 1))
        check_blending(blending, accelerator)
        if on_missing == "live" and options.get("into") is not None:
            # load_state calls the hook before it loads the model: the teacher's next forward would use older weights.
            raise ConfigError(
                "on_missing='live' and into are given, but a teacher cannot begin with weights that load_state has yet "
                "to load: for a checkpoint without the average attach after load_state"
            )
        if background and accelerator.project_configuration.total_limit == 1:
            raise ConfigError(
                "background=True with total_limit=1: accelerate removes the only checkpoint before the next is "
                "written, while its average may still be under way. Set total_limit to 2 or more"
            )

        if exchange.rank == 0 and is_of_a_trainer(accelerator):
            tell(_NOT_IN_A_TRAINER.format(name=name))
        return blending

    with ended_for_all(exchange, "attach"):
        exchange.arrive("attach")
        blending = exchange.agree_alike("attach", check, lambda made: {"blending": repr(made)})
    ema = ShardedEMA(model, schedule, **options)
    exchange.agree("attach", lambda: ema.expect_updates(user_resumes=True))
    watch = Watch(ema, name, rank=exchange.rank, ends=options.get("into") is None, blending=blending)
    names = _attached_names.setdefault(accelerator, set())
    names.add(name)
    ema.on_detach(lambda: names.discard(name))

    def before_save(models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        if _not_prepared(accelerator, model):  # accelerator.free_memory() was called
            # A detach would change the hooks through which accelerate is iterating.
            _log.warning("the average %r is not saved, its model was released: call ema.detach()", name)
            return
        _line_up(accelerator, exchange)
        ema.save(_folder_in(output_dir, name), background=background)

    def before_load(models: list[nn.Module], input_dir: str) -> None:
        _line_up(accelerator, exchange)
        hint = (
            "If the run that saved it had no average, attach with on_missing='live': the average then starts from the "
            "loaded weights, at the first update"
        )
        folder, arguments = _folder_in(input_dir, name), checked_load_arguments(on_load)
        if not load_or_begin(ema, exchange, folder, on_missing=on_missing, hint=hint, on_load=arguments):
            ema.restart()

    def after_loading() -> None:
        watch.start_over()
        ema.expect_updates()

    # end_training destroys the process group; load_state under FSDP loads the model before it calls the hook.
    wait_at_end = ema.wait if background else None
    wait_for_load = ema.wait if options.get("overlap") else None
    around(accelerator, "end_training", ema, before=wait_at_end, after=watch.end)
    around(accelerator, "load_state", ema, before=wait_for_load, after=after_loading)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        follow_engine(
            _prepared(accelerator, *parts_of(model)), ema, torch.compiler.disable(lambda: watch.update(ema, None))
        )
    else:
        follow_optimizers(optimizers, ema, lambda found_inf: watch.update(ema, found_inf))
    ema.on_detach(accelerator.register_save_state_pre_hook(before_save).remove)
    ema.on_detach(accelerator.register_load_state_pre_hook(before_load).remove)
    return ema


def _folder_in(checkpoint: str | os.PathLike[str], name: str) -> str:
    """The folder of an average beside what accelerate writes: it takes `~` for a name like any other."""
    path = os.fspath(checkpoint)
    return os.path.join(path if "://" in path else os.path.abspath(path), name)  # a refusal is to name what was given


def _line_up(accelerator: Accelerator, exchange: Exchange) -> None:
    """Collective: every rank must call it. Wait under FSDP and DeepSpeed, where rank 0 may write alone for long.

    Under DDP the average's save is the first collective of `save_state`, and waits as every call does.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        exchange.arrive("save_state or load_state", hurried=False)


def _check(
    accelerator: object,
    model: object,
    optimizers: Sequence[object],
    name: str,
    world_size: int,
    options: Mapping[str, Any],
) -> None:
    folder_name("name", name)
    check_names("attach", options)
    if not isinstance(accelerator, Accelerator):
        raise AttachError(f"accelerator is {type(accelerator).__name__}, expected an accelerate.Accelerator")
    wrapped = [optimizer for optimizer in optimizers if isinstance(optimizer, AcceleratedOptimizer)]
    for optimizer in optimizers:
        if not isinstance(optimizer, AcceleratedOptimizer):
            raise AttachError(
                f"optimizer is {type(optimizer).__name__}, expected the one that accelerator.prepare returned, or a "
                "list of such: call model, optimizer = accelerator.prepare(model, optimizer) first"
            )
    if not wrapped:
        raise AttachError("optimizer is an empty list, expected the optimizer, or all optimizers, that step the model")
    if len({id(optimizer.optimizer) for optimizer in wrapped}) < len(wrapped):
        raise AttachError(
            f"{len(wrapped)} optimizers are given, and one of them twice: an update would wait for it alone. Give each "
            "optimizer once"
        )
    if accelerator.distributed_type not in SERVED:
        raise AttachError(
            f"the accelerator runs as {accelerator.distributed_type!s}, expected one process, DDP, FSDP or DeepSpeed: "
            "other engines keep their own copies of the weights"
        )
    if accelerator.num_processes != world_size:
        raise AttachError(
            f"the accelerator counts {accelerator.num_processes} process(es), the process group {world_size}: the "
            "ranks train apart, and an average would mix different models. On CPU give Accelerator(cpu=True), before "
            "anything else starts accelerate's state (a tracker made earlier does)"
        )
    for part in _not_prepared(accelerator, model):
        raise AttachError(
            f"model is a {type(part).__name__} that this accelerator has not prepared, expected the one that "
            "accelerator.prepare returned: call model, optimizer = accelerator.prepare(model, optimizer) first"
        )
    if name in _attached_names.get(accelerator, ()):
        raise AttachError(f"an average named {name!r} is attached already: give another name=, or detach() the first")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if len(parts_of(model)) != 1:
            raise AttachError("model is a list of several parts, expected one: DeepSpeed's engine steps one model")
        if len(wrapped) != 1:
            raise AttachError(f"{len(wrapped)} optimizers are given, expected the one that DeepSpeed's engine steps")
        check_engine(_prepared(accelerator, *parts_of(model)), wrapped[0].optimizer)
        return  # it steps flat masters
    trained = trained_parameters(whole_model(model))
    for optimizer in wrapped:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not stepped.intersection(trained):
            raise AttachError(
                f"the optimizer steps none of the model's {len(trained)} trained parameters: give the optimizer that "
                "was prepared together with this model"
            )


def _not_prepared(accelerator: Accelerator, model: object) -> list[object]:
    """The model, or those of its parts, that accelerate has not prepared."""
    return [part for part in parts_of(model) if _prepared(accelerator, part) is None]


def _prepared(accelerator: Accelerator, part: object) -> Any:
    """What accelerate remembers for a model or a part; None for one that it has not prepared."""
    module = module_of(part)
    # Under DDP accelerate remembers the inner module and returns the wrapped one: the inner modules are compared.
    same = (made for made in accelerator._models if module is not None and unwrapped(made) is unwrapped(module))
    return next(same, None)
