"""The calls that save: what all ranks check together before they write. The stages of the writing are in saving.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dist_ema.averaging.state import AveragedState
from dist_ema.checkpoint.background import Background
from dist_ema.checkpoint.record import in_files, live_manifest_of, manifest_of
from dist_ema.checkpoint.save_warnings import SaveWarnings
from dist_ema.checkpoint.saving import model_files, write_average, write_export
from dist_ema.checkpoint.snapshots.names import LIVE_SNAPSHOT, SNAPSHOT, snapshots_after
from dist_ema.checkpoint.snapshots.window import SnapshotWindow, trim
from dist_ema.checkpoint.unchanged_part import Changes, Part
from dist_ema.checkpoint.writing import Pieces
from dist_ema.checks import PathLike, absolute, target_folder, working_folder
from dist_ema.disk.folders import contents
from dist_ema.disk.formats.model_files import ModelFiles
from dist_ema.disk.forms.card import card_text
from dist_ema.disk.forms.deciding import PLAIN_FORM, Decided, FormOf
from dist_ema.disk.forms.form import form_from_json, form_to_json
from dist_ema.disk.forms.models import Tensors
from dist_ema.disk.manifest import LIVE_TRACK, Manifest
from dist_ema.errors import ConfigError
from dist_ema.live.correction import Correction
from dist_ema.live.distance import sum_refused
from dist_ema.live.holders.replicas import Replicas
from dist_ema.options import floating_dtype
from dist_ema.ranks.calls import Call, ended_for_all
from dist_ema.ranks.exchange import Exchange

__all__ = ["SaveCalls"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    """What the user asks one rank to write.

    Attributes:
        path: the path, as the user gave it.
        target: returns the folder to write.
        is_export: whether one average is written, as a folder without a manifest, and not a checkpoint of all.
        track: the name of the average that is exported; None for the only one.
        dtype: the dtype of the floating-point tensors; None keeps the averaged dtype.
        max_shard_size: bytes (or "5GB") of a file before the next one begins.
        background: whether a thread writes.
        only_unchanged: whether the model may have changed.
        replaces_former: whether all saves of a run go to the same `target`.
        correct: what corrects the average that is exported.
        is_live: whether the live weights are written in place of averages.
        keep: which snapshots of the live weights are kept.
    """

    path: PathLike
    target: Callable[[], Path]
    is_export: bool = False
    track: str | None = None
    dtype: torch.dtype | None = None
    max_shard_size: int | str
    background: bool = False
    only_unchanged: bool = False
    replaces_former: bool = False
    correct: Correction | None = None
    is_live: bool = False
    keep: SnapshotWindow | None = None


class _Prepared(NamedTuple):
    background: bool
    target: Path
    manifest: Manifest
    tracks: dict[str, Pieces]
    files: ModelFiles
    part: Part
    decided: Decided


class SaveCalls:
    """The saves of one average.

    Attributes:
        background: the save that is under way, if there is one.
        warnings: the warnings about what a save loses.

    Args:
        state: the averages of this rank.
        replicas: the tensors that several ranks hold alike.
        form_of: gives the form of the folders that this model wants.
    """

    def __init__(self, state: AveragedState, replicas: Replicas, form_of: FormOf) -> None:
        self.background = Background()
        self.warnings = SaveWarnings()
        self._state = state
        self._replicas = replicas
        self._form_of = form_of
        self._warned_of_later_in: int | None = None  # an epoch of the exchange

    def wait(self) -> None:
        """Wait for the save in the background, if one is under way, and raise its error. No communication."""
        self.background.wait()

    def expect_updates(self, *, user_resumes: bool) -> None:
        """Take the live weights of now for untrained; see `SaveWarnings.expect_updates`. No communication."""
        self.warnings.expect_updates(self._state.plan, self._state.num_updates, user_resumes=user_resumes)

    def save(
        self, call: Call, path: PathLike, max_shard_size: int | str, *, background: bool, only_unchanged: bool
    ) -> None:
        """Collective: every rank must call it. See `ShardedEMA.save`."""
        self._write(
            call,
            _Request(
                path=path,
                target=lambda: target_folder(path),
                max_shard_size=max_shard_size,
                background=background,
                only_unchanged=only_unchanged,
                replaces_former=True,
            ),
        )

    def snapshot(
        self,
        call: Call,
        path: PathLike,
        dtype: torch.dtype | None,
        max_shard_size: int | str,
        *,
        background: bool,
    ) -> None:
        """Collective: every rank must call it. See `ShardedEMA.snapshot`."""

        def target() -> Path:
            return absolute(path) / SNAPSHOT.format(self._state.num_updates)

        request = _Request(path=path, target=target, dtype=dtype, max_shard_size=max_shard_size, background=background)
        self._write(call, request)
        self._warn_of_later_snapshots(call, path, SNAPSHOT)

    def snapshot_live(
        self,
        call: Call,
        path: PathLike,
        dtype: torch.dtype | None,
        max_shard_size: int | str,
        keep: SnapshotWindow | None,
    ) -> None:
        """Collective: every rank must call it. See `ShardedEMA.snapshot_live`."""

        def target() -> Path:
            if keep is not None and not isinstance(keep, SnapshotWindow):
                raise ConfigError(f"keep is {keep!r}, expected a SnapshotWindow(fraction=..., num_folders=...) or None")
            return absolute(path) / LIVE_SNAPSHOT.format(self._state.num_updates)

        live = _Request(path=path, target=target, dtype=dtype, max_shard_size=max_shard_size, is_live=True, keep=keep)
        self._write(call, live)
        if keep is not None:  # on all ranks: a save that one rank cannot do raises on all
            call.exchange.on_rank_0(call.name, lambda: trim(absolute(path), keep, self._state.num_updates))
        self._warn_of_later_snapshots(call, path, LIVE_SNAPSHOT)

    def consolidate(
        self,
        call: Call,
        path: PathLike,
        track: str | None,
        dtype: torch.dtype | None,
        max_shard_size: int | str,
        *,
        only_unchanged: bool,
        correct: Correction | None = None,
    ) -> None:
        """Collective: every rank must call it. See `ShardedEMA.consolidate`."""
        self._write(
            call,
            _Request(
                path=path,
                target=lambda: target_folder(path),
                is_export=True,
                track=track,
                dtype=dtype,
                max_shard_size=max_shard_size,
                only_unchanged=only_unchanged,
                correct=correct,
            ),
        )

    def _write(self, call: Call, request: _Request) -> None:
        """Collective: every rank must call it. Agree about the save, warn, compare replicas, and then write."""
        exchange = call.exchange
        prepared = call.together(
            lambda: self._prepared(request, exchange.rank, exchange.world_size),
            lambda prepared: self._same(request, prepared),
            after_saves=True,
            of_changed=True,  # `Part` refuses, or warns
            working_folder=working_folder(request.path),
        )
        if request.only_unchanged:  # on all ranks
            changes = Changes(*exchange.reduce(call.name, prepared.part.own, Changes.merged))
            if any(changes):
                prepared = exchange.agree(
                    call.name, lambda: self._prepared(request, exchange.rank, exchange.world_size, changes)
                )
        background, target, manifest, tracks, files, part = self._in_form_of_rank_0(request, prepared, exchange)
        part.warn(exchange)
        if not (part.has_changed or request.is_live):
            self.warnings.warn_of_no_updates(exchange, part.plan, manifest.num_updates)
        self._replicas.check(call.name, part.plan)
        if request.is_export:
            ((track, pieces),) = tracks.items()
            if request.correct is not None:
                pieces = self._corrected(call, request, request.correct, pieces)
            card = card_text(manifest.form, manifest.tracks[track], manifest.count_of(track))
            write_export(exchange, target, files, pieces, card)
            return
        if self._state.options.skip_nonfinite and not request.is_live:
            manifest = dataclasses.replace(manifest, num_refused=sum_refused(exchange, self._state))
        if background:
            self._write_behind(call, target, files, tracks, manifest)
        else:
            write_average(exchange, target, files, tracks, manifest)

    def _prepared(self, request: _Request, rank: int, world_size: int, changes: Changes | None = None) -> _Prepared:
        state, dtype = self._state, floating_dtype("dtype", request.dtype)
        if request.correct is not None:
            request.correct.check()
            if request.only_unchanged:
                raise ConfigError(
                    "correct and only_unchanged are given: the correction needs the live weights of all averaged "
                    "tensors. Leave one of them out"
                )
        part = Part.of(state.plan, in_files(state), only_unchanged=bool(request.only_unchanged), of_all=changes)
        # Rank 0 decides, and writes the small files: the module of another stage of a pipeline has no configuration.
        decided = self._decided(request, part, dtype) if rank == 0 else PLAIN_FORM
        files = model_files(part.plan, self._dtypes(request), request.max_shard_size, decided)
        if request.is_live:
            live, manifest = state.live_pieces(part.plan), live_manifest_of(state, world_size, dtype, part.plan)
            return _Prepared(False, request.target(), manifest, {LIVE_TRACK: live}, files, part, decided)
        names = [state.track(request.track)] if request.is_export else list(state.schedules)
        tracks: dict[str, Pieces] = {name: state.pieces(name, part.plan) for name in names}
        if rank == 0 and changes is None:
            self.warnings.tell_of_lost_buffers(state, names, part.plan)
            self.warnings.tell_of_nan(request.target(), tracks, part.plan)
        target, manifest = request.target(), manifest_of(state, world_size, dtype, part.plan)
        if request.replaces_former and rank == 0 and changes is None:
            self.warnings.tell_of_a_better_one(target, manifest.num_updates, state.use)
        return _Prepared(bool(request.background), target, manifest, tracks, files, part, decided)

    def _decided(self, request: _Request, part: Part, dtype: torch.dtype | None) -> Decided:
        """The form of the folder, as the model of this rank wants it."""
        dtypes = self._dtypes(request)
        return self._form_of(
            Tensors(
                written={spec.fqn: (spec.shape, dtypes[spec.fqn]) for spec in part.plan.specs},
                aliases=part.plan.aliases,
                names=self._state.plan.names,
                is_part=not part.is_whole,
                dtype=dtype or self._state.options.dtype,
                is_beside_adapters=not request.is_export and contents.takes_adapters(request.target().parent),
            )
        )

    def _in_form_of_rank_0(
        self, request: _Request, prepared: _Prepared, exchange: Exchange
    ) -> tuple[bool, Path, Manifest, dict[str, Pieces], ModelFiles, Part]:
        """Collective: every rank must call it. What was prepared, with the files and the manifest in rank 0's form."""
        background, target, manifest, tracks, files, part, decided = prepared
        form = form_from_json(exchange.broadcast_object(form_to_json(decided.form)))
        if form is not None and form != decided.form:
            files = model_files(part.plan, self._dtypes(request), request.max_shard_size, Decided(form, {}))
        return background, target, dataclasses.replace(manifest, form=form), tracks, files, part

    def _corrected(self, call: Call, request: _Request, correct: Correction, pieces: Pieces) -> Pieces:
        """Collective where the correction reads from disk: the pieces with corrected values."""
        values = correct(call, request.track, self._state.values(request.track))
        corrected = {shard.box: value for shard, value in zip(self._state.shards, values, strict=True)}
        return [(box, corrected.get(box, value)) for box, value in pieces]

    def _dtypes(self, request: _Request) -> dict[str, torch.dtype]:
        """Fqn -> dtype in the files."""
        dtype = floating_dtype("dtype", request.dtype)
        return self._state.live_dtypes(dtype) if request.is_live else self._state.dtypes(dtype)

    def _same(self, request: _Request, prepared: _Prepared) -> dict[str, Any]:
        return {
            **self._state.progress,  # before the path: that of a snapshot has the number
            "path": str(prepared.target),
            "tracks": list(prepared.tracks),
            "kept_buffers": list(prepared.manifest.kept_buffers),
            **{name: str(getattr(request, name)) for name in ("dtype", "correct", "keep", "max_shard_size")},
            "only_unchanged": bool(request.only_unchanged),
            "background": prepared.background,
        }

    def _write_behind(
        self, call: Call, target: Path, files: ModelFiles, tracks: Mapping[str, Pieces], manifest: Manifest
    ) -> None:
        exchange = call.exchange.beside()
        copies = call.exchange.agree(call.name, lambda: self.background.copied(tracks))

        def write() -> None:
            with ended_for_all(exchange, call.name):
                write_average(exchange, target, files, copies, manifest)

        with ended_for_all(exchange, call.name):  # an interrupt before the thread has begun
            self.background.start(write)

    def _warn_of_later_snapshots(self, call: Call, path: PathLike, form: str) -> None:
        exchange = call.exchange
        if self._warned_of_later_in == exchange.epoch:
            return
        now = self._state.num_updates
        num_later, first = exchange.on_rank_0(call.name, lambda: snapshots_after(form, now, absolute(path)))
        if num_later:
            self._warned_of_later_in = exchange.epoch
            exchange.warn(
                f"{path} holds {num_later} snapshots with more updates than this run has had ({first}, ...): they "
                "are of another run, or of steps that a resume took back. synthesize would mix them: move them away"
            )
