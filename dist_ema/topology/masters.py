"""The fp32 masters of DeepSpeed's optimizers, which are averaged in place of the live weights with `masters=True`.

The optimizer steps the masters, and then writes them into the live weights, rounded to bfloat16 or float16. A rank has
the masters of a run of the flattened parameters, and so it can own these elements only:

    ZeRO-3          the master of each run `ds_tensor`: the layout of the live weights already has these owners
    ZeRO-1, 2,      the live weights of a group of parameters are views of one flat buffer, padded, which is cut in
    bf16 optimizer  equal runs; a rank has the masters of one run
    fp16 optimizer  every rank has all masters

DeepSpeed is never imported. Its attributes, of which some are private, are read here and in zero3.py alone;
`test_the_masters_lie_where_these_attributes_say` fails loudly when DeepSpeed changes them. No communication.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.boxes.shards import Box, same_memory
from dist_ema.errors import ConfigError, ModelChangedError, UnsupportedModelError
from dist_ema.topology.seam.layout import FlatPlace, HeldBox, Holders, Named
from dist_ema.topology.zero3 import optimizer_of_zero3, run_of

__all__ = ["Masters"]

# What DeepSpeed's ZeRO-1, ZeRO-2 and bf16 optimizers give a parameter: where its master lies in the run of this rank
# (None if it does not), and the process group over whose ranks the flat buffer is cut.
_MAPPING, _GROUP = "_hp_mapping", "_dp_group"


class _Master(NamedTuple):
    """The master of a parameter on this rank.

    Attributes:
        flat: returns the masters of a run of the flattened parameter; None if they are not there any more.
        start: the index of the first element of that run in the flattened parameter.
        holders: the ranks, and what each of them owns; None if the layout of the live weights is right about that.
    """

    flat: Callable[[], torch.Tensor | None]
    start: int
    holders: Holders | None = None


class Masters:
    """The masters of a model.

    Args:
        model: DeepSpeed's engine, or the module in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._of_engine = _of_engine(model)
        self._without: list[str] = []
        self._num_with = 0

    def averaged(self, named: Named, boxes: Sequence[HeldBox], holders: Holders) -> tuple[Sequence[HeldBox], Holders]:
        """What a layout says of a parameter that is averaged, with the masters as the source.

        Raises:
            UnsupportedModelError: the masters do not lie as expected.
        """
        parameter = vars(named.owner)["_parameters"].get(named.attribute)
        if parameter is None or not parameter.requires_grad:
            return boxes, holders  # not stepped: its values are exact as they are
        master = self._of(named, parameter)
        if master is None:
            self._without.append(named.fqns[0])
            return boxes, holders
        if any(box.box.sizes != named.shape for box in boxes) and optimizer_of_zero3(parameter) is None:
            raise UnsupportedModelError(
                f"masters=True, but {named.fqns[0]} is a part of what several ranks hold (a DTensor, or declared by "
                "experts=), and DeepSpeed cuts that part again: leave masters out to average the live weights"
            )
        self._num_with += 1
        source = _Source(named, master)
        return [dataclasses.replace(box, source=source) for box in boxes], master.holders or holders

    def check(self) -> None:
        """Refuse a model that has no masters, or only some.

        Raises:
            ConfigError: an averaged parameter that requires a gradient has none.
        """
        if self._without and self._num_with:
            raise ConfigError(
                f"masters=True, but DeepSpeed's optimizer has no master of {len(self._without)} averaged parameters "
                f"that require a gradient ({self._without[0]}, ...): exclude them, or give the optimizer all of them"
            )
        if not self._num_with:
            raise ConfigError(
                "masters=True, but the model has no fp32 masters of DeepSpeed: give the engine that "
                "deepspeed.initialize returned, with ZeRO or its bf16 or fp16 optimizer. Otherwise leave masters out: "
                "the live weights are averaged in fp32 then"
            )

    def _of(self, named: Named, parameter: Any) -> _Master | None:
        optimizer = optimizer_of_zero3(parameter)
        if optimizer is not None:
            return _of_zero3(named, parameter, optimizer)
        if hasattr(parameter, _MAPPING):
            return _of_flat_buffer(named, parameter)
        flat = self._of_engine.get(id(parameter))
        return None if flat is None else _Master(flat, 0)


def _of_zero3(named: Named, parameter: Any, optimizer: Any) -> _Master | None:
    if getattr(optimizer, "swap_optimizer", False):
        raise UnsupportedModelError(
            f"the master of {named.fqns[0]} is offloaded to NVMe by DeepSpeed, and an update would read it from there "
            'at every step: offload it to the CPU ("offload_optimizer": {"device": "cpu"}), or leave masters out'
        )

    def flat() -> torch.Tensor | None:
        try:
            group, start, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        except KeyError:
            return None
        masters: torch.Tensor = optimizer.fp32_partitioned_groups_flat[group]
        return masters.detach()[start : start + numel]

    values = flat()
    if values is None:
        return None
    if values.numel() != parameter.ds_tensor.numel():
        raise _misunderstood(named, f"{values.numel()} masters of {parameter.ds_tensor.numel()} weights")
    return _Master(flat, run_of(parameter)[0])


def _of_flat_buffer(named: Named, parameter: Any) -> _Master:
    group, buffer = getattr(parameter, _GROUP), parameter.untyped_storage()
    num_runs, rank = dist.get_world_size(group), dist.get_rank(group)
    run_numel, rest = divmod(buffer.nbytes() // parameter.element_size(), num_runs)
    start = parameter.storage_offset()
    first = max(rank * run_numel - start, 0)
    numel = max(min((rank + 1) * run_numel - start, parameter.numel()) - first, 0)
    mapping = getattr(parameter, _MAPPING)
    address = None if mapping is None else mapping.lp_fragment_address
    recorded = (0, 0) if address is None else (address.start, address.numel)
    if rest or not parameter.is_contiguous() or recorded[1] != numel or (numel and recorded[0] != first):
        raise _misunderstood(named, f"{recorded[1]} masters from element {recorded[0]} on, not {numel} from {first} on")
    ranks = tuple(dist.get_process_group_ranks(group))
    place = FlatPlace(buffer.data_ptr(), start, run_numel)

    def flat() -> torch.Tensor | None:
        fragment = getattr(parameter, _MAPPING, None)
        return None if fragment is None else fragment.hp_fragment.detach()

    return _Master(flat, first, Holders(ranks, rank, (group,), place))


def _of_engine(model: nn.Module) -> Mapping[int, Callable[[], torch.Tensor | None]]:
    """Identity of a parameter -> its flattened master, of DeepSpeed's fp16 optimizers, which do not partition."""
    made: dict[int, Callable[[], torch.Tensor | None]] = {}
    optimizers: Iterator[Any] = (vars(module).get("optimizer") for module in model.modules())
    grouped = (
        (optimizer, number, group)
        for optimizer in optimizers
        for number, group in enumerate(getattr(optimizer, "fp16_groups", ()))
    )
    for optimizer, number, group in grouped:
        end = 0
        for index, parameter in enumerate(group):
            start, end = end, end + parameter.numel()
            if hasattr(optimizer, "fp32_groups_flat"):
                made[id(parameter)] = _part(optimizer.fp32_groups_flat, number, start, end)
            elif hasattr(optimizer, "fp32_groups"):
                made[id(parameter)] = _part(optimizer.fp32_groups[number], index, 0, parameter.numel())
    return made


def _part(tensors: Sequence[torch.Tensor], index: int, start: int, end: int) -> Callable[[], torch.Tensor]:
    return lambda: tensors[index].detach().view(-1)[start:end]


def _misunderstood(named: Named, present: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"DeepSpeed has on this rank, of {named.fqns[0]}, {present}: where its masters lie is not understood (in "
        'DeepSpeed 0.19 it is, without "round_robin_gradients"). Leave masters out to average the live weights'
    )


class _Source:
    """The masters within a box of this rank; the tensor for a box stays the same while its memory does."""

    def __init__(self, named: Named, master: _Master) -> None:
        self._fqn, self._shape = named.fqns[0], named.shape
        self._master = master
        self._seen = torch.empty(0, device="cpu")
        self._views: dict[Box, torch.Tensor] = {}

    def __call__(self, box: Box) -> torch.Tensor:
        values = self._master.flat()
        if values is None:
            raise ModelChangedError(
                f"DeepSpeed's optimizer has no master of {self._fqn} any more (the engine was destroyed, or made "
                "anew): build a new ShardedEMA"
            )
        if not same_memory(values, self._seen):
            self._seen, self._views = values, {}
        if box not in self._views:
            first = 0
            for offset, size in zip(box.offsets, self._shape, strict=True):
                first = first * size + offset
            first -= self._master.start
            self._views[box] = values[first : first + box.numel].view(box.sizes)
        return self._views[box]
