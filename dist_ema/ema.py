"""`ShardedEMA`: the facade. It checks what it is given, counts the updates, and hands the work on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from dist_ema._version import __version__
from dist_ema.checkpoint import dtype_name, load_average, saved_tensors, write_average, write_export
from dist_ema.errors import ConfigError, SwapError
from dist_ema.exchange import Exchange
from dist_ema.gather import whole_tensors
from dist_ema.layout import Plan, Shard
from dist_ema.manifest import Manifest
from dist_ema.options import Options, checked_device, checked_schedules, name_patterns
from dist_ema.schedules import Schedule, momentum_of_update, schedule_to_json
from dist_ema.swap import LiveBackup, put_average
from dist_ema.topology.planning import plan_model
from dist_ema.update import Averages

__all__ = ["ShardedEMA"]


class ShardedEMA:
    """An exponential moving average of a model's weights, each element kept by exactly one rank.

    Collective: every rank of the default process group must construct it. Works on a plain, DDP or FSDP2 module,
    with or without a process group.

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
            shown live, in the model as in the files.

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
    ) -> None:
        self._exchange = Exchange()
        self._num_updates = 0
        self._swapped: str | None = None
        self._on_detach: list[Callable[[], None]] = []

        def prepare() -> tuple[dict[str, Schedule], Options, Plan]:
            options = Options(
                interval=interval,
                interval_correction=interval_correction,
                update_buffers=update_buffers,
                dtype=dtype,
                device=checked_device(device),
                include=name_patterns("include", include),
                exclude=name_patterns("exclude", exclude),
            )
            schedules = checked_schedules(schedule)
            plan = plan_model(
                model,
                averages=options.averages,
                update_buffers=options.update_buffers,
                rank=self._exchange.rank,
                world_size=self._exchange.world_size,
            )
            options.check_patterns(plan.names)
            plan.check_not_empty()
            return schedules, options, plan

        action = "building the average"
        self._schedules, self._options, self._plan = self._exchange.agree(action, prepare)
        # The boxes of the ranks fit together only if all planned the same model with the same options.
        live_dtypes = {spec.fqn: dtype_name(spec.dtype) for spec in self._plan.specs}
        self._exchange.compare({**self._manifest().to_json(), "live_dtypes": live_dtypes})
        self._shards = self._plan.owned(averaged=True)
        self._averages = self._exchange.agree(action, self._allocate)

    def _allocate(self) -> dict[str, Averages]:
        options = self._options
        return {name: Averages(self._shards, dtype=options.dtype, device=options.device) for name in self._schedules}

    def __repr__(self) -> str:
        tracks = ", ".join(f"{name}={schedule!r}" for name, schedule in self._schedules.items())
        return (
            f"ShardedEMA({tracks}, num_updates={self._num_updates}, shards={len(self._shards)}, "
            f"nbytes={self.nbytes}, rank={self._exchange.rank}, world_size={self._exchange.world_size})"
        )

    @property
    def num_updates(self) -> int:
        """How many times `update` was called; saved and restored."""
        return self._num_updates

    @property
    def tracks(self) -> tuple[str, ...]:
        """Names of the averages."""
        return tuple(self._schedules)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The boxes whose average this rank keeps; over all ranks they cover every averaged element once."""
        return self._shards

    @property
    def nbytes(self) -> int:
        """Bytes of averaged values on this rank, all tracks together."""
        return sum(averages.nbytes for averages in self._averages.values())

    def update(self) -> None:
        """Average the live weights; call it once after each optimizer step. No communication, no host sync.

        Raises:
            SwapError: the averaged weights are in the model.
            ConfigError: a schedule gave a momentum outside [0, 1].
        """
        self._refuse_while_swapped("update")
        step = self._num_updates
        if step == 0:
            for averages in self._averages.values():
                averages.copy_live()
        elif step % self._options.interval == 0:
            momenta = {name: self._momentum(schedule, step) for name, schedule in self._schedules.items()}
            for name, momentum in momenta.items():
                self._averages[name].lerp(momentum)
        self._num_updates = step + 1

    @contextmanager
    def average_parameters(self, track: str | None = None) -> Iterator[None]:
        """Context manager: the averaged weights are in the model inside, the live ones again after it.

        Every rank must enter it. Communicates where ranks hold the same tensors (DDP, Replicate axes): each
        owner broadcasts its run. Under FSDP nothing is sent. Needs memory for one copy of the averaged tensors
        as this rank's model holds them. The live weights are restored bit for bit, also after an exception.

        Args:
            track: which average; may be left out if there is one.

        Raises:
            SwapError: an average is in the model already.
            ConfigError: there is no such track.
        """
        values = self._current("average_parameters", track)
        backup = LiveBackup(self._plan)
        self._swapped = self._track(track)
        try:
            put_average(self._plan, values)
            yield
        finally:
            backup.restore()
            self._swapped = None

    def copy_to_model(self, track: str | None = None) -> None:
        """Put the averaged weights into the model for good. Communicates like `average_parameters`.

        Args:
            track: which average; may be left out if there is one.

        Raises:
            SwapError: an average is in the model already.
            ConfigError: there is no such track.
        """
        put_average(self._plan, self._current("copy_to_model", track))

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
        values = self._exchange.agree("full_state_dict", lambda: self._seeded(track))
        with torch.no_grad():
            pieces = [(shard.box, value) for shard, value in zip(self._shards, values, strict=True)]
            pieces += [(shard.box, shard.live()) for shard in self._plan.owned(averaged=False)]
        return whole_tensors(self._exchange, self._plan, pieces, self._file_dtypes(None))

    def save(self, path: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
        """Collective: every rank must call it. Write a checkpoint folder that is also a model folder.

        The folder holds `manifest.json` and the averages as safetensors under the model's own names: at the top
        for one track, in one sub-folder per track for several. It is staged beside `path` and committed by
        rename; what was there stays until then.

        Args:
            path: the folder; one that an average was saved in before is replaced.
            max_shard_size: bytes (or "5GB") of a file before the next one begins.

        Raises:
            SwapError: the averaged weights are in the model.
            RankMismatchError: the ranks have made different numbers of updates.
            CheckpointError: some rank could not write; the same error on all ranks.
        """

        def prepare() -> tuple[Path, Manifest]:
            self._refuse_while_swapped("save")
            for name in self._schedules:
                self._seeded(name)
            return _absolute(path), self._manifest()

        target, manifest = self._exchange.agree(f"saving {path}", prepare)
        self._exchange.compare({"num_updates": self._num_updates})
        tracks = {name: averages.values for name, averages in self._averages.items()}
        write_average(self._exchange, target, self._plan, manifest, tracks, max_shard_size=max_shard_size)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Collective: every rank must call it. Restore averages and counter from a checkpoint folder.

        Any number of ranks and any layout may have written it; each rank reads the bytes of its own boxes. If
        anything fails on any rank, nothing has changed on any rank.

        Args:
            path: what `save` wrote.

        Raises:
            SwapError: the averaged weights are in the model.
            CheckpointNotFoundError: there is nothing at `path`.
            CheckpointMismatchError: it is of another model, other tracks or other options.
            CheckpointCorruptError: it is damaged.
        """

        def prepare() -> Path:
            self._refuse_while_swapped("load")
            return _absolute(path)

        target = self._exchange.agree(f"loading {path}", prepare)
        expected = saved_tensors(self._plan, self._options.dtype)
        manifest, values = load_average(self._exchange, target, self._shards, expected, self.tracks)
        for name, averages in self._averages.items():
            averages.replace(values[name])
        self._num_updates = manifest.num_updates
        for change in self._manifest().changes_since(manifest) if self._exchange.rank == 0 else ():
            warnings.warn(f"{target}: {change}", UserWarning, stacklevel=2)

    def consolidate(
        self,
        path: str | os.PathLike[str],
        *,
        track: str | None = None,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
    ) -> None:
        """Collective: every rank must call it. Write one average as a plain model folder to ship.

        Args:
            path: the folder; a former export is replaced.
            track: which average; may be left out if there is one.
            dtype: floating-point tensors are converted to it, piece by piece; None keeps the averaged dtype.
            max_shard_size: bytes (or "5GB") of a file before the next one begins.

        Raises:
            SwapError: the averaged weights are in the model.
            ConfigError: there is no such track, or `dtype` is not a floating-point one.
            CheckpointError: some rank could not write; the same error on all ranks.
        """

        def prepare() -> tuple[Path, tuple[torch.Tensor, ...]]:
            self._refuse_while_swapped("consolidate")
            if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise ConfigError(f"dtype is {dtype!r}, expected a floating-point torch dtype or None")
            return _absolute(path), self._seeded(track)

        target, values = self._exchange.agree(f"consolidating {path}", prepare)
        write_export(
            self._exchange,
            target,
            self._plan,
            values,
            dtypes=self._file_dtypes(dtype),
            max_shard_size=max_shard_size,
        )

    def detach(self) -> None:
        """Remove every hook that `attach` registered; the average stays usable by hand. No communication."""
        while self._on_detach:
            self._on_detach.pop()()

    def on_detach(self, undo: Callable[[], None]) -> None:
        """Have `detach` call `undo`; for integrations that register hooks. No communication."""
        self._on_detach.append(undo)

    def _track(self, track: str | None) -> str:
        if track is None and len(self._schedules) == 1:
            return next(iter(self._schedules))
        if track is None or track not in self._schedules:
            raise ConfigError(f"track is {track!r}, expected one of {list(self._schedules)}")
        return track

    def _momentum(self, schedule: Schedule, step: int) -> float:
        options = self._options
        return momentum_of_update(
            schedule, step, interval=options.interval, interval_correction=options.interval_correction
        )

    def _seeded(self, track: str | None) -> tuple[torch.Tensor, ...]:
        """The averaged values; before the first update these are the live ones of this moment."""
        averages = self._averages[self._track(track)]
        if self._num_updates == 0:
            averages.copy_live()
        return averages.values

    def _current(self, call: str, track: str | None) -> tuple[torch.Tensor, ...]:
        self._refuse_while_swapped(call)
        return self._seeded(track)

    def _refuse_while_swapped(self, call: str) -> None:
        if self._swapped is not None:
            raise SwapError(
                f"{call}() was called while the averaged weights of track {self._swapped!r} are in the model: leave "
                "the average_parameters() block first"
            )

    def _file_dtypes(self, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
        kept = {spec.fqn: self._options.dtype if spec.averaged else spec.dtype for spec in self._plan.specs}
        if dtype is None:
            return kept
        return {fqn: dtype if own.is_floating_point else own for fqn, own in kept.items()}

    def _manifest(self) -> Manifest:
        return Manifest(
            num_updates=self._num_updates,
            options=self._options.to_json(),
            tracks={name: schedule_to_json(schedule) for name, schedule in self._schedules.items()},
            tensors=saved_tensors(self._plan, self._options.dtype),
            aliases=self._plan.aliases,
            written_by={
                "dist_ema": __version__,
                "torch": torch.__version__,
                "world_size": self._exchange.world_size,
            },
        )


def _absolute(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(os.path.abspath(os.path.expanduser(path)))
    except TypeError:
        raise ConfigError(f"path is {path!r}, expected the name of a folder") from None
