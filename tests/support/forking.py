"""A process that has loaded torch and runs no threads: worlds of ranks are forked from it in milliseconds."""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

# What the wrappers and the average load at their first use: loaded once, not in every rank.
_SLOW_TO_LOAD = ("torch._dynamo", "torch.distributed.checkpoint", "dist_ema")
_LIMIT_SECONDS = 300


def _load() -> None:
    import torch

    torch.set_num_threads(1)
    for module in _SLOW_TO_LOAD:
        importlib.import_module(module)


@contextmanager
def forking_process() -> Iterator[Callable[..., Any]]:
    """Gives a function that runs `function(*arguments)` in that process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_load) as executor:
        yield lambda function, *arguments: executor.submit(function, *arguments).result(timeout=_LIMIT_SECONDS)
