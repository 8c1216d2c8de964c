"""Consolidating a checkpoint without the run: one process, no process group, no model.

Tensors pass in bounded chunks; their checksums are compared on the way. `ShardedEMA.consolidate` writes the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dist_ema.checks import PathLike, absolute, target_folder
from dist_ema.disk.folders.steady_reading import steadily
from dist_ema.disk.formats.checksums import checksum
from dist_ema.disk.formats.model_files import FileLayout, dtype_of
from dist_ema.disk.forms.card import card_text
from dist_ema.disk.saved_average import SavedAverage, damage_text, read_saved, stored_bytes
from dist_ema.errors import CheckpointCorruptError, ConfigError
from dist_ema.live.correction import Bema
from dist_ema.offline.correcting import Correcting
from dist_ema.offline.exporting import lay_out_export, stored_dtypes, write_model_folder
from dist_ema.options import floating_dtype, with_floating

__all__ = ["consolidate_checkpoint"]


def consolidate_checkpoint(
    src: PathLike,
    dst: PathLike,
    *,
    track: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    link: bool = False,
    correct: Bema | None = None,
    live: PathLike | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write one track of a saved average as a plain model folder to ship. Any one process; no communication.

    Args:
        src: a folder that `ShardedEMA.save` wrote, or the accelerate checkpoint that holds it. If a save replaces it
            meanwhile, it is read again.
        dst: the folder to write; a former export is replaced, atomically.
        track: the name of the average; may be left out if there is one.
        dtype: floating-point tensors are converted to it; None keeps the averaged dtype.
        max_shard_size: bytes (or "5GB") of a file before the next one begins.
        link: give files that need no change a second name in the export (a hard link), where the file system can.
            A program that writes into such an export (`open(..., "r+b")`, `safetensors.torch.save_file`,
            `numpy.memmap`) writes into the checkpoint, since both are one file. A link takes no time and no space. By
            default every file is a copy, which shares blocks with the checkpoint only where the file system copies
            them on write.
        correct: write EMA + a * (live - start) in place of the average, as `ShardedEMA.consolidate` does.
        live: with `correct`, the folder or file (safetensors) of the live weights that were saved with the average. Of
            a folder the weights at its top are read, as those of accelerate's checkpoints under DDP.
        progress: called with the number of bytes of every chunk that was read.

    Raises:
        ConfigError: an argument is out of range, or `correct` and `live` are not given together.
        CheckpointNotFoundError: there is nothing at `src`.
        CheckpointMismatchError: there is no such track, or a newer version of the format wrote it.
        CheckpointCorruptError: the checkpoint is damaged; nothing was written.
        CheckpointError: `dst` cannot be written.
    """
    source, target, converted = absolute(src), target_folder(dst), floating_dtype("dtype", dtype)
    if not isinstance(link, bool):  # "no" must not link
        raise ConfigError(f"link is {link!r}, expected True or False")

    def write(check: Callable[[], None]) -> None:
        saved = read_saved(source)
        name = saved.track(track)
        dtypes = with_floating(stored_dtypes(saved), converted)
        files = lay_out_export(saved, name, dtypes, max_shard_size, converted)
        by = None if correct is None and live is None else Correcting(saved, name, correct, live)
        work = _Consolidation(saved, name, progress or (lambda num_bytes: None), by)
        card = card_text(saved.manifest.form, saved.manifest.tracks[name], saved.manifest.count_of(name))
        write_model_folder(target, files, work.values, work.unchanged, check, card=card, link=link)

    start = correct.start if isinstance(correct, Bema) else None
    steadily([source, *(absolute(path) for path in (live, start) if path is not None)], write)


class _Consolidation:
    """Reads the tensors of one track."""

    def __init__(
        self, saved: SavedAverage, track: str, progress: Callable[[int], object], correct: Correcting | None
    ) -> None:
        self._model = saved.models[track]
        self._folder = saved.folder_of(track)
        self._checksums = saved.manifest.checksums.get(track, {})
        self._progress = progress
        self._correct = correct

    def unchanged(self, file: FileLayout) -> Path | None:
        """The file of the track that is the same as `file`."""
        stored = self._model.files.get(file.name)
        if self._correct is not None or stored is None or stored.header_checksum != checksum(file.header):
            return None
        return Path(os.path.realpath(self._folder / file.name))

    def values(self, fqn: str) -> Iterator[torch.Tensor]:
        """The values of a tensor, in chunks; its checksum is compared at the end."""
        averaged = self._averaged(fqn)
        return averaged if self._correct is None else self._correct.values(fqn, averaged)

    def _averaged(self, fqn: str) -> Iterator[torch.Tensor]:
        stored = self._model.tensors[fqn]
        total = 0
        for chunk in stored_bytes(self._folder, stored):
            total = checksum(chunk, total)
            yield torch.frombuffer(chunk, dtype=dtype_of(stored))
            self._progress(chunk.nbytes)
        if self._checksums.get(fqn, total) != total:
            raise CheckpointCorruptError(damage_text(self._folder / stored.file, [fqn]))
