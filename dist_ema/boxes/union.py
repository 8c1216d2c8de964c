"""Every tensor that any rank has, where ranks have others: stages of a pipeline, experts under names of their own.

No communication. A rank tells its tensors in a short text. The texts of lower and of higher ranks are merged, in the
order of the ranks. So all have the same list in the end: the tensors of the lowest rank, then those that the next one
adds, and so on.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import zlib
from typing import Any

import torch

from dist_ema.boxes.plan import Plan
from dist_ema.boxes.shards import TensorSpec
from dist_ema.errors import RankMismatchError

__all__ = ["described", "merged", "united"]

# Fqn -> all names, shape, dtype, whether it is averaged, whether it is a buffer, the lowest rank that has it.
_Tensors = dict[str, list[Any]]


def described(plan: Plan, rank: int) -> str:
    """The tensors of a plan as a text."""
    names = plan.names_of_tensors
    tensors = {
        spec.fqn: [names[spec.fqn], list(spec.shape), str(spec.dtype), spec.averaged, spec.is_buffer, rank]
        for spec in plan.specs
    }
    return _packed(tensors, plan.left_out)


def merged(lower: str, higher: str) -> str:
    """The tensors of some ranks and of ranks after them; "" for none. Associative.

    Of a tensor that both have, the entry of the lower rank stays, with the further names that the higher one has.
    """
    if not lower or not higher:
        return lower or higher
    (tensors, left_out), (further, left_out_there) = _unpacked(lower), _unpacked(higher)
    for fqn, entry in further.items():
        names = tensors.setdefault(fqn, entry)[0]
        tensors[fqn] = [[*names, *(name for name in entry[0] if name not in names)], *tensors[fqn][1:]]
    return _packed(tensors, dict.fromkeys([*left_out, *left_out_there]))


def united(plan: Plan, rank: int, of_all: str) -> Plan:
    """The plan with the tensors of all ranks; what this rank holds is as it was.

    Args:
        plan: the plan of this rank.
        rank: the rank.
        of_all: the merged texts of all ranks.

    Raises:
        RankMismatchError: a name stands for one tensor here, and for another one on another rank.
    """
    tensors, left_out = _unpacked(of_all)
    specs = {
        fqn: TensorSpec(fqn, tuple(shape), getattr(torch, dtype.removeprefix("torch.")), averaged, is_buffer)
        for fqn, (_, shape, dtype, averaged, is_buffer, _) in tensors.items()
    }
    for own in plan.specs:
        if specs[own.fqn] != own:
            raise RankMismatchError(_other_tensor(own, specs[own.fqn], rank, tensors[own.fqn][-1]))
    _check_names(tensors)
    aliases = {alias: fqn for fqn, (names, *_) in tensors.items() for alias in names if alias != fqn}
    return dataclasses.replace(plan, specs=tuple(specs.values()), aliases=aliases, left_out=tuple(left_out))


def _check_names(tensors: _Tensors) -> None:
    """Refuse a name that is tied on one rank to a tensor, and on another rank to another one, or to none."""
    tensor_of: dict[str, str] = {}
    for fqn, (names, *_, rank) in tensors.items():
        for name in names:
            other = tensor_of.setdefault(name, fqn)
            if other != fqn:
                raise RankMismatchError(
                    f"{name} is the same tensor as {other} on rank {tensors[other][-1]}, and another one than {other} "
                    f"on rank {rank}: the files could not tell them apart. Tie them on all ranks that hold both, under "
                    "the same first name, or give them names of their own"
                )


def _other_tensor(own: TensorSpec, other: TensorSpec, rank: int, lowest: int) -> str:
    if dataclasses.replace(own, averaged=other.averaged) == other:
        averaging, not_averaging = (rank, lowest) if own.averaged else (lowest, rank)
        return (
            f"{own.fqn} is averaged on rank {averaging} and not on rank {not_averaging}, expected the same on all "
            "ranks: with trainable_only=True (the default with adapters of PEFT) it must require a gradient on all of "
            "them, or on none"
        )
    return (
        f"{own.fqn} is {_shown(other)} on rank {lowest} and {_shown(own)} on rank {rank}: two tensors of one name, "
        "expected the same tensor, or names of their own. If ranks hold different experts under one name, declare them "
        "by experts=[Experts(names, dim, group)], equally many on each rank; stages of a pipeline need the names "
        "that they have in the whole model"
    )


def _shown(spec: TensorSpec) -> str:
    kind = "a buffer" if spec.is_buffer else "a parameter"
    dtype = str(spec.dtype).removeprefix("torch.")
    return f"{kind} of {list(spec.shape)} in {dtype}{', averaged' if spec.averaged else ', not averaged'}"


def _packed(tensors: _Tensors, left_out: Any) -> str:
    text = json.dumps([tensors, list(left_out)])
    return base64.b85encode(zlib.compress(text.encode())).decode()


def _unpacked(text: str) -> tuple[_Tensors, list[str]]:
    tensors, left_out = json.loads(zlib.decompress(base64.b85decode(text)))
    return tensors, left_out
