"""The steps of an update that move averaged tensors towards live ones. No communication.

`lerp` and not `mul` + `add`: fp32(1 - m) + fp32(m) is not 1, so the second form drifts (3e-5 relative after
2,000 updates at a decay of 0.9999, against 1e-6); and lerp in fp32 gives the same bits however a tensor is cut,
so every layout of the same weights gives the same average.

[Note: compensation]
An fp32 average moves by m * (live - averaged), which at a decay of 0.99999 is about a rounding unit of the average:
much of it is lost. A compensated average also keeps what a step lost, in bfloat16, and adds it to the next (Kahan's
sum). Its operations are not fused, so that the bits do not depend on how a tensor is cut either.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from dist_ema.averaging.averages import copying
from dist_ema.averaging.counting.skipped_steps import weight_unless
from dist_ema.averaging.fused.launches import Launch
from dist_ema.averaging.infinities import is_mask
from dist_ema.averaging.prepared_update import Prepared
from dist_ema.averaging.tensor_blocks import Block
from dist_ema.uninterrupted.jobs import Lane, Steps

__all__ = ["Moves", "adding_up"]

_lerp = torch._foreach_lerp_


class Moves:
    """Makes the steps of updates.

    Args:
        num_tracks: how many averages there are.
        skip_nonfinite: whether live values that are infinite or not a number are left out, element by element.
        compensated: whether the averages have residuals.
        counter: gives the tensor of a device that counts what is left out.

    Attributes:
        kept: the steps of the latest update that kept them; None if there are none.
    """

    def __init__(
        self,
        num_tracks: int,
        *,
        skip_nonfinite: bool,
        compensated: bool,
        counter: Callable[[torch.device], torch.Tensor],
    ) -> None:
        self._num_tracks = num_tracks
        self._skip_nonfinite = skip_nonfinite
        self._compensated = compensated
        self._counter = counter
        self.kept: Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which makes its own steps."""
        return self.__dict__ | {"kept": None}

    def forget(self) -> None:
        """Forget steps that were kept for the next update."""
        self.kept = None

    def kept_steps(self, momenta: Sequence[float]) -> Steps:
        """The steps that were kept, with these momenta, of which none is 0."""
        kept = self.kept
        assert kept is not None
        if momenta != kept.momenta:
            self.kept = kept = kept.with_momenta(momenta)
        return kept.steps

    def lanes(self, prepared: Prepared, momenta: Sequence[float], unless: torch.Tensor | None) -> Sequence[Lane]:
        """The lanes of an update.

        Args:
            prepared: the blocks that move.
            momenta: for every track the weight of the live values; a track with a momentum of 0 does not move.
            unless: a flag of one element; if it is not 0 nothing moves.
        """
        if unless is None and (steps := self._repeated(prepared, momenta)) is not None:
            return [Lane.ready(steps)]
        # 0 * (live - averaged) is not 0 where live is not finite, so a momentum of 0 does nothing.
        active = [(index, momentum) for index, momentum in enumerate(momenta) if momentum != 0.0]
        return prepared.lanes(partial(self._steps, prepared, active, unless))

    def _repeated(self, prepared: Prepared, momenta: Sequence[float]) -> Steps | None:
        """The steps of the former update, with these momenta; None where they may differ in more than that.

        They are made once, since that takes longer than to move some thousand elements.
        """
        if not prepared.is_repeated or self._skip_nonfinite or self._compensated or 0.0 in momenta:
            return None
        if self.kept is None or self.kept.prepared is not prepared:
            steps = self._steps(prepared, list(enumerate(momenta)), None, prepared.blocks, 0)
            self.kept = Kept(prepared, momenta, steps)
        return self.kept_steps(momenta)

    def _steps(
        self,
        prepared: Prepared,
        active: Sequence[tuple[int, float]],
        unless: torch.Tensor | None,
        blocks: Sequence[Block],
        worker: int,
    ) -> Steps:
        """The steps that move these blocks."""
        steps = Steps()
        if prepared.is_fetched and unless is not None:
            # The host reads the flag before copies are under way, since it would wait for these too.
            if unless.item() != 0.0:
                return steps
            unless = None
        taken: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        results: list[torch.Tensor] = []
        refused: dict[torch.device, list[torch.Tensor]] = {}
        for block, live in prepared.brought(blocks, worker, steps):
            if block.launch is not None:
                counter = self._counter(block.launch.device) if block.launch.counts else None
                block.launch.add_to(steps, self._of_all(active), unless, counter)
                continue
            if self._skip_nonfinite:
                known = block.tracks[0] if block.watched else None
                steps.again(partial(_take, taken, live, block.masks, known))
                if block.counted:
                    counter = self._counter(live[0].device)
                    count = torch.zeros_like(counter)
                    steps.again(partial(_refuse, refused, taken))
                    steps.again(partial(adding_up, count, refused))
                    if unless is not None:
                        steps.again(partial(count.masked_fill_, unless.reshape(()).to(count.device) != 0, 0))
                    steps.once(partial(counter.add_, count), counter)
            for index, momentum in active:
                averaged = block.tracks[index]
                residuals = block.tracks[self._num_tracks + index] if self._compensated else []
                new = live
                if self._skip_nonfinite:
                    steps.again(partial(_keep, kept, taken, live, averaged))
                    new = kept
                weights = _Weights(averaged, momentum, unless)
                if block.watched:
                    steps.again(partial(_with_care, results, averaged, residuals, new, weights))
                    steps.once(copying([*averaged, *residuals], results), averaged[0])
                elif residuals and momentum != 1.0:
                    for at, (value, residual) in enumerate(zip(averaged, residuals, strict=True)):
                        steps.again(partial(_compensated, results, value, residual, new, at, weights))
                        steps.once(copying([value, residual], results), value)
                else:
                    weight = momentum if unless is None else weights.of_all()
                    steps.once(partial(_lerp, averaged, new, weight), averaged[0])
                    for residual in residuals:  # the average is the live values themselves
                        steps.again(partial(residual.mul_, weights.left(residual)))
        return steps

    def _of_all(self, active: Sequence[tuple[int, float]]) -> tuple[float, ...]:
        """The momenta of all tracks."""
        momenta = [0.0] * self._num_tracks
        for index, momentum in active:
            momenta[index] = momentum
        return tuple(momenta)


class Kept(NamedTuple):
    """Steps that were made of this preparation, and for these momenta."""

    prepared: Prepared
    momenta: Sequence[float]
    steps: Steps

    def with_momenta(self, momenta: Sequence[float]) -> Kept:
        """The same, with other momenta."""
        of_tracks = itertools.cycle(momenta)  # each block has one lerp for each track, in this order
        calls = self.steps.calls.copy()
        for at, call in enumerate(calls):
            if isinstance(call, partial) and call.func is _lerp:
                calls[at] = partial(_lerp, *call.args[:2], next(of_tracks))
            elif isinstance(call, partial) and isinstance(call.func, Launch):
                calls[at] = partial(call.func, tuple(momenta), *call.args[1:])
        return Kept(self.prepared, momenta, self.steps.with_calls(calls))


class _Weights:
    """The weight of the live values: the momentum, or 0 where the flag is set. Only the device reads the flag."""

    def __init__(self, averaged: Sequence[torch.Tensor], momentum: float, unless: torch.Tensor | None) -> None:
        self.momentum = momentum
        self._averaged = averaged
        self._unless = unless
        self._weights: dict[torch.device, torch.Tensor] = {}
        self._skips: dict[torch.device, torch.Tensor] = {}
        if unless is not None:
            for device, value in {value.device: value for value in averaged}.items():
                self._weights[device] = weight_unless(unless, momentum, value)
                self._skips[device] = (unless.reshape(()) != 0).to(device)

    def of(self, value: torch.Tensor) -> torch.Tensor | float:
        """The weight for one averaged tensor."""
        return self.momentum if self._unless is None else self._weights[value.device]

    def of_all(self) -> list[torch.Tensor]:
        """The weights for all averaged tensors, where there is a flag."""
        return [self._weights[value.device] for value in self._averaged]

    def left(self, residual: torch.Tensor) -> torch.Tensor | float:
        """What a residual keeps when the average becomes the live values: nothing, or all where the flag is set."""
        return 0.0 if self._unless is None else 1.0 - weight_unless(self._unless, self.momentum, residual)

    def unless_skipped(self, new: torch.Tensor, former: torch.Tensor) -> torch.Tensor:
        """The new values, or the former ones where the flag is set."""
        if self._unless is None:
            return new
        return torch.where(self._skips[new.device], former.to(new.dtype), new)


def _take(
    taken: list[torch.Tensor],
    live: Sequence[torch.Tensor],
    masks: Sequence[float],
    averaged: Sequence[torch.Tensor] | None,
) -> None:
    """Where live values may enter the average: where they are finite, a mask, or what the average has already."""
    taken[:] = [torch.isfinite(value) for value in live]
    for where, value, known in zip(taken, live, averaged or (), strict=averaged is not None):
        where |= is_mask(value, masks) | (value == known)


def _refuse(refused: dict[torch.device, list[torch.Tensor]], taken: Sequence[torch.Tensor]) -> None:
    refused.clear()
    refused[taken[0].device] = [(~where).sum() for where in taken]


def adding_up(count: torch.Tensor, refused: dict[torch.device, list[torch.Tensor]]) -> None:
    """Set a count to the sum of the counts on its device."""
    if count.device in refused:
        torch.sum(torch.stack(refused[count.device]), dim=0, out=count)


def _keep(
    kept: list[torch.Tensor],
    taken: Sequence[torch.Tensor],
    live: Sequence[torch.Tensor],
    averaged: Sequence[torch.Tensor],
) -> None:
    # The averaged value replaces a live one that is left out: lerp(a, a, m) is a.
    kept[:] = [torch.where(*three) for three in zip(taken, live, averaged, strict=True)]


def _with_care(
    results: list[torch.Tensor],
    averaged: Sequence[torch.Tensor],
    residuals: Sequence[torch.Tensor],
    live: Sequence[torch.Tensor],
    weights: _Weights,
) -> None:
    """The averages of tensors that may have infinities: where either side is infinite, the live value."""
    moved, lost = [], []
    for at, (value, new) in enumerate(zip(averaged, live, strict=True)):
        plain = ~(torch.isinf(value) | torch.isinf(new))
        if residuals and weights.momentum != 1.0:
            pair: list[torch.Tensor] = []
            _compensated(pair, value, residuals[at], live, at, weights)
            average, rest = pair
        else:
            average = torch.lerp(value, new, weights.of(value))
            rest = residuals[at] * weights.left(residuals[at]) if residuals else value
        moved.append(torch.where(plain, average, weights.unless_skipped(new, value)))
        if residuals:
            lost.append(torch.where(plain, rest, 0.0))
    results[:] = [*moved, *lost]


def _compensated(
    results: list[torch.Tensor],
    value: torch.Tensor,
    residual: torch.Tensor,
    live: Sequence[torch.Tensor],
    at: int,
    weights: _Weights,
) -> None:
    """See [Note: compensation]: averaged + residual is what is averaged."""
    step = (live[at] - value).mul_(weights.momentum)
    moved = residual.to(value.dtype).mul_(1.0 - weights.momentum)
    step.add_(moved)
    torch.add(value, step, out=moved)
    lost = step.add_(value - moved)
    results[:] = [weights.unless_skipped(moved, value), weights.unless_skipped(lost, residual)]
