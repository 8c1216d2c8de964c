"""The waits of a call: for all ranks to come to it, and for the others within it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from dist_ema.checks import seconds_from_environment
from dist_ema.errors import CommunicationError
from dist_ema.messages import MOST_NAMED, first_of
from dist_ema.ranks.store.link import Farewell, Link
from dist_ema.ranks.worlds import World, this_world

__all__ = ["Wait", "arrival_seconds", "differing_calls", "merge_calls", "present_world"]

_log = logging.getLogger(__name__)

_NOTICE_SECONDS = 30.0
# A wait that goes on is logged again when it has become this many times as long.
_GROWTH = 10.0
# A wait within a call is logged so many times later: the others may have more to write.
_STAGE_FACTOR = 10.0
# A wait as long as this looks for machines that are gone.
_SILENCE_SECONDS = 30.0


def arrival_seconds() -> tuple[float, float]:
    """The seconds after which a wait is logged, and those after which it ends (0 if not set). Read at every use.

    Raises:
        ConfigError: one of the environment variables is not a number of seconds.
    """
    notice = seconds_from_environment("DIST_EMA_NOTICE_SECONDS", _NOTICE_SECONDS)
    return notice, seconds_from_environment("DIST_EMA_ARRIVAL_SECONDS", 0.0)


def present_world(call: str, rank: int, size: int) -> World:
    """The ranks that a call is made with. No communication, but a connection to the store.

    Args:
        call: the name of the call.
        rank: the rank of this process when the average was built.
        size: the number of ranks then.

    Raises:
        CommunicationError: the process group was destroyed.
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


class Wait:
    """The patience of one wait.

    Args:
        world: the ranks.
        link: the link in which the wait is.
        call: the name of the call.
        notice_seconds: the seconds after which rank 0 logs for which ranks it waits.
        seconds: the seconds after which the call ends on all ranks, also on those that come later.
        lost: the text for a wait that took too long, from the seconds waited, the missing ranks, and what they did.

    Attributes:
        link: as given.
        seconds: as given.
    """

    def __init__(
        self,
        world: World,
        link: Link,
        call: str,
        notice_seconds: float,
        seconds: float,
        lost: Callable[[float, str, str], str],
    ) -> None:
        self._world = world
        self.link = link
        self._call = call
        self._notice_seconds = notice_seconds
        self.seconds = seconds
        self._lost = lost

    @classmethod
    def for_all(cls, world: World, call: str, notice_seconds: float, seconds: float) -> Wait:
        """The wait for all ranks to come to a call."""

        def lost(waited: float, missing: str, doing: str) -> str:
            return (
                f"{call}: rank {world.rank} waited {waited:.0f} s, and not all {world.size} ranks came; it waited for "
                f"{missing}. Perhaps one died, or did something else. {doing}. Every rank must make the same call, at "
                "the same place of the program: do not put it under `if is_main_process`, nor into a block of DDP's "
                "join(), which ranks with fewer batches leave early. If ranks may be further apart in time, set a "
                "larger DIST_EMA_ARRIVAL_SECONDS in the environment of all of them, or a longer timeout of the "
                "process group"
            )

        return cls(world, world.link, call, notice_seconds, seconds, lost)

    @classmethod
    def within(cls, world: World, link: Link, action: str, notice_seconds: float) -> Wait:
        """The wait of a rank for the others, within a call that all have come to."""

        def lost(waited: float, missing: str, doing: str) -> str:
            return f"{action}: rank {world.rank} waited {waited:.0f} s for {missing}, within the call. {doing}"

        return cls(world, link, action, _STAGE_FACTOR * notice_seconds, world.stage_seconds, lost)

    def end_of(self, waited: float) -> Farewell | None:
        """See `dist_ema.ranks.worlds.Patience`."""
        if waited >= self.seconds:
            message = self._lost(waited, *self._world.missing(self.link, MOST_NAMED))
            return Farewell(self._world.num_calls, CommunicationError.__name__, message, lives=True)
        if waited >= _SILENCE_SECONDS:
            self._world.look_for_silence(self.link, MOST_NAMED)
        if self._world.rank == 0 and waited >= self._notice_seconds:
            self._notice_seconds = _GROWTH * waited
            missing, doing = self._world.missing(self.link, MOST_NAMED)
            _log.warning(
                "%s: rank 0 has waited %.0f s for %s, and waits on, %.0f s at most. %s. Every rank must make the same "
                "call",
                *(self._call, waited, missing, self.seconds, doing),
            )
        return None


Calls = dict[str, list[int]]  # name of a call -> how many ranks make it, and the first of them


def merge_calls(left: Calls, right: Calls) -> Calls:
    """The calls that two parts of the ranks have come to."""
    merged = dict(left)
    for name, (count, *ranks) in right.items():
        own_count, *own_ranks = merged.get(name, [0])
        merged[name] = [own_count + count, *[*own_ranks, *ranks][:MOST_NAMED]]
    return merged


def differing_calls(calls: Calls) -> str | None:
    """The message for ranks that have come to different calls; None if all have come to the same one."""
    if len(calls) == 1:
        return None
    common, *others = sorted(calls, key=lambda name: (-calls[name][0], calls[name][1]))

    def ranks(name: str) -> str:
        count, *first = calls[name]
        text = first_of(list(map(str, first)), count)
        return f"rank {text}" if count == 1 else f"ranks {text}"

    made = ", ".join(f"{ranks(name)} {name!r}" for name in (common, *others))
    return (
        f"the ranks differ in call: {common!r} against {', '.join(map(repr, others))} ({made}; {calls[common][0]} of "
        f"{sum(count for count, *_ in calls.values())} make {common!r}). Call the same methods on every rank, in one "
        "order"
    )
