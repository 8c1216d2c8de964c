"""DeepSpeed's ZeRO-3: a parameter is flattened, padded, and cut in one run of equal length for each rank.

The parameter itself has no elements, except while it is gathered. Its run on this rank lies in the attribute
`ds_tensor`, which is what the optimizer writes, whatever is gathered. A run is a few boxes: a partial row, whole rows,
a partial row.

    weight, flattened   |--------------------------------------|pad|
    ds_tensor of        [     rank 0     ][     rank 1     ][     rank 2     ]

Small parameters stay gathered between steps ("persistent"), and others from a forward to its backward. A gathered copy
is stale as soon as the runs are written, so `ZeRO3.drop_gathered` frees it: the next forward gathers anew.

DeepSpeed is never imported: attributes tell its parameters.
`test_the_attributes_of_zero_3_are_what_a_run_takes_them_for` fails loudly when DeepSpeed changes them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.boxes.owners import boxes_of_run
from dist_ema.boxes.shards import Box, NoForm, same_memory
from dist_ema.errors import ModelChangedError, UnsupportedModelError
from dist_ema.topology.seam.layout import HeldBox, Holders, Layout, Locator, Named, View, Where

__all__ = ["ZeRO3", "optimizer_of_zero3", "run_of"]

_NO_FORM = NoForm(
    "is partitioned by DeepSpeed ZeRO-3, whose runs have no form in a state dict: use save, or shard the model with "
    "FSDP2 (fully_shard)"
)
# DeepSpeed counts in it how many `GatheredParameters` blocks a parameter is in.
_CONTEXTS = "_ds_z3_gathered_param_context_depth"
# A second copy, within a node, from which a forward gathers under hierarchical partitioning until the next step.
_SECOND_COPY = "ds_secondary_tensor"
# The optimizer of ZeRO-3 by whose step a parameter is written; none before `deepspeed.initialize`.
_OPTIMIZER = "_z3_optimizer"


def _is_partitioned(tensor: object) -> bool:
    """Whether a parameter lies as DeepSpeed's ZeRO-3 leaves it, gathered at the moment or not."""
    whole = ("ds_id", "ds_shape", "ds_numel", "ds_status", "ds_process_group")
    return isinstance(getattr(tensor, "ds_tensor", None), torch.Tensor) and all(hasattr(tensor, at) for at in whole)


@dataclasses.dataclass(frozen=True)
class _Partition:
    """The whole of a parameter, of which the module shows nothing.

    Attributes:
        parameter: the parameter as DeepSpeed left it.
    """

    parameter: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole shape."""
        return tuple(self.parameter.ds_shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the run."""
        dtype: torch.dtype = self.parameter.ds_tensor.dtype
        return dtype


class ZeRO3(Layout):
    """Runs of padded, flattened parameters: the rank that holds a run owns it."""

    def find(self, model: nn.Module) -> Mapping[Where, Any]:
        """The partitioned parameters. No communication."""
        made: dict[int, _Partition] = {}
        return {
            (id(module), attribute): made.setdefault(id(parameter), _Partition(parameter))
            for module in model.modules()
            for attribute, parameter in _own(module)
        }

    def claims(self, named: Named) -> bool:
        """Whether the tensor is a partitioned parameter."""
        return isinstance(named.source, _Partition)

    def locator(self, model: nn.Module, rank: int, world_size: int) -> Locator:
        """The locator refuses runs that lie on a disk, or whose bytes are not their values."""
        return functools.partial(_locate, rank=rank)

    def drop_gathered(self, model: nn.Module, views: Sequence[View] = ()) -> None:
        """Free gathered copies, so that the next forward gathers the runs anew. No communication.

        Waits for gathers under way, which a forward that an exception cut off may have left.

        Raises:
            ModelChangedError: the call was made within `GatheredParameters`.
        """
        parameters = list({id(parameter): parameter for parameter in _partitioned(model)}.values())
        if any(getattr(parameter, _CONTEXTS, 0) for parameter in parameters):
            raise ModelChangedError(
                "this call was made within deepspeed.zero.GatheredParameters(), where parameters are whole and may be "
                "written back: leave that block first"
            )
        gathered = [parameter for parameter in parameters if parameter.ds_status.name != "NOT_AVAILABLE"]
        for optimizer in {id(made): made for made in map(optimizer_of_zero3, gathered) if made is not None}.values():
            optimizer.empty_partition_cache()
        for parameter in gathered:
            if parameter.ds_status.name == "AVAILABLE":  # no optimizer knows it yet
                parameter.partition()
        for parameter in parameters:
            if getattr(parameter, _SECOND_COPY, None) is not None:
                setattr(parameter, _SECOND_COPY, None)


def _own(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        if _is_partitioned(parameter):
            yield attribute, parameter


def _partitioned(model: nn.Module) -> Iterator[Any]:
    return (parameter for module in model.modules() for _, parameter in _own(module))


def optimizer_of_zero3(parameter: Any) -> Any:
    """The optimizer of ZeRO-3 that steps a parameter; None for any other parameter."""
    return getattr(parameter, _OPTIMIZER, None)


def run_of(parameter: Any) -> tuple[int, int]:
    """The first element and the number of elements that this rank holds of a flattened parameter, without padding."""
    run_numel = parameter.ds_tensor.numel()
    start = min(dist.get_rank(parameter.ds_process_group) * run_numel, parameter.ds_numel)
    return start, min(run_numel, parameter.ds_numel - start)


def _locate(named: Named, rank: int) -> tuple[list[HeldBox], Holders]:
    parameter = named.source.parameter
    fqn = named.fqns[0]
    _check_run(fqn, parameter)
    whole = Box(fqn, (0,) * len(named.shape), named.shape)
    boxes = [
        HeldBox(box, _LocalRun(named, skipped, box.sizes), _NO_FORM)
        for skipped, box in boxes_of_run(whole, *run_of(parameter))
    ]
    return boxes, Holders((rank,), 0)


def _check_run(fqn: str, parameter: Any) -> None:
    """Refuse a run whose values cannot be read where it lies, or that is cut in an unknown way.

    Raises:
        UnsupportedModelError: the run lies on a disk, is quantised or transposed, or has an unexpected length.
    """
    run, num_runs = parameter.ds_tensor, dist.get_world_size(parameter.ds_process_group)
    if getattr(getattr(run, "final_location", None), "name", None) == "nvme":
        raise UnsupportedModelError(
            f"{fqn} is offloaded to NVMe by DeepSpeed ZeRO-3, and an update would read it from there at every step: "
            'offload to the CPU ("offload_param": {"device": "cpu"}), or not at all'
        )
    if hasattr(run, "ds_quant_scale"):
        raise UnsupportedModelError(
            f"{fqn} is quantised by DeepSpeed ZeRO-3, and its bytes alone are not its values: leave "
            '"zero_quantized_nontrainable_weights" out of the configuration'
        )
    if getattr(optimizer_of_zero3(parameter), "zenflow", False):
        raise UnsupportedModelError(
            f'{fqn} is trained by ZenFlow, which keeps it transposed: leave "zenflow" out of the configuration'
        )
    if run.numel() != -(-parameter.ds_numel // num_runs):
        raise UnsupportedModelError(
            f"{fqn} is cut by DeepSpeed ZeRO-3 in runs of {run.numel()} of {parameter.ds_numel} elements over "
            f"{num_runs} ranks, expected equal ones: this kind of partitioning (MiCS) is not served; use the plain "
            'one, or the hierarchical one ("zero_hpz_partition_size")'
        )


class _LocalRun:
    """A part of this rank's run, in the sizes of a box; the object stays the same while its memory does."""

    def __init__(self, named: Named, offset: int, sizes: tuple[int, ...]) -> None:
        self._name = named.fqns[0]
        self._owner = named.owner
        self._attribute = named.attribute
        self._offset = offset
        self._sizes = sizes
        self._run = torch.empty(0, device="cpu")
        self._view = torch.empty(0, device="cpu")

    def _parameter(self) -> Any:
        # DeepSpeed puts a table of its own into a module, in which a look-up by `[]` may gather.
        return vars(self._owner)["_parameters"].get(self._attribute)

    def takes_gradient(self) -> bool:
        """Whether the parameter requires a gradient."""
        return bool(getattr(self._parameter(), "requires_grad", False))

    def __call__(self) -> torch.Tensor:
        run = getattr(self._parameter(), "ds_tensor", None)
        if not isinstance(run, torch.Tensor):
            raise ModelChangedError(
                f"{self._name} is not partitioned by DeepSpeed any more (replaced, removed, or the engine was "
                "destroyed): build a new ShardedEMA after changing a model"
            )
        if not same_memory(run, self._run):
            self._run = run.detach()
            self._view = self._run[self._offset : self._offset + math.prod(self._sizes)].view(self._sizes)
        return self._view
