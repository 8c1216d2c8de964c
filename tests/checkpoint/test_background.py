"""Saves in the background: their errors reach the user, they take turns, and they keep no descriptors."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist
from tiny import averaged_once
from zoo import build, set_live

from dist_ema import CommunicationError
from dist_ema.checkpoint import save_calls

LOSES_IT = """
import gc, sys, torch
from dist_ema import ConstantSchedule, ShardedEMA
def main():
    ema = ShardedEMA(torch.nn.Linear(2, 2), ConstantSchedule(momentum=0.5))
    ema.update()
    ema.save(sys.argv[1], background=True)
main()
gc.collect()
print("end of program")
"""


def test_the_error_of_a_background_save_outlives_its_average(tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    command = [sys.executable, "-c", LOSES_IT, str(tmp_path / "full")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "end of program" in done.stdout and "no saved average of this package" in done.stderr


def two_in_the_background(folder: str) -> None:
    model = build("ddp")
    first, second = averaged_once(model), averaged_once(model)
    running, real = [], save_calls.write_average

    def slowly(*arguments) -> None:
        running.append(len(threading.enumerate()))
        assert len(running) % 2 == 1, "two at a time on one process group"
        time.sleep(0.2 * (1 + dist.get_rank()))
        real(*arguments)
        running.append(0)

    save_calls.write_average = slowly
    try:
        for _ in range(2):
            first.save(os.path.join(folder, "first"), background=True)
            second.save(os.path.join(folder, "second"), background=True)
            second.wait()
            first.wait()
    finally:
        save_calls.write_average = real
    first.load(os.path.join(folder, "second"))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        again = averaged_once(model)
        again.save(os.path.join(folder, "again"), background=True)
        again.wait()
        del again
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2, "each background save keeps descriptors"


def test_two_averages_save_in_the_background_one_after_the_other(world, tmp_path) -> None:
    world(2).run(two_in_the_background, str(tmp_path))


def group_destroyed(folder: str) -> None:
    ema = averaged_once(build("ddp"))
    real = save_calls.write_average

    def slowly(*arguments) -> None:
        time.sleep(1.0)
        real(*arguments)

    save_calls.write_average = slowly
    ema.save(folder, background=True)
    set_live(build("plain"), 0)
    dist.destroy_process_group()
    with pytest.raises(CommunicationError, match=r"before wait\(\)"):
        ema.wait()
    raise RuntimeError("was told")


def test_a_process_group_destroyed_under_a_background_save_is_told_in_plain_words(world, tmp_path) -> None:
    with pytest.raises(AssertionError, match="was told"):
        world(2).run(group_destroyed, str(tmp_path / "ema"))
