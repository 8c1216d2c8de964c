"""Process groups come and go: an average outlives its group, and a store outlives the ranks that wrote to it."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forking import forking_process
from real_ranks import forked, store_kept_by
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_ema import CommunicationError, ConstantSchedule, ShardedEMA
from dist_ema.checkpoint import save_calls
from dist_ema.ranks.exchange import Exchange


@pytest.fixture(scope="module")
def forking():
    with forking_process() as forking:
        yield forking


def averaging() -> ShardedEMA:
    torch.manual_seed(0)
    ema = ShardedEMA(DistributedDataParallel(nn.Linear(16, 16)), ConstantSchedule(momentum=0.5))
    ema.update()
    return ema


def halfway(folder: Path) -> None:
    """The last rank has not come to the save in which the others are when all of them are gone."""
    ema = averaging()
    ema.save(folder / "ema")
    dist.barrier()
    if dist.get_rank() < dist.get_world_size() - 1:
        threading.Thread(target=ema.save, args=[folder / "ema"], daemon=True).start()
    time.sleep(1.0)


def resumed(folder: Path) -> int:
    ema = averaging()
    ema.load(folder / "ema")
    ema.update()
    ema.save(folder / "ema")
    return ema.num_updates


def restarts(folder: Path) -> list[list[int]]:
    counts = []
    for size, work in ((4, halfway), (2, resumed), (3, resumed), (4, resumed)):
        with store_kept_by("agent") as store:  # torchrun makes a new one for each start
            counts.append(forked(size, store, work, folder))
    return counts[1:]


@pytest.mark.ranks
def test_other_numbers_of_ranks_go_on_from_where_a_save_had_not_all_of_them(forking, tmp_path) -> None:
    assert forking(restarts, tmp_path) == [[2, 2], [3, 3, 3], [4, 4, 4, 4]]


def outlived(folder: Path) -> tuple[str, str]:
    """A save behind training that has not ended when the process group is destroyed."""
    ema, holds, real = averaging(), threading.Event(), save_calls.write_average

    def slowly(*arguments: object) -> None:
        holds.wait(20)
        real(*arguments)  # type: ignore[arg-type]

    setattr(save_calls, "write_average", slowly)  # noqa: B010
    ema.save(folder / "ema", background=True)
    dist.barrier()
    dist.destroy_process_group()
    holds.set()
    try:
        ema.wait()
        told = ("", "")
    except CommunicationError as error:
        told = (type(error).__name__, str(error))
    setattr(save_calls, "write_average", real)  # noqa: B010
    with pytest.raises(CommunicationError, match="was destroyed"):
        ema.save(folder / "ema")
    # `forked` has all ranks meet at the end.
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(os.environ["RANK"]), world_size=2)
    ema.save(folder / "ema")
    ema.load(folder / "ema")
    return told


def outliving(folder: Path, host: str) -> list[tuple[str, str]]:
    with store_kept_by(host) as store:
        return forked(2, store, outlived, folder)


@pytest.mark.ranks
@pytest.mark.parametrize("host", ["agent", "rank 0"])
def test_a_save_that_outlives_its_process_group_ends_in_an_error_that_names_it(forking, tmp_path, host) -> None:
    first, second = forking(outliving, tmp_path, host)
    assert first[0] == second[0] == "CommunicationError"
    assert "process group was destroyed" in first[1] and "process group was destroyed" in second[1]


def replaced(folder: Path) -> int:
    """The last two ranks of a world go on as ranks 0 and 1 of a new one, with a process that was in none."""
    rank, store = dist.get_rank(), f"file://{folder}"
    dist.barrier()
    dist.destroy_process_group()
    if rank:
        dist.init_process_group("gloo", init_method=f"{store}/two", rank=rank - 1, world_size=2)
        averaging().save(folder / "ema")
        dist.barrier()
        dist.destroy_process_group()
    own = (rank - 1) % 3
    dist.init_process_group("gloo", init_method=f"{store}/three", rank=own, world_size=3, timeout=timedelta(seconds=20))
    ema = averaging()
    ema.save(folder / "ema")
    return ema.num_updates


def replacing(folder: Path) -> list[int]:
    with store_kept_by("agent") as store:
        return forked(3, store, replaced, folder)


@pytest.mark.ranks
def test_a_process_that_joins_later_meets_those_that_were_in_a_group_before(forking, tmp_path) -> None:
    assert forking(replacing, tmp_path) == [1, 1, 1]


def times_of_the_end(folder: Path) -> tuple[float, float]:
    """When this rank came to the last step of a save, and when it left the save; rank 1 comes late to that step."""
    ema, came, real = averaging(), list[float](), Exchange.on_rank_0

    def late(*arguments: Any) -> Any:
        time.sleep(0.5 * dist.get_rank())
        came.append(time.monotonic())
        return real(*arguments)

    setattr(Exchange, "on_rank_0", late)  # noqa: B010
    ema.save(folder / "ema")
    return came[-1], time.monotonic()


def ending(folder: Path) -> list[tuple[float, float]]:
    with store_kept_by("rank 0") as store:
        return forked(2, store, times_of_the_end, folder)


@pytest.mark.ranks
def test_rank_0_does_not_end_with_its_store_before_all_have_come_to_the_end_of_a_save(forking, tmp_path) -> None:
    (_, left), (came, _) = forking(ending, tmp_path)
    assert left > came


def outliving_rank_0(folder: Path) -> str:
    """What rank 1 writes to stderr after the process of rank 0, which keeps the store, has ended as it should."""
    with store_kept_by("rank 0") as store:
        pids: list[int] = []
        for rank in range(2):
            pids.append(os.fork())
            if pids[-1] == 0:
                os.dup2(os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT), 2)
                os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
                dist.init_process_group("gloo")
                averaging().save(folder / "ema")
                os.write(2, b"saved\n")
                time.sleep(3.5 * rank)
                os._exit(0)
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    assert statuses == [0, 0]
    return (folder / "stderr-1").read_text().rpartition("saved\n")[2]


@pytest.mark.ranks
def test_a_rank_that_outlives_the_process_with_the_store_writes_nothing_about_it(forking, tmp_path) -> None:
    assert forking(outliving_rank_0, tmp_path) == ""
