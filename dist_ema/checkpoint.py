"""Saving and loading an average: every rank writes its boxes at their places in the final files.

Save, each stage agreed by all ranks before the next ([Note: agreement] in exchange.py):

    1 rank 0    clear leftovers, make the staging folder, create every file with its header, at its full size
    2 all       write the owned boxes in place, fsync
    3 rank 0    write the manifest, fsync, commit by rename (commit.py)

Load is the reverse: each rank reads the bytes of its own boxes, whatever layout wrote them, into scratch; only
when all ranks have succeeded does anything in memory change (`ShardedEMA.load`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dist_ema import commit
from dist_ema.errors import CheckpointCorruptError, CheckpointMismatchError
from dist_ema.exchange import Exchange
from dist_ema.files import INDEX_NAME, ModelFiles, plan_files, read_box, write_box, write_whole
from dist_ema.layout import Box, Plan, Shard
from dist_ema.manifest import MANIFEST_NAME, Manifest, SavedTensor, find_saved, read_manifest

__all__ = ["load_average", "write_average", "write_export"]

Pieces = Sequence[tuple[Box, torch.Tensor]]


def write_average(
    exchange: Exchange,
    target: Path,
    plan: Plan,
    manifest: Manifest,
    tracks: Mapping[str, Pieces],
    *,
    max_shard_size: int | str,
) -> None:
    """Collective: every rank must call it. Write a checkpoint of all tracks.

    Args:
        exchange: the control traffic of all ranks.
        target: the folder to write, replaced atomically if it is there.
        plan: the model as boxes.
        manifest: the record to put beside the tensors.
        tracks: track name -> every box this rank owns, and its values.
        max_shard_size: bytes (or "5GB") of a file before the next one begins.

    Raises:
        CheckpointError: some rank failed; the same on all ranks, and the former content stays.
    """
    dtypes = {fqn: getattr(torch, saved.dtype) for fqn, saved in manifest.tensors.items()}
    files = _model_files(plan, dtypes, max_shard_size)
    folders = {manifest.folder_of(name): (files, pieces) for name, pieces in tracks.items()}
    _write_folders(exchange, target, folders, manifest)


def write_export(
    exchange: Exchange,
    target: Path,
    plan: Plan,
    pieces: Pieces,
    *,
    dtypes: Mapping[str, torch.dtype],
    max_shard_size: int | str,
) -> None:
    """Collective: every rank must call it. Write one track as a plain model folder, without a manifest.

    Args:
        exchange: the control traffic of all ranks.
        target: the folder to write, replaced atomically if it is there.
        plan: the model as boxes.
        pieces: every box this rank owns, and its values.
        dtypes: fqn -> dtype in the files; converted piece by piece on the way.
        max_shard_size: bytes (or "5GB") of a file before the next one begins.

    Raises:
        CheckpointError: some rank failed; the same on all ranks, and the former content stays.
    """
    files = _model_files(plan, dtypes, max_shard_size)
    _write_folders(exchange, target, {".": (files, pieces)}, None)


def _model_files(plan: Plan, dtypes: Mapping[str, torch.dtype], max_shard_size: int | str) -> ModelFiles:
    tensors = [(spec.fqn, dtypes[spec.fqn], spec.shape) for spec in plan.specs]
    metadata = {**plan.aliases, commit.MARK: commit.MARK_VALUE}
    return plan_files(tensors, max_shard_size=max_shard_size, metadata=metadata)


def _write_folders(
    exchange: Exchange,
    target: Path,
    folders: Mapping[str, tuple[ModelFiles, Pieces]],
    manifest: Manifest | None,
) -> None:
    action = f"writing {target}"

    def on_rank_0(work: Callable[[], None]) -> Callable[[], None]:
        return work if exchange.rank == 0 else _nothing

    def create() -> None:
        staging = commit.stage(target, commit.is_average if manifest is not None else commit.is_export)
        for folder, (files, _) in folders.items():
            (staging / folder).mkdir(exist_ok=True)
            for file in files.files:
                write_whole(staging / folder / file.name, file.header, size_bytes=file.size_bytes)
            if files.index is not None:
                write_whole(staging / folder / INDEX_NAME, files.index)

    def write() -> None:
        for folder, (files, pieces) in folders.items():
            _write_pieces(commit.staging_of(target) / folder, files, pieces)

    def finish() -> None:
        if manifest is not None:
            write_whole(commit.staging_of(target) / MANIFEST_NAME, manifest.to_bytes())
        commit.publish(target)

    try:
        exchange.agree(action, on_rank_0(create))
        exchange.agree(action, write)
        exchange.agree(action, on_rank_0(finish))
    except Exception:
        if exchange.rank == 0:
            commit.discard(target)
        raise


def _nothing() -> None:
    """What the other ranks do while rank 0 works."""


def _write_pieces(folder: Path, files: ModelFiles, pieces: Pieces) -> None:
    places = files.locate()
    by_file: dict[str, list[tuple[Box, torch.Tensor]]] = {}
    for box, values in pieces:
        if box.numel:
            by_file.setdefault(places[box.fqn][0].name, []).append((box, values))
    for name, group in by_file.items():
        descriptor = os.open(folder / name, os.O_WRONLY)
        try:
            for box, values in group:
                write_box(descriptor, places[box.fqn][1], box, values)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_average(
    exchange: Exchange, target: Path, shards: Sequence[Shard], now: Manifest
) -> tuple[Manifest, dict[str, list[torch.Tensor]]]:
    """Collective: every rank must call it. Read the averaged values of this rank's shards into new CPU tensors.

    Args:
        exchange: the control traffic of all ranks.
        target: the folder that `write_average` wrote, on any layout and number of ranks, or the one that holds it.
        shards: the averaged shards this rank owns.
        now: what this run would write; tracks and tensors must be the same in the checkpoint.

    Returns:
        The checkpoint's manifest, and per track one tensor per shard.

    Raises:
        CheckpointNotFoundError: there is nothing at the path.
        CheckpointMismatchError: names, shapes, dtypes or tracks differ from what is expected.
        CheckpointCorruptError: files are missing or damaged.
    """
    action = f"loading {target}"
    # One rank decides which folder counts: on shared file systems the others may see it later.
    found = exchange.agree(action, lambda: find_saved(target) if exchange.rank == 0 else None)
    folder: Path = exchange.broadcast_object(found)

    def read() -> tuple[Manifest, dict[str, list[torch.Tensor]]]:
        manifest = read_manifest(folder)
        _check_tracks(folder, manifest, list(now.tracks))
        _check_tensors(folder, manifest, now.tensors)
        return manifest, {
            name: _read_track(folder / manifest.folder_of(name), shards, now.tensors) for name in now.tracks
        }

    return exchange.agree(action, read)


def _check_tracks(folder: Path, manifest: Manifest, tracks: Sequence[str]) -> None:
    if set(manifest.tracks) != set(tracks):
        raise CheckpointMismatchError(
            f"{folder} holds the tracks {sorted(manifest.tracks)}, expected {sorted(tracks)}: give the same "
            "track names as the run that saved it"
        )


def _check_tensors(folder: Path, manifest: Manifest, expected: Mapping[str, SavedTensor]) -> None:
    missing = [fqn for fqn in expected if fqn not in manifest.tensors]
    extra = [fqn for fqn in manifest.tensors if fqn not in expected]
    if missing or extra:
        raise CheckpointMismatchError(
            f"{folder} is of another model: {len(missing)} tensors of this model are not in it {missing[:3]}, "
            f"{len(extra)} of its tensors are not in this model {extra[:3]}"
        )
    for fqn, wanted in expected.items():
        saved = manifest.tensors[fqn]
        if saved != wanted:
            raise CheckpointMismatchError(
                f"{folder} has {fqn} as {_told(saved)}, expected {_told(wanted)}: it is of another model or was "
                "saved with other options (dtype, update_buffers, include, exclude)"
            )


def _told(saved: SavedTensor) -> str:
    return f"{saved.dtype}{list(saved.shape)}, {'averaged' if saved.averaged else 'live'}"


def _read_track(folder: Path, shards: Sequence[Shard], expected: Mapping[str, SavedTensor]) -> list[torch.Tensor]:
    values = [torch.empty(shard.sizes, dtype=getattr(torch, expected[shard.fqn].dtype)) for shard in shards]
    remaining = {shard.fqn for shard in shards}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as handle:
                present = remaining.intersection(handle.keys())
                for shard, value in zip(shards, values, strict=True):
                    if shard.fqn in present:
                        _check_shape(path, handle, shard)
                        read_box(handle, shard.box, value)
                remaining -= present
        except SafetensorError as error:
            raise CheckpointCorruptError(f"{path} is damaged: {error}") from error
    if remaining:
        raise CheckpointCorruptError(
            f"{folder} lacks the tensors {sorted(remaining)[:3]} that its manifest lists: a file is missing"
        )
    return values


def _check_shape(path: Path, handle: safe_open, shard: Shard) -> None:
    shape = tuple(handle.get_slice(shard.fqn).get_shape())
    if shape != shard.global_shape:
        raise CheckpointCorruptError(
            f"{path} has {shard.fqn} with shape {list(shape)}, its manifest says {list(shard.global_shape)}"
        )
