"""Worlds of gloo ranks for tests: started once per size, then any number of cases run in them.

Process start dominates rank tests, so a world is kept for the whole session of a pytest worker. A case is a
module-level function; it runs on every rank at once. A short process-group timeout turns a hang into an error, and
every rank's traceback is shown. After any failure the world is killed: its ranks may be in different places.

Every case begins with the environment that the world was started with: Lightning, for one, takes WORLD_SIZE out of it
when it ends, and transformers then shards nothing.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

GROUP_TIMEOUT_SECONDS = 20
CASE_TIMEOUT_SECONDS = 90
# Each group of gloo keeps three threads, one of which wakes a hundred times a second. Cases that make meshes leave
# groups: hundreds of them take all the time of a small machine.
MOST_GROUPS = 40


class World:
    """`size` processes with an initialised gloo group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, case: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run `case(*arguments)` on every rank; the results in rank order. Fails with all tracebacks."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((case, arguments))
        replies: list[tuple[bool, Any, int]] = []
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=CASE_TIMEOUT_SECONDS)
        for rank, pipe in enumerate(self._pipes):
            remaining = (deadline - datetime.datetime.now()).total_seconds()
            try:
                answered = pipe.poll(max(remaining, 0.1))
                replies.append(pipe.recv() if answered else (False, f"rank {rank} did not answer: it hangs", 0))
            except EOFError:
                replies.append((False, f"rank {rank} died", 0))
        if not all(ok for ok, *_ in replies):
            self.stop()
            told = "\n".join(f"--- rank {rank}\n{value}" for rank, (ok, value, _) in enumerate(replies) if not ok)
            raise AssertionError(f"{case.__name__} failed on {self.size} ranks\n{told}")
        if any(num_groups > MOST_GROUPS for *_, num_groups in replies):
            self.stop()
        return [value for _, value, _ in replies]

    def stop(self) -> None:
        """Kill the processes; the next `run` starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        store = os.path.join(tempfile.mkdtemp(), "store")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, port, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(rank: int, size: int, port: int, store: str, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=UserWarning, module="dist_ema")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=GROUP_TIMEOUT_SECONDS),
    )
    environment = dict(os.environ)
    while True:
        try:
            case, arguments = pipe.recv()
        except EOFError:
            break
        torch.manual_seed(0)  # a model that a case makes is alike on all ranks
        try:
            ok, value = True, case(*arguments)
        except BaseException:
            ok, value = False, traceback.format_exc()
        os.environ.clear()
        os.environ.update(environment)
        pipe.send((ok, value, len(dist.distributed_c10d._world.pg_map)))
    # Leaving through destroy_process_group() aborts now and then in gloo's teardown.
    os._exit(0)
