"""Loading an average, on any layout and number of ranks.

    1 rank 0    find the folder, check the manifest, the headers and that they fit this run; send these to all ranks
    2 all       read the bytes of their own boxes, with their checksums, into the tensors that the caller gives
    3 all       agree that all have read, and that the checksums of the whole tensors fit
    4 all       look whether a save has replaced the folder meanwhile; if so, all begin again

A load that fails changes no average: the caller gives tensors that are not in use before the end of stage 4
(`AveragedState.targets`).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from dist_ema.boxes.plan import Plan
from dist_ema.boxes.rank_runs import RankRuns
from dist_ema.boxes.shards import EXTRA_STATE, Box, Shard
from dist_ema.checkpoint.fitting import Escapes, fit_model, matches, other_model, patterns_of
from dist_ema.checkpoint.nodes.homes import as_rank_0_sees, num_updates_at, warn_of_a_newer_one, warn_of_blind_ranks
from dist_ema.checkpoint.nodes.views import blind_ranks
from dist_ema.checkpoint.reading import ModelReading, Targets
from dist_ema.checkpoint.tracks.changes import TrackChanges, TrackSources
from dist_ema.disk.folders.steady_reading import Attempts, generation, steadily
from dist_ema.disk.formats.checksums import checksum
from dist_ema.disk.formats.headers import StoredModel, read_small
from dist_ema.disk.manifest import MANIFEST_NAME, Manifest, SavedTensor
from dist_ema.disk.saved_average import SavedAverage, read_saved, was_replaced
from dist_ema.disk.starts import find_starts, sees_model
from dist_ema.errors import CheckpointError, CheckpointMismatchError, DistEMAError
from dist_ema.ranks.exchange import Exchange

__all__ = ["load_average", "load_model"]

T = TypeVar("T")


def load_average(
    exchange: Exchange,
    target: Path,
    shards: Sequence[Shard],
    fqns: Collection[str],
    now: Manifest,
    left_out: Collection[str],
    escapes: Escapes,
    changes: TrackChanges,
    targets: Mapping[str, Targets],
    buffers: Plan | None,
    *,
    verify: bool,
) -> tuple[Manifest, TrackSources, set[str], Mapping[str, Mapping[Box, torch.Tensor]]]:
    """Collective: every rank must call it. Read the averaged values of this rank's shards.

    Args:
        exchange: the control traffic of all ranks.
        target: the folder that `write_average` wrote, on any layout and number of ranks, or the one that holds it.
        shards: the shards of this rank.
        fqns: the names in the shards of all ranks, which together have every element of these tensors.
        now: the manifest of all tensors of this run's plan; tracks and tensors must be the same in the checkpoint,
            except where an option leaves out what is not averaged.
        left_out: the names in the model that are not in the plan; the checkpoint may have them.
        escapes: the differences of tensors that are allowed.
        changes: the differences of tracks that are allowed.
        targets: per track, one contiguous tensor per shard to be filled.
        buffers: the buffers to read besides, of the tracks with which they were kept; None for none.
        verify: whether the checksums of what is read are compared.

    Returns:
        The checkpoint's manifest, where the tracks begin, the fqns whose values it has, and per track what this rank
        holds of the buffers that were kept with its average.

    Raises:
        CheckpointNotFoundError: there is nothing at the path.
        CheckpointMismatchError: names, shapes, dtypes or tracks differ from those of this run.
        CheckpointCorruptError: files are missing or damaged.
    """
    action = f"loading {target}"

    # Rank 0 decides which folder counts: on shared file systems the others may see a new one later.
    def find() -> SavedAverage:
        saved = read_saved(target)
        changes.sources(saved.folder, saved.manifest, now.tracks)
        _common_tensors(saved, now, left_out, escapes)
        return saved

    kept: dict[str, Mapping[Box, torch.Tensor]] = {}

    def fill(saved: SavedAverage, blind: RankRuns) -> None:
        common = _common_tensors(saved, now, left_out, escapes)
        wanted = common.intersection(fqns)
        kept.clear()
        for track, source in changes.sources(saved.folder, saved.manifest, now.tracks).names.items():
            names = {fqn: fqn for fqn in wanted}
            checksums = saved.manifest.checksums.get(source, {})  # format version 1 has none
            expected = {fqn: value for fqn, value in checksums.items() if verify and fqn in wanted}
            loading = ModelReading(exchange, action, saved.folder_of(source), saved.models[source], blind)
            loading.run(shards, names, targets[track], expected)
            if buffers is not None and source in saved.manifest.kept_buffers:
                kept[track] = loading.kept(buffers, common, checksums if verify else {})

    saved = _steadily(
        exchange,
        action,
        target,
        lambda: as_rank_0_sees(exchange, action, target, find, SavedAverage.from_json, lambda: num_updates_at(target)),
        sees=_sees_average,
        warn=lambda saved, blind: warn_of_a_newer_one(exchange, target, saved.manifest.num_updates, blind),
        fill=fill,
        replaced=was_replaced,
    )
    sources = changes.sources(saved.folder, saved.manifest, now.tracks)
    return saved.manifest, sources, _common_tensors(saved, now, left_out, escapes), kept


def load_model(
    exchange: Exchange,
    source: Path,
    plan: Plan,
    shards: Sequence[Shard],
    escapes: Escapes,
    targets: Targets,
) -> tuple[set[str], int | None]:
    """Collective: every rank must call it. Read this rank's shards from weights of any library, without a manifest.

    Args:
        exchange: the control traffic of all ranks.
        source: a model folder, a file, or a checkpoint that holds an average, which is read then; see
            `disk/starts.py`.
        plan: the model as boxes; a tied tensor may be stored under any of its names.
        shards: the averaged shards this rank owns.
        escapes: the differences that are allowed.
        targets: one contiguous tensor per shard to be filled, converted to its dtype.

    Returns:
        The fqns whose values the files have, and the number of updates of the average, where the files say it.

    Raises:
        CheckpointMismatchError: names or shapes differ from the model's, or several sets of weights fit.
        CheckpointCorruptError: files are missing or damaged, or hold more than tensors.
    """
    action = f"loading {source}"

    def find(check: Callable[[], None]) -> _ModelRecord:
        state = generation([source])
        fit = fit_model(source, find_starts(source), plan, escapes)
        return _ModelRecord(fit.start.folder, fit.start.model, fit.names, fit.num_updates, state)

    record = _steadily(
        exchange,
        action,
        source,
        lambda: as_rank_0_sees(
            exchange,
            action,
            source,
            lambda: steadily([source], find),
            _ModelRecord.from_json,
            lambda: 0 if os.path.lexists(source) else None,
        ),
        sees=lambda record: sees_model(record.folder, record.model),
        fill=lambda record, blind: ModelReading(exchange, action, record.folder, record.model, blind).run(
            shards, record.names, targets, {}
        ),
        # The headers may be alike before and after: only rank 0 can see a replacement, by the generation of the folder.
        replaced=lambda record: exchange.rank == 0 and generation([source]) != record.state,
    )
    return set(record.names), record.num_updates


@dataclasses.dataclass(frozen=True)
class _ModelRecord:
    """Weights as rank 0 sees them; `state` is the generation of their files, and stays on rank 0."""

    folder: Path
    model: StoredModel
    names: Mapping[str, str]
    num_updates: int | None
    state: object = None

    def to_json(self) -> dict[str, Any]:
        """The record as JSON, for the other ranks."""
        return {
            "folder": str(self.folder),
            "model": self.model.to_json(),
            "names": dict(self.names),
            "num_updates": self.num_updates,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> _ModelRecord:
        """The record, of what `to_json` returned."""
        model = StoredModel.from_json(record["model"])
        return cls(Path(record["folder"]), model, record["names"], record["num_updates"])


def _steadily(
    exchange: Exchange,
    action: str,
    source: Path,
    find: Callable[[], T],
    *,
    sees: Callable[[T], bool],
    warn: Callable[[T, RankRuns], object] = lambda record, blind: None,
    fill: Callable[[T, RankRuns], None],
    replaced: Callable[[T], bool],
) -> T:
    """Collective: every rank must call it. Find and read a folder; begin again if a save has replaced it meanwhile.

    Args:
        exchange: the control traffic of all ranks.
        action: a name of the work, for a message.
        source: the path, for a message.
        find: collective; returns a record of what is to be read, the same on all ranks.
        sees: whether this rank sees the files of the record.
        warn: collective; warns further, where ranks are blind.
        fill: collective; reads, for the given blind ranks too. Raises the same error on all ranks.
        replaced: whether these files are no longer there, as this rank sees it.

    Raises:
        CheckpointError: `fill` raised it while no file was replaced; or every attempt met a save.
    """
    attempts = Attempts([source])
    while True:
        record = find()
        look = functools.partial(sees, record)
        blind = blind_ranks(exchange, action, look, look)
        failure: CheckpointError | None = None
        # If a save replaced the files before these ranks looked, no rank is blind.
        if not (blind and exchange.broadcast_object(exchange.rank == 0 and replaced(record))):
            if blind:
                warn_of_blind_ranks(exchange, source, blind)
                warn(record, blind)
            try:
                fill(record, blind)
            except CheckpointError as error:
                failure = error
            if not exchange.reduce(action, exchange.rank not in blind and replaced(record), operator.or_):
                if failure is not None:
                    raise failure
                return record
        attempts.count_one()
        if exchange.on_rank_0(f"loading {source}", lambda: attempts.are_enough):  # rank 0 has the clock
            raise attempts.refusal() from failure


def _sees_average(saved: SavedAverage) -> bool:
    try:
        if checksum(read_small(saved.folder / MANIFEST_NAME)) != saved.manifest_checksum:
            return False
        return all(
            (saved.folder_of(track) / name).stat().st_size == file.size_bytes
            for track, model in saved.models.items()
            for name, file in model.files.items()
        )
    except (OSError, DistEMAError):
        return False


def _common_tensors(saved: SavedAverage, now: Manifest, left_out: Collection[str], escapes: Escapes) -> set[str]:
    """The tensors of this run that the checkpoint has as this run expects them.

    Extra state is not compared: it is never loaded, may change its shape, and older versions did not store it. Neither
    is what is not averaged, if this run does not write it.
    """
    tensors = {fqn: tensor for fqn, tensor in saved.manifest.tensors.items() if not fqn.endswith(EXTRA_STATE)}
    expected = {fqn: tensor for fqn, tensor in now.tensors.items() if not fqn.endswith(EXTRA_STATE)}
    averaged_only, saved_averaged_only = (bool(record.options.get("averaged_only")) for record in (now, saved.manifest))
    only_averaged = averaged_only or saved_averaged_only
    # Whether the other run may have left a tensor of this model out of its files.
    may_lack = saved_averaged_only or bool(saved.manifest.options.get("exclude"))
    leaves_out = escapes.options_changed and may_lack
    trains_less = now.options["trainable_only"] and not saved.manifest.options.get("trainable_only")
    missing = [
        fqn
        for fqn, wanted in expected.items()
        if fqn not in tensors
        and (wanted.averaged or not only_averaged)
        and not (leaves_out or matches(fqn, escapes.new))
    ]
    different = []
    extra = [
        fqn for fqn in tensors if fqn not in expected and fqn not in left_out and not matches(fqn, escapes.dropped)
    ]
    if missing or extra:
        text = other_model(saved.folder, missing, extra, tensors.keys() | expected.keys())
        hint = ". If options alone have changed: load(path, options_changed=True)" if may_lack and not extra else ""
        raise CheckpointMismatchError(text + hint)
    common, shown = set(), []
    for fqn, stored in tensors.items():
        wanted = expected.get(fqn)
        if wanted is None:
            continue
        # A tensor that is not averaged may have another dtype: FSDP1 casts buffers at its first forward.
        alike = (stored.shape, stored.averaged) == (wanted.shape, wanted.averaged)
        if alike and (stored.dtype == wanted.dtype or not wanted.averaged or escapes.options_changed):
            common.add(fqn)
        elif stored.shape == wanted.shape and escapes.options_changed:
            continue
        elif wanted.averaged or not (averaged_only or (stored.averaged and trains_less)):
            if not matches(fqn, escapes.new):
                different.append(fqn)
                shown.append(f"{fqn} as {_shown(stored)}, expected {_shown(wanted)}")
    if different:
        raise CheckpointMismatchError(
            f"{saved.folder} has {'; '.join(shown[:3])}{' ...' if len(shown) > 3 else ''} ({len(shown)} tensors "
            "differ): it is of another model, or was saved with other options (dtype, update_buffers, include, "
            "exclude, trainable_only). To start the averages of such tensors from the live weights, name them: "
            f"load(path, new={patterns_of(different, tensors.keys() | expected.keys())!r}). If options alone have "
            "changed, load(path, options_changed=True) resumes what is common, and converts another dtype"
        )
    if escapes.options_changed and not any(expected[fqn].averaged for fqn in common):
        raise CheckpointMismatchError(
            f"{saved.folder} has the average of none of the tensors that this run averages: begin without it"
        )
    return common


def _shown(saved: SavedTensor) -> str:
    return f"{saved.dtype}{list(saved.shape)}, {'averaged' if saved.averaged else 'live'}"
