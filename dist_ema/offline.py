"""Consolidating a checkpoint without the run: one process, no process group, no model.

Tensors pass in bounded pieces, their checksums compared on the way. The same bytes as `ShardedEMA.consolidate` writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from dist_ema import commit
from dist_ema.checks import absolute
from dist_ema.checksums import checksum
from dist_ema.errors import CheckpointCorruptError
from dist_ema.files import FileLayout, host_bytes, plan_files, write_all, write_whole
from dist_ema.headers import INDEX_NAME, TORCH_DTYPES, read_small
from dist_ema.integrations.transformers import CONFIG_NAME, CONFIG_NAMES, config_with_dtype
from dist_ema.options import floating_dtype
from dist_ema.saved import SavedAverage, damage_told, read_saved, stored_bytes

__all__ = ["consolidate_checkpoint"]


def consolidate_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    track: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write one track of a saved average as a plain model folder to ship. Any one process; no communication.

    Args:
        src: what `ShardedEMA.save` wrote, or the accelerate checkpoint that holds it.
        dst: the folder to write; a former export is replaced, atomically.
        track: which average; may be left out if there is one.
        dtype: floating-point tensors are converted to it; None keeps the averaged dtype, and then files that need no
            change are linked where the file system can, else copied.
        max_shard_size: bytes (or "5GB") of a file before the next one begins.
        progress: called with the number of bytes of each piece that was read.

    Raises:
        ConfigError: an argument is out of range.
        CheckpointNotFoundError: there is nothing at `src`.
        CheckpointMismatchError: there is no such track, or a newer version of the format wrote it.
        CheckpointCorruptError: it is damaged; nothing was written.
        CheckpointError: `dst` cannot be written.
    """
    target, converted = absolute(dst), floating_dtype("dtype", dtype)
    saved = read_saved(absolute(src))
    name = saved.track(track)
    tensors = []
    for fqn, tensor in saved.manifest.tensors.items():
        own = getattr(torch, tensor.dtype)
        tensors.append((fqn, converted if converted is not None and own.is_floating_point else own, tensor.shape))
    metadata = {**saved.manifest.aliases, commit.MARK: commit.MARK_VALUE}
    files = plan_files(tensors, max_shard_size=max_shard_size, metadata=metadata)
    work = _Consolidation(saved, name, progress or _nothing)
    staging = commit.stage(target, commit.is_export)
    try:
        for file in files.files:
            work.write(file, staging / file.name)
        if files.index is not None:
            write_whole(staging / INDEX_NAME, files.index)
        for text, content in _texts(saved.folder_of(name), converted).items():
            write_whole(staging / text, content)
        commit.publish(target)
    except BaseException:
        with suppress(OSError):
            commit.discard(target)
        raise


def _texts(folder: Path, dtype: torch.dtype | None) -> dict[str, bytes]:
    """The model's configuration files, if they are beside its weights; config.json names the dtype."""
    found = {}
    for name in CONFIG_NAMES:
        path = folder / name
        if path.is_file() and not path.is_symlink():  # not somebody's link to another file of ours
            content = read_small(path)
            try:
                found[name] = config_with_dtype(content, dtype) if dtype and name == CONFIG_NAME else content
            except (ValueError, RecursionError) as error:
                raise CheckpointCorruptError(f"{path} is not a readable JSON file: {str(error)[:300]}") from error
    return found


def _nothing(num_bytes: int) -> None:
    """Progress that nobody watches."""


class _Consolidation:
    """Reads the tensors of one track."""

    def __init__(self, saved: SavedAverage, track: str, progress: Callable[[int], object]) -> None:
        self._model = saved.models[track]
        self._folder = saved.folder_of(track)
        self._checksums = saved.manifest.checksums.get(track, {})
        self._progress = progress

    def write(self, file: FileLayout, path: Path) -> None:
        """Write one file."""
        unchanged = self._model.files.get(file.name)
        if unchanged is not None and unchanged.header_checksum == checksum(file.header):
            for fqn in file.entries:
                self._copy(fqn, None, None)
            commit.link(os.path.realpath(self._folder / file.name), path)
            return
        write_whole(path, file.header, size_bytes=file.size_bytes)
        descriptor = os.open(path, os.O_WRONLY)
        try:
            for fqn in file.entries:
                self._copy(fqn, file, descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _copy(self, fqn: str, file: FileLayout | None, descriptor: int | None) -> None:
        """Read a tensor, compare its checksum, and write it converted, where a file is given."""
        stored = self._model.tensors[fqn]
        own = getattr(torch, TORCH_DTYPES[stored.dtype])
        offset = 0 if file is None else file.entries[fqn].start
        found = 0
        for piece in stored_bytes(self._folder, stored):
            found = checksum(piece, found)
            if file is not None and descriptor is not None:
                content = host_bytes(torch.frombuffer(piece, dtype=own), file.entries[fqn].dtype).numpy()
                write_all(descriptor, content, offset)
                offset += content.nbytes
            self._progress(piece.nbytes)
        if self._checksums.get(fqn, found) != found:
            raise CheckpointCorruptError(damage_told(self._folder / stored.file, [fqn]))
