"""The files of a folder in a form. Every rank computes the same ones. No communication."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch

from dist_ema.disk.folders import contents
from dist_ema.disk.formats.model_files import FileLayout, ModelFiles, lay_out_files
from dist_ema.disk.forms.form import TOP, FolderForm

__all__ = ["lay_out_form"]

# A library that reads one file gets one of any size.
_ANY_SIZE = 2**62


def lay_out_form(
    form: FolderForm,
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    aliases: Mapping[str, str],
    max_shard_size: int | str,
    texts: Mapping[str, bytes],
) -> ModelFiles:
    """Lay out the tensors of a track.

    Args:
        form: the form.
        tensors: fqn, dtype and shape of every tensor, in the order of the model.
        aliases: further names of tied tensors -> the fqn.
        max_shard_size: the largest size of a file; it does not hold for the form of a library that reads one file.
        texts: path -> content of the small files.

    Raises:
        ConfigError: `max_shard_size` cannot be read.
        UnsupportedModelError: the format cannot store a tensor.
    """
    folders: dict[str, list[tuple[str, torch.dtype, tuple[int, ...]]]] = {}
    for tensor in tensors:
        folders.setdefault(form.folder_of(tensor[0]), []).append(tensor)
    if form.is_one_file:
        lay_out_files(tensors, max_shard_size=max_shard_size, metadata={})  # raises if the size cannot be read
        max_shard_size = _ANY_SIZE
    files: list[FileLayout] = []
    index = None
    for folder, of_folder in folders.items():
        tied = {name: form.name_of(fqn) for name, fqn in aliases.items() if form.folder_of(fqn) == folder}
        metadata = _metadata(form, folder, tied)
        laid_out = lay_out_files(
            of_folder, max_shard_size=max_shard_size, metadata=metadata, stem=form.stem, names=form.names
        )
        index = laid_out.index
        above = "" if folder == TOP else f"{folder}/"
        files += [dataclasses.replace(file, name=above + file.name) for file in laid_out.files]
    return ModelFiles(tuple(files), index, form.stem, texts, form.unfit)


def _metadata(form: FolderForm, folder: str, aliases: Mapping[str, str]) -> dict[str, str]:
    """The text in the headers of a sub-folder's files."""
    metadata = {**aliases, **form.headers.get(folder, {}), contents.MARK: contents.MARK_VALUE}
    small_files = _names_in(folder, form.small_files)
    if small_files:
        metadata[contents.SMALL_FILES] = " ".join(small_files)
    if folder != TOP:
        metadata[contents.FOLDER] = folder
    return metadata


def _names_in(folder: str, paths: Iterable[str]) -> list[str]:
    """The names of the files that lie in a sub-folder, of paths below the folder."""
    split = [path.rpartition("/") for path in paths]
    return [name for above, _, name in split if (above or TOP) == folder]
