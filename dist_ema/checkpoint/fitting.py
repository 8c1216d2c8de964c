"""Which weights of a file fit a model, by name: other tools put prefixes before the names, or leave parts of them out.

    the model's own     the file of                        is called there
    layer.weight        torch, timm, mmengine              module.layer.weight
                        ema-pytorch                        ema_model.layer.weight
                        a LightningModule                  model.layer.weight
                        torch.compile                      _orig_mod.layer.weight, layer._orig_mod.weight
    base_model.model.layer.lora_A.default.weight           base_model.model.layer.lora_A.weight
                        PEFT: without the adapter's name

A way to read the names counts only if all averaged tensors fit, and if it is the only one. No communication.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from dist_ema.boxes.plan import Plan
from dist_ema.boxes.shards import EXTRA_STATE
from dist_ema.disk.formats.model_files import dtype_of
from dist_ema.disk.starts import Start
from dist_ema.errors import CheckpointMismatchError

__all__ = ["Escapes", "Fit", "fit_model", "matches", "other_model", "patterns_of"]

# What tools put before all names, and whether it says that the tensors are an average.
_PREFIXES = {"module.": False, "ema_model.": True, "averaged_model.": True, "model.": False}
_MOST_PREFIXES = 3
# What transformers and diffusers put before the names of an adapter that was added without a PeftModel.
_BEFORE_ADAPTERS = ("", "base_model.model.", "unet.", "transformer.")
# What wrappers put anywhere into a name.
_WITHIN = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")

_KNOWN = (
    "Forms that are known: model folders and safetensors files of transformers, diffusers (EMAModel too), PEFT and "
    "timm; files of torch.save with tensors by name, also under a key such as state_dict or state_dict_ema, under the "
    f"model's own names or with one of the prefixes {', '.join([*_PREFIXES, '_orig_mod.'])}"
)


@dataclasses.dataclass(frozen=True)
class Escapes:
    """Differences that are allowed.

    Attributes:
        new: glob patterns of names in this model that need not be in the checkpoint as they are now.
        dropped: glob patterns of names in the checkpoint that need not be in this model.
        options_changed: whether the options may differ that say what is averaged, and in which dtype.
    """

    new: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    options_changed: bool = False


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to read the names of a file.

    Attributes:
        form: the way, for messages.
        stored: the names that a tensor of the model may have in the file, the likeliest first.
        prefix: what is before all names.
        adapters: the adapters whose files are in sub-folders.
    """

    form: str
    stored: Callable[[str], Sequence[str]]
    prefix: str = ""
    adapters: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Fit:
    """Weights that fit the model.

    Attributes:
        start: the weights.
        names: fqn -> stored name, of the averaged tensors that do not start from the live weights.
        num_updates: the number of updates of an average, where the file says it.
        is_average: whether the file says that it is an average.
        way: how the names were read.
        leaves_rest: whether what has not the prefix is known to be something else.
    """

    start: Start
    names: Mapping[str, str]
    num_updates: int | None
    is_average: bool
    way: Way
    leaves_rest: bool


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns means the name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def fit_model(source: Path, starts: Sequence[Start], plan: Plan, escapes: Escapes) -> Fit:
    """The weights that fit the model's averaged tensors.

    Raises:
        CheckpointMismatchError: none fit, or several do and the file does not say which are the average.
    """
    other_names = plan.names_of_tensors
    known = set(plan.names)
    wanted = {spec.fqn: other_names[spec.fqn] for spec in plan.specs if spec.averaged}
    required = [names for fqn, names in wanted.items() if not matches(fqn, escapes.new)]
    ways = [(start, way) for start in starts for way in _ways(start, required, known)]
    fits = [_fit(start, way, wanted) for start, way in ways if _fits(start, way, required)]
    fits = [fit for fit in fits if fit.names]
    candidates = [fit for fit in fits if fit.is_average] or fits
    if not candidates and ways:  # for the message, or nothing is required
        start, way = max(ways, key=lambda pair: len(_stored(pair[0], pair[1], required)))
        candidates = [_fit(start, way, wanted)]
    if len(candidates) != 1:
        forms = "; ".join(fit.way.form for fit in candidates) or "nothing"
        raise CheckpointMismatchError(
            f"{source} has several sets of weights that fit this model ({forms}), and does not say which of them is "
            "the average: save the one that you mean as a file of its own"
        )
    _check(candidates[0], plan, escapes)
    (fit,) = candidates
    tensors, shapes = fit.start.model.tensors, {spec.fqn: spec.shape for spec in plan.specs}
    return dataclasses.replace(
        fit, names={fqn: name for fqn, name in fit.names.items() if tensors[name].shape == shapes[fqn]}
    )


def _ways(start: Start, required: Sequence[Sequence[str]], known: set[str]) -> Iterator[Way]:
    tensors = start.model.tensors
    what = f"{start.part!r} under " if start.part else ""
    own = Way(f"{what}the model's own names", lambda name: [name])
    yield own
    if _fits(start, own, required) and not start.adapters and known.issuperset(tensors):
        return
    clean = _clean(tensors)
    if len(clean) == len(tensors) and any(name != stored for name, stored in clean.items()):
        yield Way(f"{what}names with _orig_mod.", functools.partial(_behind, "", clean))
    for prefix in _prefixes(clean):
        yield Way(f"{what}the prefix {prefix}", functools.partial(_behind, prefix, clean), prefix)
    inner = [adapter for adapter in start.adapters if any(adapter in name.split(".") for (name, *_) in required)]
    for top in sorted(_top_adapters(start, required, inner)) or [""] * bool(inner):
        names = ", ".join(filter(None, [top, *inner]))
        stored = _stored_by_adapter(top, inner)
        yield Way(f"{what}PEFT's names of the adapter {names}", stored, adapters=tuple(inner))


def _behind(prefix: str, clean: Mapping[str, str], name: str) -> list[str]:
    return [clean.get(prefix + name, prefix + name)]


def _clean(tensors: Mapping[str, object]) -> dict[str, str]:
    """Name without the marks of wrappers -> stored name."""
    clean = {}
    for stored in tensors:
        name = stored
        for mark in _WITHIN:
            name = name.replace(mark, "")
        clean[name] = stored
    return clean


def _prefixes(names: Mapping[str, str]) -> list[str]:
    """Every row of known prefixes that some name begins with."""
    rows, last = [], [""]
    for _ in range(_MOST_PREFIXES):
        last = [row + word for row in last for word in _PREFIXES if any(name.startswith(row + word) for name in names)]
        rows += last
    return rows


def _top_adapters(start: Start, required: Sequence[Sequence[str]], inner: Sequence[str]) -> set[str]:
    """The adapters whose tensors may be those of the file, by one tensor that is not of another adapter."""
    for fqn, *_ in required:
        parts = set(fqn.split("."))
        if not parts.intersection(inner):
            return {part for part in parts if any(name in start.model.tensors for name in _without(fqn, part))}
    # Every tensor is of an adapter in a sub-folder; the same one may also be meant by the files at the top.
    return {
        adapter
        for adapter in inner
        for fqn, *_ in required
        if any(name in start.model.tensors for name in _without(fqn, adapter))
    }


def _stored_by_adapter(top: str, inner: Sequence[str]) -> Callable[[str], Sequence[str]]:
    def stored(name: str) -> list[str]:
        names = [f"{adapter}/{inside}" for adapter in inner for inside in _without(name, adapter)]
        # A bias that is trained beside an adapter (`bias="all"`) keeps its name.
        return [*names, *((_without(name, top) or [before + name for before in _BEFORE_ADAPTERS]) if top else [])]

    return stored


def _without(fqn: str, adapter: str) -> list[str]:
    """The names that a tensor of an adapter may have in a file: those of PEFT, which a test compares, come first."""
    parts = fqn.split(".")
    names = []
    for at, part in enumerate(parts):
        if part == adapter and at:
            before, behind = parts[:at], parts[at + 1 :]
            names.append([*before, *behind])
            if before[-1] == "modules_to_save":
                names.append([*before[:-1], *behind])
            if before[-1] == "lora_magnitude_vector" and behind == ["weight"]:
                names.append(before)
    return [before + ".".join(name) for before in _BEFORE_ADAPTERS for name in names]


def _fits(start: Start, way: Way, required: Sequence[Sequence[str]]) -> bool:
    return len(_stored(start, way, required)) == len(required)


def _stored(start: Start, way: Way, required: Sequence[Sequence[str]]) -> list[str]:
    """The stored names of the required tensors that the weights have."""
    tensors = start.model.tensors
    names = (next((s for name in names for s in way.stored(name) if s in tensors), None) for names in required)
    return [name for name in names if name is not None]


def _fit(start: Start, way: Way, wanted: Mapping[str, Sequence[str]]) -> Fit:
    tensors, names = start.model.tensors, {}
    for fqn, others in wanted.items():
        stored = [stored for name in others for stored in way.stored(name) if stored in tensors]
        if stored:
            names[fqn] = stored[0]
        if way.adapters and len({"/" in name for name in stored}) > 1:
            adapter = stored[0].partition("/")[0]
            raise CheckpointMismatchError(
                f"{start.path} has two adapters that may be the model's {adapter!r}: one at its top, and one in the "
                f"folder {adapter}. Give {start.path / adapter}, or the file at the top"
            )
    marked = next((word for word, says in _PREFIXES.items() if says and word in way.prefix), None)
    count = start.num_updates
    if count is None:
        count = _count(start, way.prefix)
    is_average = start.is_average or marked is not None or count is not None
    return Fit(start, names, count, is_average, way, marked is not None or count is not None)


def _count(start: Start, prefix: str) -> int | None:
    """The counter beside the tensors with the prefix: of `AveragedModel` and of mmengine, or of ema-pytorch."""
    for word, counters in (("module.", ("n_averaged", "steps")), ("ema_model.", ("step",))):
        if prefix.endswith(word):
            outer = prefix.removesuffix(word)
            return next((start.counts[outer + name] for name in counters if outer + name in start.counts), None)
    return None


def _check(fit: Fit, plan: Plan, escapes: Escapes) -> None:
    """Refuse weights that lack tensors of the model, have others, or other shapes."""
    tensors, path = fit.start.model.tensors, fit.start.path
    missing = []
    for spec in plan.specs:
        name = fit.names.get(spec.fqn)
        if not spec.averaged or (name is not None and tensors[name].shape == spec.shape):
            continue
        if not matches(spec.fqn, escapes.new):
            existing = "nothing" if name is None else f"{list(tensors[name].shape)}"
            missing.append(f"{spec.fqn} {list(spec.shape)} (found {existing})")
    extra = _unknown(fit, plan, escapes)
    if missing or extra:
        known = {*fit.start.model.tensors, *(spec.fqn for spec in plan.specs)}
        text = other_model(path, missing, extra, known, "start_from")
        raise CheckpointMismatchError(f"{text}. It was read as {fit.way.form}. {_KNOWN}")
    for name in fit.names.values():
        if not dtype_of(tensors[name]).is_floating_point:
            raise CheckpointMismatchError(f"{path} has {name} as {tensors[name].dtype}, expected floats")


def _unknown(fit: Fit, plan: Plan, escapes: Escapes) -> list[str]:
    """The tensors of the file that are not in the model, and that the user has not named as such."""
    start, way = fit.start, fit.way
    known = {stored for name in plan.names for stored in (*way.stored(name), *([] if way.prefix else [name]))}
    unknown = []
    for stored in start.model.tensors:
        own = stored.removeprefix(way.prefix)
        is_other = stored.partition("/")[0] in set(start.adapters) - set(way.adapters)
        if fit.leaves_rest:
            is_other |= own == stored
        if stored not in known and not stored.endswith(EXTRA_STATE) and not is_other:
            unknown += [] if matches(stored, escapes.dropped) or matches(own, escapes.dropped) else [stored]
    return unknown


def other_model(
    folder: Path, missing: Sequence[str], extra: Sequence[str], known: Collection[str], call: str = "load"
) -> str:
    """The refusal of weights of another model.

    Args:
        folder: the weights.
        missing: the tensors of this model that they lack, perhaps with a text behind the name.
        extra: their tensors that this model lacks.
        known: the names of all tensors of both.
        call: the method that was called.
    """
    names = [text.partition(" ")[0] for text in missing]
    arguments = [f"new={patterns_of(names, known)!r}"] if missing else []
    arguments += [f"dropped={patterns_of(extra, known)!r}"] if extra else []
    return (
        f"{folder} is of another model: {len(missing)} tensors of this model are not in it {list(missing[:3])}, "
        f"{len(extra)} of its tensors are not in this model {list(extra[:3])}. If that is intended, name them by "
        f"patterns: {call}(path, {', '.join(arguments)}), where new= starts tensors from the live weights, and "
        "dropped= leaves tensors out"
    )


def patterns_of(names: Sequence[str], known: Collection[str]) -> list[str] | str:
    """The glob pattern or patterns, as short as may be, that match these names and no other known one."""
    others = set(known).difference(names)
    patterns: list[str] = []
    for name in names:
        if not matches(name, patterns):
            parts = name.split(".")
            wide = (".".join(parts[:depth]) + "." for depth in range(1, len(parts)))
            begins = next((text for text in wide if not any(other.startswith(text) for other in others)), None)
            patterns.append(name.replace("[", "[[]") if begins is None else begins.replace("[", "[[]") + "*")
    return patterns[0] if len(patterns) == 1 else patterns
