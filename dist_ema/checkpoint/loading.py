"""Loading an average, on any layout and number of ranks.

    1 rank 0    find the folder, check the manifest, the headers and that they fit this run; tell all ranks
    2 all       read the bytes of their own boxes, with their checksums, to where the caller wants them
    3 all       agree that all have read, and that the checksums of the whole tensors fit
    4 all       look whether a save has replaced the folder meanwhile: then all begin again

The caller sees to it that nothing that counts changes before the end of 4 (`AveragedState.targets`).
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from dist_ema.boxes.plan import Plan
from dist_ema.boxes.shards import EXTRA_STATE, Shard
from dist_ema.checkpoint.reading import read_boxes
from dist_ema.disk.folders.steady_reading import Attempts, generation, steadily
from dist_ema.disk.formats.checksums import PartialChecksums, checksum, whole_checksums
from dist_ema.disk.formats.headers import TORCH_DTYPES, StoredModel, read_header, read_small
from dist_ema.disk.manifest import MANIFEST_NAME, Manifest, SavedTensor
from dist_ema.disk.saved_average import SavedAverage, damage_told, read_saved, was_replaced
from dist_ema.disk.sources import find_start
from dist_ema.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError, DistEMAError
from dist_ema.ranks.exchange import Exchange

__all__ = ["Escapes", "load_average", "load_model"]

T = TypeVar("T")

# One tensor per shard to be filled; what the checkpoint does not have stays as it is.
Targets = Sequence[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Escapes:
    """Differences that are allowed.

    Attributes:
        new: glob patterns of names in this model that need not be in the checkpoint as they are now.
        dropped: glob patterns of names in the checkpoint that need not be in this model.
    """

    new: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


def load_average(
    exchange: Exchange,
    target: Path,
    shards: Sequence[Shard],
    fqns: Collection[str],
    now: Manifest,
    escapes: Escapes,
    targets: Mapping[str, Targets],
    *,
    verify: bool,
) -> tuple[Manifest, set[str]]:
    """Collective: every rank must call it. Read the averaged values of this rank's shards.

    Args:
        exchange: the control traffic of all ranks.
        target: the folder that `write_average` wrote, on any layout and number of ranks, or the one that holds it.
        shards: of this rank.
        fqns: of the shards of all ranks, which together have every element of these tensors.
        now: what this run would write; tracks and tensors must be the same in the checkpoint.
        escapes: the differences that are allowed.
        targets: per track, one contiguous tensor per shard to be filled.
        verify: compare the checksums of what is read.

    Returns:
        The checkpoint's manifest, and the fqns that it had values for.

    Raises:
        CheckpointNotFoundError: there is nothing at the path.
        CheckpointMismatchError: names, shapes, dtypes or tracks differ from what is expected.
        CheckpointCorruptError: files are missing or damaged.
    """
    action = f"loading {target}"

    # One rank decides which folder counts: on shared file systems the others may see it later.
    def find() -> tuple[SavedAverage, set[str]]:
        saved = read_saved(target)
        _check_tracks(saved, list(now.tracks))
        return saved, _common_tensors(saved, now.tensors, escapes)

    def fill(found: tuple[SavedAverage, set[str]], blind: Sequence[int]) -> None:
        saved, common = found
        wanted = common.intersection(fqns)
        for track in now.tracks:
            names = {fqn: fqn for fqn in wanted}
            checksums = saved.manifest.checksums.get(track, {})  # format version 1 has none
            expected = {fqn: value for fqn, value in checksums.items() if verify and fqn in wanted}
            loading = _Loading(exchange, action, saved.folder_of(track), saved.models[track], blind)
            loading.run(shards, names, targets[track], expected)

    saved, common = _steadily(
        exchange,
        target,
        lambda: exchange.on_rank_0(action, find),
        sees=lambda found: _sees_average(found[0]),
        fill=fill,
        replaced=lambda found: was_replaced(found[0]),
    )
    return saved.manifest, common


def load_model(
    exchange: Exchange,
    source: Path,
    plan: Plan,
    shards: Sequence[Shard],
    escapes: Escapes,
    targets: Targets,
) -> set[str]:
    """Collective: every rank must call it. Read this rank's shards from a folder of safetensors without a manifest.

    Args:
        exchange: the control traffic of all ranks.
        source: a model folder or a file; of a checkpoint that holds an average, that average.
        plan: the model as boxes; a tied tensor may be stored under any of its names.
        shards: the averaged shards this rank owns.
        escapes: the differences that are allowed.
        targets: one contiguous tensor per shard to be filled, converted to its dtype.

    Returns:
        The fqns that the folder had values for.

    Raises:
        CheckpointMismatchError: names or shapes differ from the model's.
        CheckpointCorruptError: files are missing or damaged.
    """
    action = f"loading {source}"

    def find(check: Callable[[], None]) -> _FoundModel:
        state = generation([source])
        found = find_start(source)
        return _FoundModel(found.folder, found.model, _stored_names(found.place, found.model, plan, escapes), state)

    found = _steadily(
        exchange,
        source,
        lambda: exchange.on_rank_0(action, lambda: steadily([source], find)),
        sees=lambda found: _sees_model(found.folder, found.model),
        fill=lambda found, blind: _Loading(exchange, action, found.folder, found.model, blind).run(
            shards, found.names, targets, {}
        ),
        # Headers are alike before and after: only rank 0 can tell, from what it saw first.
        replaced=lambda found: exchange.rank == 0 and generation([source]) != found.state,
    )
    return set(found.names)


@dataclasses.dataclass(frozen=True)
class _FoundModel:
    """A model folder, or a file, as rank 0 has found it; `state` is its generation."""

    folder: Path
    model: StoredModel
    names: Mapping[str, str]
    state: object


def _steadily(
    exchange: Exchange,
    source: Path,
    find: Callable[[], T],
    *,
    sees: Callable[[T], bool],
    fill: Callable[[T, Sequence[int]], None],
    replaced: Callable[[T], bool],
) -> T:
    """Collective: every rank must call it. Find and read a folder; all again if a save has replaced it meanwhile.

    Args:
        exchange: the control traffic of all ranks.
        source: for the message.
        find: collective; what to read, the same on all ranks.
        sees: whether this rank sees what was found.
        fill: collective; reads, for the given blind ranks too. Raises the same error on all ranks.
        replaced: whether what was found is no longer there, as this rank sees it.

    Raises:
        CheckpointError: what `fill` raised while nothing was replaced, or every attempt met a save.
    """
    attempts = Attempts([source])
    while True:
        found = find()
        views = exchange.gather_objects((exchange.rank == 0 or sees(found), exchange.rank == 0 and replaced(found)))
        blind = [rank for rank, (seen, _) in enumerate(views) if not seen]
        failure: CheckpointError | None = None
        if not (blind and views[0][1]):  # else they are not blind: it was replaced before they looked
            if blind:
                _warn_of_blind_ranks(exchange, source, blind)
            try:
                fill(found, blind)
            except CheckpointError as error:
                failure = error
            if not any(exchange.gather_objects(exchange.rank not in blind and replaced(found))):
                if failure is not None:
                    raise failure
                return found
        attempts.count_one()
        if exchange.broadcast_object(attempts.are_enough):  # rank 0 has the clock
            raise attempts.refusal() from failure


class _Loading:
    """Reading one model folder into the shards of all ranks."""

    def __init__(self, exchange: Exchange, action: str, folder: Path, model: StoredModel, blind: Sequence[int]) -> None:
        self._exchange = exchange
        self._action = action
        self._folder = folder
        self._model = model
        self._blind = blind
        self._sizes_bytes = {name: stored.nbytes for name, stored in model.tensors.items()}

    def run(
        self, shards: Sequence[Shard], names: Mapping[str, str], values: Targets, expected: Mapping[str, int]
    ) -> None:
        """Collective. Fill what the shards need.

        Args:
            shards: of this rank.
            names: fqn of a shard -> the name it is stored under, where there is one.
            values: one tensor per shard.
            expected: stored name -> checksum to compare; the ranks together read each byte of these tensors once.
        """
        tensors = self._model.tensors
        wanted = [
            (names[shard.fqn], dataclasses.replace(shard.box, fqn=names[shard.fqn]), value)
            for shard, value in zip(shards, values, strict=True)
            if shard.fqn in names
        ]
        partial = PartialChecksums(self._sizes_bytes)
        failure = read_boxes(self._exchange, self._folder, tensors, wanted, self._blind, partial)
        self._exchange.settle(self._action, failure)
        if expected:
            found = whole_checksums(self._sizes_bytes, self._exchange.xor_integers(partial.partial()))
            damaged = [name for name, value in expected.items() if found[name] != value]
            if damaged:  # the same on every rank
                raise CheckpointCorruptError(damage_told(self._folder, damaged))


def _warn_of_blind_ranks(exchange: Exchange, folder: Path, blind: Sequence[int]) -> None:
    exchange.warn(
        f"{len(blind)} of {exchange.world_size} ranks do not see {folder} as rank 0 does: rank 0 reads for them, which "
        "is slower. Load from a file system that all nodes share"
    )


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


def _sees_model(folder: Path, model: StoredModel) -> bool:
    try:
        return all(read_header(folder / name) == file for name, file in model.files.items())
    except (OSError, DistEMAError):
        return False


def _check_tracks(saved: SavedAverage, tracks: Sequence[str]) -> None:
    if set(saved.manifest.tracks) != set(tracks):
        raise CheckpointMismatchError(
            f"{saved.folder} holds the tracks {sorted(saved.manifest.tracks)}, expected {sorted(tracks)}: give the "
            "same track names as the run that saved it"
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _common_tensors(saved: SavedAverage, expected: Mapping[str, SavedTensor], escapes: Escapes) -> set[str]:
    """The averaged tensors of this run that the checkpoint has as this run expects them.

    Extra state is not compared: it is never loaded, may change its shape, and older versions did not store it.
    """
    tensors = {fqn: tensor for fqn, tensor in saved.manifest.tensors.items() if not fqn.endswith(EXTRA_STATE)}
    expected = {fqn: tensor for fqn, tensor in expected.items() if not fqn.endswith(EXTRA_STATE)}
    missing = [fqn for fqn in expected if fqn not in tensors and not _matches(fqn, escapes.new)]
    different = []
    extra = [fqn for fqn in tensors if fqn not in expected and not _matches(fqn, escapes.dropped)]
    if missing or extra:
        raise CheckpointMismatchError(_other_model(saved.folder, missing, extra))
    common = set()
    for fqn, wanted in expected.items():
        found = tensors.get(fqn)
        # What is shown live may have another dtype: FSDP1 casts buffers at its first forward.
        alike = found is not None and (found.shape, found.averaged) == (wanted.shape, wanted.averaged)
        if found is not None and alike and (found.dtype == wanted.dtype or not wanted.averaged):
            common.add(fqn)
        elif found is not None and not _matches(fqn, escapes.new):
            different.append(f"{fqn} as {_told(found)}, expected {_told(wanted)}")
    if different:
        raise CheckpointMismatchError(
            f"{saved.folder} has {'; '.join(different[:3])}{' ...' if len(different) > 3 else ''} ({len(different)} "
            "tensors differ): it is of another model, or was saved with other options (dtype, update_buffers, include, "
            "exclude). To start the averages of such tensors from the live weights, name them: load(..., new='head.*')"
        )
    return common


def _other_model(folder: Path, missing: Sequence[str], extra: Sequence[str]) -> str:
    return (
        f"{folder} is of another model: {len(missing)} tensors of this model are not in it {list(missing[:3])}, "
        f"{len(extra)} of its tensors are not in this model {list(extra[:3])}. If that is intended, name them by "
        "patterns: load(..., new='head.*') starts those from the live weights, dropped='old_head.*' leaves those out"
    )


def _told(saved: SavedTensor) -> str:
    return f"{saved.dtype}{list(saved.shape)}, {'averaged' if saved.averaged else 'live'}"


def _stored_names(folder: Path, model: StoredModel, plan: Plan, escapes: Escapes) -> dict[str, str]:
    """Fqn -> stored name, of each averaged tensor that does not start from the live weights."""
    other_names = plan.names_of_tensors
    names, missing = {}, []
    for spec in plan.specs:
        if not spec.averaged:
            continue
        name = next((name for name in other_names[spec.fqn] if name in model.tensors), None)
        if name is not None and model.tensors[name].shape == spec.shape:
            if not getattr(torch, TORCH_DTYPES[model.tensors[name].dtype]).is_floating_point:
                raise CheckpointMismatchError(f"{folder} has {name} as {model.tensors[name].dtype}, expected floats")
            names[spec.fqn] = name
        elif not _matches(spec.fqn, escapes.new):
            found = "nothing" if name is None else f"{list(model.tensors[name].shape)}"
            missing.append(f"{spec.fqn} {list(spec.shape)} (found {found})")
    known = {name for group in other_names.values() for name in group}
    known.update(name for name in model.tensors if name.endswith(EXTRA_STATE))
    extra = [name for name in model.tensors if name not in known and not _matches(name, escapes.dropped)]
    if missing or extra:
        raise CheckpointMismatchError(_other_model(folder, missing, extra))
    return names
