"""DeepSpeed's ZeRO-1, 2 and 3: averages, swaps and files of what is partitioned, and updates after the engine's steps.

DeepSpeed runs in worlds of its own: its import changes much, and warns.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import NaiveAverage
from ranks import World
from safetensors.torch import load_file
from torch.distributed.tensor.debug import CommDebugMode
from twins import assert_same_bits
from zoo import Nasty

from dist_ema import CosineSchedule, ShardedEMA

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
SCHEDULE = CosineSchedule(0.3, 0.01, total_steps=12)


@pytest.fixture(scope="module")
def own_world() -> Iterator[Callable[[int], World]]:
    worlds: dict[int, World] = {}
    yield lambda size: worlds.setdefault(size, World(size))
    for each in worlds.values():
        each.stop()


def followed(engine: Any, emas: list[ShardedEMA], naive: NaiveAverage, steps: range) -> None:
    """Train and update; the naive average is taken after `engine.step`."""
    from deepspeeded import read_whole, train

    for step in steps:
        train(engine, step)
        for ema in emas:
            with CommDebugMode() as traffic:
                ema.update()
            assert traffic.get_total_counts() == 0
        naive.update(read_whole(engine.module))


def on_rank_0(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if dist.get_rank() == 0:
        assert_same_bits(state, expected)


def whole_life(kind: str, folder: str, whole_engine: bool) -> None:
    from deepspeeded import batch, engine_of, read_whole, train

    engine = engine_of(kind)
    model = engine if whole_engine else engine.module
    ema, naive = ShardedEMA(model, SCHEDULE), NaiveAverage(SCHEDULE.momentum)
    followed(engine, [ema], naive, range(4))
    on_rank_0(ema.full_state_dict(), naive.values)

    live, dtype = read_whole(model), next(engine.module.parameters()).dtype
    averaged = {name: value.to(dtype) for name, value in naive.values.items()}
    with torch.no_grad():
        engine(batch(0))  # what it gathers must not outlive the swap
        with ema.average_parameters():
            reference = Nasty(scalar=False).to(dtype)
            reference.load_state_dict(averaged, strict=False)
            assert torch.equal(engine(batch(7)), reference(batch(7)))
            assert_same_bits(read_whole(model), averaged)
        assert_same_bits(read_whole(model), live)
        reference.load_state_dict(live, strict=False)
        assert torch.equal(engine(batch(7)), reference(batch(7)))

    ema.save(folder)
    ema.consolidate(folder + "_export", dtype=torch.bfloat16)
    if dist.get_rank() == 0:
        assert_same_bits(load_file(os.path.join(folder, "model.safetensors")), naive.values)
        export = load_file(os.path.join(folder + "_export", "model.safetensors"))
        assert_same_bits(export, {name: value.bfloat16() for name, value in naive.values.items()})
    resumed = ShardedEMA(model, SCHEDULE)
    resumed.load(folder)
    followed(engine, [ema, resumed], naive, range(4, 6))
    for each in (ema, resumed):
        on_rank_0(each.full_state_dict(), naive.values)
    ema.copy_to_model()
    assert_same_bits(read_whole(model), {name: value.to(dtype) for name, value in naive.values.items()})
    train(engine, 6)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *((kind, size) for kind in ("zero1", "zero2", "zero3") for size in (2, 3)),
        *((kind, 2) for kind in ("zero3_init", "zero3_persistent", "zero3_offload", "zero3_nodes")),
        *((kind, 2) for kind in ("none_bf16", "zero1_bf16", "zero2_bf16", "zero3_bf16", "zero3_fp16")),
    ],
)
def test_averages_swaps_and_files_of_a_partitioned_model_are_those_of_whole_tensors(
    own_world, tmp_path, kind, size
) -> None:
    """ZeRO-3 averaged nothing, in silence; what a forward gathers is stale after a swap."""
    own_world(size).run(whole_life, kind, str(tmp_path / "ema"), size == 2)
