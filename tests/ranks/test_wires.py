"""Point to point: every pattern of messages comes through, over few descriptors, and a lost rank is no hang."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from typing import Any

import pytest
import torch

from dist_ema.ranks.wires import addresses, tasks
from dist_ema.ranks.wires import wires as wires_of_threads
from dist_ema.ranks.wires.outgoing import Outgoing
from dist_ema.ranks.wires.wires import MOST_ACCEPTED, WireError, Wires

MOST_OPEN = MOST_ACCEPTED + 2


class Board:
    """What ranks have posted, for the threads of one test. It has no lock, which an interrupt could leave locked."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.failure: BaseException | None = None

    def wires(self, rank: int, **options: Any) -> Wires:
        return Wires(rank, self, **options)

    def look_up(self, key: str) -> str:
        while key not in self.texts:
            self.check()
            time.sleep(0.001)
        return self.texts[key]

    def post(self, key: str, text: str) -> None:
        self.texts[key] = text

    def forget(self, key: str) -> None:
        self.texts.pop(key, None)  # as a store does

    def check(self) -> None:
        if self.failure is not None:
            raise ConnectionError("the call has ended on another rank")


def run(num_ranks: int, case: Callable[[Wires, int], Any], seconds: float = 60) -> list[Any]:
    """Run a case on ranks that are threads; their results. The first failure ends it on all of them."""
    board, results = Board(), [None] * num_ranks

    def serve(rank: int) -> None:
        own = board.wires(rank)
        try:
            results[rank] = case(own, rank)
        except BaseException as error:
            board.failure = board.failure or error
        finally:
            own.close()

    threads = [threading.Thread(target=serve, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if board.failure is not None:
        raise board.failure
    assert not any(thread.is_alive() for thread in threads), "it hangs"
    return results


def num_open() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def nothing_left_open() -> Iterator[None]:
    before = num_open()
    yield
    deadline = time.monotonic() + 5
    while num_open() > before and time.monotonic() < deadline:  # the threads of other ranks end on their own
        time.sleep(0.01)
    assert num_open() <= before


def pattern(source: int, target: int, size: int) -> torch.Tensor:
    return torch.arange(source + 3 * target, source + 3 * target + size, dtype=torch.int32).to(torch.uint8)


def exchange(own: Wires, rank: int, size_of: Callable[[int, int], int | None], num_ranks: int) -> None:
    """Every rank sends what `size_of(source, target)` says, and checks what it gets."""
    others = [other for other in range(num_ranks) if other != rank]
    sending = [(other, size) for other in others if (size := size_of(rank, other)) is not None]
    sources = {other: size for other in others if (size := size_of(other, rank)) is not None}
    inbox = {source: torch.full((size,), 255, dtype=torch.uint8) for source, size in sources.items()}
    own.pass_all(((other, lambda other=other, size=size: pattern(rank, other, size)) for other, size in sending), inbox)
    for source, values in inbox.items():
        assert torch.equal(values, pattern(source, rank, len(values)))


def test_a_message_of_any_size_arrives_bit_by_bit() -> None:
    sizes = (0, 1, 7, 2**16, 0, 2**20 + 1, 2**26)

    def case(own: Wires, rank: int) -> None:
        for size in sizes:
            if rank == 0:
                own.send(pattern(0, 1, size), 1)
            else:
                values = torch.zeros(size, dtype=torch.uint8)
                own.receive(values.numpy() if size % 2 else values, 0)
                assert torch.equal(values, pattern(0, 1, size))

    with nothing_left_open():
        run(2, case)


@pytest.mark.parametrize(
    ("name", "num_ranks", "size_of"),
    [
        ("40 to one", 40, lambda source, target: 5000 + source if target == 0 else None),
        ("one to 40", 40, lambda source, target: 5000 + target if source == 0 else None),
        ("all to all of 16", 16, lambda source, target: 100 * source + target),
        ("large both ways", 2, lambda source, target: 2**25),
        ("a ring of large ones", 5, lambda source, target: 2**23 if (source + 1) % 5 == target else None),
        ("all nothing", 12, lambda source, target: 0),
    ],
)
def test_no_pattern_hangs_or_mixes_up_messages(name, num_ranks, size_of) -> None:
    with nothing_left_open():
        run(num_ranks, lambda own, rank: exchange(own, rank, size_of, num_ranks))


def test_ranks_that_are_rounds_apart_do_not_take_each_others_messages() -> None:
    """Twelve ranks are quick and come many rounds ahead of a slow one, whose few places they would fill."""

    def of_round(number: int, source: int, target: int) -> int | None:
        return number if (source + number) % 3 == 0 else None

    def case(own: Wires, rank: int) -> None:
        for number in range(12):
            if rank == 0:
                time.sleep(0.02)
            exchange(own, rank, functools.partial(of_round, number), 13)

    with nothing_left_open():
        run(13, case)


def test_messages_are_received_in_the_order_that_the_receiver_likes() -> None:
    """More ranks wait than places are there, and the one that is expected comes last."""

    def case(own: Wires, rank: int) -> None:
        for number in range(3):
            if rank != 0:
                own.send(bytes([rank, number]), 0)
                continue
            for source in reversed(range(1, 20)):
                values = bytearray(2)
                own.receive(values, source)
                assert values == bytes([source, number])

    with nothing_left_open():
        run(20, case)


def test_a_message_that_nobody_wants_any_more_is_received_and_forgotten() -> None:
    def case(own: Wires, rank: int) -> None:
        own.pass_all([(1 - rank, lambda: bytes(3 * 2**20 + 5))], {1 - rank: 3 * 2**20 + 5})
        exchange(own, rank, lambda source, target: 9, 2)

    run(2, case)


def test_a_message_of_another_size_than_expected_is_an_error() -> None:
    with nothing_left_open(), pytest.raises(WireError, match="rank 0 sends 5 bytes, and rank 1 expects 4"):
        run(2, lambda own, rank: own.send(b"12345", 1) if rank == 0 else own.receive(bytearray(4), 0))


def test_messages_are_made_one_by_one() -> None:
    """Else the memory for all of them would be needed at once."""
    made: list[int] = []

    def case(own: Wires, rank: int) -> None:
        if rank == 0:
            own.pass_all(((target, lambda target=target: (made.append(target), b"x")[1]) for target in (1, 2)), {})
        elif rank == 1:
            time.sleep(0.3)
            assert made == [1]
            own.receive(bytearray(1), 0)
        else:
            own.receive(bytearray(1), 0)

    run(3, case)


def send_from_many(text: str, num_ranks: int, size: int) -> None:
    """A process whose threads are ranks 1 to `num_ranks` - 1, which all send to rank 0."""
    board = Board()
    board.texts["address/0"] = text
    threads = [threading.Thread(target=board.wires(rank).send, args=(bytes(size), 0)) for rank in range(1, num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextlib.contextmanager
def beside(work: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """Another process."""
    process = get_context("fork").Process(target=work, args=arguments, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        process.close()


def test_few_descriptors_are_open_whatever_the_number_of_ranks() -> None:
    board, seen, size = Board(), [], 2**20
    own = board.wires(0)
    own._listen()
    with beside(send_from_many, board.texts["address/0"], 41, size):
        before = num_open() - 1  # the listener is open
        step = own._tasks.step
        own._tasks.step = lambda paused: (step(paused), seen.append(num_open() - before))
        try:
            own.pass_all((), {rank: bytearray(size) for rank in range(1, 41)})
        finally:
            own.close()
        assert num_open() == before
    assert MOST_ACCEPTED <= max(seen) <= MOST_ACCEPTED + 1


@pytest.mark.parametrize("num_ranks", [MOST_ACCEPTED + 1, MOST_ACCEPTED + 2])
def test_a_connection_to_a_rank_is_kept_where_all_ranks_have_a_place(monkeypatch, num_ranks) -> None:
    """With one rank more, a kept connection would take the place of a rank that is waited for."""
    connected, kept = [], []
    monkeypatch.setattr(Board, "wires", lambda board, rank: Wires(rank, board, num_ranks=num_ranks))
    connect = Outgoing._connect
    monkeypatch.setattr(Outgoing, "_connect", lambda own, target: (connected.append(target), connect(own, target))[1])

    def rounds(wires: Wires, rank: int) -> None:
        others = [other for other in range(num_ranks) if other != rank]
        for number in range(5):
            received = {other: bytearray(3) for other in others}
            wires.pass_all([(other, lambda number=number: bytes([rank, number, 7])) for other in others], received)
            assert received == {other: bytes([other, number, 7]) for other in others}
        kept.append(len(wires._outgoing._connections))

    run(num_ranks, rounds)
    if num_ranks == MOST_ACCEPTED + 1:
        assert len(connected) == num_ranks * MOST_ACCEPTED and kept == [MOST_ACCEPTED] * num_ranks
    else:
        assert set(kept) == {1}


def sent_until_killed(text: str) -> None:
    """A rank that is killed in the middle of its message."""
    board = Board()
    board.texts["address/0"] = text
    threading.Timer(0.3, os._exit, [1]).start()
    board.wires(1).pass_all(itertools.repeat((0, lambda: bytes(2**20))), {})


def test_a_rank_that_dies_in_the_middle_of_a_message_is_an_error_at_once() -> None:
    board = Board()
    own = board.wires(0)
    own._listen()
    # It may die between two messages. Then only the other ranks can tell.
    timer = threading.Timer(2, setattr, (board, "failure", OSError()))
    timer.start()
    began = time.perf_counter()
    with nothing_left_open(), beside(sent_until_killed, board.texts["address/0"]):
        with pytest.raises((WireError, ConnectionError), match=r"rank 1 was lost|ended on another rank"):
            while True:
                own.receive(bytearray(2**20), 1)
        own.close()
    timer.cancel()
    assert time.perf_counter() - began < 5


def test_a_rank_that_is_gone_is_named_with_the_addresses_that_were_tried() -> None:
    board = Board()
    gone = board.wires(1)
    gone._listen()
    text = board.texts["address/1"]
    gone.close()
    board.texts["address/1"] = text
    own = board.wires(0)
    began = time.perf_counter()
    with (
        nothing_left_open(),
        pytest.raises(WireError, match=r"to rank 1, port \d+; it tried 127\.0\.0\.1 \(Conn") as caught,
    ):
        own.send(b"1", 1)
    assert "GLOO_SOCKET_IFNAME" in str(caught.value)
    assert time.perf_counter() - began < 5


def test_a_wait_ends_when_the_call_has_ended_on_another_rank() -> None:
    def case(own: Wires, rank: int) -> None:
        if rank == 0:
            time.sleep(0.2)
            raise ZeroDivisionError
        own.receive(bytearray(1), 0)

    began = time.perf_counter()
    with nothing_left_open(), pytest.raises(ZeroDivisionError):
        run(3, case)
    assert time.perf_counter() - began < 2


def test_a_wait_without_any_progress_ends() -> None:
    own = Board().wires(0, patience_seconds=0.1)
    with nothing_left_open(), pytest.raises(WireError, match=r"for 0.1 s, and waits for the messages of 1 ranks .*\[5"):
        try:
            own.receive(bytearray(1), 5)
        finally:
            own.close()


@pytest.mark.parametrize("name", ["silent", "leaving", "talking", "guessing"])
def test_strangers_who_connect_do_no_harm_and_keep_nobody_out(name) -> None:
    """More of them than there are places; a scan of the ports, or a process that took a wrong address."""
    strangers: list[socket.socket] = []

    def visit(port: int) -> None:
        for _ in range(2 * MOST_ACCEPTED):
            strangers.append(socket.create_connection(("127.0.0.1", port), 5))
            if name == "leaving":
                strangers.pop().close()
            elif name != "silent":
                strangers[-1].sendall(b"GET / HTTP/1.1\r\n" if name == "talking" else bytes(64))

    def case(own: Wires, rank: int) -> None:
        if rank == 0:
            own._listen()
            visit(own._listener.getsockname()[1])
        exchange(own, rank, lambda source, target: 1000, 3)

    began = time.perf_counter()
    with nothing_left_open():
        run(3, case)
        for stranger in strangers:
            stranger.close()
    assert time.perf_counter() - began < 10


def test_a_stranger_at_the_address_of_a_rank_gets_no_message() -> None:
    """The port may be another process's by then, or the address another host's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        got: list[bytes] = []

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        got.append(connection.recv(2**16))
                        connection.sendall(got[-1] + bytes(64))

        threading.Thread(target=answer, daemon=True).start()
        board = Board()
        text = [addresses.host_identity(), [], server.getsockname()[1], "00" * 16, "11" * 16]
        board.texts["address/1"] = json.dumps(text)
        own = board.wires(0)
        with pytest.raises(WireError, match="another process answers"):
            own.send(b"secret" * 1000, 1)
        server.close()
    assert all(b"secret" not in content for content in got)


def test_the_wrong_addresses_of_a_rank_are_passed_over() -> None:
    board = Board()
    own, other = board.wires(0), board.wires(1)
    other._listen()
    _, _, *rest = json.loads(board.texts["address/1"])
    board.texts["address/1"] = json.dumps(["elsewhere", ["192.0.2.1", "::1", "127.0.0.1"], *rest])
    thread = threading.Thread(target=lambda: own.send(b"12", 1), daemon=True)
    thread.start()
    values = bytearray(2)
    with nothing_left_open():
        other.receive(values, 0)
        thread.join()
        own.close()
        other.close()
    assert values == b"12"


class Interrupt(BaseException):
    """What a signal handler raises."""


# A socket that Python was just making is closed when the traceback is forgotten, with a warning.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_moment_leaves_nothing_open(monkeypatch) -> None:
    monkeypatch.setattr(tasks, "_CHECK_SECONDS", 0.01)

    def interrupt(*_: object) -> None:
        raise Interrupt

    former = signal.signal(signal.SIGALRM, interrupt)
    num_interrupted = 0
    try:
        for number in range(100):
            before, board = num_open(), Board()
            own, others = board.wires(0), [board.wires(rank) for rank in (1, 2)]
            threads = [
                threading.Thread(target=exchange_until_the_end, args=(other, rank, 3))
                for rank, other in enumerate(others, start=1)
            ]
            for thread in threads:
                thread.start()
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.0002 * number)
                try:
                    exchange_forever(own, 0, 3)
                finally:
                    own.close()
            except Interrupt:
                num_interrupted += 1
            board.failure = Interrupt()
            for thread in threads:
                thread.join()
            deadline = time.monotonic() + 2.0
            while num_open() != before and time.monotonic() < deadline:
                time.sleep(0.001)  # a thread that was opening a socket closes it
            assert num_open() == before, f"interrupt number {number}"
    finally:
        signal.signal(signal.SIGALRM, former)
    assert num_interrupted == 100


def exchange_forever(own: Wires, rank: int, num_ranks: int) -> None:
    while True:
        exchange(own, rank, lambda source, target: 300, num_ranks)


def exchange_until_the_end(own: Wires, rank: int, num_ranks: int) -> None:
    with contextlib.suppress(Exception):
        exchange_forever(own, rank, num_ranks)
    own.close()


def test_an_interrupt_ends_a_wait_at_once() -> None:
    def interrupt(*_: object) -> None:
        raise Interrupt

    former = signal.signal(signal.SIGALRM, interrupt)
    own = Board().wires(0)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        began = time.perf_counter()
        with nothing_left_open(), pytest.raises(Interrupt):
            try:
                own.receive(bytearray(1), 1)
            finally:
                own.close()
        assert time.perf_counter() - began < 0.3
    finally:
        signal.signal(signal.SIGALRM, former)


def test_a_thread_behind_training_needs_no_further_thread_for_its_sockets() -> None:
    opened_by: list[int] = []

    def opened() -> socket.socket:
        opened_by.append(threading.get_ident())
        return socket.socket()

    def save() -> None:
        sockets = tasks.Sockets(wires_of_threads._insist)
        sockets.open(opened)
        sockets.close_all()

    thread = threading.Thread(target=save)
    thread.start()
    thread.join()
    assert opened_by == [thread.ident]
