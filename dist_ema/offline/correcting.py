"""Correcting a saved average by BEMA without the run: `ShardedEMA.consolidate(correct=...)` writes the same values.

The averages, the live weights and theta_0 are read side by side, a chunk of each at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from dist_ema.checks import PathLike, absolute, shown
from dist_ema.disk.formats.file_names import stem_in
from dist_ema.disk.formats.headers import StoredModel, StoredTensor, read_header, read_model_folder
from dist_ema.disk.formats.model_files import dtype_of
from dist_ema.disk.saved_average import SavedAverage
from dist_ema.errors import CheckpointMismatchError, ConfigError
from dist_ema.live.correction import START_TRACK, Bema, add_correction, check_start_track, wide
from dist_ema.offline.summing import StoredTensors
from dist_ema.schedules.records import schedule_from_json

__all__ = ["Correcting"]


class Correcting:
    """The correction of a saved average.

    Args:
        saved: the saved averages.
        track: the one that is corrected.
        bema: the constants; without `start` the average must have the track "start".
        live: the folder or file of the live weights of the same moment.

    Raises:
        ConfigError: a theta_0 or the live weights are not given, or averaged buffers would be corrected.
        CheckpointMismatchError: the weights are of another model.
        CheckpointCorruptError: files are missing or damaged.
    """

    def __init__(self, saved: SavedAverage, track: str, bema: object, live: PathLike | None) -> None:
        if not isinstance(bema, Bema) or live is None:
            raise ConfigError(
                f"correct is {shown(bema)} and live is {shown(live)}, expected a dist_ema.Bema, and the folder or file "
                "of the live weights that were saved with this average: the correction is made of both"
            )
        manifest = saved.manifest
        if manifest.options.get("update_buffers"):
            raise ConfigError(
                f"{saved.folder} has averaged buffers (update_buffers=True), which its manifest does not tell from "
                "parameters, and a corrected variance may be negative: call ema.consolidate(correct=...) in the run"
            )
        self._averaged = {fqn: tensor.shape for fqn, tensor in manifest.tensors.items() if tensor.averaged}
        names = {fqn: [fqn] for fqn in self._averaged}
        for alias, fqn in manifest.aliases.items():
            names.get(fqn, []).append(alias)
        self._weight = bema.weight(manifest.count_of(track))
        self._skip_nonfinite = bool(manifest.options.get("skip_nonfinite"))
        self._live = _Side(*_model_at(absolute(live)), self._averaged, names)
        if bema.start is None:
            check_start_track({track: schedule_from_json(record) for track, record in manifest.tracks.items()})
            start = saved.folder_of(START_TRACK), saved.models[START_TRACK]
        else:
            start = _model_at(absolute(bema.start))
        self._start = _Side(*start, self._averaged, names)

    def values(self, fqn: str, averaged: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The chunks of a tensor, of the average `averaged`, corrected if it is averaged."""
        if fqn not in self._averaged:
            yield from averaged
            return
        done = 0
        for chunk in averaged:
            live, start = (side.read(fqn, done, len(chunk)) for side in (self._live, self._start))
            done += len(chunk)
            value = chunk.to(wide(chunk.dtype))
            yield add_correction(value, live, start, self._weight, skip_nonfinite=self._skip_nonfinite)


class _Side:
    """Weights that are read beside an average."""

    def __init__(
        self,
        folder: Path,
        model: StoredModel,
        averaged: Mapping[str, tuple[int, ...]],
        names: Mapping[str, Sequence[str]],
    ) -> None:
        tensors: dict[str, StoredTensor] = {}
        missing = []
        for fqn, shape in averaged.items():
            stored = next((model.tensors[name] for name in names[fqn] if name in model.tensors), None)
            if stored is None or stored.shape != shape or not dtype_of(stored).is_floating_point:
                missing.append(f"{fqn} {list(shape)}")
            else:
                tensors[fqn] = stored
        if missing:
            raise CheckpointMismatchError(
                f"{folder} is of another model: {len(missing)} averaged tensors are not in it, or not as floats of "
                f"that shape ({', '.join(missing[:3])}). Give weights of the model that was averaged"
            )
        self._source = StoredTensors(folder, tensors)

    def read(self, fqn: str, start: int, count: int) -> torch.Tensor:
        """`count` elements of a tensor, from number `start` on."""
        dtype = self._source.dtype(fqn)
        buffer = bytearray(count * dtype.itemsize)
        self._source.read(fqn, start, memoryview(buffer))
        return torch.frombuffer(buffer, dtype=dtype)


def _model_at(path: Path) -> tuple[Path, StoredModel]:
    """The weights in a file, or those at the top of a folder: of a checkpoint with an average in it the live ones."""
    if path.is_file():
        file = read_header(path)
        return path.parent, StoredModel({path.name: file}, file.tensors, None)
    dcp = [below for below in (path, *path.glob("pytorch_model_fsdp_*")) if (below / ".metadata").is_file()]
    if dcp and stem_in(path) is None:
        raise CheckpointMismatchError(
            f"{dcp[0]} is a checkpoint of torch's DCP, expected safetensors: write it as a model folder first, by "
            f"`dist-ema merge FOLDER {dcp[0]}`, and give that folder"
        )
    return path, read_model_folder(path)
