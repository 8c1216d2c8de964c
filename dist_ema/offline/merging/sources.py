"""What can be merged: model folders, safetensors files, saved averages, checkpoints of DCP. No communication."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from dist_ema.disk.folders import contents
from dist_ema.disk.formats.file_names import stem_in
from dist_ema.disk.formats.headers import StoredModel
from dist_ema.disk.saved_average import SavedAverage, read_saved
from dist_ema.disk.sources import Weights, averaged_side, find_weights
from dist_ema.errors import CheckpointNotFoundError
from dist_ema.offline.merging.dcp import METADATA_NAME, DcpCheckpoint
from dist_ema.offline.summing import StoredTensors

__all__ = ["Mergeable", "open_source", "watched"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mergeable:
    """A source of a merge.

    Attributes:
        path: the path that was given.
        tensors: reads the tensors.
        shapes: name -> shape of the stored tensors.
        spellings: ways to call the stored tensors: common name -> name in `tensors`. The first is the source's own way.
        aliases: further names of tied tensors -> the name in the first spelling.
        saved: the saved average; None for other sources.
        track: its track.
        folder: the model folder, if it is one: its small files are those of the result.
        model: the files of that folder.
    """

    path: Path
    tensors: StoredTensors | DcpCheckpoint
    shapes: Mapping[str, tuple[int, ...]]
    spellings: tuple[Mapping[str, str], ...]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    saved: SavedAverage | None = None
    track: str = ""
    folder: Path | None = None
    model: StoredModel | None = None

    @property
    def has_form(self) -> bool:
        """Whether it says how the folder of the result looks."""
        return self.folder is not None

    @property
    def not_averaged(self) -> set[str]:
        """The names of tensors that a saved average holds as they were live."""
        tensors = {} if self.saved is None else self.saved.manifest.tensors
        return {fqn for fqn, tensor in tensors.items() if not tensor.averaged}


def open_source(path: Path, track: str | None) -> Mergeable:
    """Read the headers of a source.

    Args:
        path: a model folder, a safetensors file, a saved average or the checkpoint that holds it, or a folder of DCP:
            the folder of the `.metadata`, or the checkpoint of accelerate that has `pytorch_model_fsdp_0`.
        track: the name of the average, where a source has several.

    Raises:
        CheckpointNotFoundError: there are no weights, or there are several averages to choose from.
        CheckpointMismatchError: there is no such track.
        CheckpointCorruptError: files are missing, damaged, or contradict each other.
    """
    if path.is_file():
        return _of_dcp(path, path.parent) if path.name == METADATA_NAME else _of_weights(path, None)
    try:
        folder = averaged_side(contents.resolve(path))
    except CheckpointNotFoundError:
        raise CheckpointNotFoundError(
            f"there is nothing at {path}, expected weights to merge: a model folder, a safetensors file, a saved "
            "average or a checkpoint of torch's DCP"
        ) from None
    if contents.has_manifest(folder):
        saved = read_saved(folder)
        return _of_average(path, saved, saved.track(track))
    if stem_in(folder) is None:
        dcp = _dcp_folders(folder)
        if len(dcp) == 1:
            return _of_dcp(path, dcp[0])
        if dcp:
            names = ", ".join(below.name for below in dcp)
            raise CheckpointNotFoundError(f"{path} holds several models in DCP's format ({names}): give one of these")
        weights = find_weights(path, track)
        return _of_weights(path, None, weights)
    return _of_weights(path, folder)


def watched(path: Path) -> Path:
    """The path whose change tells that a source was replaced."""
    dcp = _dcp_folders(path) if path.is_dir() else []
    return dcp[0] / METADATA_NAME if dcp else path


def _dcp_folders(folder: Path) -> list[Path]:
    """The folders of DCP that a path means: itself, or those of accelerate in it."""
    candidates = [folder, *sorted(folder.glob("pytorch_model_fsdp_*"))]
    return [below for below in candidates if (below / METADATA_NAME).is_file()]


def _of_average(path: Path, saved: SavedAverage, track: str) -> Mergeable:
    folder, checksums = saved.folder_of(track), saved.manifest.checksums.get(track, {})
    model = saved.models[track]
    form = saved.manifest.form
    in_files = {form.name_of(fqn) if form else fqn: fqn for fqn in saved.manifest.tensors}
    own = {fqn: fqn for fqn in saved.manifest.tensors}
    return Mergeable(
        path=path,
        tensors=StoredTensors(folder, model.tensors, checksums.get),
        shapes={fqn: tensor.shape for fqn, tensor in saved.manifest.tensors.items()},
        spellings=(own, in_files) if len(in_files) == len(own) else (own,),
        aliases=saved.manifest.aliases,
        saved=saved,
        track=track,
        folder=folder,
        model=model,
    )


def _of_weights(path: Path, folder: Path | None, weights: Weights | None = None) -> Mergeable:
    """A model folder, or a file."""
    weights = weights or find_weights(folder or path, None)
    model = weights.model
    return Mergeable(
        path=path,
        tensors=StoredTensors(weights.folder, weights.model.tensors, weights.checksums.get),
        shapes={name: stored.shape for name, stored in model.tensors.items()},
        spellings=({name: name for name in model.tensors},),
        aliases=dict(_aliases(model)),
        folder=folder,
        model=model,
    )


def _aliases(model: StoredModel) -> Iterator[tuple[str, str]]:
    """The tied names that safetensors and this package write into headers."""
    for file in model.files.values():
        for alias, name in file.metadata.items():
            if name in file.tensors and alias not in model.tensors:
                yield alias, name


def _of_dcp(path: Path, folder: Path) -> Mergeable:
    """A checkpoint of DCP. Each dict in it is a way to call the tensors; the model's is the first."""
    checkpoint = DcpCheckpoint(folder)
    groups: dict[tuple[object, ...], dict[str, str]] = {}
    for name in checkpoint.tensors:
        key = checkpoint.paths.get(name, (name,))
        groups.setdefault(tuple(key[:-1]), {})[str(key[-1])] = name
    flat = {name: name for name in checkpoint.tensors}
    first = groups.get(("model",)) or groups.get(()) or flat
    others = (spelling for spelling in (*groups.values(), flat) if spelling != first)
    shapes = {name: checkpoint.shape(name) for name in checkpoint.tensors}
    return Mergeable(path=path, tensors=checkpoint, shapes=shapes, spellings=(first, *others))
