"""Merging saved weights: a weighted sum of folders of one model. One process, no process group, no model.

With the coefficients of a decay curve (schedules/merging.py) the merge of the last values of a run at a constant
learning rate stands in for a learning-rate decay. Tensors pass in bounded chunks through one float64 sum (summing.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from dist_ema.checks import PathLike, absolute, real_number, shown, target_folder
from dist_ema.disk.folders.steady_reading import steadily
from dist_ema.disk.formats.model_files import ModelFiles
from dist_ema.disk.forms.card import merge_card_text
from dist_ema.disk.forms.form import TRANSFORMERS, FolderForm
from dist_ema.disk.forms.layout import lay_out_form
from dist_ema.errors import ConfigError
from dist_ema.offline.exporting import lay_out_export, small_texts, write_model_folder
from dist_ema.offline.merging.dcp import DcpCheckpoint
from dist_ema.offline.merging.forms_found import form_of_folder
from dist_ema.offline.merging.matching import Matched, match
from dist_ema.offline.merging.sources import Mergeable, open_source, watched
from dist_ema.offline.summing import Chunks, TensorSource
from dist_ema.options import floating_dtype, with_floating
from dist_ema.schedules.coefficients import merge_coefficients

__all__ = ["Merge", "MergePlan", "MergedSource", "checked_coefficients", "merge", "plan_merge", "write_merge"]

# Elements of a chunk of a tensor that a checkpoint of DCP has in pieces: a piece is loaded anew for every chunk of it.
_DCP_CHUNK_NUMEL = 2**24
# The sum of as many weights as there may be sources is finite.
_LARGEST_WEIGHT = 1e300


@dataclasses.dataclass(frozen=True)
class MergedSource:
    """A source in the sum: its path, the track that was read ("" if it has none), and its coefficient."""

    path: Path
    track: str
    coefficient: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """The weights that `merge` has made.

    Attributes:
        folder: the model folder.
        sources: the sources, oldest first; their coefficients sum to 1. Those of coefficient 0 were not summed.
        base: the base of the task-vector form, or None.
        scale: how far the result lies from the base towards the weighted mean.
    """

    folder: Path
    sources: tuple[MergedSource, ...]
    base: Path | None
    scale: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergePlan:
    """What to read and to write. The headers were read, the tensors not.

    Attributes:
        target: the folder to write.
        sources: the sources, oldest first, and the base behind them.
        coefficients: the coefficients of the sources; they sum to 1.
        scale: see `merge`.
        matched: which tensors belong together.
        naming: the index of the source whose form the result has.
    """

    target: Path
    sources: tuple[Mergeable, ...]
    coefficients: tuple[float, ...]
    scale: float
    matched: Matched
    naming: int

    @property
    def has_base(self) -> bool:
        """Whether the last source is the base."""
        return len(self.sources) > len(self.coefficients)

    @property
    def factors(self) -> tuple[float, ...]:
        """The factors of all sources in the sum, the base's among them: B + scale (mean - B)."""
        if not self.has_base:
            return self.coefficients
        return (*(self.scale * coefficient for coefficient in self.coefficients), 1.0 - self.scale)

    @property
    def latest(self) -> int:
        """The index of the source that tensors come from which are not summed."""
        return len(self.coefficients) - 1

    @property
    def nbytes(self) -> int:
        """The bytes that `write_merge` reads."""
        total = 0
        for name, shape in self.matched.shapes.items():
            total += math.prod(shape) * sum(source.dtype(own).itemsize for source, own, _ in self.parts(name))
        return total

    def parts(self, name: str) -> list[tuple[TensorSource, str, float]]:
        """What the tensor of a common name is made of."""
        if name in self.matched.as_it_is:
            return [(self.sources[self.latest].tensors, self.matched.names[self.latest][name], 1.0)]
        return [
            (source.tensors, names[name], factor)
            for source, names, factor in zip(self.sources, self.matched.names, self.factors, strict=True)
            if factor
        ]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor that is not converted: the widest of the sources."""
        dtypes = {source.dtype(own) for source, own, _ in self.parts(name)}
        if any(dtype.itemsize == 1 and dtype.is_floating_point for dtype in dtypes) and len(dtypes) > 1:
            return torch.float32
        return functools.reduce(torch.promote_types, dtypes)


def merge(
    out: PathLike,
    sources: Sequence[PathLike],
    *,
    weights: Sequence[float] | None = None,
    decay: str | Callable[[float], float] | None = None,
    base: PathLike | None = None,
    scale: float = 1.0,
    track: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int], object] | None = None,
) -> Merge:
    """Write the weighted mean of saved weights as a plain model folder. Any one process; no communication.

    The sources are of one model, in any mixture of its forms: model folders, safetensors files, saved averages or
    checkpoints that hold one, and checkpoints of torch's DCP (accelerate's under FSDP among them). A tensor without
    floating-point values, and one that a saved average holds as it was live, comes from the last source. The folder has
    the form and the small files of the first source that is a folder of safetensors.

    Args:
        out: the folder to write; a former export is replaced, atomically.
        sources: the sources, oldest first.
        weights: their weights; they are divided by their sum. None for equal weights, or those of `decay`.
        decay: the curve of the learning-rate decay that the merge stands in for: "linear", "1-sqrt", "cosine", or a
            function of s; see `MergeSchedule`. The sources are evenly spaced then.
        base: the weights B of the task-vector form, B + scale (mean - B).
        scale: the factor of the task vector.
        track: the name of the average, where saved averages have several.
        dtype: floating-point tensors are converted to it; None for the widest dtype of the sources.
        max_shard_size: bytes (or "5GB") of a file before the next one begins.
        progress: called with the number of bytes of every chunk that was read.

    Raises:
        ConfigError: an argument is out of range, or `out` is one of the sources.
        CheckpointNotFoundError: a source does not exist, or holds several averages.
        CheckpointMismatchError: the sources differ in the names or shapes of their tensors, or one has no such track.
        CheckpointCorruptError: a source is damaged; nothing was written.
        CheckpointError: `out` cannot be written.

    Example:
        >>> import tempfile
        >>> from dist_ema import merge
        >>> from safetensors.torch import load_file, save_file
        >>> folder = tempfile.mkdtemp()
        >>> for value in (1.0, 2.0, 3.0, 4.0):
        ...     save_file({"weight": torch.tensor([value])}, f"{folder}/{value}.safetensors")
        >>> made = merge(f"{folder}/merged", [f"{folder}/{value}.safetensors" for value in (1.0, 2.0, 3.0, 4.0)])
        >>> load_file(f"{folder}/merged/model.safetensors")["weight"].item()
        2.5
    """
    target, paths = target_folder(out), _paths(sources)
    below = None if base is None else absolute(base)
    coefficients = checked_coefficients(len(paths), weights, decay)
    converted = floating_dtype("dtype", dtype)

    def work(check: Callable[[], None]) -> Merge:
        plan = plan_merge(target, paths, coefficients, below, scale, track)
        return write_merge(plan, converted, max_shard_size, progress or (lambda num_bytes: None), check)

    every = [*paths, *([] if below is None else [below])]
    return steadily([watched(path) for path in every], work)


def _paths(sources: object) -> list[Path]:
    if isinstance(sources, str | os.PathLike) or not isinstance(sources, Sequence) or not sources:
        raise ConfigError(f"sources is {sources!r}, expected a list of at least one path, oldest first")
    return [absolute(source) for source in sources]


def checked_coefficients(
    num_sources: int, weights: Sequence[float] | None, decay: str | Callable[[float], float] | None
) -> tuple[float, ...]:
    """The coefficients of the sources, oldest first; they sum to 1. Negative ones are warned of.

    Raises:
        ConfigError: the weights are not as many as the sources, sum to nothing, or come with a decay.
    """
    if weights is not None and decay is not None:
        raise ConfigError("weights and decay are both given, expected one of them: a decay has weights of its own")
    if weights is None:
        return merge_coefficients("linear" if decay is None else decay, num_sources)
    if not isinstance(weights, Iterable):
        raise ConfigError(f"weights is {shown(weights)}, expected a list of numbers, one for each source")
    values = [real_number(f"weights[{index}]", weight) for index, weight in enumerate(weights)]
    if len(values) != num_sources:
        raise ConfigError(f"weights has {len(values)} numbers, expected one for each of the {num_sources} sources")
    if max(map(abs, values)) > _LARGEST_WEIGHT:
        raise ConfigError(f"the weights {values} have one beyond {_LARGEST_WEIGHT:g}: their sum overflows")
    total = math.fsum(values)
    if not total > 1e-9 * math.fsum(map(abs, values)):
        raise ConfigError(f"the weights {values} sum to {total:g}, expected a sum above 0: they are divided by it")
    if any(value < 0 for value in values):
        warnings.warn(
            f"the weights {values} have negative ones: the result lies outside of what was saved, and its rounding is "
            f"larger by {math.fsum(map(abs, values)) / total:.3g} times",
            UserWarning,
            stacklevel=3,
        )
    return tuple(value / total for value in values)


def plan_merge(
    target: Path,
    paths: Sequence[Path],
    coefficients: Sequence[float],
    base: Path | None,
    scale: float,
    track: str | None,
) -> MergePlan:
    """Read the headers of all sources and bring their tensors together; see `merge`."""
    if base is None and scale != 1.0:
        raise ConfigError(f"scale is {scale!r}, but there is no base: the mean is scaled from a base towards it")
    opened = tuple(open_source(path, track) for path in (*paths, *([] if base is None else [base])))
    if track is not None and all(source.saved is None for source in opened):
        raise ConfigError(f"track is {track!r}, but none of the sources is a saved average, which has tracks")
    _check_target(target, opened)
    of_values = opened[: len(paths)]
    by_form = [index for index, source in enumerate(of_values) if source.has_form]
    in_files = [index for index, source in enumerate(of_values) if not isinstance(source.tensors, DcpCheckpoint)]
    naming = (*by_form, *in_files, 0)[0]
    return MergePlan(
        target=target,
        sources=opened,
        coefficients=tuple(coefficients),
        scale=real_number("scale", scale),
        matched=match(opened, naming),
        naming=naming,
    )


def _check_target(target: Path, sources: Sequence[Mergeable]) -> None:
    """Refuse to write over what is read."""
    real = Path(os.path.realpath(target))
    for source in sources:
        read = Path(os.path.realpath(source.path))
        if real == read or real in read.parents:
            raise ConfigError(
                f"{target} is to be written, but the source {source.path} lies there: give another folder"
            )


def write_merge(
    plan: MergePlan,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    progress: Callable[[int], object],
    check: Callable[[], None],
) -> Merge:
    """Sum up the sources of a plan; see `merge`, which checks the arguments."""
    form, files = _lay_out(plan, dtype, max_shard_size)
    made = Merge(
        folder=plan.target,
        sources=tuple(
            MergedSource(source.path, source.track, coefficient)
            for source, coefficient in zip(plan.sources, plan.coefficients, strict=False)
        ),
        base=plan.sources[-1].path if plan.has_base else None,
        scale=plan.scale,
    )
    write_model_folder(
        plan.target, files, _Values(plan, progress).values, lambda file: None, check, card=_card(form, made)
    )
    return made


def _card(form: FolderForm | None, made: Merge) -> bytes:
    facts = [f"sources: {len(made.sources)}, oldest first"]
    if made.base is not None:
        facts.append(f"base: {made.base.name}, scale {made.scale!r}: base + scale (mean - base)")
    return merge_card_text(form, facts, [(_name(source), source.coefficient) for source in made.sources])


def _name(source: MergedSource) -> str:
    """A source as the card calls it: a path of this machine is of no use elsewhere."""
    name = "/".join(source.path.parts[-2:]).lstrip("/")
    return f"{name} ({source.track})" if source.track else name


def _lay_out(
    plan: MergePlan, dtype: torch.dtype | None, max_shard_size: int | str
) -> tuple[FolderForm | None, ModelFiles]:
    naming, matched = plan.sources[plan.naming], plan.matched
    dtypes = with_floating({name: plan.dtype(name) for name in matched.shapes}, dtype)
    summed = {kind for name, kind in dtypes.items() if name not in matched.as_it_is}
    of_config = dtype or (next(iter(summed)) if len(summed) == 1 else None)
    if naming.saved is not None and matched.shapes.keys() == naming.shapes.keys():
        return naming.saved.manifest.form, lay_out_export(
            naming.saved, naming.track, dtypes, max_shard_size, of_config, aliases=matched.aliases
        )
    form, texts = FolderForm(), {}
    if naming.folder is not None and naming.model is not None and naming.saved is None:
        form = form_of_folder(naming.folder, naming.model)
        texts = small_texts(naming.folder, form.small_files, of_config if form.kind == TRANSFORMERS else None)
    tensors = [(name, dtypes[name], shape) for name, shape in matched.shapes.items()]
    return form, lay_out_form(form, tensors, matched.aliases, max_shard_size, texts)


class _Values:
    """The values of the tensors of a plan."""

    def __init__(self, plan: MergePlan, progress: Callable[[int], object]) -> None:
        self._plan = plan
        self._chunks = Chunks(progress)

    def values(self, name: str) -> Iterator[torch.Tensor]:
        """The chunks of the tensor of a common name."""
        parts = self._plan.parts(name)
        numel = math.prod(self._plan.matched.shapes[name])
        pieces = [source.piece_numel(own) for source, own, _ in parts if isinstance(source, DcpCheckpoint)]
        options = {"chunk_numel": min(max(*pieces, 2**19), _DCP_CHUNK_NUMEL)} if pieces else {}
        if name in self._plan.matched.as_it_is:
            ((source, own, _),) = parts
            return self._chunks.copied(numel, source, own, **options)
        return self._chunks.summed(numel, parts, **options)
