"""The beginning of a call: all ranks come to it, or it ends on all of them."""

from __future__ import annotations

import logging
import time

from dist_ema.checks import seconds_from_environment
from dist_ema.errors import CommunicationError, agreed, error_class
from dist_ema.ranks.groups import Farewell, World, this_world
from dist_ema.ranks.long_waits import Deed, watch

__all__ = ["arrival_seconds", "present_world", "wait_for_all"]

_log = logging.getLogger(__name__)

_NOTICE_SECONDS = 30.0
# A wait that goes on is logged again when it has become this many times as long.
_GROWTH = 10.0
# After so long a wait a rank tells the others which call it has come to.
_COME_SECONDS = 1.0
# The most ranks that a message names.
_MOST_NAMED = 8


def arrival_seconds() -> tuple[float, float]:
    """The seconds after which a wait is logged, and those after which it ends, 0 if they are not set.

    The environment is read at every use.

    Raises:
        ConfigError: an environment variable has a value that is no number of seconds.
    """
    notice = seconds_from_environment("DIST_EMA_NOTICE_SECONDS", _NOTICE_SECONDS)
    return notice, seconds_from_environment("DIST_EMA_ARRIVAL_SECONDS", 0.0)


def present_world(call: str, rank: int, size: int) -> World:
    """The ranks that make a call together. No communication, but a connection to the store.

    Args:
        call: the name of the call.
        rank: the rank of this process when the average was built.
        size: the number of ranks at that time.

    Raises:
        CommunicationError: their process group was destroyed.
    """
    world = this_world()
    if world is None or (world.rank, world.size) != (rank, size):
        now = "there is none now" if world is None else f"this process is rank {world.rank} of {world.size} now"
        raise CommunicationError(
            f"{call}: the process group of {size} ranks that this average was built in was destroyed "
            f"(destroy_process_group, or accelerator.end_training, which calls it), and {now}. Make the call before "
            "that, or build the average again"
        )
    return world


def wait_for_all(world: World, call: str, notice_seconds: float, seconds: float) -> None:
    """Collective: every rank must call it. It waits until all ranks have come to the same call.

    Args:
        world: the ranks.
        call: the name of the call.
        notice_seconds: the time after which rank 0 logs the ranks that it waits for.
        seconds: the time after which the call ends on all ranks, also on those that come later.

    Raises:
        CommunicationError: some rank did not come in time, or is gone; the same on all ranks.
        DistEMAError: some rank has left the call with it; the same on all ranks.
    """
    began = time.monotonic()

    def tell(waited: float) -> None:
        _log.warning(
            "%s: rank 0 has waited %.0f s for %s, and waits on, %.0f s at most. Every rank must make the same call",
            *(call, waited, _missing(world), seconds),
        )

    # No rank asks which ranks have come before some rank has waited for long.
    deeds = [Deed(min(_COME_SECONDS, notice_seconds / 4, seconds / 4), lambda waited: world.come(call))]
    if world.rank == 0:
        deeds.append(Deed(notice_seconds, tell, growth=_GROWTH))
    watch.begin(deeds)
    try:
        while True:
            try:
                world.link.make(began + seconds - time.monotonic())
                world.link.arrive(began + seconds - time.monotonic())
                return
            except RuntimeError as error:
                waited = time.monotonic() - began
                parting = Farewell(
                    world.num_calls, CommunicationError.__name__, _missed(world, call, waited), waited > 0.9 * seconds
                )
                said = world.link.leave(parting)
                world.renew()
                # The farewell may be of the former call: a rank may have left at its very end, when the others had
                # finished it.
                if not said.lives or said.call >= world.num_calls:
                    raise agreed(error_class(said.kind)(said.message)) from error
    finally:
        watch.end()


def _missed(world: World, call: str, waited: float) -> str:
    return (
        f"{call}: rank {world.rank} waited {waited:.0f} s, and not all {world.size} ranks came; it waited for "
        f"{_missing(world)}. Perhaps one died, or did something else. Every rank must make the same call, at the same "
        "place of the program: do not put it under `if is_main_process`, nor into a block of DDP's join(), which ranks "
        "with fewer batches leave early. If ranks may be further apart in time, set a larger DIST_EMA_ARRIVAL_SECONDS "
        "in the environment of all of them, or a longer timeout of the process group"
    )


def _missing(world: World) -> str:
    """The ranks that have not come, in words."""
    try:
        missing = world.missing()
    except RuntimeError:
        return "ranks that cannot be named: the store of the process group is gone"
    if not missing:
        return "ranks that came and are gone"
    named = [f"rank {rank}" for rank in missing[:_MOST_NAMED]]
    return ", ".join(named) + (f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else "")
