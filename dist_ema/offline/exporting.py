"""Writing a plain model folder from saved averages: one process, no process group, no model.

`ShardedEMA.consolidate` writes the same files, and commits them the same way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from dist_ema.disk.folders import commit, contents
from dist_ema.disk.folders.file_copies import clone, give_second_name
from dist_ema.disk.formats.headers import read_small
from dist_ema.disk.formats.model_files import FileLayout, ModelFiles, host_bytes, write_all, write_whole
from dist_ema.disk.forms.card import CARD_NAME, takes_card
from dist_ema.disk.forms.form import CONFIG_NAME, GENERATION_NAME, PLAIN, TRANSFORMERS, FolderForm, path_from_top
from dist_ema.disk.forms.layout import lay_out_form
from dist_ema.disk.forms.transformers_models import are_described, config_with_dtype
from dist_ema.disk.saved_average import SavedAverage
from dist_ema.errors import CheckpointCorruptError, CheckpointError

__all__ = ["lay_out_export", "small_texts", "stored_dtypes", "write_model_folder"]

# Gives the values of the tensor of a name: consecutive chunks of any dtype. Raises if the tensor proves damaged.
Values = Callable[[str], Iterable[torch.Tensor]]


# What an older version wrote beside the weights; the user may have added it since.
_CONFIG_NAMES = (CONFIG_NAME, GENERATION_NAME)


def stored_dtypes(saved: SavedAverage) -> dict[str, torch.dtype]:
    """Fqn -> dtype in the files of a saved average."""
    return {fqn: getattr(torch, tensor.dtype) for fqn, tensor in saved.manifest.tensors.items()}


def lay_out_export(
    saved: SavedAverage,
    track: str,
    dtypes: Mapping[str, torch.dtype],
    max_shard_size: int | str,
    config_dtype: torch.dtype | None,
    aliases: Mapping[str, str] | None = None,
) -> ModelFiles:
    """The files of an export that looks like one track of a saved average.

    Args:
        saved: the average.
        track: the name of the track that has the configuration of the model beside its weights.
        dtypes: fqn -> dtype in the export.
        max_shard_size: bytes (or "5GB") of a file before the next one begins.
        config_dtype: the dtype that the configuration of the model gets; None keeps its own.
        aliases: further names of tied tensors -> the fqn; None for those of the average.

    Raises:
        ConfigError: `max_shard_size` cannot be read.
        CheckpointCorruptError: the configuration of the model cannot be read.
    """
    tensors = [(fqn, dtypes[fqn], tensor.shape) for fqn, tensor in saved.manifest.tensors.items()]
    aliases = saved.manifest.aliases if aliases is None else aliases
    folder, form = saved.folder_of(track), saved.manifest.form
    if form is None:
        # An older version may have written a configuration beside the names of an adapter, which it does not describe.
        form = FolderForm(is_described=are_described([*saved.manifest.tensors, *aliases]))
    names = form.small_files or (_CONFIG_NAMES if form.is_described else ())
    of_weights = config_dtype if form.kind in (PLAIN, TRANSFORMERS) else None  # others do not name it
    texts = small_texts(folder, names, of_weights)
    lifted = form.lifted(saved.manifest.tensors)
    if lifted is not None:
        form, texts = form.with_at_top(lifted), {path_from_top(path, lifted): text for path, text in texts.items()}
    return lay_out_form(form, tensors, aliases, max_shard_size, texts)


def write_model_folder(
    target: Path,
    files: ModelFiles,
    values: Values,
    unchanged: Callable[[FileLayout], Path | None],
    check: Callable[[], None],
    *,
    card: bytes,
    link: bool = False,
) -> None:
    """Write the folder, whole or not at all; a former export is replaced.

    Args:
        target: the folder.
        files: the layout of the folder.
        values: gives the values of a tensor, which are converted on the way.
        unchanged: returns an existing file that is the same as the one to write, or None.
        card: the content of the model card; it is written where the user has none.
        link: give such a file a second name, where the file system can. Else it is copied: one pass over its bytes
            both compares the checksums and writes, or only compares, where the file system shares blocks.
        check: called before the folder is committed; raises if what was read was replaced meanwhile.

    Raises:
        CheckpointError: there is something else at `target`, or it cannot be written.
    """
    staged = None
    try:
        staged = commit.stage(target, contents.is_export, sum(file.size_bytes for file in files.files))
        _fill(staged.folder, files, values, unchanged, link=link)
        if takes_card(commit.former_of(target)):
            write_whole(staged.folder / CARD_NAME, card)
        check()
        commit.publish(staged, files.unfit)
    except OSError as error:
        raise CheckpointError(f"{target} could not be written: {error}") from error
    finally:
        if staged is not None:
            commit.discard(staged)


def _fill(
    staging: Path,
    files: ModelFiles,
    values: Values,
    unchanged: Callable[[FileLayout], Path | None],
    *,
    link: bool,
) -> None:
    share = give_second_name if link else clone
    for below in files.sub_folders:
        (staging / below).mkdir(exist_ok=True)
    for file in files.files:
        source = unchanged(file)
        # The file is shared before it is read: then the checksums show a save that replaces the source in between.
        if source is None or not share(source, staging / file.name):
            _write(file, staging / file.name, values)
            continue
        for fqn in file.entries:
            for _ in values(fqn):
                pass
    if files.index is not None:
        write_whole(staging / files.index_name, files.index)
    for name, content in files.texts.items():
        write_whole(staging / name, content)


def _write(file: FileLayout, path: Path, values: Values) -> None:
    write_whole(path, file.header, size_bytes=file.size_bytes)
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for fqn, entry in file.entries.items():
            offset = entry.start
            for chunk in values(fqn):
                content = host_bytes(chunk, entry.dtype).numpy()
                write_all(descriptor, content, offset)
                offset += content.nbytes
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def small_texts(folder: Path, names: Sequence[str], dtype: torch.dtype | None) -> dict[str, bytes]:
    """The small files that are beside the weights.

    Args:
        folder: the folder of the weights.
        names: the names of the files; one that is not there is left out.
        dtype: the dtype that config.json gets; None keeps its own. Only the configuration of transformers names it.

    Raises:
        CheckpointCorruptError: a file cannot be read.
    """
    texts = {}
    for name in names:
        path = folder / name
        # A link of the user may lead to another file of this user; so may that of a sub-folder.
        if path.is_file() and not (path.is_symlink() or (path.parent != folder and path.parent.is_symlink())):
            content = read_small(path)
            try:
                texts[name] = config_with_dtype(content, dtype) if dtype and name == CONFIG_NAME else content
            except (ValueError, RecursionError) as error:
                raise CheckpointCorruptError(f"{path} is not a readable JSON file: {str(error)[:300]}") from error
    return texts
