"""DeepSpeed's engine under accelerate: `engine.step` is what updates follow. DeepSpeed is never imported.

The engine steps by itself, within `accelerator.backward`, and the step hook of a torch optimizer is of no use there: it
fires before the live weights are written, once for every sub-group under ZeRO-3, and sees flat masters only. The engine
says afterwards whether the live weights were stepped: not between accumulated micro-batches, and not on an overflow.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from dist_ema.ema import ShardedEMA
from dist_ema.errors import AttachError

__all__ = ["around", "check_engine", "follow_steps"]


def around(
    target: Any,
    method: str,
    ema: ShardedEMA,
    *,
    before: Callable[[], None] | None,
    after: Callable[[], None],
) -> None:
    """Extend a method of an object that has no hooks there, for as long as `ema` is attached.

    Args:
        target: the object; its class stays as it is.
        method: the name of the method.
        ema: the average whose `detach` undoes it.
        before: what to call first.
        after: what to call when the method has returned.
    """
    of_class = method not in vars(target)
    former = getattr(target, method)
    attached = [ema]

    @functools.wraps(former)
    def longer(_: object, *args: Any, **kwargs: Any) -> Any:
        if attached and before is not None:
            before()
        result = former(*args, **kwargs)
        if attached:
            after()
        return result

    # A method, which does not bind once more: torch's schedulers bind the `step` that they meet.
    with_more = types.MethodType(longer, target)

    def undo() -> None:
        attached.clear()
        if getattr(target, method) is not with_more:
            return  # a later average has wrapped it in turn
        if of_class:
            delattr(target, method)
        else:
            setattr(target, method, former)

    setattr(target, method, with_more)
    ema.on_detach(undo)


def follow_steps(engine: Any, ema: ShardedEMA, after_step: Callable[[], None]) -> None:
    """Call `after_step` after each step of the engine that has changed the live weights, until `ema.detach()`."""

    def after() -> None:
        if engine.was_step_applied():
            after_step()

    around(engine, "step", ema, before=None, after=after)


def check_engine(engine: nn.Module, optimizer: object) -> None:
    """Refuse an engine whose steps cannot be followed.

    Args:
        engine: the model that accelerate prepared.
        optimizer: the optimizer inside accelerate's wrapper.

    Raises:
        AttachError: the engine has no steps, another optimizer, or does not know which steps were skipped.
    """
    if not callable(getattr(engine, "was_step_applied", None)):
        raise AttachError(
            f"accelerate runs DeepSpeed, but the prepared model is a {type(engine).__name__}, expected DeepSpeed's "
            "engine: call model, optimizer = accelerator.prepare(model, optimizer) first"
        )
    if getattr(engine, "optimizer", None) is not optimizer:
        raise AttachError(
            "the optimizer is not that of the model's DeepSpeed engine: give the optimizer that was prepared together "
            "with this model"
        )
    if getattr(engine, "torch_autocast_z0_gradscaler", None) is not None:
        raise AttachError(
            "DeepSpeed runs torch_autocast with float16 without ZeRO, where the engine does not know which steps its "
            'scaler skipped: use bfloat16, the "fp16" section, or a ZeRO stage'
        )
