"""Saving and loading an average: every rank writes its boxes at their places in the final files.

Save, each stage agreed by all ranks before the next ([Note: agreement] in exchange.py):

    1 rank 0    clear leftovers, make the staging folder, create every file with its header, at its full size
    2 all       write the owned boxes in place, fsync
    3 rank 0    write the manifest, fsync, commit by rename (commit.py)

Load is the reverse: each rank reads the bytes of its own boxes, whatever layout wrote them, into scratch; only
when all ranks have succeeded does anything in memory change (`ShardedEMA.load`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dist_ema import commit
from dist_ema.checks import file_name
from dist_ema.errors import CheckpointCorruptError, CheckpointMismatchError, ConfigError
from dist_ema.exchange import Exchange
from dist_ema.files import (
    DTYPE_NAMES,
    INDEX_NAME,
    ONE_FILE_NAME,
    ModelFiles,
    plan_files,
    read_box,
    write_box,
    write_whole,
)
from dist_ema.layout import Box, Shard
from dist_ema.manifest import MANIFEST_NAME, Manifest, SavedTensor, find_saved, read_manifest
from dist_ema.plan import Plan

__all__ = ["load_average", "model_files", "write_average", "write_export"]

Pieces = Sequence[tuple[Box, torch.Tensor]]


def model_files(plan: Plan, dtypes: Mapping[str, torch.dtype], max_shard_size: int | str) -> ModelFiles:
    """The files of one track, the same on every rank. No communication.

    Args:
        plan: the model as boxes.
        dtypes: fqn -> dtype in the files.
        max_shard_size: bytes (or "5GB") of a file before the next one begins.

    Raises:
        ConfigError: `max_shard_size` cannot be read.
        UnsupportedModelError: a dtype has no name in the format.
    """
    tensors = [(spec.fqn, dtypes[spec.fqn], spec.shape) for spec in plan.specs]
    metadata = {**plan.aliases, commit.MARK: commit.MARK_VALUE}
    return plan_files(tensors, max_shard_size=max_shard_size, metadata=metadata)


def write_average(
    exchange: Exchange, target: Path, files: ModelFiles, tracks: Mapping[str, Pieces], manifest: Manifest
) -> None:
    """Collective: every rank must call it. Write a checkpoint of all tracks.

    Args:
        exchange: the control traffic of all ranks.
        target: the folder to write, replaced atomically if it is there.
        files: the layout of one track.
        tracks: track name -> every box this rank owns, and its values, converted to the files' dtypes on the way.
        manifest: the record to put beside the tensors.

    Raises:
        CheckpointError: some rank failed; the same on all ranks, and the former content stays.
    """
    folders = {manifest.folder_of(name): (files, pieces) for name, pieces in tracks.items()}
    _write_folders(exchange, target, folders, manifest)


def write_export(exchange: Exchange, target: Path, files: ModelFiles, pieces: Pieces) -> None:
    """Collective: every rank must call it. Write one track as a plain model folder, without a manifest.

    Args:
        exchange: the control traffic of all ranks.
        target: the folder to write, replaced atomically if it is there.
        files: its layout.
        pieces: every box this rank owns, and its values, converted to the files' dtypes on the way.

    Raises:
        CheckpointError: some rank failed; the same on all ranks, and the former content stays.
    """
    _write_folders(exchange, target, {".": (files, pieces)}, None)


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
            with suppress(OSError):  # the next save clears what stays
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
        # What is shown live is not read, so its dtype does not matter: FSDP1 casts buffers at its first forward.
        alike = (saved.shape, saved.averaged) == (wanted.shape, wanted.averaged)
        if not alike or (wanted.averaged and saved.dtype != wanted.dtype):
            raise CheckpointMismatchError(
                f"{folder} has {fqn} as {_told(saved)}, expected {_told(wanted)}: it is of another model or was "
                "saved with other options (dtype, update_buffers, include, exclude)"
            )


def _told(saved: SavedTensor) -> str:
    return f"{saved.dtype}{list(saved.shape)}, {'averaged' if saved.averaged else 'live'}"


def _read_track(folder: Path, shards: Sequence[Shard], expected: Mapping[str, SavedTensor]) -> list[torch.Tensor]:
    values = [torch.empty(shard.sizes, dtype=getattr(torch, expected[shard.fqn].dtype)) for shard in shards]
    by_file: dict[str, list[tuple[Shard, torch.Tensor]]] = {}
    file_of = _files_of_tensors(folder)
    for shard, value in zip(shards, values, strict=True):
        if shard.fqn not in file_of:
            raise CheckpointCorruptError(f"{folder / INDEX_NAME} does not list {shard.fqn}, its manifest does")
        by_file.setdefault(file_of[shard.fqn], []).append((shard, value))
    for name, group in by_file.items():
        path = folder / name
        try:
            with safe_open(path, framework="pt") as handle:
                for shard, value in group:
                    _check_header(path, handle, shard, expected[shard.fqn])
                    read_box(handle, shard.box, value)
        except FileNotFoundError:
            raise CheckpointCorruptError(f"{path} is missing, though {folder} is otherwise a saved average") from None
        except SafetensorError as error:
            raise CheckpointCorruptError(f"{path} is damaged: {error}") from error
    return values


class _OneFile(dict[str, str]):
    """Every tensor is in the only file."""

    def __contains__(self, fqn: object) -> bool:
        return True

    def __missing__(self, fqn: str) -> str:
        return ONE_FILE_NAME


def _files_of_tensors(folder: Path) -> Mapping[str, str]:
    """Name of a tensor -> its file. Other files in the folder are not looked at."""
    path = folder / INDEX_NAME
    if not path.exists():
        return _OneFile()
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        return {str(fqn): file_name("weight_map", name) for fqn, name in dict(weight_map).items()}
    except (ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
        raise CheckpointCorruptError(f"{path} is not an index of safetensors files: {error!r}") from error


def _check_header(path: Path, handle: safe_open, shard: Shard, expected: SavedTensor) -> None:
    source = handle.get_slice(shard.fqn)
    found = (list(source.get_shape()), source.get_dtype())
    wanted = (list(expected.shape), DTYPE_NAMES[getattr(torch, expected.dtype)])
    if found != wanted:
        raise CheckpointCorruptError(f"{path} has {shard.fqn} as {found}, its manifest says {wanted}")
