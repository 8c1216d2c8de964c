"""The real steps of a Trainer's optimizers, and the updates that follow them. No communication.

One optimizer: every step is followed by one update, also where a batch has several of them. It is made at the end of
the batch, or just before the next step, so that it sees what the user did to the weights after the step (clipping).
Several optimizers: a batch in which any of them has stepped has one update, after the last of them, at its end.

A step that a GradScaler skips is none: the hook does not fire, or, with a fused optimizer, its `found_inf` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dist_ema.ema import ShardedEMA
from dist_ema.integrations.watch import Watch, is_state_initialisation

__all__ = ["StepsOfBatches"]


class StepsOfBatches:
    """Follows some optimizers until `stop`.

    Args:
        ema: the average to update.
        watch: what notices updates of the user beside these.
        optimizers: the optimizers of torch that step its model.
    """

    def __init__(self, ema: ShardedEMA, watch: Watch, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._ema = ema
        self._watch = watch
        self._num_optimizers = len(optimizers)
        self._stepped: set[int] = set()
        self._were_all_skipped: torch.Tensor | None = None
        # A compiled step traces its hooks too.
        before, after = torch.compiler.disable(self._before_step), torch.compiler.disable(self._after_step)
        self._hooks = [optimizer.register_step_post_hook(after) for optimizer in optimizers]
        if len(optimizers) == 1:
            self._hooks += [optimizer.register_step_pre_hook(before) for optimizer in optimizers]

    def _before_step(self, *_: Any) -> None:
        if not is_state_initialisation():
            self.end_batch()

    def _after_step(self, stepped: torch.optim.Optimizer, *_: Any) -> None:
        if is_state_initialisation():
            return
        # Only a fused optimizer under a GradScaler has a `found_inf`, and only during its step.
        found_inf = getattr(stepped, "found_inf", None)
        former = self._were_all_skipped
        if found_inf is None or (self._stepped and former is None):
            self._were_all_skipped = None
        else:
            # The scaler adds the flags of its optimizers up in place: so this is a copy.
            self._were_all_skipped = found_inf.clone() if former is None else torch.minimum(former, found_inf)
        self._stepped.add(id(stepped))

    def end_batch(self) -> None:
        """Make the update that is due, if there is one."""
        if self._stepped:
            skipped, self._were_all_skipped = self._were_all_skipped, None
            self._stepped.clear()
            self._watch.update(self._ema, skipped)

    def before_save(self) -> None:
        """Make the update that is due if no further step of this batch can belong to it."""
        if len(self._stepped) == self._num_optimizers:
            self.end_batch()

    def stop(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
