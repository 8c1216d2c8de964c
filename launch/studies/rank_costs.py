"""What the calls of an average cost all ranks of a world together: a line of JSON for each number of ranks.

    python launch/studies/rank_costs.py 1 2 4 8 16 32

The ranks are processes on loopback, of a small model under DDP; Linux only. They share the cores, so the cost is CPU
time. `launch/bench/growth.py` draws it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from real_ranks import forked, store_kept_by
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_ema import ConstantSchedule, ShardedEMA

_WIDTH, _DEPTH = 64, 16


def costs(folder: Path) -> dict[str, float]:
    """Collective: every rank must call it. Call -> CPU seconds of all ranks."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(*[nn.Linear(_WIDTH, _WIDTH) for _ in range(_DEPTH)]))
    made: list[ShardedEMA] = []
    calls: dict[str, Callable[[], object]] = {
        "construction": lambda: made.append(ShardedEMA(model, ConstantSchedule(momentum=0.25))),
        "first save": lambda: made[0].save(folder / "average"),
        "save": lambda: made[0].save(folder / "average"),
        "load": lambda: made[0].load(folder / "average"),
    }
    seconds = {}
    for name, call in calls.items():
        dist.barrier()
        began = time.process_time()
        call()
        used = torch.tensor(time.process_time() - began)
        dist.all_reduce(used)
        seconds[name] = float(used)
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("ranks", type=int, nargs="+", help="of one world after the other")
    torch.set_num_threads(1)
    for size in parser.parse_args(arguments).ranks:
        with store_kept_by("agent") as store:
            print(json.dumps(forked(size, store, costs)[0]), flush=True)


if __name__ == "__main__":
    main()
