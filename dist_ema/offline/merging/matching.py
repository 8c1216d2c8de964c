"""Which tensors of the sources of a merge belong together: by name, tied names included. No communication.

Sources call one tensor by several names. The names of the first source that has a form are the common ones. A library
leaves a tied name out of its files or not, so a name that not every source has must be a tied one: by what the source
says, or by its bytes, which are those of another tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from dist_ema.errors import CheckpointMismatchError
from dist_ema.offline.merging.sources import Mergeable
from dist_ema.offline.summing import Chunks

__all__ = ["Matched", "match"]

_MOST_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Matched:
    """The tensors of all sources.

    Attributes:
        shapes: common name -> shape, in the order of the source that names them.
        names: for every source: common name -> its name there.
        aliases: further names of tied tensors -> the common name.
        as_it_is: the common names of tensors that are not summed: no floating-point values, or not averaged.
    """

    shapes: Mapping[str, tuple[int, ...]]
    names: Sequence[Mapping[str, str]]
    aliases: Mapping[str, str]
    as_it_is: frozenset[str]


def match(sources: Sequence[Mergeable], naming: int) -> Matched:
    """Bring the tensors of all sources together.

    Args:
        sources: the sources.
        naming: the index of the source whose names are the common ones.

    Raises:
        CheckpointMismatchError: a source lacks a tensor, has one more, or has one in another shape.
    """
    reference = sources[naming]
    stored = [_spelled(source, reference) for source in sources]
    stored[naming] = dict(reference.spellings[0])
    all_names = [_with_aliases(source, names) for source, names in zip(sources, stored, strict=True)]
    aliases = dict(reference.aliases)
    kept = dict(stored[naming])
    for source, own_names, names in zip(sources, stored, all_names, strict=True):
        for name in [name for name in stored[naming] if name not in names]:
            aliases[name] = _tied_name(reference, stored[naming], name, source, names)
            kept.pop(name, None)
        for name in [name for name in own_names if name not in stored[naming] and name not in aliases]:
            aliases[name] = _tied_name(source, own_names, name, reference, stored[naming])
    aliases = {alias: _end(aliases, name) for alias, name in aliases.items()}
    for source, own_names in zip(sources, stored, strict=True):
        _check_tied(source, own_names, aliases)
    shapes = {name: reference.shapes[own] for name, own in kept.items()}
    for source, names in zip(sources, all_names, strict=True):
        for name, shape in shapes.items():
            if source.shapes[names[name]] != shape:
                raise CheckpointMismatchError(
                    f"{name!r} is {list(source.shapes[names[name]])} in {source.path}, {list(shape)} in "
                    f"{reference.path}: give sources of one model"
                )
    return Matched(shapes, all_names, aliases, frozenset(_as_it_is(sources, all_names, shapes)))


def _spelled(source: Mergeable, reference: Mergeable) -> dict[str, str]:
    """The names of a source, in the spelling that has most in common with the reference."""
    wanted = {*reference.spellings[0], *reference.aliases}
    spellings = list(source.spellings)
    if reference.saved is not None:  # the names in its files -> its own
        own = {name: fqn for spelling in reference.spellings[1:] for name, fqn in spelling.items()}
        spellings.append({own.get(name, name): stored for name, stored in spellings[0].items()})
    return dict(max(spellings, key=lambda spelling: len(wanted.intersection(spelling.keys()))))


def _with_aliases(source: Mergeable, names: Mapping[str, str]) -> dict[str, str]:
    """The common names of a source, tied ones included."""
    common = {own: name for name, own in names.items()}
    tied = {alias: own for alias, own in source.aliases.items() if own in common}
    return {**tied, **names}


def _tied_name(
    having: Mergeable, names: Mapping[str, str], name: str, lacking: Mergeable, known: Mapping[str, str]
) -> str:
    """The tensor that both sources have and that `name`, which one lacks, is tied to."""
    own = names[name]
    for other, there in names.items():
        if other == name or other not in known or having.shapes[there] != having.shapes[own]:
            continue
        if _are_same(having, own, there):
            return other
    lacked = [other for other in names if other not in known]
    extra = [other for other in known if other not in names]
    more = f" and has {', '.join(map(repr, extra[:_MOST_NAMED]))} instead" if extra else ""
    raise CheckpointMismatchError(
        f"{lacking.path} lacks {len(lacked)} tensors of {having.path} ({', '.join(map(repr, lacked[:_MOST_NAMED]))})"
        f"{more}: give sources of one model, with the same names"
    )


def _check_tied(source: Mergeable, names: Mapping[str, str], aliases: Mapping[str, str]) -> None:
    """Refuse a source that holds two tensors, with different values, under the names of one."""
    for alias, name in aliases.items():
        if alias in names and name in names and not _are_same(source, names[alias], names[name]):
            raise CheckpointMismatchError(
                f"{source.path} holds {alias!r} and {name!r} with different values, which are tied in another source: "
                "give sources of one model, all tied or none"
            )


def _are_same(source: Mergeable, name: str, other: str) -> bool:
    """Whether two tensors of a source have the same bytes."""
    if source.tensors.dtype(name) != source.tensors.dtype(other) or source.shapes[name] != source.shapes[other]:
        return False
    numel = math.prod(source.shapes[name])
    sides = [Chunks(lambda num_bytes: None).copied(numel, source.tensors, own) for own in (name, other)]
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(*sides, strict=True))


def _end(aliases: Mapping[str, str], name: str) -> str:
    """The tensor that a chain of tied names leads to."""
    for _ in aliases:
        name = aliases.get(name, name)
    return name


def _as_it_is(
    sources: Sequence[Mergeable], names: Sequence[Mapping[str, str]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    apart = [source.not_averaged for source in sources]
    for name in shapes:
        dtypes = [source.tensors.dtype(of_source[name]) for source, of_source in zip(sources, names, strict=True)]
        kinds = {dtype.is_floating_point or dtype.is_complex: index for index, dtype in enumerate(dtypes)}
        if any(of_source[name] in of_one for of_source, of_one in zip(names, apart, strict=True)):
            yield name
        elif len(kinds) > 1:
            one, other = kinds.values()
            raise CheckpointMismatchError(
                f"{name!r} is {dtypes[one]} in {sources[one].path}, and {dtypes[other]} in {sources[other].path}: "
                "floating-point values and others cannot be summed. Give sources that hold it alike"
            )
        elif False in kinds:
            yield name
