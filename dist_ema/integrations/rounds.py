"""Several optimizers of one model: one update in a round, after the last of them has stepped. No communication.

A round ends when every optimizer has had its turn since the end of the last round, in any order and any number of
times. So a GAN's critic that steps five times for one step of its generator has one update for these six steps:

    Muon and AdamW    M A | M A | M A |            an update at each |
    a GAN, 5 to 1     D D D D D G | D D D D D G |
    a GAN, 1 to 2     G G D | G G D |

A step that a GradScaler skips is a turn without a step. A round in which an optimizer has had only such turns has no
update, and is not counted: the model has moved in part. If skipped steps were no turns, that round would end in the
middle of the next one, and so would all later ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer

from dist_ema.ema import ShardedEMA
from dist_ema.integrations.engine import around

__all__ = ["follow_rounds"]


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


def _any_of(skipped: Mapping[int, torch.Tensor | None]) -> torch.Tensor | None:
    flags = [flag for flag in skipped.values() if flag is not None]
    return functools.reduce(torch.maximum, (flag.to(flags[0]) for flag in flags)) if flags else None


def follow_rounds(
    optimizers: Sequence[AcceleratedOptimizer],
    ema: ShardedEMA,
    end: Callable[[torch.Tensor | None], None],
    is_no_step: Callable[[], bool],
) -> None:
    """Call `end` after each round of the optimizers, until `ema.detach()`.

    Args:
        optimizers: the optimizers as accelerate prepared them.
        ema: the average whose `detach` undoes it.
        end: called with the overflow flag of the round, or None.
        is_no_step: whether the running `step()` of an optimizer is no training step.
    """
    rounds = _Rounds(len(optimizers), end)
    is_alone = len(optimizers) == 1
    for which, optimizer in enumerate(optimizers):

        def after_step(stepped: torch.optim.Optimizer, *_: Any, which: int = which) -> None:
            if is_no_step():
                return
            # Only a fused optimizer under a GradScaler has a `found_inf`, and only during its step.
            found_inf = getattr(stepped, "found_inf", None)
            if is_alone:
                end(found_inf)
            else:
                rounds.step(which, found_inf)

        def after_call(which: int = which, optimizer: AcceleratedOptimizer = optimizer) -> None:
            # Between accumulated micro-batches `step_was_skipped` still tells of an earlier step.
            if optimizer.gradient_state.sync_gradients and optimizer.step_was_skipped:
                rounds.turn(which)

        untraced = torch.compiler.disable(after_step)  # a compiled step traces its hooks too
        ema.on_detach(optimizer.optimizer.register_step_post_hook(untraced).remove)
        if not is_alone:
            around(optimizer, "step", ema, before=None, after=after_call)
