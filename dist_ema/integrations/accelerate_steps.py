"""The steps that updates follow under accelerate: of one optimizer, of several in rounds, or of DeepSpeed's engine.

[Note: rounds]
Several optimizers of one model have one update in a round. A round ends when every optimizer has had its turn since the
end of the last round, in any order and any number of times:

    Muon and AdamW    M A | M A | M A |             an update at each |
    a GAN, 5 to 1     D D D D D G | D D D D D G |
    a GAN, 1 to 2     G G D | G G D |

A step that a GradScaler skips is a turn without a step. A round in which an optimizer has had only such turns has no
update, and is not counted: the model has moved in part. If skipped steps were no turns, that round would end in the
middle of the next one, and so would all later ones.

[Note: the engine]
DeepSpeed's engine steps by itself, within `accelerator.backward`, and the step hook of a torch optimizer is of no use
there: it fires before the live weights are written, once for every sub-group under ZeRO-3, and sees flat masters only.
The engine says afterwards whether the live weights were stepped: not between accumulated micro-batches, and not on an
overflow. DeepSpeed is never imported.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from dist_ema.ema import ShardedEMA
from dist_ema.errors import AttachError, ConfigError
from dist_ema.integrations.watch import is_state_initialisation
from dist_ema.live.blending import Blending

__all__ = ["around", "check_blending", "check_engine", "follow_engine", "follow_optimizers"]


def check_blending(blending: Blending | None, accelerator: Any) -> None:
    """Refuse blends that the next step would undo. No communication.

    Raises:
        ConfigError: the average is to be blended into live weights of which DeepSpeed keeps masters.
    """
    if blending is not None and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ConfigError(
            "blend_every is given, but DeepSpeed's next step would write its masters over the blended weights: call "
            "copy_to_model(weight=...) and then engine.optimizer.refresh_fp32_params() in the training loop"
        )


def around(
    target: Any,
    method: str,
    ema: ShardedEMA,
    *,
    before: Callable[[], None] | None,
    after: Callable[[], None],
) -> Callable[[], None]:
    """Extend a method of an object that has no hooks there, for as long as `ema` is attached.

    Args:
        target: the object; its class stays as it is.
        method: the name of the method.
        ema: the average whose `detach` undoes it.
        before: what to call first.
        after: what to call when the method has returned.

    Returns:
        What undoes it earlier.
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
    return undo


class _Rounds:
    """The turns since the last round.

    Args:
        num_optimizers: the number of optimizers.
        end: called at the end of a round in which all have stepped, with the flag of an overflow or None.
    """

    def __init__(self, num_optimizers: int, end: Callable[[torch.Tensor | None], None]) -> None:
        self._all = set(range(num_optimizers))
        self._end = end
        self._turns: set[int] = set()
        # Optimizer -> whether all its steps so far were skipped, on the device; None once one is known to be real.
        self._skipped: dict[int, torch.Tensor | None] = {}

    def step(self, which: int, found_inf: torch.Tensor | None) -> None:
        """An optimizer has stepped; `found_inf` is the flag of a fused one, which the device knows first."""
        former = self._skipped.get(which)
        if found_inf is None or (which in self._skipped and former is None):
            self._skipped[which] = None
        else:
            # The scaler may use the flag's memory again: so this is a copy.
            self._skipped[which] = found_inf.clone() if former is None else torch.minimum(former, found_inf)
        self.turn(which)

    def turn(self, which: int) -> None:
        """An optimizer has had its turn, with or without a step."""
        self._turns.add(which)
        if self._turns == self._all:
            skipped, self._skipped = self._skipped, {}
            self._turns = set()
            if skipped.keys() == self._all:
                self._end(_any_of(skipped))


def _is_of_an_outer_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of the optimizer's own class has made this one, by `super().step()`. The outer one counts.

    Torch puts its hooks around `step` of each class of which an optimizer was ever made, so they run for both.
    """
    num_steps = 0
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _STEP_WITH_HOOKS and frame.f_locals.get("args", (None,))[0] is optimizer:
            num_steps += 1
        frame = frame.f_back
    return num_steps > 1


# The function that torch puts in the place of `step`.
_STEP_WITH_HOOKS = torch.optim.Optimizer.profile_hook_step(lambda *_: None).__code__


def _any_of(skipped: Mapping[int, torch.Tensor | None]) -> torch.Tensor | None:
    flags = [flag for flag in skipped.values() if flag is not None]
    return functools.reduce(torch.maximum, (flag.to(flags[0]) for flag in flags)) if flags else None


def follow_optimizers(
    optimizers: Sequence[AcceleratedOptimizer],
    ema: ShardedEMA,
    end: Callable[[torch.Tensor | None], None],
) -> None:
    """Call `end` after each step of the one optimizer, or after each round of several, until `ema.detach()`.

    Args:
        optimizers: the optimizers as accelerate prepared them.
        ema: the average whose `detach` undoes it.
        end: called with the overflow flag of the round, or None.
    """
    rounds = _Rounds(len(optimizers), end)
    is_alone = len(optimizers) == 1
    for which, optimizer in enumerate(optimizers):

        def after_step(stepped: torch.optim.Optimizer, *_: Any, which: int = which) -> None:
            if is_state_initialisation() or _is_of_an_outer_step(stepped):
                return
            # Only a fused optimizer under a GradScaler has a `found_inf`, and only during its step.
            found_inf = getattr(stepped, "found_inf", None)
            if is_alone:
                end(found_inf)
            else:
                rounds.step(which, found_inf)

        def after_call(which: int = which, optimizer: AcceleratedOptimizer = optimizer) -> None:
            # Between accumulated micro-batches `step_was_skipped` still tells of an earlier step.
            was_skipped = optimizer.gradient_state.sync_gradients and optimizer.step_was_skipped
            if was_skipped and not is_state_initialisation():
                rounds.turn(which)

        untraced = torch.compiler.disable(after_step)  # a compiled step traces its hooks too
        ema.on_detach(optimizer.optimizer.register_step_post_hook(untraced).remove)
        if not is_alone:
            around(optimizer, "step", ema, before=None, after=after_call)


def follow_engine(engine: Any, ema: ShardedEMA, after_step: Callable[[], None]) -> Callable[[], None]:
    """Call `after_step` after each step of the engine that has changed the live weights, until `ema.detach()`.

    Returns:
        What ends it earlier.
    """

    def after() -> None:
        if engine.was_step_applied():
            after_step()

    return around(engine, "step", ema, before=None, after=after)


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
