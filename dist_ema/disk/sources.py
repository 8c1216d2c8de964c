"""The weights that a path means, where it could mean several: the averaged ones. No communication.

A checkpoint of accelerate under DDP has the live weights at its top (`model.safetensors`) and the average in a folder
in it. The path of such a checkpoint means the average here; only the path of their file means the live weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from dist_ema.disk.folders import contents
from dist_ema.disk.formats.file_names import (
    ADAPTER_STEM,
    LORA_STEM,
    MODEL_STEM,
    STEMS,
    index_name,
    one_file_name,
    stem_in,
)
from dist_ema.disk.formats.headers import StoredModel, read_header, read_model_folder
from dist_ema.disk.forms.form import TOP
from dist_ema.disk.manifest import Manifest
from dist_ema.disk.saved_average import read_saved
from dist_ema.errors import CheckpointNotFoundError

__all__ = ["Weights", "averaged_side", "find_weights"]


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights in files.

    Attributes:
        path: the file or folder, for messages.
        folder: the folder of the files of `model`.
        model: the names of the tensors and their places in the files.
        checksums: name -> CRC-32 of the whole tensor, where a checksum was saved.
        exported: name -> the name that the tensor has in an export, where that is another one.
    """

    path: Path
    folder: Path
    model: StoredModel
    checksums: Mapping[str, int] = dataclasses.field(default_factory=dict)
    exported: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def under_names_of(self, other: Weights) -> Weights:
        """These weights; a tensor that `other` has under its exported name alone gets that name."""
        theirs = other.model.tensors
        renamed = {fqn: name for fqn, name in self.exported.items() if name in theirs and fqn not in theirs}
        if not renamed:
            return self
        tensors = {renamed.get(fqn, fqn): stored for fqn, stored in self.model.tensors.items()}
        checksums = {renamed.get(fqn, fqn): value for fqn, value in self.checksums.items()}
        model = dataclasses.replace(self.model, tensors=tensors)
        return dataclasses.replace(self, model=model, checksums=checksums)


def find_weights(source: Path, track: str | None) -> Weights:
    """The weights of an average, checked against its manifest, of a model folder, or of a file.

    Args:
        source: the folder of an average, a checkpoint with one, a model folder, a safetensors file or an index.
        track: the name of the average, where there are several.

    Raises:
        CheckpointNotFoundError: there are no weights, or there are several averages to choose from.
        CheckpointMismatchError: there is no such track.
        CheckpointCorruptError: files are missing, damaged, or contradict each other.
    """
    if source.is_file():
        return _of_file(source)
    folder = averaged_side(contents.resolve(source))
    if not contents.has_manifest(folder) and _has_weights(folder):
        return Weights(folder, folder, _with_adapters(folder, read_model_folder(folder)))
    try:
        saved = read_saved(folder)
    except CheckpointNotFoundError as error:
        if contents.has_manifest(folder) or contents.averages_in(folder):
            raise
        raise CheckpointNotFoundError(
            f"{source} holds neither a saved average nor {one_file_name(MODEL_STEM)}, expected one of these or such a "
            "file"
        ) from error
    name = saved.track(track)
    path, checksums = saved.folder_of(name), saved.manifest.checksums.get(name, {})
    return Weights(path, path, saved.models[name], checksums, _exported(saved.manifest))


def _exported(manifest: Manifest) -> dict[str, str]:
    """The names of the tensors in an export, where they are others; `adapter/name` in the sub-folder of an adapter."""
    form = manifest.form
    if form is None:
        return {}
    lifted, names = form.lifted(manifest.tensors), {}
    for fqn in manifest.tensors:
        folder = form.folder_of(fqn)
        name = form.name_of(fqn)
        names[fqn] = name if folder in (TOP, lifted) else f"{folder}/{name}"
    return {fqn: name for fqn, name in names.items() if fqn != name}


def _with_adapters(folder: Path, model: StoredModel) -> StoredModel:
    """The model of a folder, with the further adapters of a folder of PEFT; their tensors are called `adapter/name`."""
    if model.stem not in (ADAPTER_STEM, LORA_STEM):
        return model
    files, tensors = dict(model.files), dict(model.tensors)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith(".") and stem_in(path) == model.stem:
            file_name = f"{path.name}/{one_file_name(model.stem)}"
            files[file_name] = file = read_header(folder / file_name).called(file_name)
            tensors |= {f"{path.name}/{fqn}": stored for fqn, stored in file.tensors.items()}
    return dataclasses.replace(model, files=files, tensors=tensors)


def _of_file(source: Path) -> Weights:
    if source.name in map(index_name, STEMS):
        return Weights(source, source.parent, read_model_folder(source.parent))
    file = read_header(source)
    return Weights(source, source.parent, StoredModel({source.name: file}, file.tensors, None))


def averaged_side(folder: Path) -> Path:
    """The average in a folder that has one; else the folder.

    Raises:
        CheckpointNotFoundError: there are several averages to choose from.
    """
    if not folder.is_dir() or contents.has_manifest(folder):
        return folder
    inside = [path for path in contents.averages_in(folder) if contents.is_average(path)]
    if len(inside) > 1:
        names = ", ".join(contents.name_of(path) for path in inside)
        raise CheckpointNotFoundError(
            f"{folder} holds several averages ({names}): give the folder of one of them, or the file of other weights"
        )
    return inside[0] if inside else folder


def _has_weights(folder: Path) -> bool:
    return stem_in(folder) is not None
