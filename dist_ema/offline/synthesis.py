"""Making an average that was not tracked out of saved ones: one process, no process group, no model.

Tensors pass in bounded chunks through one float64 sum (summing.py). The checksum of every tensor that is read is
compared on the way.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from dist_ema.checks import PathLike, absolute, target_folder
from dist_ema.disk.folders.steady_reading import steadily
from dist_ema.disk.formats.model_files import dtype_of
from dist_ema.disk.forms.card import card_text
from dist_ema.offline.exporting import lay_out_export, stored_dtypes, write_model_folder
from dist_ema.offline.posthoc import Fit, fit
from dist_ema.offline.snapshots import Snapshots, Source, read_snapshots
from dist_ema.offline.summing import Chunks, StoredTensors
from dist_ema.options import checked_schedules, floating_dtype, with_floating
from dist_ema.schedules.base import Schedule
from dist_ema.schedules.records import schedule_to_json

__all__ = ["Synthesis", "WeighedSnapshots", "WeightedAverage", "synthesize", "weigh", "write"]

_LARGE_ERROR = 0.1


@dataclasses.dataclass(frozen=True)
class WeightedAverage:
    """A saved average in the sum: its folder, its track, how many updates it had, and its weight."""

    folder: Path
    track: str
    num_updates: int
    weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synthesis:
    """The average that `synthesize` has made.

    Attributes:
        folder: the model folder.
        schedule: the schedule of the average.
        num_updates: the number of updates of the average.
        weights: the weights of the saved averages; they sum to 1. Averages of weight 0 were not read.
        profile_error: the relative L2 distance of the achieved weights of all observations from the wanted ones.
        amplification: the sum of the absolute weights: the rounding of what was saved is larger by at most this factor.
    """

    folder: Path
    schedule: Schedule
    num_updates: int
    weights: tuple[WeightedAverage, ...]
    profile_error: float
    amplification: float


@dataclasses.dataclass(frozen=True)
class WeighedSnapshots:
    """Saved averages, and the weights that make of them the average of `schedule`."""

    snapshots: Snapshots
    schedule: Schedule
    fit: Fit

    @property
    def parts(self) -> list[tuple[Source, float]]:
        """The sources that are read, and their weights."""
        weighted = zip(self.snapshots.sources, self.fit.weights, strict=True)
        return [(source, weight) for source, weight in weighted if weight]

    @property
    def nbytes(self) -> int:
        """The bytes that `write` reads."""
        averaged = {fqn for fqn, tensor in self.snapshots.latest.manifest.tensors.items() if tensor.averaged}
        total = sum(t.nbytes for source, _ in self.parts for fqn, t in source.tensors.items() if fqn in averaged)
        return total + sum(t.nbytes for fqn, t in self.snapshots.sources[-1].tensors.items() if fqn not in averaged)


def synthesize(
    snapshots: PathLike,
    out: PathLike,
    schedule: Schedule,
    *,
    num_updates: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int], object] | None = None,
) -> Synthesis:
    """Write the average that `schedule` would have made, as a plain model folder. Any one process; no communication.

    Snapshots do not show which live values `skip_nonfinite` left out, nor that averages began anew or at the weights of
    a file (`restart`, `start_from`, `load(new=...)`): such values count as observed all along. Give every such stretch
    of a run a folder of its own. The result is the weighted sum of the saved averages whose weights of all observations
    come nearest (EDM2: arXiv 2312.02696, section 3.2), exact but for `profile_error`.

    Args:
        snapshots: the folder of the saved averages of a run (`ShardedEMA.snapshot`), or of checkpoints that hold them.
        out: the folder to write; a former export is replaced, atomically.
        schedule: the schedule of the wanted average, such as `PowerSchedule(sigma_rel=0.15)`.
        num_updates: the number of updates of the wanted average; None for that of the latest snapshot. Later snapshots
            are not used. What is not averaged (buffers) comes from the latest that is used.
        dtype: floating-point tensors are converted to it; None for averages in float32 (float64 if they were saved
            so), all else as it is.
        max_shard_size: bytes (or "5GB") of a file before the next one begins.
        progress: called with the number of bytes of every chunk that was read.

    Raises:
        ConfigError: an argument is out of range, or no snapshot can be used.
        CheckpointNotFoundError: there is no folder `snapshots`.
        CheckpointMismatchError: the snapshots are not of one model and one set of options (two runs that agree in these
            are not told apart), or one of their schedules only its author can rebuild.
        CheckpointCorruptError: a snapshot is damaged; nothing was written.
        CheckpointError: `out` cannot be written.

    Example:
        >>> import tempfile
        >>> from dist_ema import PowerSchedule, ShardedEMA, synthesize
        >>> model, folder = torch.nn.Linear(2, 1), tempfile.mkdtemp()
        >>> ema = ShardedEMA(model, {"short": PowerSchedule(sigma_rel=0.05), "long": PowerSchedule(sigma_rel=0.10)})
        >>> for step in range(1, 101):
        ...     ema.update()
        ...     if step % 10 == 0:
        ...         ema.snapshot(f"{folder}/snapshots", dtype=torch.bfloat16)
        >>> synthesize(f"{folder}/snapshots", f"{folder}/model", PowerSchedule(sigma_rel=0.075)).profile_error < 0.02
        True
    """
    target, converted = target_folder(out), floating_dtype("dtype", dtype)

    def work(check: Callable[[], None]) -> Synthesis:
        weighed = weigh(snapshots, schedule, num_updates)
        return write(weighed, target, dtype=converted, max_shard_size=max_shard_size, progress=progress, check=check)

    return steadily([absolute(snapshots)], work)


def weigh(snapshots: PathLike, schedule: Schedule, num_updates: int | None = None) -> WeighedSnapshots:
    """The weights of the saved averages, without reading their tensors; see `synthesize`.

    Raises:
        ConfigError: an argument is out of range, or no snapshot can be used.
        CheckpointError: as `synthesize`.
    """
    (checked,) = checked_schedules({"wanted": schedule}).values()
    saved = read_snapshots(absolute(snapshots), num_updates)
    averaged = [fqn for fqn, tensor in saved.latest.manifest.tensors.items() if tensor.averaged]
    rounding = [_rounding(source, averaged) for source in saved.sources]
    profiles = [source.profile for source in saved.sources]
    return WeighedSnapshots(saved, checked, fit(profiles, saved.profile(checked), rounding))


def _rounding(source: Source, averaged: Sequence[str]) -> float:
    """The largest relative rounding error of the stored averages."""
    return max((torch.finfo(dtype).eps / 2.0 for dtype in {_dtype(source, fqn) for fqn in averaged}), default=0.0)


def _dtype(source: Source, fqn: str) -> torch.dtype:
    return dtype_of(source.tensors[fqn])


def write(
    weighed: WeighedSnapshots,
    target: Path,
    *,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    progress: Callable[[int], object] | None,
    check: Callable[[], None],
) -> Synthesis:
    """Sum up the weighed snapshots; see `synthesize`, which checks the arguments."""
    snapshots, best = weighed.snapshots, weighed.fit
    latest, last = snapshots.latest, snapshots.sources[-1]
    dtypes = stored_dtypes(latest)
    averaged = [fqn for fqn, tensor in latest.manifest.tensors.items() if tensor.averaged]
    wide = dtype or (torch.float64 if torch.float64 in {dtypes[fqn] for fqn in averaged} else torch.float32)
    dtypes |= dict.fromkeys(averaged, wide)
    files = lay_out_export(latest, last.track, with_floating(dtypes, dtype), max_shard_size, wide)
    if best.error > _LARGE_ERROR:
        warnings.warn(
            f"the snapshots cannot express {weighed.schedule!r} after {snapshots.num_updates} updates: the profile of "
            f"their best sum is off by {best.error:.0%}. More snapshots help, tracks that average longer and shorter "
            "than the wanted one, and a number of updates at which there is a snapshot. With snapshots of live "
            "weights, wish for an average that begins at one of them",
            UserWarning,
            stacklevel=5,
        )
    values = _Sum(weighed, progress or (lambda num_bytes: None)).values
    card = card_text(latest.manifest.form, schedule_to_json(weighed.schedule), snapshots.num_updates)
    write_model_folder(target, files, values, lambda file: None, check, card=card)
    return Synthesis(
        folder=target,
        schedule=weighed.schedule,
        num_updates=snapshots.num_updates,
        weights=tuple(
            WeightedAverage(source.snapshot, source.track, source.profile.num_updates, weight)
            for source, weight in zip(snapshots.sources, best.weights, strict=True)
        ),
        profile_error=best.error,
        amplification=best.amplification,
    )


def _tensors_of(source: Source, index: Mapping[str, int]) -> StoredTensors:
    """The tensors of a saved average, whose checksums are in the order of the latest manifest."""
    checksums = source.checksums
    return StoredTensors(source.folder, source.tensors, lambda name: checksums[index[name]] if checksums else None)


class _Sum:
    """Reads the saved averages side by side."""

    def __init__(self, weighed: WeighedSnapshots, progress: Callable[[int], object]) -> None:
        self._tensors = weighed.snapshots.latest.manifest.tensors
        index = {fqn: index for index, fqn in enumerate(self._tensors)}
        self._parts = [(_tensors_of(source, index), weight) for source, weight in weighed.parts]
        self._latest = _tensors_of(weighed.snapshots.sources[-1], index)
        self._chunks = Chunks(progress)

    def values(self, fqn: str) -> Iterator[torch.Tensor]:
        """The chunks of a tensor: of the sum if it is averaged, else of the latest snapshot."""
        tensor = self._tensors[fqn]
        numel = math.prod(tensor.shape)
        if tensor.averaged:
            return self._chunks.summed(numel, [(source, fqn, weight) for source, weight in self._parts])
        return self._chunks.copied(numel, self._latest, fqn)
