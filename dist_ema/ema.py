"""`ShardedEMA`: the facade. It sees that all ranks make the same call, and hands the work on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn

from dist_ema.averaging.standstill import Standstill
from dist_ema.averaging.state import AveragedState
from dist_ema.averaging.streams import join_before_steps
from dist_ema.averaging.usage import Use
from dist_ema.boxes.shards import Shard
from dist_ema.construction import build_state
from dist_ema.live.distance import Groups, checked_groups, distances, metrics_of
from dist_ema.live.gather import whole_tensors
from dist_ema.live.sharded import check_forms, sharded_tensors
from dist_ema.live.spreading import LiveBackup, put_average
from dist_ema.live.swap import Swap, put_for_good
from dist_ema.options import Options, checked_device, name_patterns
from dist_ema.ranks.calls import collective, together
from dist_ema.ranks.exchange import Exchange
from dist_ema.schedules.base import Schedule
from dist_ema.storage import Stored
from dist_ema.uninterrupted import Job, Lane

__all__ = ["ShardedEMA"]

T = TypeVar("T")


def _count_update(state: AveragedState, standstill: Standstill, found_inf: torch.Tensor | None) -> None:
    step, mode = state.num_updates, torch.is_grad_enabled()
    try:
        state.update(found_inf)
    except BaseException:
        torch.set_grad_enabled(mode)  # see calls.py
        raise
    state.use.num_calls += 1
    if step >= standstill.next_step:
        standstill.tell(step)


# A compiled optimizer step traces its hooks too; the lists and counters of an update are nothing to trace.
_update = torch.compiler.disable(_count_update)


class ShardedEMA(Stored):
    """An exponential moving average of a model's weights, each element kept by exactly one rank.

    Collective: every rank of the default process group must construct it. Works on a plain, DDP, FSDP1, FSDP2,
    HSDP or tensor-parallel module, with or without a process group; see docs/layouts.md.

    The rule: `averaged <- (1 - m) * averaged + m * live`, m the schedule's momentum. Call number 0 of `update`
    copies the live values; until then the average is the live model.

    Args:
        model: the prepared (wrapped) model.
        schedule: a schedule, or `{track_name: schedule}` for several averages at once; one is the track "ema".
        interval: average on calls number 0, n, 2n, ... of `update`; the others only count.
        interval_correction: use 1 - (1 - m)^n in place of m, so that `interval` does not lengthen the average.
        update_buffers: average floating-point buffers too; otherwise, and for all other buffers, the averaged
            side shows the live values of rank 0.
        dtype: dtype of the averaged values.
        device: where they are kept; None for the device of each live tensor.
        include: glob pattern or patterns of names to average; None for all.
        exclude: glob pattern or patterns of names not to average; wins over `include`. What is not averaged is
            shown live, in the model as in the files; what a file cannot hold (quantised weights, extra state that is no
            tensor) has to be named here, and is left out of the files.
        skip_nonfinite: a live value that is infinite or not a number never enters an average, element by element; the
            first copy takes 0 for it. Decided on the device, without a host sync, through a bounded scratch. Masks are
            no overflow and do enter: infinities of frozen parameters, and of buffers if they are minus infinity, or
            were there at the first copy.
        compensated: keep what rounding takes from each update in bfloat16, and add it to the next: for decays of 0.9999
            and more, where an fp32 average loses a part of its motion. 2 more bytes for each element, and slower
            updates (docs/performance.md). Files hold the fp32 values, so a resume begins anew with nothing kept.
        overlap: on a GPU have updates run beside the next forward and backward, on a stream of their own, or on a host
            thread for device="cpu". Every torch optimizer's next step waits for the update, and so does every call here
            that uses the averages; what else writes to the weights must call `wait` first. On a CPU it changes nothing.
        into: a teacher: keep the average in this module's parameters, so that it can run forward at every step. It has
            the model's names, shapes and layout (what is excluded it need not have), the averaged dtype, and takes no
            gradient. It begins as a copy of the model; every rank averages all that it holds of it.

    Raises:
        ConfigError: an option is out of range, or a pattern matches no name.
        UnsupportedModelError: the model cannot be averaged exactly as it is.
        RankMismatchError: the ranks do not agree about the model or the options.

    Example:
        >>> from dist_ema import CosineSchedule, ShardedEMA
        >>> model = torch.nn.Linear(2, 1)
        >>> ema = ShardedEMA(model, CosineSchedule(total_steps=100))
        >>> ema.update()  # after each optimizer step
        >>> ema.num_updates
        1
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule | Mapping[str, Schedule],
        *,
        interval: int = 1,
        interval_correction: bool = False,
        update_buffers: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        skip_nonfinite: bool = False,
        compensated: bool = False,
        overlap: bool = False,
        into: nn.Module | None = None,
    ) -> None:
        exchange = Exchange()
        self._on_detach: list[Callable[[], None]] = []

        def options() -> Options:
            return Options(
                interval=interval,
                interval_correction=interval_correction,
                update_buffers=update_buffers,
                dtype=dtype,
                device=checked_device(device),
                include=name_patterns("include", include),
                exclude=name_patterns("exclude", exclude),
                skip_nonfinite=skip_nonfinite,
                compensated=compensated,
                overlap=overlap,
            )

        if dtype in (torch.bfloat16, torch.float16):
            warnings.warn(
                f"averaged values in {dtype} stand still when the momentum is small: at a decay of 0.9999 a bfloat16 "
                "average loses 99% of the motion. Use torch.float32 and convert on export",
                UserWarning,
                stacklevel=2,
            )
        with together(exchange, "ShardedEMA"):
            exchange.arrive("ShardedEMA")
            state = build_state(exchange, model, schedule, options, into)
        super().__init__(exchange, state)
        self._standstill = Standstill(self._state.schedules if exchange.rank == 0 else {})
        if overlap:
            self.on_detach(join_before_steps(self._state))
            self.on_detach(self._state.stop_overlapping)

    def _copied(self) -> dict[str, Any]:
        """The hooks are those of the first, and stay so."""
        return super()._copied() | {"_on_detach": []}

    def __repr__(self) -> str:
        tracks = ", ".join(f"{name}={schedule!r}" for name, schedule in self._state.schedules.items())
        return (
            f"ShardedEMA({tracks}, num_updates={self.num_updates}, shards={len(self.shards)}, nbytes={self.nbytes}, "
            f"{self._state.options.told()}rank={self._exchange.rank}, world_size={self._exchange.world_size})"
        )

    @property
    def num_updates(self) -> int:
        """How many times `update` was called, less the steps that were skipped; saved and restored."""
        return self._state.num_updates

    @property
    def tracks(self) -> tuple[str, ...]:
        """Names of the averages."""
        return tuple(self._state.schedules)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The boxes whose average this rank keeps; over all ranks they cover every averaged element once."""
        return self._state.shards

    @property
    def nbytes(self) -> int:
        """Bytes of averaged values on this rank, all tracks together."""
        return self._state.nbytes

    @property
    def use(self) -> Use:
        """What has been done with the averages; for integrations that have something to say of it."""
        return self._state.use

    def update(self, *, found_inf: torch.Tensor | None = None) -> None:
        """Average the live weights; call it once after each optimizer step. No communication.

        No host sync, unless the averages are in host memory and do not overlap; the second update waits for the first.
        Whole or not at all: an interrupt (Ctrl-C) goes on when all tracks have moved and are counted, or none.

        Args:
            found_inf: overflow flag of a fused optimizer under a `GradScaler` (its `found_inf`): one element, not 0 if
                the step was skipped. Such a step is neither averaged nor counted; `averaging/skipped_steps.py` has its
                cost.
                `attach` passes it by itself.

        Raises:
            SwapError: the averaged weights are in the model.
            ConfigError: a schedule gave a momentum outside [0, 1].
        """
        self._state.refuse_while_swapped("update")
        _update(self._state, self._standstill, found_inf)

    def average_parameters(self, track: str | None = None) -> Swap:
        """Context manager: the averaged weights are in the model inside, the live ones again after it.

        Every rank must enter it. Communicates where ranks hold the same tensors (DDP, Replicate axes): each
        owner broadcasts its run, and every rank sees the persistent buffers that the files hold, those of rank 0.
        Under FSDP nothing is sent, and each rank sees its own. Needs memory for one copy of the averaged tensors as
        this rank's model holds them. The live weights, and each rank's own persistent buffers, are restored bit for
        bit, also after an exception or an interrupt, which goes on once they are.

        Args:
            track: which average; may be left out if there is one.

        Raises:
            SwapError: an average is in the model already.
            ConfigError: there is no such track.
            UnsupportedModelError: ranks that should hold the same weights do not (found before the first swap).
        """
        return Swap(self._exchange, self._state, lambda: self._prepared_swap("average_parameters", track), track)

    @collective
    def copy_to_model(self, track: str | None = None) -> None:
        """Put the averaged weights into the model for good. Communicates like `average_parameters`.

        Where that communicates, every rank then has the persistent buffers of rank 0 as well.
        Needs memory for one copy where ranks hold the same tensors: if it is cut off, the live weights come back.

        Args:
            track: which average; may be left out if there is one.

        Raises:
            SwapError: an average is in the model already.
            ConfigError: there is no such track.
        """
        state = self._state
        if state.plan.has_replicas:
            put_for_good(self._exchange, state, *self._prepared_swap("copy_to_model", track), track)
            return
        state.begin("copy_to_model")
        state.plan.verify()
        values = state.values(track)
        Job([Lane.of(lambda: put_average(state.plan, values))])()

    def _prepared_swap(self, call: str, track: str | None) -> tuple[tuple[torch.Tensor, ...], LiveBackup]:
        state = self._state

        def prepare() -> tuple[tuple[torch.Tensor, ...], LiveBackup]:
            state.begin(call)
            return state.values(track), LiveBackup(state.plan)

        return self._prepare_swap(call, track, prepare)

    @collective
    def distance(self, track: str | None = None, *, groups: Groups | None = None) -> dict[str, float]:
        """Collective: every rank must call it. How far the live weights lie from an average, by groups of tensors.

        Reads both sides once, in pieces, in float64; waits for the device; sends two numbers for each group.

        Args:
            track: which average; may be left out if there is one.
            groups: group -> glob pattern or patterns of names, such as `{"norms": "*norm*"}`; None for the model's
                children.

        Returns:
            `||live - averaged|| / ||live||` of all averaged tensors as "all", and of each group; the same on every
            rank. Not a number if a live value is none.

        Raises:
            SwapError: the averaged weights are in the model.
            ConfigError: there is no such track, or a group matches nothing.
        """
        return self._distances("distance", [track], groups)[0]

    @collective
    def metrics(self, *, prefix: str = "ema", groups: Groups | None = None) -> dict[str, float]:
        """Collective: every rank must call it. For a tracker: `accelerator.log(ema.metrics(), step=step)`.

        Args:
            prefix: of the names.
            groups: as in `distance`.

        Returns:
            "ema/num_updates"; "ema/momentum" of the latest update, "ema/distance" and "ema/distance/<group>"; for
            several tracks "ema/<track>/momentum" and so on.

        Raises:
            SwapError: the averaged weights are in the model.
            ConfigError: a group matches nothing.
        """
        found = zip(self.tracks, self._distances("metrics", self.tracks, groups), strict=True)
        told = {f"{prefix}/num_updates": float(self.num_updates)}
        for track, distances_of_track in found:
            told.update(metrics_of(self._state, track, prefix, distances_of_track))
        return told

    def _distances(self, call: str, tracks: Sequence[str | None], groups: Groups | None) -> list[dict[str, float]]:
        def prepare() -> tuple[list[str], dict[str, set[str]]]:
            self._state.begin(call)
            self._state.plan.verify()
            return [self._state.track(track) for track in tracks], checked_groups(self._state.plan, groups)

        self._exchange.arrive(call)
        names, members = self._exchange.agree(call, prepare)
        told = {group: sorted(fqns) for group, fqns in members.items()}
        self._exchange.compare({"call": call, "tracks": names, "groups": told})
        return [distances(self._exchange, self._state, name, members) for name in names]

    @collective
    def full_state_dict(self, track: str | None = None) -> dict[str, torch.Tensor]:
        """Collective: every rank must call it. The average as whole CPU tensors. For small models and tests.

        Args:
            track: which average; may be left out if there is one.

        Returns:
            On rank 0 the averaged parameters (in the averaged dtype) and the buffers under the model's own names,
            tied tensors under each of theirs; elsewhere {}.

        Raises:
            ConfigError: there is no such track.
        """
        self._exchange.arrive("full_state_dict")
        pieces = self._exchange.agree("full_state_dict", lambda: self._state.pieces(track))
        self._exchange.compare({"call": "full_state_dict", "track": self._state.track(track)})
        self._replicas.check_once("full_state_dict", self.num_updates)
        return whole_tensors(self._exchange, self._state.plan, pieces, self._state.dtypes())

    @collective
    def sharded_state_dict(self, track: str | None = None) -> dict[str, torch.Tensor]:
        """Collective where ranks hold the same tensors: the average laid out like the model's own state dict.

        For `dcp.save`, `dcp.async_save` and `set_model_state_dict` in somebody's own pipeline. Takes new memory for one
        copy of what this rank's model holds; under FSDP2 nothing is sent, along Replicate axes each owner broadcasts.

        Args:
            track: which average; may be left out if there is one.

        Returns:
            Averaged parameters (in the averaged dtype) and the other tensors under the model's own names, tied ones
            under each: DTensors under FSDP2, HSDP and TP, whole tensors under DDP.

        Raises:
            UnsupportedModelError: the model is under FSDP1, whose flat shards have no such form.
            ConfigError: there is no such track.
        """

        def prepare() -> tuple[torch.Tensor, ...]:
            check_forms(self._state.plan)
            self._state.begin("sharded_state_dict")
            self._state.plan.verify()
            return self._state.values(track)

        values = self._prepare_swap("sharded_state_dict", track, prepare)
        plan = self._state.plan
        meeting = self._exchange.meeting("sharded_state_dict") if plan.has_replicas else ()
        return sharded_tensors(plan, values, self._state.options.dtype, meeting)

    def restart(self) -> None:
        """Forget the averages and the counter: the next update copies the live weights. No communication.

        A teacher becomes a copy of the model at once.

        Raises:
            SwapError: the averaged weights are in the model.
        """
        self._state.begin("restart")
        self._state.restart()
        self._state.use.is_begun_on_purpose = True

    def detach(self) -> None:
        """Remove every hook, those of `attach` too; the average stays usable by hand. No communication."""
        with ExitStack() as stack:  # all of them, whatever one raises
            for undo in self._on_detach:
                stack.callback(undo)
            self._on_detach = []

    def on_detach(self, undo: Callable[[], None]) -> None:
        """Have `detach` call `undo`; for integrations that register hooks. No communication."""
        self._on_detach.append(undo)

    def _prepare_swap(self, call: str, track: str | None, prepare: Callable[[], T]) -> T:
        """Collective only where ranks hold the same tensors: there all of them must swap the same track, or none.

        Whoever calls it ends the call for all ranks if this raises: `collective`, or the swap itself.
        """
        if not self._state.plan.has_replicas:
            return prepare()
        self._exchange.arrive(call)
        prepared = self._exchange.agree(call, prepare)
        self._exchange.compare({"call": call, "track": self._state.track(track)})
        self._replicas.check_once(call, self.num_updates)
        return prepared
