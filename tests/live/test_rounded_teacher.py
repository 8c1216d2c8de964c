"""A bfloat16 teacher of an fp32 average: it shows the rounded average after whatever moves it, and nothing is sent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from layouts_zoo import build_layout, clean, read_whole, runs_forward, set_whole
from oracle import NaiveAverage
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import implicit_replication

from dist_ema import ConfigError, ConstantSchedule, CosineSchedule, ShardedEMA

SCHEDULE = CosineSchedule(0.3, 0.01, total_steps=6)
TOKENS = torch.arange(8).view(2, 4)


def taught(layout: str, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, nn.Module, ShardedEMA]:
    student, teacher = build_layout(layout), build_layout(layout, dtype=dtype, seed=1, frozen=True)
    return student, teacher, ShardedEMA(student, SCHEDULE, into=teacher)


def assert_rounded(teacher: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = read_whole(teacher)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name


def follow(layout: str, folder: str) -> None:
    student, teacher, ema = taught(layout)
    assert_rounded(teacher, read_whole(student))
    naive = NaiveAverage(SCHEDULE.momentum)
    for step in range(4):
        naive.update(set_whole(student, step))
        for name, buffer in student.named_buffers():
            if clean(name) == "running":
                buffer.fill_(step)
        with CommDebugMode() as mode:
            ema.update()
        assert mode.get_total_counts() == 0
        assert_rounded(teacher, naive.values)
        if runs_forward(layout):
            with torch.no_grad(), implicit_replication():
                teacher(TOKENS)  # leaves FSDP's root gathered: the next update must drop that copy
    whole = ema.full_state_dict()
    if dist.get_rank() == 0:
        for name, value in naive.values.items():
            assert torch.equal(whole[name], value), name  # fp32: nothing is lost to the teacher's rounding
    ema.save(folder)
    _, other, resumed = taught(layout)
    resumed.load(folder)
    assert_rounded(other, naive.values)
    naive.update(set_whole(student, 7))
    with ema.average_parameters():
        pass
    ema.update()
    assert_rounded(teacher, naive.values)
    ema.restart()
    assert_rounded(teacher, read_whole(student))


@pytest.mark.parametrize(("layout", "size"), [("ddp", 2), ("fsdp2", 2), ("hsdp", 4), ("tp", 2), ("fsdp_tp", 4)])
def test_a_bfloat16_teacher_is_the_rounded_average_and_the_average_stays_exact(world, layout, size, tmp_path) -> None:
    world(size).run(follow, layout, str(tmp_path / "average"))


def test_an_average_whose_motion_a_bfloat16_teacher_would_lose_still_moves() -> None:
    student = nn.Linear(4, 4, bias=False)
    teacher = nn.Linear(4, 4, bias=False).to(torch.bfloat16).requires_grad_(False)
    nn.init.ones_(student.weight)
    ema = ShardedEMA(student, ConstantSchedule(decay=0.9999), into=teacher)
    ema.update()
    nn.init.constant_(student.weight, 2.0)
    for _ in range(200):
        ema.update()
    # Each step is 1e-4, far below the rounding unit of bfloat16 at 1 (7.8e-3): together they are 2e-2.
    assert teacher.weight.float().min() > 1.01
    assert ema.nbytes == 16 * 4


def test_a_teacher_of_mixed_dtypes_has_each_tensor_in_its_own(tmp_path: Path) -> None:
    student = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    teacher = nn.Sequential(nn.Linear(4, 4).to(torch.float16), nn.LayerNorm(4)).requires_grad_(False)
    ema = ShardedEMA(student, SCHEDULE, into=teacher)
    for _ in range(3):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.1)
        ema.update()
    whole = ema.full_state_dict()
    assert torch.equal(teacher[0].weight, whole["0.weight"].half())
    assert torch.equal(teacher[1].weight, whole["1.weight"])
    with pytest.raises(ConfigError, match="a coarser one"):
        ShardedEMA(student, SCHEDULE, into=teacher.double())
