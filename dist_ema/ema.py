"""`ShardedEMA`: the facade. Every public method is here; its work is in the rooms below."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import nn

from dist_ema import habits
from dist_ema.averaging.standstill import Standstill, update_and_count
from dist_ema.averaging.streams import join_all, join_before_steps
from dist_ema.averaging.usage import Use
from dist_ema.boxes.shards import Shard
from dist_ema.checkpoint import load_calls
from dist_ema.checkpoint.save_calls import SaveCalls
from dist_ema.checkpoint.snapshots.window import SnapshotWindow
from dist_ema.checkpoint.tracks.changes import NewTracks
from dist_ema.checks import PathLike
from dist_ema.construction import add_track, build, drop_track
from dist_ema.errors import ConfigError
from dist_ema.live import distance
from dist_ema.live.correction import Bema, Correction
from dist_ema.live.distance import Groups
from dist_ema.live.elsewhere.elsewhere_calls import ElsewhereCalls, NamedTensors
from dist_ema.live.state_dicts import gather, sharded, stateful
from dist_ema.live.state_dicts.stateful import StatefulAverages
from dist_ema.live.swap import Swap, put_for_good
from dist_ema.options import Experts, Patterns
from dist_ema.ranks.calls import Calls
from dist_ema.ranks.exchange import Exchange
from dist_ema.schedules.base import fraction_between
from dist_ema.schedules.functions import ScheduleLike
from dist_ema.uninterrupted.modes import without_gradients

__all__ = ["ShardedEMA"]


class ShardedEMA:
    """An exponential moving average of a model's weights, each element kept by exactly one rank.

    Collective: every rank of the default process group must construct it. The model is a plain, DDP, FSDP1, FSDP2,
    HSDP or tensor-parallel module, with or without a process group; see docs/layouts.md.

    The rule is `averaged <- (1 - m) * averaged + m * live`, where m is the schedule's momentum. Call number 0 of
    `update` copies the live values; until then the average is the live model.

    Args:
        model: the prepared (wrapped) model; or a list of the parts of it that this rank has (stages of a pipeline),
            under the names that they have in the whole model. The files hold the union over all ranks.
        schedule: a schedule, or `{track_name: schedule}` for several averages at once. One schedule makes the track
            "ema". A function of the number of the update that returns the momentum is a schedule too.
        interval: with n, calls number 0, n, 2n, ... of `update` average; the others only count.
        interval_correction: use 1 - (1 - m)^n in place of m, so that `interval` does not lengthen the average.
        update_buffers: average floating-point buffers too. Without it, and for all other buffers, the averaged side
            shows the live values of rank 0.
        dtype: the dtype of the averaged values.
        device: the device of the averaged values; None for the device of the live tensor.
        include: glob pattern or patterns of names to average; None for all.
        exclude: glob pattern or patterns of names not to average; wins over `include`. The model and the files show the
            live values of such tensors. What a file cannot have (quantised weights, extra state that is no tensor) must
            be named here, and is left out of the files.
        trainable_only: average only the parameters that require a gradient when the average is built, of those that
            `include` and `exclude` leave in. None: True if PEFT has put adapters into a frozen model, else False.
            Buffers follow `update_buffers`.
        averaged_only: have files hold the averaged tensors alone: no frozen weights, no live buffers, no extra state.
            Nothing else need be storable then (quantised weights). None: as for `trainable_only`.
        skip_nonfinite: leave out live values that are infinite or not a number, element by element; the first copy
            takes 0 for them. The device decides, without a host sync, through a bounded scratch. Masks are no overflow
            and are averaged: infinities of frozen parameters, and of buffers if they are minus infinity, or were there
            at the first copy.
        compensated: keep in bfloat16 what rounding takes from an update, and add it to the next: for decays of 0.9999
            and more, where an fp32 average loses a part of its motion. It takes 2 more bytes for an element, and slower
            updates (docs/performance/updates.md). Files have the fp32 values alone, so a resume loses what was kept.
        overlap: on a GPU, run updates beside the next forward and backward, on a stream of their own, or on a host
            thread for device="cpu". Code that writes to the weights must call `wait` first; the next step of every
            torch optimizer, and every call here that uses the averages, wait anyway. On a CPU it changes nothing.
        masters: under DeepSpeed average the fp32 masters of its optimizer in place of the live bfloat16 or float16
            weights; of frozen parameters the live values. A swap puts the average into the live weights all the same.
        experts: plain tensors that each rank has of its own (local experts without DTensors), as a list of `Experts`.
            The average and its files have the whole tensors. `sharded_state_dict` shows DTensors over the group.
        into: a teacher module, whose parameters keep the average, so that it can run forward at every step. It needs
            the model's names (excluded ones it may lack), shapes and layout, and must take no gradient. It begins as a
            copy of the model; every rank averages all that it holds of the teacher. A teacher of a coarser dtype than
            the averaged one (bfloat16) gets the average rounded, which every rank then keeps beside it.

    Raises:
        ConfigError: an option is out of range, or a pattern matches no name.
        UnsupportedModelError: the model cannot be averaged exactly as it is.
        RankMismatchError: the ranks do not agree about the model or the options.

    Example:
        >>> from dist_ema import CosineSchedule, ShardedEMA
        >>> model = torch.nn.Linear(2, 1)
        >>> ema = ShardedEMA(model, CosineSchedule(total_steps=100))
        >>> ema.update()  # after every optimizer step
        >>> ema.num_updates
        1
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        schedule: ScheduleLike | Mapping[str, ScheduleLike],
        *,
        interval: int = 1,
        interval_correction: bool = False,
        update_buffers: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        trainable_only: bool | None = None,
        averaged_only: bool | None = None,
        skip_nonfinite: bool = False,
        compensated: bool = False,
        overlap: bool = False,
        masters: bool = False,
        experts: Iterable[Experts] = (),
        into: nn.Module | None = None,
    ) -> None:
        self._exchange = exchange = Exchange()
        built = build(
            exchange,
            model,
            schedule,
            into,
            interval=interval,
            interval_correction=interval_correction,
            update_buffers=update_buffers,
            dtype=dtype,
            device=device,
            include=include,
            exclude=exclude,
            trainable_only=trainable_only,
            averaged_only=averaged_only,
            skip_nonfinite=skip_nonfinite,
            compensated=compensated,
            overlap=overlap,
            masters=masters,
            experts=experts,
        )
        self._state, self._replicas = built.state, built.replicas
        self._saves = SaveCalls(built.state, built.replicas, built.form_of)
        self._calls = Calls(exchange, self._state, self._saves.wait)
        self._elsewhere = ElsewhereCalls(built.state, built.replicas)
        self._standstill = Standstill(self._state.schedules if exchange.rank == 0 else {}, self._state.own_number)
        self._on_detach: list[Callable[[], None]] = []
        if overlap:
            self.on_detach(join_before_steps(self._state))
            self.on_detach(self._state.stop_overlapping)

    def __repr__(self) -> str:
        tracks = ", ".join(f"{name}={schedule!r}" for name, schedule in self._state.schedules.items())
        return (
            f"ShardedEMA({tracks}, num_updates={self.num_updates}, shards={len(self.shards)}, nbytes={self.nbytes}, "
            f"{self._state.options.arguments_text()}rank={self._exchange.rank}, world_size={self._exchange.world_size})"
        )

    @property
    def num_updates(self) -> int:
        """The number of calls of `update`, without those for skipped steps; it is saved and restored."""
        return self._state.num_updates

    @property
    def tracks(self) -> tuple[str, ...]:
        """The names of the averages."""
        return tuple(self._state.schedules)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The boxes whose average this rank keeps; over all ranks they cover every averaged element once."""
        return self._state.shards

    @property
    def nbytes(self) -> int:
        """The bytes of averaged values on this rank, of all tracks together."""
        return self._state.nbytes

    @property
    def use(self) -> Use:
        """The use of the averages so far; for integrations that warn about it."""
        return self._state.use

    def update(self, *, found_inf: torch.Tensor | None = None, batch_size: float | None = None) -> None:
        """Average the live weights; call it once after every optimizer step. No communication.

        There is no host sync, unless the averages are in host memory and do not overlap; the second update waits for
        the first. An update is whole or not done: an interrupt (Ctrl-C) is raised when all tracks have moved and are
        counted, or none.

        Args:
            found_inf: the overflow flag of a fused optimizer under a `GradScaler` (its `found_inf`): one element, not 0
                if the step was skipped. Such a step is neither averaged nor counted;
                `averaging/counting/skipped_steps.py` has the cost. `attach` passes the flag by itself.
            batch_size: the size of the batch of this step over all ranks, in any unit, for `per_batch` schedules; the
                same on every rank. None for the latest one that was given.

        Raises:
            SwapError: the averaged weights are in the model.
            ConfigError: a schedule gave a momentum outside [0, 1], or wants a batch size and none is given.
        """
        self._state.refuse_while_swapped("update")
        if batch_size is not None:
            self.expect_batch_size(batch_size)
        update_and_count(self._state, self._standstill, found_inf)

    def expect_batch_size(self, batch_size: float) -> None:
        """Give the batch size of the updates from now on, where a hook calls `update`. No communication.

        Args:
            batch_size: as in `update`.

        Raises:
            ConfigError: it is not above 0.
        """
        self._state.batch_size = fraction_between("batch_size", batch_size, 0.0, math.inf)

    def average_parameters(
        self, track: str | None = None, *, keep_buffers: bool = False, correct: Bema | None = None
    ) -> Swap:
        """Context manager: the averaged weights are in the model inside, the live ones again after it.

        Collective where ranks hold the same averaged tensors (DDP, Replicate axes, what FSDP leaves whole): every rank
        must enter it, an owner broadcasts its run, and every rank gets the persistent buffers of rank 0, which are
        those of the files. Elsewhere nothing is sent, and every rank keeps its own buffers. It needs memory for one
        copy of the averaged tensors that this rank's model holds. The live weights, and the rank's own persistent
        buffers, are restored bit for bit, also after an exception or an interrupt, which is raised after that.

        Args:
            track: the name of the average; may be left out if there is one.
            keep_buffers: keep the persistent buffers that are in the model at the end of the block with this average,
                for `torch.optim.swa_utils.update_bn` within the block. They fit the averaged weights of now: swaps,
                state dicts and files show them until an update moves the average. From then on the live buffers are
                shown again, and the next save warns of it. With `update_buffers` a buffer that the block has changed
                replaces its average, which goes on from there. After an exception in the block nothing is kept.
            correct: show EMA + a * (live - start) in place of the average, for parameters. With `Bema(start=folder)`
                every rank must enter it, whatever the layout, since all read the folder together. It needs memory for
                one more copy of what this rank owns. Before the first update there is nothing to correct.

        Raises:
            SwapError: an average is in the model already.
            ConfigError: there is no such track, or buffers of a teacher are to be kept.
            CheckpointError: the folder of the start cannot be read, or is of another model; nothing has changed.
            UnsupportedModelError: ranks that should hold the same weights do not (compared before the first swap).
        """
        by = Correction.of(correct, self._state, load_calls.read_start)
        return Swap(self._calls, self._state, self._replicas, track, keep_buffers=keep_buffers, correct=by)

    def copy_to_model(self, track: str | None = None, *, weight: float = 1.0) -> None:
        """Put the averaged weights into the model for good, or blend them in. Collective where `average_parameters` is.

        The optimizer's state stays as it is: its moments are those of the former weights. Where ranks hold the same
        tensors, every rank then has the persistent buffers of rank 0 as well, and memory is needed for one copy: after
        an interrupt the live weights are put back. Elsewhere an interrupt is raised when all is done.

        DeepSpeed's next step writes its masters of the former weights over the average, unless
        `engine.optimizer.refresh_fp32_params()` was called after this.

        Args:
            track: the name of the average; may be left out if there is one.
            weight: live <- (1 - weight) * live + weight * average, computed in the averaged dtype; above 0, at most 1.

        Raises:
            SwapError: an average is in the model already.
            ConfigError: there is no such track, or the weight is out of range.
        """
        self._calls("copy_to_model", lambda call: put_for_good(call, self._state, self._replicas, track, weight))

    def copy_to(
        self,
        module: nn.Module | Sequence[nn.Module],
        *,
        track: str | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
    ) -> None:
        """Collective: every rank must call it. Copy the average into another module of the same names and layout.

        Nothing is gathered. Under FSDP2 every rank writes its own shards, and no values are sent. Where ranks hold the
        same tensors (DDP, HSDP, what tensor parallelism leaves whole) owners broadcast what they own, in the dtype of
        the module, and every rank gets the buffers of rank 0. What is not averaged gets the live values.

        Args:
            module: the other module, wrapped like the model on the same mesh, of any floating dtypes; or a list of
                parts, as for the model.
            track: the name of the average; may be left out if there is one.
            include: glob pattern or patterns of names to copy; None for all.
            exclude: glob pattern or patterns of names not to copy, such as those that only one of both has.

        Raises:
            SwapError: the averaged weights are in the model.
            ConfigError: there is no such track, a pattern matches nothing, or the module is the model.
            UnsupportedModelError: names, shapes or layouts do not fit; nothing was written on any rank.
            RankMismatchError: the ranks did not ask for the same.
        """
        self._calls("copy_to", lambda call: self._elsewhere.copy_to(call, module, track, include, exclude))

    def distance(self, track: str | None = None, *, groups: Groups | None = None) -> dict[str, float]:
        """Collective: every rank must call it. How far the live weights lie from an average, by groups of tensors.

        It reads both sides once, in chunks, in float64; waits for the device; and sends two numbers for a group.

        Args:
            track: the name of the average; may be left out if there is one.
            groups: group -> glob pattern or patterns of names, such as `{"norms": "*norm*"}`; None for the model's
                children.

        Returns:
            `||live - averaged|| / ||live||` of all averaged tensors as "all", and of every group; the same on every
            rank. It is nan if a live value is infinite or nan.

        Raises:
            SwapError: the averaged weights are in the model.
            ConfigError: there is no such track, or a group matches nothing.
        """
        return self._calls("distance", lambda call: distance.distances(call, self._state, [track], groups)[0])

    def metrics(self, *, prefix: str = "ema", groups: Groups | None = None) -> dict[str, float]:
        """Collective: every rank must call it. For a tracker: `accelerator.log(ema.metrics(), step=step)`.

        Args:
            prefix: the beginning of the names.
            groups: as in `distance`.

        Returns:
            "ema/num_updates"; "ema/momentum" of the latest update, "ema/distance" and "ema/distance/<group>"; for
            several tracks "ema/<track>/momentum" and so on.

        Raises:
            SwapError: the averaged weights are in the model.
            ConfigError: a group matches nothing.
        """
        return self._calls("metrics", lambda call: distance.metrics(call, self._state, prefix, groups))

    def full_state_dict(self, track: str | None = None) -> dict[str, torch.Tensor]:
        """Collective: every rank must call it. The average as whole CPU tensors, for small models and tests.

        Args:
            track: the name of the average; may be left out if there is one.

        Returns:
            On rank 0 the averaged parameters (in the averaged dtype) and the buffers under the model's own names, tied
            tensors under all of their names; elsewhere {}.

        Raises:
            ConfigError: there is no such track.
        """
        return self._calls(
            "full_state_dict", lambda call: gather.full_state_dict(call, self._state, self._replicas, track)
        )

    def whole_tensors(
        self,
        track: str | None = None,
        dtype: torch.dtype | None = None,
        bucket_bytes: int = 256 * 2**20,
        ranks: Iterable[int] | None = None,
    ) -> NamedTensors:
        """Collective: every rank must call it, and exhaust or close what it returns. A stream of whole tensors.

        Chunks are sent in the default process group, the next while the caller works on one. A rank that ends its
        stream early (`break`, an error) goes on with the messages that are left, without keeping them; an interrupt is
        raised after that. Until its stream has ended a rank refuses updates, loads and swaps. See docs/on_demand.md.

        Args:
            track: the name of the average; may be left out if there is one.
            dtype: floating-point tensors are sent in it, torch.bfloat16 say; None keeps the averaged dtype.
            bucket_bytes: bytes of messages that a rank keeps at a time. Besides what the caller keeps, a stream takes
                at most twice this or twice the largest tensor.
            ranks: the ranks that get the tensors; None for all. On the others the call returns an empty iterator when
                what they own has been sent.

        Returns:
            (name, tensor) of all that `full_state_dict` has, in the model's order, a tied tensor once under each of its
            names. Each is new memory: in the host's, or on the present GPU where the backend is NCCL.

        Raises:
            SwapError: the averaged weights are in the model, or another stream is open.
            ConfigError: there is no such track, or an argument is out of range.
            CommunicationError: a rank is gone; also while the stream goes on.
        """
        streamed = functools.partial(self._elsewhere.stream, track=track, dtype=dtype)
        return self._calls("whole_tensors", functools.partial(streamed, bucket_bytes=bucket_bytes, ranks=ranks))

    def sharded_state_dict(self, track: str | None = None) -> dict[str, torch.Tensor]:
        """Collective where ranks hold the same tensors: the average laid out like the model's own state dict.

        It is for a pipeline of your own with `dcp.save`, `dcp.async_save` and `set_model_state_dict`. It takes new
        memory for one copy of what this rank's model holds. Under FSDP2 nothing is sent; along Replicate axes owners
        broadcast.

        Args:
            track: the name of the average; may be left out if there is one.

        Returns:
            Averaged parameters (in the averaged dtype) and the other tensors under the model's own names, tied ones
            under all of them: DTensors under FSDP2, HSDP and TP, whole tensors under DDP.

        Raises:
            SwapError: the averaged weights are in the model.
            UnsupportedModelError: the model is under FSDP1, whose flat shards have no such form.
            ConfigError: there is no such track.
        """
        return self._calls(
            "sharded_state_dict", lambda call: sharded.sharded_state_dict(call, self._state, self._replicas, track)
        )

    def load_sharded_state_dict(
        self, state_dict: Mapping[str, torch.Tensor], *, track: str | None = None, num_updates: int | None = None
    ) -> None:
        """Collective: every rank must call it. Take over what `dcp.load` has read into a `sharded_state_dict`.

        Args:
            state_dict: a dict laid out as `sharded_state_dict` gives it now.
            track: the name of the average; may be left out if there is one.
            num_updates: the counter, which the state dict does not have: save `ema.num_updates` beside it. If left out,
                the present counter stays, or becomes 1.

        Raises:
            SwapError: the averaged weights are in the model.
            ConfigError: there is no such track, or `num_updates` is out of range.
            CheckpointMismatchError: names or layouts are not the model's.
        """
        self._calls(
            "load_sharded_state_dict",
            lambda call: sharded.take_over(call, self._state, state_dict, track, num_updates),
        )

    def stateful(self) -> StatefulAverages:
        """Collective: every rank must call it. All tracks, counters and schedules, for torch's own checkpoints.

        `dcp.save({"model": ..., "ema": ema.stateful()}, checkpoint_id=folder)` and `dcp.async_save` write it beside the
        model, and `dcp.load` reads it, on any number of ranks and in any layout that has it. Nothing in it is pickled.
        What is not averaged is in the model's own entries. Buffers that a swap has kept are in neither, of which a load
        warns: `save` has them. DCP calls its `state_dict` on every rank; that takes memory for one copy of what this
        rank's model holds for each track, and under DDP owners broadcast the whole average, of which DCP writes one
        copy.

        Raises:
            UnsupportedModelError: a tensor has no form there: FSDP1, ZeRO-3, packed columns of tensor parallelism.
        """
        return self._calls("stateful", lambda call: stateful.stateful(call, self._state, self._replicas, self._calls))

    @property
    def state_dict(self) -> Callable[[], dict[str, Any]]:
        """`state_dict()`: all tracks, counters and schedules of one process, for `torch.save`. No communication.

        A dict of new tensors and numbers: `["tracks"][track][name]` are the averaged tensors, whole, `["num_updates"]`
        is the counter, `["kept_buffers"]` has what swaps have kept. Calling it on several ranks raises a `ConfigError`
        that names `save` and `stateful`, and so does `accelerator.register_for_checkpointing(ema)`.

        Raises:
            SwapError: the averaged weights are in the model.
            ConfigError: there are several ranks.
        """
        habits.refuse_registration()  # a method could not
        return functools.partial(self._calls, "state_dict", functools.partial(stateful.whole, state=self._state))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over all that `state_dict()` gave, in one process. No communication.

        Args:
            state_dict: the dict; its tensors are copied.

        Raises:
            ConfigError: there are several ranks; it names `load` and `stateful`.
            SwapError: the averaged weights are in the model.
            CheckpointMismatchError: names, shapes or tracks are not those of this average.
            CheckpointCorruptError: an entry is none that `state_dict` makes.
        """
        self._calls("load_state_dict", lambda call: stateful.load_whole(call, self._state, state_dict))

    def save(
        self,
        path: PathLike,
        *,
        max_shard_size: int | str = "5GB",
        background: bool = False,
        only_unchanged: bool = False,
    ) -> None:
        """Collective: every rank must call it. Write a checkpoint folder that is also a model folder.

        The folder has `manifest.json` and the averages as safetensors under the model's own names: at the top for one
        track, in one sub-folder per track for several. It is staged beside `path` and committed by rename; what was
        there stays until then. See docs/checkpoint_commit.md.

        Args:
            path: the folder; a former average there is replaced.
            max_shard_size: bytes (or "5GB") of a file before the next one begins.
            background: return as soon as this rank's values are copied to host memory (which is kept for the next such
                save), and write behind training. `wait`, the next call that saves or loads, or the end of the process
                waits for the save and raises its error.
            only_unchanged: if the model has changed since the average was built, write the tensors that have not, and
                warn of the others. A new average of the changed model goes on from such a save by `load(..., new=)`.

        Raises:
            SwapError: the averaged weights are in the model.
            ConfigError: `max_shard_size` is no size.
            ModelChangedError: the model has other modules, names or shapes than when the average was built.
            RankMismatchError: the ranks made different calls, or different numbers of updates.
            UnsupportedModelError: ranks that should hold the same weights do not; nothing was written.
            CheckpointError: some rank could not write; the same error on all ranks.
            CommunicationError: some rank did not make the call.
        """
        self._calls(
            "save",
            lambda call: self._saves.save(
                call, path, max_shard_size, background=background, only_unchanged=only_unchanged
            ),
        )

    def load(
        self,
        path: PathLike,
        *,
        new: Patterns = None,
        dropped: Patterns = None,
        new_tracks: NewTracks = None,
        dropped_tracks: Patterns = None,
        renamed_tracks: Mapping[str, str] | None = None,
        options_changed: bool = False,
        verify: bool = True,
    ) -> None:
        """Collective: every rank must call it. Restore averages and counter from a checkpoint folder.

        Any number of ranks and any layout may have written it; every rank reads the bytes of its own boxes. If the load
        fails on any rank, nothing has changed on any rank.

        Args:
            path: a folder that `save` wrote, or the checkpoint that holds it.
            new: glob patterns of tensors that the checkpoint may lack, or have in another shape: their average starts
                from the live weights at its next use.
            dropped: glob patterns of tensors in the checkpoint that this model may lack.
            new_tracks: tracks that the checkpoint may lack -> "live", to begin at the live weights of the next update;
                or the name of a track in the checkpoint, to begin at its values. "live" alone is for all such tracks.
                The schedule of such a track counts from now, as that of `add_track` does.
            dropped_tracks: tracks in the checkpoint that this average may lack.
            renamed_tracks: name of a track in the checkpoint -> its name here.
            options_changed: resume what is common if the options differ that say what is averaged, and in which dtype:
                what was not averaged starts from the live weights, and values are converted.
            verify: whether the checksums of what is read are compared.

        Raises:
            SwapError: the averaged weights are in the model.
            CheckpointNotFoundError: there is nothing at `path`.
            CheckpointMismatchError: the checkpoint is of another model, other tracks or other options.
            CheckpointCorruptError: the checkpoint is damaged.
            CommunicationError: some rank did not make the call.
        """
        tracks = (new_tracks, dropped_tracks, renamed_tracks)
        tensors = (new, dropped, options_changed)
        self._calls("load", lambda call: load_calls.load(call, self._state, path, tensors, tracks, verify=verify))

    def start_from(
        self,
        path: PathLike,
        *,
        num_updates: int | None = None,
        new: Patterns = None,
        dropped: Patterns = None,
    ) -> None:
        """Collective: every rank must call it. Begin every track at weights, or at an average, of another library.

        Args:
            path: a model folder of transformers, diffusers (of its EMAModel too) or timm, a folder of PEFT, or a file
                of safetensors or of torch.save, under this model's own names or with a known prefix, such as `module.`
                (docs/coming_from.md has the forms). Of a file of torch.save tensors are read and nothing else. Of live
                weights and an average in one place the average is read. There is no checksum to compare.
            num_updates: the counter of the average, where its schedules go on; at least 1, as update number 0 would
                copy the live weights. By default the number that the file says, or 1.
            new: as in `load`.
            dropped: as in `load`.

        Raises:
            SwapError: the averaged weights are in the model.
            ConfigError: `num_updates` is below 1.
            CheckpointMismatchError: names or shapes differ from the model's, or several sets of weights fit.
            CheckpointCorruptError: a file is missing or damaged, or a pickle of more than tensors.
            CommunicationError: some rank did not make the call.
        """
        self._calls(
            "start_from", lambda call: load_calls.start_from(call, self._state, path, num_updates, new, dropped)
        )

    def add_track(self, name: str, schedule: ScheduleLike, *, start: str = "live") -> None:
        """Collective: every rank must call it. Average one more track from now on.

        Its schedule counts from now: update number k of the average is update number k - start of the track, also for
        `interval`, and after a resume. At the live weights it begins as a new average does: the next update copies
        them. The values of another track count as its update number 0.

        Args:
            name: the name of the track.
            schedule: its schedule.
            start: "live", or the name of the track at whose values it begins.

        Raises:
            SwapError: the averaged weights are in the model.
            ConfigError: the name is taken, `start` is no track, or a teacher holds the average (`into`).
            RankMismatchError: the ranks made different calls, or different numbers of updates.
        """
        self._calls("add_track", lambda call: add_track(call, self._state, name, schedule, start))
        if self._exchange.rank == 0:
            self._standstill.add(name, self._state.schedules[name])

    def drop_track(self, name: str) -> None:
        """Collective: every rank must call it. Average a track no more, and free its memory.

        Args:
            name: the name of the track.

        Raises:
            SwapError: the averaged weights are in the model.
            ConfigError: there is no such track, or no other one.
            RankMismatchError: the ranks made different calls, or different numbers of updates.
        """
        self._calls("drop_track", lambda call: drop_track(call, self._state, name))
        self._standstill.drop(name)

    def snapshot(
        self,
        path: PathLike,
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
        background: bool = False,
    ) -> None:
        """Collective: every rank must call it. Keep the averages of now, for `synthesize`.

        It writes `path/updates-<num_updates>`, a folder as `save` writes it, beside the existing ones. It warns once if
        some of these have more updates: they are of another run, or of steps that a resume took back.

        Args:
            path: the folder of all snapshots of a run.
            dtype: the dtype of floating-point tensors in the files, torch.bfloat16 say. None keeps the averaged dtype;
                `load` can go on only from such a snapshot.
            max_shard_size: as in `save`.
            background: as in `save`.

        Raises:
            SwapError: the averaged weights are in the model.
            ConfigError: `dtype` is not a floating-point one.
            RankMismatchError: the ranks made different calls, or different numbers of updates.
            UnsupportedModelError: ranks that should hold the same weights do not; nothing was written.
            CheckpointError: some rank could not write; the same error on all ranks.
            CommunicationError: some rank did not make the call.
        """
        self._calls(
            "snapshot",
            lambda call: self._saves.snapshot(call, path, dtype, max_shard_size, background=background),
        )

    def snapshot_live(
        self,
        path: PathLike,
        dtype: torch.dtype | None = None,
        *,
        keep: SnapshotWindow | None = None,
        max_shard_size: int | str = "5GB",
    ) -> None:
        """Collective: every rank must call it. Keep the live weights of now, for `dist-ema merge` and `synthesize`.

        It writes `path/live-<num_updates>`, a model folder with a manifest, beside the existing ones. It takes no
        memory beyond bounded chunks. Call it after `update`, at the steps that you choose (`log_spaced`). It warns as
        `snapshot` does.

        Args:
            path: the folder of all live snapshots of a run.
            dtype: the dtype of floating-point tensors in the files, torch.bfloat16 say; None keeps the live one.
            keep: a window of the run; the live snapshots in `path` that it does not keep are removed after this one is
                in place.
            max_shard_size: as in `save`.

        Raises:
            SwapError: the averaged weights are in the model.
            ConfigError: `dtype` is not a floating-point one, or `keep` is no window.
            RankMismatchError: the ranks made different calls, or different numbers of updates.
            UnsupportedModelError: ranks that should hold the same weights do not; nothing was written.
            CheckpointError: some rank could not write; the same error on all ranks.
        """
        self._calls("snapshot_live", lambda call: self._saves.snapshot_live(call, path, dtype, max_shard_size, keep))

    def consolidate(
        self,
        path: PathLike,
        *,
        track: str | None = None,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
        only_unchanged: bool = False,
        correct: Bema | None = None,
    ) -> None:
        """Collective: every rank must call it. Write one average as a plain model folder to ship.

        Args:
            path: the folder; a former export is replaced.
            track: the name of the average; may be left out if there is one.
            dtype: floating-point tensors are converted to it, in chunks; None keeps the averaged dtype.
            max_shard_size: bytes (or "5GB") of a file before the next one begins.
            only_unchanged: as in `save`.
            correct: as in `average_parameters`.

        Raises:
            SwapError: the averaged weights are in the model.
            ModelChangedError: the model has other modules, names or shapes than when the average was built.
            ConfigError: there is no such track, or `dtype` is not a floating-point one.
            CheckpointError: some rank could not write; the same error on all ranks.
        """
        by = Correction.of(correct, self._state, load_calls.read_start)
        self._calls(
            "consolidate",
            lambda call: self._saves.consolidate(
                call, path, track, dtype, max_shard_size, only_unchanged=only_unchanged, correct=by
            ),
        )

    def wait(self) -> None:
        """Wait for a save in the background, if one is under way. Every rank must call it; no communication here.

        The further work of the current stream also waits for updates that run beside training, of any average.

        Raises:
            CheckpointError: that save failed; the same on all ranks.
        """
        join_all()
        self._saves.wait()

    def expect_updates(self, *, user_resumes: bool = False) -> None:
        """Have a save warn if the live weights have changed since now, and no update was made. No communication.

        It is for integrations whose hooks call `update`; they call it again where weights are loaded.

        Args:
            user_resumes: whether the user's own program says when a run resumes, and may forget the average. Then the
                first save into a folder warns if it replaces an average that was not loaded.

        Raises:
            ModelChangedError: the model is no longer the one that was planned.
        """
        self._saves.expect_updates(user_resumes=user_resumes)

    def num_refused(self) -> int:
        """Collective: every rank must call it. How many live values `skip_nonfinite` has left out, over all updates.

        Returns:
            The number over all ranks; the same on every rank.
        """
        return self._calls("num_refused", lambda call: distance.num_refused(call, self._state))

    def restart(self) -> None:
        """Forget the averages and the counter: the next update copies the live weights. No communication.

        A teacher is a copy of the model at once.

        Raises:
            SwapError: the averaged weights are in the model.
        """
        self._state.begin("restart")
        without_gradients(self._state.restart)

    def detach(self) -> None:
        """Remove every hook, those of `attach` too; the average stays usable by hand. No communication."""
        with ExitStack() as stack:  # it calls all of them, whatever one raises
            for undo in self._on_detach:
                stack.callback(undo)
            self._on_detach = []

    def on_detach(self, undo: Callable[[], None]) -> None:
        """Have `detach` call `undo`; for integrations that register hooks. No communication.

        Args:
            undo: a function that removes a hook.
        """
        self._on_detach.append(undo)

    def __getattr__(self, name: str) -> NoReturn:
        raise habits.no_such_name(self, name)

    def __call__(self, *arguments: object, **keywords: object) -> NoReturn:
        """Refuse a forward.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(habits.NO_FORWARD)

    def __copy__(self) -> ShardedEMA:
        return habits.twin(self, self._copied())

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedEMA:
        """A copy in this process, which averages on its own."""
        return habits.twin(self, self._copied(), memo)

    def _copied(self) -> dict[str, Any]:
        return vars(self) | {"_on_detach": []}  # the hooks stay with the original

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse a pickle, which would hold one rank's slice and the model.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(habits.NO_PICKLE)
