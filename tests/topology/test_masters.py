"""Masters of an optimizer without ranks, and the cuts of a flat buffer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dist_ema import ConstantSchedule, ShardedEMA, UnsupportedModelError
from dist_ema.boxes.coverage import Coverage
from dist_ema.boxes.owners import Division
from dist_ema.boxes.shards import Box, Held, NoForm, TensorSpec
from dist_ema.topology.masters import Masters
from dist_ema.topology.planning import _cuts
from dist_ema.topology.seam.layout import FlatPlace, HeldBox, Holders, Named

HALF = ConstantSchedule(momentum=0.5)


def test_flat_masters_of_a_fused_optimizer_are_averaged_and_followed_when_they_are_replaced() -> None:
    """As DeepSpeed's fused fp16 optimizer has them, which runs on a GPU only."""
    model = nn.Linear(3, 2).to(torch.bfloat16)
    flat = torch.arange(8.0) + 2**-12  # bfloat16 would lose the fraction
    model.optimizer = SimpleNamespace(fp16_groups=[[model.weight, model.bias]], fp32_groups_flat=[flat])
    ema = ShardedEMA(model, HALF, masters=True)
    ema.update()
    flat += 2.0
    ema.update()
    assert torch.equal(ema.full_state_dict()["weight"], (torch.arange(6.0) + 1.0 + 2**-12).reshape(2, 3))
    assert torch.equal(ema.full_state_dict()["bias"], torch.tensor([7.0, 8.0]) + 2**-12)
    live = model.weight.detach().clone()
    with ema.average_parameters():
        assert torch.equal(model.bias.detach(), torch.tensor([7.0, 8.0]).to(torch.bfloat16))
    assert torch.equal(model.weight.detach(), live)
    model.optimizer.fp32_groups_flat[0] = torch.full((8,), 3.0)  # as a load may do
    ema.update()
    assert torch.equal(ema.full_state_dict()["bias"], torch.tensor([5.0, 5.5]) + 2**-13)


def test_masters_of_a_part_of_a_tensor_are_refused() -> None:
    """Where an element of the part lies in the masters does not follow from its place in the whole tensor."""
    model = nn.Linear(3, 2)
    model.optimizer = SimpleNamespace(fp16_groups=[[model.weight]], fp32_groups_flat=[torch.zeros(6)])
    named = Named(["weight"], (4, 3), torch.float32, model.weight, False, model, "weight")
    part = HeldBox(Box("weight", (2, 0), (2, 3)), model.weight.detach, NoForm(""))
    with pytest.raises(UnsupportedModelError, match="weight is a part of what several ranks hold"):
        Masters(model).averaged(named, [part], Holders((0,), 0))


def test_runs_of_a_flat_buffer_with_padding_and_holes_have_one_owner_for_every_element() -> None:
    """Elements 0 to 32 in 4 runs of 8; 22 and 23 are padding, and so are 30 and 31; the third tensor is excluded."""
    shapes, starts = {"a": (2, 5), "b": (4, 3), "d": (5,)}, {"a": 0, "b": 10, "d": 25}
    specs = [TensorSpec(name, shape, torch.float32, True, False) for name, shape in shapes.items()]
    held = [Held(spec, Box(spec.fqn, (0,) * len(spec.shape), spec.shape), torch.Tensor, NoForm("")) for spec in specs]
    places = {name: FlatPlace(0, start, 8) for name, start in starts.items()}
    cuts = _cuts(held, places, 8, 4)
    assert cuts == ((0, 0), (0, 8), (1, 6), (2, 0), (3, 0))
    division = Division(held=tuple(held), ranks=(0, 1, 2, 3), position=0, cuts=cuts)
    coverage = Coverage(specs, seed=1)
    owned = [[shard.box for shard in division.run(rank)] for rank in range(4)]
    assert coverage.is_whole(sum(map(coverage.fingerprint, owned)))
    for rank, boxes in enumerate(owned):
        assert sum(box.numel for box in boxes) == [8, 8, 6, 5][rank]
