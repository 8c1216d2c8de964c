"""Small messages by relays: all arrive, and nobody has many partners."""

from __future__ import annotations

import collections
from types import SimpleNamespace
from typing import Any

import pytest

from dist_ema.ranks import relays


class Simulated:
    """All ranks of a world, hop by hop, in one process: what they announce and send is kept in dicts."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.partners: list[collections.Counter[str]] = []

    def deliver(self, letters: list[list[tuple[int, bytes]]]) -> list[list[bytes]]:
        held, block = letters, 1
        while block < self.size:
            block *= relays.PARTNERS
            after: list[list[tuple[int, bytes]]] = [[] for _ in held]
            pairs = set()
            for rank, own in enumerate(held):
                for target, content in own:
                    stop = relays.next_hop(rank, target, block, self.size)
                    after[stop].append((target, content))
                    pairs.add((rank, stop))
            pairs = {(rank, stop) for rank, stop in pairs if rank != stop}
            self.partners.append(collections.Counter(stop for _, stop in pairs))
            held = after
        assert all(target == rank for rank, own in enumerate(held) for target, _ in own)
        return [[content for _, content in own] for own in held]


@pytest.mark.parametrize("size", [2, 31, 32, 33, 100, 1000, 1024, 1025, 2048, 5000])
def test_a_writer_of_a_norm_hears_from_few_ranks_and_gets_everything(size) -> None:
    for target in (0, size // 2, size - 1):
        simulated = Simulated(size)
        delivered = simulated.deliver([[(target, b"%d" % rank)] for rank in range(size)])
        assert sorted(delivered[target], key=int) == [b"%d" % rank for rank in range(size)]
        assert len(simulated.partners) <= 3
        assert max(max(of_hop.values(), default=0) for of_hop in simulated.partners) < 2 * relays.PARTNERS


def test_the_letters_of_many_targets_share_their_way() -> None:
    simulated = Simulated(1024)
    simulated.deliver([[(target, b"x") for target in range(0, 1024, 7)] for _ in range(1024)])
    assert max(max(of_hop.values()) for of_hop in simulated.partners) < relays.PARTNERS


def test_packed_letters_are_unpacked_as_they_were() -> None:
    letters = [(3, b""), (10**6, b"abc"), (3, bytes(1000))]
    assert relays._unpacked(bytearray(relays._packed(letters))) == letters
    assert relays._unpacked(bytearray()) == []


class Told:
    """Wires that note what goes over them; nobody else is there."""

    def __init__(self) -> None:
        self.targets: list[int] = []

    def announce(self, values: dict[int, Any]) -> None:
        self.targets += values

    def announced(self) -> list[tuple[int, Any]]:
        return []

    def pass_all(self, sending: Any, receiving: Any) -> None:
        assert [target for target, _ in sending] == self.targets and not receiving


def test_a_rank_without_a_letter_has_no_partner() -> None:
    wires, agreed = Told(), []
    exchange = SimpleNamespace(rank=5, world_size=1000, raise_together=lambda action, failure: agreed.append(action))
    assert relays.deliver(exchange, wires, "writing", []) == []
    assert relays.deliver(exchange, wires, "writing", [(5, b"own")]) == [b"own"]
    assert wires.targets == [] and len(agreed) == 4
