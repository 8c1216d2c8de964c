"""How far live and averaged weights lie apart: whole and by groups, the same on every rank and for every layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from layouts_zoo import build_layout, set_whole
from oracle import NaiveAverage
from torch import nn

from dist_ema import ConfigError, ConstantSchedule, ShardedEMA, SwapError

SCHEDULE = ConstantSchedule(momentum=0.25)


def measured(layout: str, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    model = build_layout(layout, dtype=dtype)
    ema = ShardedEMA(model, SCHEDULE, interval=2)
    assert ema.distance()["all"] == 0.0
    naive = NaiveAverage(SCHEDULE.momentum, interval=2)
    for step in range(4):
        live = set_whole(model, step)
        naive.update(live)
        ema.update()
    groups = {"norms": "norm.*", "tied": "head.weight", "rest": ["hidden.*", "narrow.*"]}
    return ema.distance(groups=groups), ema.metrics(), (naive.values, live)


def naive_distance(naive: dict[str, torch.Tensor], live: dict[str, torch.Tensor], names: list[str]) -> float:
    apart = torch.cat([(live[name].double() - naive[name].double()).flatten() for name in names])
    return float(apart.norm() / torch.cat([live[name].double().flatten() for name in names]).norm())


@pytest.mark.parametrize(
    ("layout", "size"), [("plain", 1), ("ddp", 3), ("fsdp2", 3), ("fsdp1_orig", 2), ("hsdp", 4), ("fsdp_tp", 4)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_distances_are_those_of_whole_tensors_on_every_rank(world, layout, size, dtype) -> None:
    told = world(size).run(measured, layout, dtype)
    found, metrics, (naive, live) = told[0]
    assert all(each[:2] == (found, metrics) for each in told)
    members = {
        "all": sorted(naive),
        "norms": ["norm.weight", "norm.bias"],
        "tied": ["embed.weight"],
        "rest": ["hidden.weight", "hidden.bias", "narrow.weight", "narrow.bias"],
    }
    assert found.keys() == members.keys()
    for group, names in members.items():
        assert found[group] == pytest.approx(naive_distance(naive, live, names), rel=1e-6), group
    assert metrics["ema/distance"] == found["all"]
    assert metrics["ema/distance/norm"] == found["norms"]
    assert metrics["ema/momentum"] == 0.25 and metrics["ema/num_updates"] == 4.0


def test_metrics_tell_the_latest_momentum_of_each_track() -> None:
    ema = ShardedEMA(nn.Linear(2, 1), {"fast": ConstantSchedule(decay=0.5), "slow": ConstantSchedule(decay=0.75)})
    assert ema.metrics()["ema/fast/momentum"] == 1.0
    ema.update()
    assert ema.metrics()["ema/fast/momentum"] == 1.0
    ema.update()
    told = ema.metrics(prefix="averages", groups={"biases": "bias"})
    assert told["averages/fast/momentum"] == 0.5 and told["averages/slow/momentum"] == 0.25
    assert set(told) == {"averages/num_updates"} | {
        f"averages/{track}/{name}" for track in ("fast", "slow") for name in ("momentum", "distance", "distance/biases")
    }


def test_a_live_value_that_is_no_number_shows_and_zero_weights_divide_nothing() -> None:
    model = nn.Linear(2, 1)
    ema = ShardedEMA(model, SCHEDULE)
    ema.update()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    assert ema.distance()["all"] == math.inf
    nn.init.constant_(model.bias, math.nan)
    assert math.isnan(ema.distance()["bias"]) and ema.distance()["weight"] == math.inf


def test_groups_that_match_nothing_are_refused() -> None:
    ema = ShardedEMA(nn.Linear(2, 1), SCHEDULE)
    for groups in ({"norms": "norm.*"}, {"all": "*"}, {"x": 3}, "norm.*"):
        with pytest.raises(ConfigError, match="expected"):
            ema.distance(groups=groups)
    with pytest.raises(ConfigError, match="track"):
        ema.distance("slow")
    with ema.average_parameters(), pytest.raises(SwapError):
        ema.metrics()
