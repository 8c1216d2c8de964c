"""The calls of `ShardedEMA` that save and load: what all ranks check together before they write or read."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from dist_ema.averaging.state import AveragedState
from dist_ema.averaging.streams import join_all
from dist_ema.checkpoint.background import Background
from dist_ema.checkpoint.loading import Escapes, load_average, load_model
from dist_ema.checkpoint.save_warnings import Doubts
from dist_ema.checkpoint.saving import model_files, write_average, write_export
from dist_ema.checkpoint.unchanged_part import Part
from dist_ema.checkpoint.writing import Pieces
from dist_ema.checks import absolute, positive_integer, target_folder, working_folder
from dist_ema.disk.formats.model_files import ModelFiles
from dist_ema.disk.manifest import Manifest
from dist_ema.habits import Habits
from dist_ema.live.replicas import Replicas
from dist_ema.live.sharded import take_sharded
from dist_ema.options import floating_dtype, name_patterns
from dist_ema.ranks.calls import collective, together
from dist_ema.ranks.exchange import Exchange

__all__ = ["Stored"]

T = TypeVar("T")
PathLike = str | os.PathLike[str]
Patterns = str | Iterable[str] | None

# Sorted by name they are sorted by their number of updates.
_SNAPSHOT = "updates-{:09d}"


class Stored(Habits):
    """The half of `ShardedEMA` that knows folders."""

    def __init__(self, exchange: Exchange, state: AveragedState) -> None:
        self._exchange = exchange
        self._state = state
        self._replicas = Replicas(exchange, state.plan)
        self._replicas.check("building the average")
        self._background = Background()
        self._warned_of_later_in: int | None = None  # an epoch of the exchange
        self._doubts = Doubts()

    def expect_updates(self) -> None:
        """Have a save warn if the live weights are no longer those of now, and no update was made. No communication.

        For integrations whose hooks call `update`; to be called again where weights are loaded.
        """
        self._doubts.expect_updates(self._state.plan)

    def wait(self) -> None:
        """Wait for a save in the background, if one is under way. Every rank must call it; no communication here.

        Also have what comes next on the current stream wait for updates that run beside training, of any average.

        Raises:
            CheckpointError: that save failed; the same on all ranks.
        """
        join_all()
        self._background.wait()

    @collective
    def save(
        self,
        path: PathLike,
        *,
        max_shard_size: int | str = "5GB",
        background: bool = False,
        only_unchanged: bool = False,
    ) -> None:
        """Collective: every rank must call it. Write a checkpoint folder that is also a model folder.

        The folder holds `manifest.json` and the averages as safetensors under the model's own names: at the top
        for one track, in one sub-folder per track for several. It is staged beside `path` and committed by
        rename; what was there stays until then. See docs/checkpoint_format.md.

        Args:
            path: the folder; one that an average was saved in before is replaced.
            max_shard_size: bytes (or "5GB") of a file before the next one begins.
            background: return as soon as this rank's values are copied to host memory (which is kept for the next such
                save), and write behind training. `wait`, the next call that saves or loads, or the end of the process
                joins it and raises its error.
            only_unchanged: of a model that has changed since the average was built write the tensors that are as they
                were, and warn of the others; a new average of the changed model goes on from it by `load(..., new=)`.

        Raises:
            SwapError: the averaged weights are in the model.
            ModelChangedError: the model has other modules, names or shapes than when the average was built.
            RankMismatchError: the ranks made different calls, or different numbers of updates.
            UnsupportedModelError: ranks that should hold the same weights do not; nothing was written.
            CheckpointError: some rank could not write; the same error on all ranks.
            CommunicationError: some rank did not make the call.
        """
        only = bool(only_unchanged)

        def place(state: AveragedState) -> Path:
            return target_folder(path)

        self._save("save", path, place, None, max_shard_size, bool(background), only_unchanged=only)

    @collective
    def snapshot(
        self,
        path: PathLike,
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
        background: bool = False,
    ) -> None:
        """Collective: every rank must call it. Keep the averages of this moment, for `synthesize`.

        Writes `path/updates-<num_updates>`, a folder as `save` writes it, besides those that are there. Warns once if
        some of them are of more updates: another run's, or of steps that a resume took back.

        Args:
            path: the folder of all snapshots of a run.
            dtype: floating-point tensors are stored in it, torch.bfloat16 say; None keeps the averaged dtype, and only
                then `load` can go on from the snapshot.
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

        def place(state: AveragedState) -> Path:
            return absolute(path) / _SNAPSHOT.format(state.num_updates)

        self._save("snapshot", path, place, dtype, max_shard_size, bool(background))
        if self._warned_of_later_in == self._exchange.epoch:
            return
        now = self._state.num_updates
        later = self._exchange.on_rank_0("snapshot", lambda: _snapshots_after(now, absolute(path)))
        if later:
            self._warned_of_later_in = self._exchange.epoch
            self._exchange.warn(
                f"{path} holds {len(later)} snapshots with more updates than this run has had ({later[0]}, ...): they "
                "are of another run, or of steps that a resume took back. synthesize would mix them: move them away"
            )

    def _save(
        self,
        call: str,
        path: PathLike,
        place: Callable[[AveragedState], Path],
        dtype: torch.dtype | None,
        max_shard_size: int | str,
        background: bool,
        *,
        only_unchanged: bool = False,
    ) -> None:
        def prepare() -> tuple[Path, Manifest, dict[str, Pieces], ModelFiles, Part]:
            state, stored = self._state, floating_dtype("dtype", dtype)
            state.begin(call)
            part = Part.of(state.plan, only_unchanged=only_unchanged)
            texts = part.texts(lambda: state.texts(stored or state.options.dtype))
            files = model_files(part.plan, state.dtypes(stored), max_shard_size, texts, in_part=part.has_changed)
            tracks: dict[str, Pieces] = {name: state.pieces(name, part.plan) for name in state.schedules}
            manifest, target = state.manifest(self._exchange.world_size, stored, part.plan), place(state)
            if call == "save" and self._exchange.rank == 0:
                self._doubts.tell_of_a_better_one(target, manifest.num_updates, state.use)
            return target, manifest, tracks, files, part

        target, manifest, tracks, files, part = self._together(call, prepare)
        if self._state.options.skip_nonfinite:
            manifest = dataclasses.replace(manifest, num_refused=self._sum_refused())
        same = {"call": call, "path": str(target), "num_updates": manifest.num_updates, "dtype": str(dtype)}
        same |= {"left_out": part.left_out, "others": part.others}
        same |= {"max_shard_size": str(max_shard_size), "background": background}
        self._exchange.compare(same, working_folder(path))
        part.warn(self._exchange)
        if not part.has_changed:
            self._doubts.warn_of_no_updates(self._exchange, part.plan, manifest.num_updates)
        self._replicas.check(call, part.plan)
        if not background:
            write_average(self._exchange, target, files, tracks, manifest)
            return
        exchange = self._exchange.beside()
        copies = self._exchange.agree(call, lambda: self._background.copied(tracks))

        def write() -> None:
            with together(exchange, call):
                write_average(exchange, target, files, copies, manifest)

        with together(exchange, call):  # an interrupt before the thread has begun
            self._background.start(write)

    @collective
    def load(
        self,
        path: PathLike,
        *,
        new: Patterns = None,
        dropped: Patterns = None,
        verify: bool = True,
    ) -> None:
        """Collective: every rank must call it. Restore averages and counter from a checkpoint folder.

        Any number of ranks and any layout may have written it; each rank reads the bytes of its own boxes. If
        anything fails on any rank, nothing has changed on any rank.

        Args:
            path: what `save` wrote, or the checkpoint that holds it.
            new: glob patterns of tensors that the checkpoint need not have, or not in this shape: their average
                starts from the live weights at its next use.
            dropped: glob patterns of tensors in the checkpoint that this model need not have.
            verify: compare the checksums of what is read.

        Raises:
            SwapError: the averaged weights are in the model.
            CheckpointNotFoundError: there is nothing at `path`.
            CheckpointMismatchError: it is of another model, other tracks or other options.
            CheckpointCorruptError: it is damaged.
            CommunicationError: some rank did not make the call.
        """
        target, escapes = self._prepare_load("load", path, new, dropped, verify=verify)
        state, now = self._state, self._state.manifest(self._exchange.world_size)
        filled = self._exchange.agree("load", state.targets)
        saved, found = load_average(
            self._exchange, target, state.loaded, state.loaded_fqns, now, escapes, filled, verify=verify
        )
        for change in now.changes_since(saved):
            self._exchange.warn(f"{target}: {change}")
        refused = saved.num_refused if self._exchange.rank == 0 else 0
        state.restore(filled, found, saved.num_updates, num_refused=refused)
        state.use.is_begun_on_purpose = True

    @collective
    def start_from(
        self,
        path: PathLike,
        *,
        num_updates: int = 1,
        new: Patterns = None,
        dropped: Patterns = None,
    ) -> None:
        """Collective: every rank must call it. Begin every track at somebody else's weights.

        Args:
            path: a model folder: `model.safetensors`, or several files and their index, under this model's own names;
                or one such file. Floating-point values of any dtype; there is no checksum to compare. Of a checkpoint
                that holds live weights and an average, the average is taken: give the file of the live ones.
            num_updates: the number of updates that the average counts as having had, which is where its schedules go
                on; at least 1, as the first update would copy the live weights.
            new: as in `load`.
            dropped: as in `load`.

        Raises:
            SwapError: the averaged weights are in the model.
            CheckpointMismatchError: names or shapes differ from the model's.
            CheckpointCorruptError: a file is missing or damaged.
            CommunicationError: some rank did not make the call.
        """
        source, escapes = self._prepare_load("start_from", path, new, dropped, num_updates=num_updates)
        start = positive_integer("num_updates", num_updates)  # alike on all ranks by now
        state = self._state
        filled = self._exchange.agree("start_from", state.targets)
        first = next(iter(filled.values()))
        averaged = first[: len(state.shards)]
        found = load_model(self._exchange, source, state.plan, state.shards, escapes, averaged)
        state.restore(dict.fromkeys(filled, first), found, start)
        state.use.is_begun_on_purpose = True

    @collective
    def consolidate(
        self,
        path: PathLike,
        *,
        track: str | None = None,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
        only_unchanged: bool = False,
    ) -> None:
        """Collective: every rank must call it. Write one average as a plain model folder to ship.

        Args:
            path: the folder; a former export is replaced.
            track: which average; may be left out if there is one.
            dtype: floating-point tensors are converted to it, piece by piece; None keeps the averaged dtype.
            max_shard_size: bytes (or "5GB") of a file before the next one begins.
            only_unchanged: as in `save`.

        Raises:
            SwapError: the averaged weights are in the model.
            ModelChangedError: the model has other modules, names or shapes than when the average was built.
            ConfigError: there is no such track, or `dtype` is not a floating-point one.
            CheckpointError: some rank could not write; the same error on all ranks.
        """

        def prepare() -> tuple[Path, Pieces, ModelFiles, Part]:
            state = self._state
            state.begin("consolidate")
            part = Part.of(state.plan, only_unchanged=bool(only_unchanged))
            dtypes = state.dtypes(floating_dtype("dtype", dtype))
            texts = part.texts(lambda: state.texts(dtype or state.options.dtype))
            files = model_files(part.plan, dtypes, max_shard_size, texts, in_part=part.has_changed)
            return target_folder(path), state.pieces(track, part.plan), files, part

        target, pieces, files, part = self._together("consolidate", prepare)
        same = {"call": "consolidate", "path": str(target), "track": self._state.track(track), "dtype": str(dtype)}
        same |= {"num_updates": str(self._state.num_updates), "max_shard_size": str(max_shard_size)}
        same |= {"left_out": str(part.left_out), "others": str(part.others)}
        self._exchange.compare(same, working_folder(path))
        part.warn(self._exchange)
        if not part.has_changed:
            self._doubts.warn_of_no_updates(self._exchange, part.plan, self._state.num_updates)
        self._replicas.check("consolidate", part.plan)
        write_export(self._exchange, target, files, pieces)

    @collective
    def load_sharded_state_dict(
        self, state_dict: Mapping[str, torch.Tensor], *, track: str | None = None, num_updates: int | None = None
    ) -> None:
        """Collective: every rank must call it. Take over what `dcp.load` put into a `sharded_state_dict`.

        Args:
            state_dict: of the layout that `sharded_state_dict` gives now.
            track: which average; may be left out if there is one.
            num_updates: the counter, which the state dict does not hold: save `ema.num_updates` beside it. If left out,
                the present one stays, or becomes 1.

        Raises:
            SwapError: the averaged weights are in the model.
            CheckpointMismatchError: names or layouts are not the model's.
        """
        state = self._state

        def prepare() -> tuple[str, list[torch.Tensor], int]:
            state.begin("load_sharded_state_dict")
            count = max(state.num_updates, 1) if num_updates is None else positive_integer("num_updates", num_updates)
            return state.track(track), take_sharded(state.plan, state_dict), count

        name, values, count = self._together("load_sharded_state_dict", prepare)
        self._exchange.compare({"call": "load_sharded_state_dict", "track": name, "num_updates": count})
        state.take_over(name, values, count)
        state.use.is_begun_on_purpose = True

    @collective
    def num_refused(self) -> int:
        """Collective: every rank must call it. Live values that `skip_nonfinite` has left out, over all updates."""
        self._exchange.arrive("num_refused")
        return self._sum_refused()

    def _sum_refused(self) -> int:
        (total,) = self._exchange.sum_integers([self._state.num_refused])
        return total

    def _together(self, call: str, prepare: Callable[[], T]) -> T:
        """See that all ranks come, that no save is under way, and that the local work succeeds on all."""
        self._exchange.arrive(call)
        self._background.wait()
        return self._exchange.agree(call, prepare)

    def _prepare_load(
        self, call: str, path: PathLike, new: Patterns, dropped: Patterns, **same: object
    ) -> tuple[Path, Escapes]:
        """The checked arguments of a load, the same on all ranks."""

        def prepare() -> tuple[Path, Escapes]:
            self._state.begin(call)
            self._state.plan.verify()
            return absolute(path), Escapes(name_patterns("new", new), name_patterns("dropped", dropped))

        target, escapes = self._together(call, prepare)
        told = {name: str(value) for name, value in same.items()}
        told_same = {"call": call, "path": str(target), **dataclasses.asdict(escapes), **told}
        self._exchange.compare(told_same, working_folder(path))
        return target, escapes


def _snapshots_after(num_updates: int, folder: Path) -> list[str]:
    """Names of the snapshots of more updates in a folder, which a save in the background may not have made yet."""
    if not folder.is_dir():
        return []
    found = sorted(path.name for path in folder.iterdir() if re.fullmatch(r"updates-\d{9}", path.name))
    return [name for name in found if name > _SNAPSHOT.format(num_updates)]
