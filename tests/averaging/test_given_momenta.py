"""Momenta that each rank is given: ranks that were given different ones share no average, and no one is told a lie."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_ema import ConfigError, ConstantSchedule, RankMismatchError, ShardedEMA, per_batch

HALF = ConstantSchedule(decay=0.5)


def twin(value: float = 1.0) -> nn.Module:
    net = nn.Linear(3, 3)
    for parameter in net.parameters():
        nn.init.constant_(parameter, value)
    return DistributedDataParallel(net)


def average_apart(folder: str) -> None:
    rank, model = dist.get_rank(), twin()

    def refused(ema: ShardedEMA, words: str) -> None:
        track = ema.tracks[0]
        for call in (
            lambda: ema.save(f"{folder}/never"),
            lambda: ema.snapshot_live(f"{folder}/never"),
            lambda: ema.average_parameters(track).__enter__(),
            lambda: ema.copy_to_model(track, weight=0.5),
            lambda: ema.copy_to(nn.Linear(3, 3), track=track),
            lambda: ema.whole_tensors(track),
            lambda: ema.full_state_dict(track),
            lambda: ema.add_track("late", HALF),
        ):
            with pytest.raises(RankMismatchError, match=words):
                call()
        assert ema.tracks == (track,) and not list(Path(folder).iterdir())

    given = ShardedEMA(model, per_batch(4, HALF))
    given.update(batch_size=4)
    for sizes in ((4, 8), (8, 4)):  # their sums are equal
        given.update(batch_size=sizes[rank])
    refused(given, "batch_size=")
    given.restart()
    given.update(batch_size=4)
    given.update(batch_size=6)
    given.metrics()

    counted = ShardedEMA(model, HALF)
    for _ in range(1 + rank):
        counted.update()
    refused(counted, "num_updates")


def test_ranks_with_other_batch_sizes_or_updates_share_no_average_that_is_partly_each(
    world: Any, tmp_path: Path
) -> None:
    world(2).run(average_apart, str(tmp_path))


def average_by_functions() -> None:
    rank, model = dist.get_rank(), twin()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dist_ema.ranks.exchange.Exchange.warn", lambda *_: None)
        own = ShardedEMA(model, {"own": lambda step: 0.5 + 0.01 * rank})
        alike = ShardedEMA(model, {"own": lambda step: 0.5 + 1e-15 * rank})  # another machine may round otherwise
    for ema in (own, alike):
        ema.update()
        ema.update()
    with pytest.raises(RankMismatchError, match="a schedule of your own"):
        own.full_state_dict()
    alike.full_state_dict()


def test_ranks_whose_own_schedules_give_other_momenta_share_no_average(world: Any) -> None:
    world(2).run(average_by_functions)


def test_the_metrics_of_a_resumed_run_come_before_its_first_batch(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, per_batch(4, HALF))
    ema.update()
    ema.update(batch_size=4)
    ema.save(tmp_path / "ema")
    resumed = ShardedEMA(model, per_batch(4, HALF))
    resumed.load(tmp_path / "ema")
    assert math.isnan(resumed.metrics()["ema/momentum"]), "nobody knows the batch of the latest update"
    with pytest.raises(ConfigError, match="batch_size"):
        resumed.update()
    resumed.update(batch_size=8)
    assert resumed.metrics()["ema/momentum"] == pytest.approx(0.75)
    assert torch.equal(resumed.full_state_dict()["bias"], model.bias)
