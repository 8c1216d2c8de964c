"""The gloo groups of the package's own messages, made once for each default group.

They need no GPU, and never mix with the traffic of training.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import threading
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from dist_ema.checks import positive_number

__all__ = ["ARRIVAL_SECONDS", "Groups", "control_groups"]

T = TypeVar("T")

# How long a rank waits for the others to make the same call, before it says that they did not.
ARRIVAL_SECONDS = positive_number("DIST_EMA_ARRIVAL_SECONDS", os.environ.get("DIST_EMA_ARRIVAL_SECONDS", "30"))
# How long it waits within a call that all have made: a slow disk is no error.
_STAGE_TIMEOUT = datetime.timedelta(minutes=30)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Gloo groups of all ranks.

    Attributes:
        world: the default group that they were made for.
        control: waits as long as a slow disk may take.
        arrival: for the start of a call, at which all ranks should be soon.
    """

    world: dist.ProcessGroup
    control: dist.ProcessGroup
    arrival: dist.ProcessGroup
    _background: list[dist.ProcessGroup] = dataclasses.field(default_factory=list, init=False)

    def background(self) -> dist.ProcessGroup:
        """Collective at the first call, at which all ranks must be already. For a thread beside the other calls.

        Raises:
            RuntimeError: it could not be made; other ranks are gone.
        """
        if not self._background:
            self._background.append(_soon(lambda: _gloo_group(_STAGE_TIMEOUT), ARRIVAL_SECONDS))
        return self._background[0]


_groups_of_this_world: list[Groups] = []


def control_groups() -> Groups | None:
    """The groups of all ranks, made once for each default group. Collective at the first call."""
    world = dist.group.WORLD
    if world is None or dist.get_world_size() == 1:
        return None
    if not _groups_of_this_world or _groups_of_this_world[0].world is not world:
        arrival = datetime.timedelta(seconds=ARRIVAL_SECONDS)
        _groups_of_this_world[:] = [Groups(world, _gloo_group(_STAGE_TIMEOUT), _gloo_group(arrival))]
    return _groups_of_this_world[0]


def _gloo_group(timeout: datetime.timedelta) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    return group


def _soon(work: Callable[[], T], seconds: float) -> T:
    """The result of `work`, if it ends in time; else it is left behind in a thread that ends with the process.

    For the making of a group, which waits for a rank that has died as long as the group's own timeout is.

    Raises:
        RuntimeError: it did not end in time.
    """
    results: list[T] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="dist_ema-group", daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    if not results:
        raise RuntimeError(f"a process group was not made within {seconds:g} s")
    return results[0]
