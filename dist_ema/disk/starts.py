"""The weights at which an average can begin: files of any library, and what they say of themselves. No communication.

A path may mean several sets of weights: a file of torch.save often has the live ones beside the averaged ones. All of
them are returned, with what the file says: which are an average, and of how many updates. Which of them fit a model is
decided by name in `checkpoint/fitting.py`.

    form                                averaged                            number of updates
    folders and files of safetensors    the tensors                         optimization_step of diffusers' config.json
    folders of PEFT                     the adapter, and its sub-folders
    timm, torchvision, ...              state_dict_ema, model_ema, ...
    torch's AveragedModel               module.*                            n_averaged
    Lightning's WeightAveraging         state_dict                          averaging_state: n_averaged
    mmengine's EMAHook                  state_dict: it exchanges the two    ema_state_dict: steps
    ema-pytorch                         ema_model.*                         step
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from dist_ema.disk.folders import contents
from dist_ema.disk.formats.file_names import ADAPTER_STEM, DIFFUSERS_STEM, STEMS, WEIGHTS_FILE, index_name, stem_in
from dist_ema.disk.formats.headers import (
    ITEM_BYTES,
    StoredFile,
    StoredModel,
    StoredTensor,
    index_of_files,
    open_regular,
    read_exactly,
    read_header,
    read_model_folder,
    read_small,
)
from dist_ema.disk.formats.pickles import PickledFile, is_pickled, mmengine_lines
from dist_ema.disk.manifest import read_manifest
from dist_ema.disk.sources import averaged_side
from dist_ema.errors import CheckpointCorruptError, CheckpointMismatchError, DistEMAError

__all__ = ["Start", "find_starts", "sees_model"]

# The stems of files of torch.save in model folders: transformers, diffusers, PEFT.
_PICKLED_STEMS = ("pytorch_model", DIFFUSERS_STEM, ADAPTER_STEM)

# A key of a file whose tensors are an average.
_AVERAGED_KEY = re.compile(r"(^|[._])(ema|averaged?|avg|swa|shadow)([._]|$)", re.IGNORECASE)
_COUNTERS = ("n_averaged", "steps", "step")


@dataclasses.dataclass(frozen=True)
class Start:
    """Weights in files.

    Attributes:
        path: the file or folder, for messages.
        folder: the folder of the files of `model`.
        model: the names of the tensors and their places in the files.
        part: of a file of torch.save the part that they are.
        is_average: whether the file says that they are an average.
        num_updates: the number of its updates, where the file says it.
        counts: the name of a tensor -> its value, of tensors that may be a counter.
        adapters: the further adapters of a folder of PEFT; the tensors of one are called `adapter/name` in `model`.
    """

    path: Path
    folder: Path
    model: StoredModel
    part: str = ""
    is_average: bool = False
    num_updates: int | None = None
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    adapters: tuple[str, ...] = ()


def find_starts(source: Path) -> list[Start]:
    """The weights that a path means: one, or several of which the names in the model tell which are meant.

    Args:
        source: a model folder, a file of safetensors or of torch.save, an index of several, a saved average, or a
            checkpoint that holds one.

    Raises:
        CheckpointNotFoundError: there are several averages to choose from.
        CheckpointMismatchError: the average has several tracks to choose from; or a file holds no tensors by name.
        CheckpointCorruptError: files are missing or damaged, or hold more than tensors.
    """
    if not os.path.lexists(source):
        raise CheckpointCorruptError(
            f"{source} is missing, expected a model folder, a safetensors file or a file of torch.save: check the path"
        )
    if source.is_file():
        return _of_file(source)
    folder = averaged_side(source)
    has_weights = stem_in(folder) is not None
    if contents.has_manifest(folder) and not has_weights:
        tracks = list(read_manifest(folder).tracks)
        if len(tracks) > 1:
            raise CheckpointMismatchError(
                f"{folder} holds {len(tracks)} tracks, expected the weights of one: give the folder of one of them, "
                f"{', '.join(str(folder / track) for track in tracks)}"
            )
    return _of_folder(folder, has_weights)


def _of_folder(folder: Path, has_weights: bool) -> list[Start]:
    adapters = _adapters_in(folder)
    if has_weights:
        model = read_model_folder(folder)
        if model.stem != ADAPTER_STEM:
            return [_counted(Start(folder, folder, model))]
        return [_with_adapters(Start(folder, folder, model), adapters)]
    for stem in _PICKLED_STEMS:
        if os.path.lexists(folder / f"{stem}.bin.index.json"):
            return _of_pickled_index(folder / f"{stem}.bin.index.json")
        if is_pickled(folder / f"{stem}.bin"):
            starts = [dataclasses.replace(start, path=folder) for start in _of_pickled(folder / f"{stem}.bin")]
            return [_with_adapters(start, adapters) for start in starts] if stem == ADAPTER_STEM else starts
    if adapters:
        return [_with_adapters(Start(folder, folder, StoredModel({}, {}, None, ADAPTER_STEM)), adapters)]
    read_model_folder(folder)  # raises: it says what the folder has
    raise AssertionError(folder)


def _of_file(source: Path) -> list[Start]:
    if source.name in map(index_name, STEMS):
        return [_counted(Start(source, source.parent, read_model_folder(source.parent)))]
    if source.name in (f"{stem}.bin.index.json" for stem in _PICKLED_STEMS):
        return _of_pickled_index(source)
    if is_pickled(source):
        return _of_pickled(source)
    file = read_header(source)
    return [_counted(Start(source, source.parent, StoredModel({source.name: file}, file.tensors, None)))]


def _counted(start: Start) -> Start:
    """The weights with the counters that lie in safetensors files, and in diffusers' configuration beside them."""
    counts = {}
    for name, tensor in start.model.tensors.items():
        if name.rpartition(".")[2] in _COUNTERS and tensor.shape == () and tensor.dtype in ("I64", "I32"):
            count = _counted_updates(_integer(start.folder, tensor))
            if count is not None:
                counts[name] = count
    file_names = list(start.model.files)
    is_ours = any(contents.MARK in file.metadata for file in start.model.files.values())
    steps = None
    if not is_ours and all(WEIGHTS_FILE.fullmatch(name) for name in file_names):
        steps = _optimization_step(start.folder)
    return dataclasses.replace(start, counts=counts, num_updates=steps, is_average=steps is not None)


def _integer(folder: Path, tensor: StoredTensor) -> int:
    content = bytearray(ITEM_BYTES[tensor.dtype])
    descriptor = open_regular(folder / tensor.file)
    try:
        read_exactly(descriptor, content, tensor.start)
    finally:
        os.close(descriptor)
    return int.from_bytes(content, "little", signed=True)


def _optimization_step(folder: Path) -> int | None:
    """What diffusers' EMAModel writes into the configuration of the model; None for any other configuration."""
    try:
        step = json.loads(read_small(folder / "config.json"))["optimization_step"]
    except (DistEMAError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return _counted_updates(step)


def _adapters_in(folder: Path) -> list[str]:
    """The names of the further adapters of a folder of PEFT: the sub-folders that have files of one."""
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
    return [
        path.name
        for path in inside
        if path.is_dir()
        and os.path.lexists(path / "adapter_config.json")
        and (stem_in(path) == ADAPTER_STEM or is_pickled(path / f"{ADAPTER_STEM}.bin"))
    ]


def _with_adapters(start: Start, adapters: list[str]) -> Start:
    """The adapter at the top of a folder of PEFT, with those in the sub-folders."""
    files, tensors = dict(start.model.files), dict(start.model.tensors)
    for adapter in adapters:
        (inner,) = _of_folder(start.folder / adapter, stem_in(start.folder / adapter) is not None)
        for name, there in inner.model.files.items():
            files[f"{adapter}/{name}"] = file = there.called(f"{adapter}/{name}")
            listed = {fqn: place for fqn, place in file.tensors.items() if fqn in inner.model.tensors}
            tensors |= {f"{adapter}/{fqn}": place for fqn, place in listed.items()}
    model = dataclasses.replace(start.model, files=files, tensors=tensors)
    return dataclasses.replace(start, model=model, adapters=tuple(adapters))


def _of_pickled(path: Path) -> list[Start]:
    file = PickledFile(path)
    content = file.content
    if "ema_state_dict" in file.parts and "steps" in file.parts["ema_state_dict"] and "state_dict" in file.parts:
        meta = content.get("meta")
        if not isinstance(meta, dict) or "mmengine_version" not in meta:
            raise CheckpointMismatchError(
                f"{path} has state_dict and an ema_state_dict with steps, as mmengine writes them, and does not say "
                "who wrote it (no mmengine_version). EMAHook exchanges the two when it saves, so that state_dict has "
                f"the averaged weights. Save them alone, if it is so:\n{mmengine_lines(path)}"
            )
        count = _count(file.parts["ema_state_dict"]["steps"])
        return [_start(file, path, "state_dict", is_average=True, num_updates=count)]
    averaging = file.parts.get("averaging_state", {})
    if "n_averaged" in averaging and "state_dict" in file.parts:
        return [_start(file, path, "state_dict", is_average=True, num_updates=_count(averaging["n_averaged"]))]
    return [_start(file, path, part, is_average=_AVERAGED_KEY.search(part) is not None) for part in file.parts]


def _start(
    file: PickledFile, path: Path, part: str, *, is_average: bool = False, num_updates: int | None = None
) -> Start:
    stored = file.stored(part)
    counts = {}
    for name, tensor in file.parts[part].items():
        count = _count(tensor) if name.rpartition(".")[2] in _COUNTERS else None
        if count is not None:
            counts[name] = count
    model = StoredModel({path.name: stored}, stored.tensors, None)
    return Start(path, path.parent, model, part, is_average, num_updates, counts)


def _count(tensor: torch.Tensor) -> int | None:
    is_integer = tensor.shape == () and tensor.dtype in (torch.int64, torch.int32)
    return _counted_updates(int(tensor)) if is_integer else None


def _counted_updates(value: object) -> int | None:
    """A number of updates; None for what is none, such as a negative number."""
    return value if type(value) is int and 0 <= value < 2**63 else None


def _of_pickled_index(path: Path) -> list[Start]:
    """The several files of torch.save that an index of transformers lists."""
    folder = path.parent
    file_of = index_of_files(path, read_small(path))
    files = {name: PickledFile(folder / name).stored("") for name in dict.fromkeys(file_of.values())}
    tensors = {}
    for fqn, name in file_of.items():
        if fqn not in files[name].tensors:
            raise CheckpointCorruptError(f"{path} says that {fqn[:200]!r} is in {name}, but it is not")
        tensors[fqn] = files[name].tensors[fqn]
    return [Start(path, folder, StoredModel(files, tensors, None))]


def sees_model(folder: Path, model: StoredModel) -> bool:
    """Whether the files of the weights lie in the folder as they were found."""
    try:
        return all(_stored_file(folder, name, file.part) == file for name, file in model.files.items())
    except (OSError, DistEMAError):
        return False


def _stored_file(folder: Path, name: str, part: str | None) -> StoredFile:
    path = folder / name
    return (read_header(path) if part is None else PickledFile(path).stored(part)).called(name)
