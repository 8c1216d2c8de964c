"""Only ranks that have bytes for each other exchange anything."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from dist_ema.checkpoint.parcels import Desk, Guard, Parcels, Part, Window
from dist_ema.disk.formats.byte_ranges import Strip


class Told:
    """Wires of one rank that note what goes over them; `answers` is what others have announced."""

    def __init__(self, answers: list[tuple[int, Any]]) -> None:
        self.answers = answers
        self.announcements: list[tuple[int, Any]] = []
        self.passed: list[tuple[list[int], list[int]]] = []
        self.contents: list[bytes] = []

    def announce(self, values: dict[int, Any]) -> None:
        self.announcements += values.items()

    def announced(self) -> list[tuple[int, Any]]:
        return self.answers

    def pass_all(self, sending: list[tuple[int, Callable[[], Any]]], receiving: dict[int, Any]) -> None:
        self.passed.append(([target for target, _ in sending], list(receiving)))
        self.contents += [bytes(make()) for _, make in sending]


def part(start: int, numel: int) -> Part:
    return Part(Strip(start, numel, numel, 1), torch.arange(numel, dtype=torch.uint8).view(1, -1), torch.uint8)


def passed(parcels: Parcels, wires: Told, num_files: int) -> Told:
    exchange = SimpleNamespace(world_size=64, agree=lambda action, work: work())
    parcels.announce(exchange, wires, "writing")
    for file in range(num_files):
        for window in parcels.windows(wires, file):
            tuple(window.stretches())
    return wires


def test_a_rank_without_short_pieces_announces_nothing_and_exchanges_nothing() -> None:
    wires = passed(Parcels(3, Guard()), Told([]), num_files=100)
    assert wires.announcements == [] and wires.passed == []


def test_what_stays_with_this_rank_is_not_sent() -> None:
    parcels = Parcels(3, Guard())
    parcels.put(0, 0, 3, part(0, 10))
    wires = passed(parcels, Told([]), num_files=1)
    assert wires.announcements == [] and wires.passed == []


def test_one_announcement_for_each_partner_and_rounds_only_where_there_are_bytes(monkeypatch) -> None:
    monkeypatch.setattr("dist_ema.checkpoint.parcels._EARLY_BYTES", 0)
    parcels = Parcels(3, Guard())
    for file, window, writer in ((0, 0, 1), (0, 7, 1), (2, 7, 60), (2, 7, 4)):
        parcels.put(file, window, writer, part(100 * window, 10))
    wires = passed(parcels, Told([]), num_files=1000)
    assert sorted(target for target, _ in wires.announcements) == [1, 4, 60]
    assert dict(wires.announcements)[1] == [(0, 0, 50), (0, 7, 50)]
    assert wires.passed == [([1], []), ([1], []), ([4, 60], [])]
    assert [len(content) for content in wires.contents] == [50] * 4


def test_few_bytes_of_many_windows_go_in_one_round_and_many_bytes_in_their_own() -> None:
    parcels = Parcels(3, Guard())
    parts = [part(10, 10), part(1000, 10), part(2000, 2**17)]  # of 64 ranks each may send 128 KiB at once
    for file, window, writer, index in ((0, 1, 1, 0), (0, 7, 1, 1), (0, 5, 4, 0), (0, 7, 4, 2), (0, 8, 3, 0)):
        parcels.put(file, window, writer, parts[index])
    wires = passed(parcels, Told([]), num_files=1)
    announced = {target: sorted(rounds) for target, rounds in wires.announcements}
    assert announced == {1: [(0, 0, 92)], 4: [(0, 5, 50), (0, 7, 40 + 2**17)]}
    assert wires.passed == [([1], []), ([4], []), ([4], [])]
    window = Window(Desk())
    window.put_message(np.frombuffer(wires.contents[0], np.uint8))
    assert [(start, bytes(content)) for start, content in window.stretches()] == [
        (10, bytes(range(10))),
        (1000, bytes(range(10))),
    ]


def test_bytes_far_apart_are_put_together_without_the_memory_between_them() -> None:
    desk = Desk()
    window = Window(desk)
    rows = torch.arange(6, dtype=torch.uint8).view(3, 2)
    columns = [Part(Strip(2**40 + 2 * at, 2, 4, 3), rows + 6 * at, torch.uint8) for at in (0, 1)]
    window.put_parts([part(2**50, 3), *columns, part(0, 5), part(5, 4)])
    assert [(start, bytes(content)) for start, content in window.stretches()] == [
        (0, bytes([0, 1, 2, 3, 4, 0, 1, 2, 3])),
        (2**40, bytes([0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11])),
        (2**50, bytes([0, 1, 2])),
    ]
    assert desk.num_bytes < 100


def test_a_rank_that_has_failed_sends_as_much_as_it_announced_and_takes_what_comes() -> None:
    guard = Guard()
    parcels = Parcels(3, guard)
    parcels.put(0, 0, 1, part(0, 10))
    guard.failure = MemoryError()
    wires = passed(parcels, Told([(5, [[0, 0, 1000]])]), num_files=1)
    assert wires.passed == [([1], [5])]
    assert len(wires.contents[0]) == 50 and np.frombuffer(wires.contents[0][:8], np.int64) == [0], "and no strips"
