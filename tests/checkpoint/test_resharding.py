"""What any layout and number of ranks saved, any other loads, bit for bit: all ordered pairs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from layouts_zoo import bare, build_layout, set_whole
from oracle import NaiveAverage

from dist_ema import ConstantSchedule, ShardedEMA

SCHEDULE = ConstantSchedule(momentum=0.25)
# All of models of one width, without the 0-dim parameter that FSDP refuses.
CELLS = [
    ("fsdp1_orig", 2),
    ("fsdp1_flat", 3),
    ("fsdp1_hybrid", 4),
    ("fsdp1_no_shard", 2),
    ("fsdp2", 1),
    ("fsdp2", 3),
    ("hsdp", 4),
    ("tp_uneven", 2),
    ("fsdp_tp_uneven", 4),
    ("ddp_sliced", 4),
    ("fsdp1_sliced", 4),
    ("fsdp2_sliced", 4),
    ("fsdp_tp_sliced_uneven", 4),
    ("replicate", 2),
    ("experts", 4),
    ("packed", 3),
    ("packed_twice", 4),
    ("fsdp_packed", 4),
    ("offset", 3),
]


def updates_before_the_save(model: torch.nn.Module, ema: ShardedEMA) -> None:
    for step in range(3):
        set_whole(model, step)
        ema.update()


def save(layout: str, folder: str) -> None:
    model = build_layout(layout)
    ema = ShardedEMA(model, SCHEDULE)
    updates_before_the_save(model, ema)
    ema.save(folder)


def load(layout: str, folders: list[str]) -> None:
    """Into one model from each folder in turn; then one more update, and compare with the uninterrupted twin."""
    model = build_layout(layout, seed=1)
    ema, naive = ShardedEMA(model, SCHEDULE), NaiveAverage(SCHEDULE.momentum)
    for step in range(4):
        naive.update(set_whole(model, step))
    for folder in folders:
        ema.load(folder)
        assert ema.num_updates == 3
        ema.update()
        state = ema.full_state_dict()
        if dist.get_rank() == 0:
            assert set(state) == set(bare(layout).state_dict())
            for name, value in naive.values.items():
                assert torch.equal(state[name], value), f"{folder}: {name}"


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory) -> list[str]:
    folders = [str(tmp_path_factory.mktemp("saved") / f"{layout}-{size}") for layout, size in CELLS]
    for (layout, size), folder in zip(CELLS, folders, strict=True):
        world(size).run(save, layout, folder)
    return folders


@pytest.mark.parametrize(("layout", "size"), CELLS, ids=[f"into {layout} on {size}" for layout, size in CELLS])
def test_every_layout_loads_what_every_layout_saved(world, saved, layout, size) -> None:
    world(size).run(load, layout, saved)
