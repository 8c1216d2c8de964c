"""Saving an average: every rank writes its boxes at their places in the final files.

All ranks agree after each stage, before the next ([Note: agreement] in exchange.py):

    1 rank 0    look at the target, clear leftovers, make the staging folder, create every file at its full size
    2 all       look whether they see that folder; no other save has its name
    3 all       write the bytes they own, with the header, or send them to a rank that sees the folder; fsync
    4 rank 0    write the manifest, with the checksums of all ranks together; fsync; commit by rename (commit.py)
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from dist_ema.boxes.plan import Plan
from dist_ema.boxes.rank_runs import RankRuns
from dist_ema.checkpoint.nodes.views import blind_ranks, node_name
from dist_ema.checkpoint.writing import Pieces, write_tensors
from dist_ema.disk.folders import commit, contents
from dist_ema.disk.formats.checksums import PartialChecksums, checksum, whole_checksums
from dist_ema.disk.formats.model_files import ModelFiles, write_whole
from dist_ema.disk.forms.card import CARD_NAME, takes_card
from dist_ema.disk.forms.deciding import PLAIN_FORM, Decided
from dist_ema.disk.forms.layout import lay_out_form
from dist_ema.disk.manifest import MANIFEST_NAME, Manifest, SavedFile
from dist_ema.ranks.exchange import Exchange

__all__ = ["model_files", "write_average", "write_export"]

# How long a rank looks for the staging folder before it counts as having another disk. Network file systems may show
# a new folder late; if a rank gives up too early, another rank writes its bytes.
_LOOKING_SECONDS = 1.0


def model_files(
    plan: Plan, dtypes: Mapping[str, torch.dtype], max_shard_size: int | str, decided: Decided = PLAIN_FORM
) -> ModelFiles:
    """The files of one track, the same on every rank. No communication.

    Args:
        plan: the model as boxes.
        dtypes: fqn -> dtype in the files.
        max_shard_size: bytes (or "5GB") of a file before the next one begins.
        decided: the form of the folder, and the small files in it; the ranks must have the same form.

    Raises:
        ConfigError: `max_shard_size` cannot be read.
        UnsupportedModelError: a dtype has no name in the format.
    """
    tensors = [(spec.fqn, dtypes[spec.fqn], spec.shape) for spec in plan.specs]
    return lay_out_form(decided.form, tensors, plan.aliases, max_shard_size, decided.texts)


def write_average(
    exchange: Exchange, target: Path, files: ModelFiles, tracks: Mapping[str, Pieces], manifest: Manifest
) -> None:
    """Collective: every rank must call it. Write a checkpoint of all tracks.

    Args:
        exchange: the control traffic of all ranks.
        target: the folder to write, replaced atomically if it is there.
        files: the layout of one track.
        tracks: track name -> every box this rank owns, and its values, converted to the files' dtypes on the way.
        manifest: the manifest to write beside the tensors; files and checksums are added to it.

    Raises:
        CheckpointError: some rank failed; the same on all ranks, and the former content stays.
    """
    _Save(exchange, target, files, {manifest.folder_of(name): name for name in tracks}, manifest).run(tracks)


def write_export(exchange: Exchange, target: Path, files: ModelFiles, pieces: Pieces, card: bytes) -> None:
    """Collective: every rank must call it. Write one track as a plain model folder, without a manifest.

    Args:
        exchange: the control traffic of all ranks.
        target: the folder to write, replaced atomically if it is there.
        files: the layout of the folder.
        pieces: every box this rank owns, and its values, converted to the files' dtypes on the way.
        card: the content of the model card; it is written where the user has none.

    Raises:
        CheckpointError: some rank failed; the same on all ranks, and the former content stays.
    """
    _Save(exchange, target, files, {".": ""}, None, card).run({"": pieces})


class _Save:
    """One save, by all ranks.

    Attributes:
        folders: sub-folder of the target -> the track in it.
        manifest: the manifest of an average; None for an export.
        card: the model card of an export.
    """

    def __init__(
        self,
        exchange: Exchange,
        target: Path,
        files: ModelFiles,
        folders: Mapping[str, str],
        manifest: Manifest | None,
        card: bytes = b"",
    ) -> None:
        self._exchange = exchange
        self._target = target
        self._card = card
        self._staged: commit.Staged | None = None  # on rank 0
        self._files = files
        self._sizes_bytes = {fqn: entry.nbytes for fqn, (_, entry) in files.locate().items()}
        self._folders = folders
        self._manifest = manifest
        self._action = f"writing {target}"

    def run(self, tracks: Mapping[str, Pieces]) -> None:
        """Collective. All stages."""
        try:
            staging = Path(self._exchange.on_rank_0(self._action, lambda: str(self._create())))
            writers = self._writers(staging)
            checksums = {
                track: self._write(staging / folder, tracks[track], writers) for folder, track in self._folders.items()
            }
            self._exchange.on_rank_0(self._action, lambda: self._finish(checksums))
        finally:
            if self._staged is not None:
                commit.discard(self._staged)

    def _create(self) -> Path:
        """Make the staging folder and its files."""
        replaceable = contents.is_average if self._manifest is not None else contents.is_export
        self._staged = commit.stage(self._target, replaceable, self._needed_bytes())
        staging = self._staged.folder
        for folder in self._folders:
            for below in self._files.sub_folders:
                (staging / folder / below).mkdir(parents=True, exist_ok=True)
            for file in self._files.files:
                write_whole(staging / folder / file.name, b"", size_bytes=file.size_bytes)
            if self._files.index is not None:
                write_whole(staging / folder / self._files.index_name, self._files.index)
            for name, content in self._files.texts.items():
                write_whole(staging / folder / name, content)
        if self._card and takes_card(commit.former_of(self._target)):
            write_whole(staging / CARD_NAME, self._card)
        return staging

    def _needed_bytes(self) -> int:
        """The bytes of all tracks; the manifest is not known yet."""
        texts = sum(map(len, self._files.texts.values())) + len(self._files.index or b"")
        return len(self._folders) * (texts + sum(file.size_bytes for file in self._files.files))

    def _writers(self, staging: Path) -> RankRuns:
        """The ranks that see the staging folder of rank 0."""
        blind = blind_ranks(self._exchange, self._action, lambda: _appears(staging), lambda: _is_there(staging))
        world_size = self._exchange.world_size
        if blind:
            self._exchange.warn(
                f"{len(blind)} of {world_size} ranks do not see the folder that rank 0 makes for {self._target}: their "
                "slices are sent to the others and written there, which is slower. The files lie on the disk of rank "
                f"0, on the node {node_name()}, and a load wants rank 0 there again. Save to a file system that all "
                "nodes share"
            )
        return blind.others(world_size)

    def _write(self, folder: Path, pieces: Pieces, writers: RankRuns) -> dict[str, int]:
        """Write one track. Returns the checksums of its tensors, on rank 0; {} elsewhere."""
        partial = None if self._manifest is None else PartialChecksums(self._sizes_bytes)
        failure = write_tensors(self._exchange, folder, self._files, pieces, writers, partial)
        self._exchange.raise_together(self._action, failure)
        if partial is None:
            return {}
        combined = self._exchange.xor_on_rank_0(partial.partial())
        return {} if combined is None else whole_checksums(self._sizes_bytes, combined)

    def _finish(self, checksums: Mapping[str, Mapping[str, int]]) -> None:
        assert self._staged is not None, "this is rank 0, and it has staged"
        if self._manifest is not None:
            manifest = dataclasses.replace(self._manifest, files=self._saved_files(), checksums=checksums)
            write_whole(self._staged.folder / MANIFEST_NAME, manifest.to_bytes())
        commit.publish(self._staged, self._files.unfit)

    def _saved_files(self) -> dict[str, SavedFile]:
        files = {file.name: SavedFile(file.size_bytes, checksum(file.header)) for file in self._files.files}
        if self._files.index is not None:
            files[self._files.index_name] = SavedFile(len(self._files.index), checksum(self._files.index))
        return {
            name if folder == "." else f"{folder}/{name}": file
            for folder in self._folders
            for name, file in files.items()
        }


def _appears(path: Path) -> bool:
    """Whether the path is there, or appears within `_LOOKING_SECONDS`."""
    deadline = time.monotonic() + _LOOKING_SECONDS
    while time.monotonic() < deadline:
        if _is_there(path):
            return True
        time.sleep(0.05)
    return False


def _is_there(path: Path) -> bool:
    """Whether the path is there. A rank that may not look (root squashing) counts as one that does not see it."""
    with suppress(OSError):
        return path.exists()
    return False
