"""Agreements through a store: one outcome for all ranks, whoever comes late, leaves, or brings nonsense."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dist_ema.ranks.store import link as links
from dist_ema.ranks.store.link import Farewell, LeftError, Link
from dist_ema.ranks.store.shared_store import SharedStore


@pytest.fixture(params=["tcp", "file"])
def store(request, tmp_path: Path) -> Iterator[Any]:
    """Each store that processes may share."""
    if request.param == "tcp":
        yield dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    else:
        yield dist.FileStore(str(tmp_path / "store"), -1)


def on_ranks(store: Any, size: int, life: Callable[[Link, SharedStore], Any]) -> list[Any]:
    """What `life` returned on each rank, or the farewell that it met."""
    results: list[Any] = [None] * size
    have_left = threading.Barrier(size)

    def run(rank: int) -> None:
        client, link = SharedStore(store, "test", 20.0), Link("calls/1", rank, size)
        try:
            results[rank] = life(link, client)
        except LeftError as error:
            results[rank] = error.farewell
        have_left.wait(20)
        link.clear(client)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def joined(left: list[int], right: list[int]) -> list[int]:
    return left + right


@pytest.mark.parametrize(("size", "fan_in"), [(2, 128), (5, 2), (9, 3)])
def test_values_are_combined_in_the_order_of_the_ranks_on_every_level(store, monkeypatch, size, fan_in) -> None:
    monkeypatch.setattr(links, "FAN_IN", fan_in)

    def life(link: Link, client: SharedStore) -> list[Any]:
        rank = link._rank
        return [
            *(link.combine(client, [rank, turn], joined) for turn in range(3)),
            link.broadcast(client, "first" if rank == 0 else "not mine"),
            link.broadcast(client, {"second": 2.5}),
            link.combine(client, [rank], joined, on_rank_0=True),
            link.combine(client, float("inf"), max),
        ]

    first, *others = on_ranks(store, size, life)
    for turn in range(3):
        assert first[turn] == [number for rank in range(size) for number in (rank, turn)]
    assert first[3:] == ["first", {"second": 2.5}, list(range(size)), float("inf")]
    assert all(other == [*first[:5], None, first[6]] for other in others)


def test_texts_longer_than_a_request_may_be_arrive_whole(store) -> None:
    text = "0123456789abcdef" * 2**16 * 10  # 10 MiB; torch's server drops a client that sends 8 MiB

    def life(link: Link, client: SharedStore) -> bool:
        combined = link.combine(client, text + str(link._rank), max)
        return bool(combined == text + "1" and link.broadcast(client, text) == text)

    assert on_ranks(store, 2, life) == [True, True]


def test_a_farewell_is_the_outcome_for_all_also_for_the_rank_that_comes_later(store) -> None:
    def life(link: Link, client: SharedStore) -> Any:
        link.combine(client, 0, max)
        if link._rank == 1:
            time.sleep(0.1)
            link.leave(client, Farewell(7, "CheckpointError", "no space", lives=True))
        if link._rank == 2:
            time.sleep(0.3)
        return link.combine(client, 0, max)

    farewell = Farewell(7, "CheckpointError", "no space", lives=True)
    assert on_ranks(store, 3, life) == [farewell] * 3


def test_two_ranks_that_leave_at_once_leave_for_one_reason(store) -> None:
    def life(link: Link, client: SharedStore) -> Any:
        link.combine(client, 0, max)
        return link.leave(client, Farewell(1, "CommunicationError", f"rank {link._rank}", lives=True))

    farewells = on_ranks(store, 4, life)
    assert len(set(farewells)) == 1


def test_a_farewell_that_took_longer_than_its_rank_waited_for_it_reaches_the_others(store) -> None:
    """On a busy machine it was not sent at all, and the others waited for half an hour."""
    own = Farewell(1, "CommunicationError", "interrupted", lives=True)

    def life(link: Link, client: SharedStore) -> Any:
        if link._rank == 1:
            link.forget(own)
            return link.leave(client, own)
        return link.combine(client, 0, max)

    assert on_ranks(store, 2, life) == [own, own]


def test_a_farewell_after_a_broadcast_that_others_have_passed_reaches_them(store) -> None:
    """Rank 0 does not wait in a broadcast: the farewell must not take the place of a verdict that others have read."""

    def life(link: Link, client: SharedStore) -> Any:
        link.combine(client, 0, max)
        if link._rank == 2:
            time.sleep(0.3)  # the others have the broadcast by now
            return link.leave(client, Farewell(1, "CommunicationError", "interrupted", lives=True))
        return [link.broadcast(client, "value"), link.combine(client, 0, max)]

    assert {result.message for result in on_ranks(store, 3, life)} == {"interrupted"}


def test_values_that_cannot_be_combined_end_the_agreement_on_all_ranks(store) -> None:
    results = on_ranks(store, 3, lambda link, client: link.combine(client, [1] if link._rank else "text", joined))
    assert len(set(results)) == 1 and "TypeError" in results[0].message


def test_a_link_leaves_nothing_in_the_store(monkeypatch) -> None:
    """A run of days makes many calls, and a failed one must not leave its texts either."""
    monkeypatch.setattr(links, "FAN_IN", 3)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    before = store.num_keys()

    def life(link: Link, client: SharedStore) -> Any:
        for _ in range(3):
            link.combine(client, "x" * 40_000, max)
            link.broadcast(client, "y")
        if link._rank == 5:
            return link.leave(client, Farewell(1, "CommunicationError", "gone", lives=True))
        return link.combine(client, 0, max)

    on_ranks(store, 8, life)
    assert store.num_keys() == before


def test_the_missing_ranks_are_named_up_to_a_number_and_counted_beyond(store, monkeypatch) -> None:
    monkeypatch.setattr(links, "FAN_IN", 4)
    late = {1, 6, 7, 8, 9, 10, 11}
    told: list[Any] = []

    def life(link: Link, client: SharedStore) -> Any:
        link.combine(client, 0, max)
        if link._rank == 1:
            deadline = time.monotonic() + 10
            while not told or told[-1][1] != len(late):
                told.append(link.missing(client, 4))
                assert time.monotonic() < deadline, told[-1]
        if link._rank in late:
            while not told or told[-1][1] != len(late):
                time.sleep(0.01)
        return link.combine(client, 0, max)

    on_ranks(store, 12, life)
    assert told[-1] == ([1, 6, 7, 8], 7)


def test_a_look_at_a_text_that_is_not_there_yet_ends_nobodys_wait_for_it(store) -> None:
    """torch's TCPStore ends the waits for a key whenever a comparison finds nothing under it."""
    waiting, looking = (SharedStore(store, "test", 20.0) for _ in range(2))
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(waiting.take("key")))
    thread.start()
    for _ in range(20):
        assert looking.look("key") is None
        looking._store.compare_set("test/key", "other", "other")
        time.sleep(0.01)
    assert texts == []
    looking.put("key", "text")
    thread.join(10)
    assert texts == [looking.look("key")] == ["text"]
