"""Which tensors have infinities, live or averaged, so that only these are averaged with care. No communication.

A mask of minus infinities, frozen or in a buffer, must stay what it is; but `lerp(-inf, -inf)` is not a number. Watched
tensors are averaged with a second pass, which the other tensors must not pay for. So this package looks at all averages
once, after they were copied or loaded. A tensor that trains counts as it was then: if it overflows later, it may spoil
its average. A tensor that takes no gradient (a frozen parameter, a buffer) is watched from when it changes, which torch
counts, until it has stood still for an update and was looked at again. Torch does not count what is written through
`.data`: such an average may be spoilt until it is used, and is then mended.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dist_ema.averaging.averages import Averages
from dist_ema.averaging.streams import has_streams
from dist_ema.boxes.shards import Shard
from dist_ema.uninterrupted.jobs import version_of

__all__ = ["Watch", "is_mask", "masks_of"]

# The infinities that `skip_nonfinite` takes as values, and not as an overflow. Statistics in a buffer overflow upwards.
_OF_TRAINED: tuple[float, ...] = ()
_OF_BUFFER: tuple[float, ...] = (-math.inf,)
_OF_FROZEN: tuple[float, ...] = (-math.inf, math.inf)


def masks_of(shard: Shard) -> tuple[float, ...]:
    """The infinities of a tensor that are no overflow."""
    if shard.held.spec.is_buffer:
        return _OF_BUFFER
    return _OF_TRAINED if shard.held.takes_gradient else _OF_FROZEN


def is_mask(live: torch.Tensor, masks: Sequence[float]) -> torch.Tensor:
    """Where the live values are one of `masks`."""
    at_mask = torch.zeros_like(live, dtype=torch.bool)
    for infinity in masks:
        at_mask |= live == infinity
    return at_mask


class _Untrained(NamedTuple):
    """The shards that take no gradient; every list has one entry for each of them.

    Attributes:
        indices: the indices of these shards.
        views: the live tensors that they lie in.
        looked: the versions of the live tensors at the latest look; None before the first look.
        latest: the versions of the live tensors at the latest update.
    """

    indices: list[int]
    views: list[torch.Tensor]
    looked: list[Any]
    latest: list[Any]


_NOTHING = _Untrained([], [], [], [])


class Watch:
    """The shards to be watched.

    Args:
        shards: the shards of the averages.
        tracks: the averages.
        is_free: whether watching costs nothing more: then what takes no gradient is always watched.

    Attributes:
        due: shards to be looked at again after the update, and the versions of their live tensors.
    """

    def __init__(self, shards: Sequence[Shard], tracks: Sequence[Averages], *, is_free: bool = False) -> None:
        self._is_free = is_free
        self._shards = shards
        self._tracks = tracks
        self._infinite: frozenset[int] = frozenset()
        self._look: _Look | None = None
        self._is_known = False
        self._untrained = _NOTHING  # replaced as a whole: an interrupt may come anywhere
        self.due: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which looks at everything anew before its next update."""
        return self.__dict__ | {"_look": None, "_is_known": False, "_untrained": _NOTHING, "due": {}}

    def forget(self) -> None:
        """Before averages are copied or loaded: the next update looks at all of them, unless `look` has."""
        self._is_known = False

    @torch.no_grad()
    def look(self) -> None:
        """Look at all averages, after they were copied or loaded; the host does not wait."""
        self.follow()
        versions = list(map(_version, self._untrained.views))
        look = _Look(
            range(len(self._shards)),
            [pair for track in self._tracks for pair in enumerate(track.values)],
            is_of_all=True,
        )
        self._untrained = self._untrained._replace(looked=versions)
        self._look = look
        self._is_known = True

    @torch.no_grad()
    def look_again(self, due: Mapping[int, Any]) -> None:
        """Look at live tensors that have stood still: their averages have the same infinities by now.

        The host does not wait.
        """
        look = _Look(due, [(index, self._shards[index].observed()) for index in due])
        now = self._untrained
        self._look = look
        looked = [due.get(index, former) for index, former in zip(now.indices, now.looked, strict=True)]
        self._untrained = now._replace(looked=looked)

    def follow(self) -> None:
        """Take the live tensors anew: their memory may have been replaced, or they may train by now."""
        known = {index: (view, looked, latest) for index, view, looked, latest in zip(*self._untrained, strict=True)}
        indices = [index for index, shard in enumerate(self._shards) if masks_of(shard)]
        views = [self._shards[index].held.view() for index in indices]
        former = [known.get(index, (None, None, None)) for index in indices]
        versions = [entry[1:] if entry[0] is view else (None, None) for entry, view in zip(former, views, strict=True)]
        self._untrained = _Untrained(
            indices, views, [looked for looked, _ in versions], [latest for _, latest in versions]
        )

    @property
    def is_idle(self) -> bool:
        """Whether `watched` would look at nothing, and find nothing."""
        return self._is_known and self._look is None and not self._untrained.indices and not self._infinite

    def watched(self) -> frozenset[int]:
        """The shards to be watched at the update that begins; waits for the device after a copy or load."""
        if not self._is_known:
            self.look()
        look = self._look
        if look is not None and (look.is_of_all or look.is_ready()):
            self._infinite = self._infinite.difference(look.indices).union(look.infinite())
            self._look = None
        now = self._untrained
        if not now.indices:
            return self._infinite
        if self._is_free:
            return self._infinite.union(now.indices)
        versions = list(map(_version, now.views))
        if versions == now.looked:
            self.due = {}
            return self._infinite
        rows = list(zip(now.indices, versions, now.looked, now.latest, strict=True))
        changed = [index for index, version, looked, _ in rows if version != looked]
        if any(not masks_of(self._shards[index]) for index in changed):  # one of them trains now
            self.follow()
            return self.watched()
        still = {index: version for index, version, looked, latest in rows if version == latest != looked}
        self.due = {} if self._look is not None else still  # one look at a time
        self._untrained = now._replace(latest=versions)
        return self._infinite.union(changed)

    @torch.no_grad()
    def mend(self) -> None:
        """Set averages that an unnoticed infinity has spoilt to the live values, if these take no gradient."""
        for track in self._tracks if self._untrained.indices else ():
            values = track.values
            for index in self._untrained.indices:
                spoilt = values[index].isnan()
                if spoilt.any():
                    live = self._shards[index].observed().to(values[index].device, values[index].dtype)
                    values[index].copy_(torch.where(spoilt, live, values[index]))


class _Look:
    """Whether tensors are all finite, on the way to the host. A NaN counts too: it may hide an infinity."""

    def __init__(
        self, indices: Iterable[int], values: Iterable[tuple[int, torch.Tensor]], *, is_of_all: bool = False
    ) -> None:
        self.indices = list(indices)
        self.is_of_all = is_of_all
        self._ends: list[tuple[list[int], torch.Tensor]] = []
        self._arrivals: list[Any] = []
        of_devices: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
        for index, value in values:
            if value.numel():
                of_devices.setdefault(value.device, []).append((index, value))
        for device, pairs in of_devices.items():
            # No infinity escapes a sum, and no pass is cheaper. A sum that overflows only costs a second pass later.
            ends = torch.stack([_sum(value).isfinite() for _, value in pairs])
            if device.type == "cuda":
                host = torch.empty(ends.shape, dtype=ends.dtype, device="cpu", pin_memory=True)
                ends = host.copy_(ends, non_blocking=True)
            if device.type != "cpu" and has_streams(device):
                of = torch.get_device_module(device)
                self._arrivals.append(of.Event())
                self._arrivals[-1].record(of.current_stream(device))
            self._ends.append(([index for index, _ in pairs], ends))

    def is_ready(self) -> bool:
        """Whether `infinite` would not wait."""
        return all(arrival.query() for arrival in self._arrivals)

    def infinite(self) -> set[int]:
        """The indices of the shards that may have an infinity; waits for the device."""
        for arrival in self._arrivals:
            arrival.synchronize()
        return {
            index
            for indices, ends in self._ends
            for index, is_finite in zip(indices, ends.tolist(), strict=True)
            if not is_finite
        }


def _sum(value: torch.Tensor) -> torch.Tensor:
    return value.sum(dtype=torch.promote_types(value.dtype, torch.float32))


def _version(value: torch.Tensor) -> Any:
    return 0 if value.is_inference() else version_of(value)
