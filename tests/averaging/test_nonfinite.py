"""Live values that are infinite or not a number: left out element by element, wherever they appear."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from layouts_zoo import build_layout, set_whole, whole_parameters
from torch.distributed.tensor.debug import CommDebugMode
from twins import assert_same_bits

from dist_ema import ConfigError, ConstantSchedule, ShardedEMA

MOMENTUM = 0.25
BAD = [float("nan"), float("inf"), float("-inf")]


def spoil(model: torch.nn.Module, step: int) -> dict[str, torch.Tensor]:
    """Put three bad values into the live weights; returns the weights as they then are."""
    with whole_parameters(model) as whole:
        value = whole["hidden.weight"].view(-1)
        value[step : step + 3] = torch.tensor(BAD)
        return {name: each.clone() for name, each in whole.items()}


def twin(averages: dict[str, torch.Tensor], live: dict[str, torch.Tensor], momentum: float) -> None:
    for name, value in live.items():
        kept = torch.where(value.isfinite(), value.float(), averages[name])
        averages[name] = torch.lerp(averages[name], kept, momentum)


def averaged_without(layout: str, dtype: torch.dtype, folder: str) -> None:
    model = build_layout(layout, dtype=dtype)
    schedules = {"a": ConstantSchedule(momentum=MOMENTUM), "b": ConstantSchedule(momentum=0.5)}
    ema = ShardedEMA(model, schedules, skip_nonfinite=True)
    expected: dict[str, dict[str, torch.Tensor]] = {}
    for step in range(5):
        live = set_whole(model, step)
        if step != 1:
            live = spoil(model, step)
        with CommDebugMode() as communication:
            ema.update()
        assert communication.get_total_counts() == 0
        for name, schedule in schedules.items():
            if step == 0:
                expected[name] = {key: value.float().nan_to_num(0, 0, 0) for key, value in live.items()}
            else:
                twin(expected[name], live, schedule.momentum(step))
    for name in schedules:
        state = ema.full_state_dict(name)
        if dist.get_rank() == 0:
            assert all(value.isfinite().all() for key, value in state.items() if key in expected[name])
            assert_same_bits({key: state[key] for key in expected[name]}, expected[name])
    assert ema.num_refused() == 4 * 3
    ema.save(folder)
    again = ShardedEMA(model, schedules, skip_nonfinite=True)
    again.load(folder)
    assert again.num_refused() == 12
    spoil(model, 0)
    again.update()
    assert again.num_refused() > 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("layout", "size"), [("ddp", 2), ("fsdp2", 3), ("fsdp1_orig", 2), ("hsdp", 4)])
def test_values_that_are_no_numbers_never_enter_an_average(world, tmp_path, layout, size, dtype) -> None:
    world(size).run(averaged_without, layout, dtype, str(tmp_path / "ema"))
    assert json.loads((tmp_path / "ema" / "manifest.json").read_text())["num_refused"] == 12


def spoiled_on_one_rank(layout: str) -> None:
    model = build_layout(layout)
    ema = ShardedEMA(model, ConstantSchedule(momentum=MOMENTUM), skip_nonfinite=True)
    ema.update()
    if dist.get_rank() == 1:
        with torch.no_grad():
            for parameter in model.parameters():
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                if local.numel():
                    local.view(-1)[0] = float("nan")
    ema.update()
    state = ema.full_state_dict()
    assert ema.num_refused() > 0
    if dist.get_rank() == 0:
        assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())


def test_a_nan_on_one_rank_leaves_every_average_finite(world) -> None:
    world(2).run(spoiled_on_one_rank, "fsdp2")


def test_without_the_option_they_enter(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    ema = ShardedEMA(model, ConstantSchedule(momentum=MOMENTUM))
    ema.update()
    with torch.no_grad():
        model.bias.fill_(float("nan"))
    ema.update()
    assert ema.full_state_dict()["bias"].isnan().all() and ema.num_refused() == 0
    with pytest.warns(UserWarning, match="not a number"):
        ema.save(os.path.join(tmp_path, "ema"))
    with pytest.raises(ConfigError, match="skip_nonfinite"):
        ShardedEMA(model, ConstantSchedule(momentum=MOMENTUM), skip_nonfinite="yes")


def test_values_of_a_step_that_the_optimizer_skipped_are_not_counted_as_left_out() -> None:
    """Nothing of that step is averaged, so nothing of it is left out of an average."""
    model = torch.nn.Linear(3, 3)
    ema = ShardedEMA(model, ConstantSchedule(momentum=MOMENTUM), skip_nonfinite=True)
    for _ in range(2):
        ema.update()
    with torch.no_grad():
        model.weight[0, :] = torch.tensor(BAD)
    ema.update(found_inf=torch.ones(1))
    assert ema.num_refused() == 0
    ema.update(found_inf=torch.zeros(()))
    assert ema.num_refused() == 3
