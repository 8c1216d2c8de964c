"""A rank that comes late, leaves a call halfway, or is in another place: all ranks are told alike, and go on."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts_zoo import build_layout, set_whole
from ranks import World
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from twins import assert_same_bits

from dist_ema import (
    CommunicationError,
    ConfigError,
    ConstantSchedule,
    DistEMAError,
    RankMismatchError,
    ShardedEMA,
)
from dist_ema.checkpoint import parcels, save_calls
from dist_ema.disk.formats.checksums import PartialChecksums
from dist_ema.live.holders.replicas import Replicas
from dist_ema.ranks import worlds
from dist_ema.ranks.store.link import Link

SCHEDULE = ConstantSchedule(momentum=0.25)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Variables of the package on this rank, by the end of their names."""
    names = {f"DIST_EMA_{name.upper()}_SECONDS": value for name, value in values.items()}
    os.environ.update(names)
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert record.levelno == logging.WARNING
        self.told.append(record.getMessage())

    def __enter__(self) -> Log:
        logging.getLogger("dist_ema").addHandler(self)
        return self

    def __exit__(self, *exc: object) -> None:
        logging.getLogger("dist_ema").removeHandler(self)


def averaging(layout: str = "ddp") -> ShardedEMA:
    model = build_layout(layout)
    ema = ShardedEMA(model, SCHEDULE)
    for step in range(2):
        set_whole(model, step)
        ema.update()
    return ema


def swapped(ema: ShardedEMA, folder: str) -> None:
    with ema.average_parameters():
        pass


CALLS: dict[str, Callable[[ShardedEMA, str], object]] = {
    "save": lambda ema, folder: ema.save(folder),
    "snapshot": lambda ema, folder: ema.snapshot(folder + "-all"),
    "consolidate": lambda ema, folder: ema.consolidate(folder + "-export"),
    "load": lambda ema, folder: ema.load(folder + "-good"),
    "start_from": lambda ema, folder: ema.start_from(folder + "-good/model.safetensors"),
    "metrics": lambda ema, folder: ema.metrics(),
    "num_refused": lambda ema, folder: ema.num_refused(),
    "full_state_dict": lambda ema, folder: ema.full_state_dict(),
    "average_parameters": swapped,
    "ShardedEMA": lambda ema, folder: ShardedEMA(build_layout("plain"), SCHEDULE),  # DDP would wait itself
}


# Errors that a program holds on to, with their tracebacks: no connection may stay open because of one.
KEPT: list[BaseException] = []


def caught(call: Callable[[], object]) -> tuple[str, str, float]:
    """Class and text of the error, and the seconds until it came."""
    began = time.monotonic()
    try:
        call()
    except BaseException as error:
        KEPT.append(error)
        return type(error).__name__, str(error), time.monotonic() - began
    return "", "", time.monotonic() - began


def whole_life(ema: ShardedEMA, folder: str) -> None:
    """What all ranks call after a failure, with the average that saw it and with a new one."""
    ema.save(folder)
    ema.save(folder, background=True)
    ema.wait()
    new = averaging()
    new.load(folder)
    assert new.num_updates == ema.num_updates
    ours, theirs = ema.full_state_dict(), new.full_state_dict()
    assert_same_bits(ours, theirs)
    group = dist.new_group(backend="gloo")  # its name comes from a count that all ranks must share
    dist.barrier(group=group)
    dist.destroy_process_group(group)


def late(folder: str, late_rank: int) -> tuple[list[str], float]:
    ema = averaging()
    dist.barrier()
    ema.metrics()
    with environment(notice="0.8"), Log() as log:
        if dist.get_rank() == late_rank:
            time.sleep(1.5)
        began = time.monotonic()
        ema.save(folder)
    return log.told, time.monotonic() - began


def test_a_late_rank_is_waited_for_and_rank_0_tells_for_whom(world, tmp_path) -> None:
    (told, seconds), (silent, _), (also_silent, _) = world(3).run(late, str(tmp_path / "ema"), 2)
    assert silent == also_silent == [] and seconds > 1.0
    assert re.match(r"save: rank 0 has waited \d+ s for rank 2, and waits on, 20 s at most", told[0])
    assert [log for log, _ in world(3).run(late, str(tmp_path / "ema"), 0)] == [[], [], []]


def given_up(folder: str, late_rank: int, name: str) -> tuple[str, str, float]:
    ema = averaging()
    ema.save(folder + "-good")
    dist.barrier()
    with environment(arrival="0.5"):
        if dist.get_rank() == late_rank:
            time.sleep(1.2)
        told = caught(lambda: CALLS[name](ema, folder))
    assert not os.path.exists(folder)
    whole_life(ema, folder)
    return told


@pytest.mark.parametrize(
    ("size", "late_rank", "name"),
    [*((2, 1, name) for name in CALLS), (2, 0, "save"), (3, 2, "metrics"), (3, 1, "save"), (3, 0, "ShardedEMA")],
)
def test_after_arrival_seconds_all_ranks_and_the_late_one_fail_alike_and_the_next_call_works(
    world, tmp_path, size, late_rank, name
) -> None:
    results = world(size).run(given_up, str(tmp_path / "ema"), late_rank, name)
    assert {kind for kind, _, _ in results} == {"CommunicationError"}
    messages = {message for _, message, _ in results}
    assert len(messages) == 1 and f"waited for rank {late_rank}. Perhaps" in messages.pop()
    assert all(seconds < 5 for _, _, seconds in results), "not the 20 s of the process group"


def given_up_often(folder: str) -> list[str]:
    """The impatient rank has tried three times by the time that the other comes to its first call."""
    ema = averaging()
    dist.barrier()
    told = []
    with environment(arrival="0.3"):
        if dist.get_rank() == 1:
            time.sleep(1.2)
        for name in ("save", "metrics", "save"):
            told.append(caught(lambda name=name: CALLS[name](ema, folder))[1])
    whole_life(ema, folder)
    return told


def test_a_rank_that_tried_again_alone_is_caught_up_with(world, tmp_path) -> None:
    first, second = world(2).run(given_up_often, str(tmp_path / "ema"))
    assert first == second and [text.partition(":")[0] for text in first] == ["save", "metrics", "save"]


class Preempted(Exception):
    """What a program's own signal handler raises."""


def in_prepare(ema: ShardedEMA, leave: Callable[[], None]) -> Callable[[], None]:
    real = ema._state.begin
    ema._state.begin = lambda call: leave()  # type: ignore[method-assign]
    return lambda: setattr(ema._state, "begin", real)


def patched(module: Any, name: str) -> Callable[[ShardedEMA, Callable[[], None]], Callable[[], None]]:
    def patch(ema: ShardedEMA, leave: Callable[[], None]) -> Callable[[], None]:
        real = getattr(module, name)
        setattr(module, name, lambda *arguments, **options: leave())
        return lambda: setattr(module, name, real)

    return patch


PLACES = {
    "before the first agreement": ("save", in_prepare),
    "between two agreements": ("save", patched(Replicas, "check")),
    "between the messages of an exchange": ("save", patched(parcels.Part, "copy_to")),
    "after the last byte": ("save", patched(PartialChecksums, "partial")),
    "after the last agreement": ("load", lambda ema, leave: patched(ema._state, "restore")(ema, leave)),
}


def interrupted(folder: str, place: str, how: str) -> tuple[str, str, float]:
    ema = averaging()
    ema.save(folder)
    ema.save(folder + "-good")
    before = Path(folder, "model.safetensors").read_bytes()
    name, patch = PLACES[place]

    def leave() -> None:
        if how == "signal":
            signal.raise_signal(signal.SIGINT)
        raise {"own": Preempted("requeued"), "exit": SystemExit(3), "signal": AssertionError("no handler")}[how]

    restore = patch(ema, leave) if dist.get_rank() == 1 else lambda: None
    dist.barrier()
    told = caught(lambda: CALLS[name](ema, folder))
    restore()
    assert Path(folder, "model.safetensors").read_bytes() == before
    whole_life(ema, folder)
    return told


@pytest.mark.parametrize("how", ["signal", "own", "exit"])
@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_is_interrupted_ends_the_call_for_all_at_once_and_the_next_call_works(
    world, tmp_path, place, how
) -> None:
    other, own = world(2).run(interrupted, str(tmp_path / "ema"), place, how)
    # In the bytes of a file the first two are errors like any other: they are agreed on.
    kinds = {"signal": "KeyboardInterrupt", "own": "Preempted", "exit": "SystemExit"}
    swallowed = how == "own" and place in ("before the first agreement", "between the messages of an exchange")
    assert own[0] == ("DistEMAError" if swallowed else kinds[how]) and own[2] < 5
    if place == "after the last agreement":
        assert other[:2] == ("", ""), "it had done with the call"
        return
    assert other[2] < 5 and kinds[how] in other[1]
    assert other[0] == ("DistEMAError" if swallowed else "CommunicationError")


def as_it_arrives() -> Callable[[], None]:
    """The next call is interrupted after it was counted, before its link is known."""

    def come(world: worlds.World, call: str) -> None:
        if call:
            raise KeyboardInterrupt

    worlds.World.at = property(lambda world: "", come)  # type: ignore[assignment]
    return lambda: delattr(worlds.World, "at")


def in_the_second_link() -> Callable[[], None]:
    """The next call is interrupted as it waits in its second link: it has found that the first one was left."""
    real, came_to = Link.combine, []

    def combine(link: Link, *arguments: Any, **options: Any) -> Any:
        came_to.append(link)
        if len(came_to) == 2:
            raise KeyboardInterrupt
        return real(link, *arguments, **options)

    Link.combine = combine  # type: ignore[method-assign]
    return lambda: setattr(Link, "combine", real)


def interrupted_beside_a_left_link(folder: str, by: Callable[[], Callable[[], None]], interrupted_rank: int) -> Any:
    ema = averaging()
    ema.metrics()
    if dist.get_rank() == 1:  # at the very end of that call, with which all had done
        ema._exchange.channel.abandon("metrics", KeyboardInterrupt(), [])
    dist.barrier()
    restore = by() if dist.get_rank() == interrupted_rank else lambda: None
    told = caught(ema.metrics)
    restore()
    dist.barrier()
    whole_life(ema, folder)
    return told


@pytest.mark.parametrize(("by", "rank"), [(as_it_arrives, 1), (in_the_second_link, 0)], ids=["arrives", "waits"])
def test_an_interrupt_beside_a_link_that_was_left_ends_the_call_where_the_others_wait(
    world, tmp_path, by, rank
) -> None:
    """The rank left the former link once more, and the others waited in the new one until the timeout of the group."""
    told = world(2).run(interrupted_beside_a_left_link, str(tmp_path / "ema"), by, rank)
    assert told[rank][0] == "KeyboardInterrupt" and told[1 - rank][0] == "CommunicationError"
    assert "KeyboardInterrupt" in told[1 - rank][1] and max(told[0][2], told[1][2]) < 5


def test_a_third_rank_is_told_too_while_the_errors_of_the_others_are_kept(world, tmp_path) -> None:
    first, own, third = world(3).run(interrupted, str(tmp_path / "ema"), "between two agreements", "signal")
    assert first[:2] == third[:2] and own[0] == "KeyboardInterrupt" and max(first[2], third[2]) < 5


def interrupted_before_the_farewell(folder: str, call: str) -> Any:
    """Rank 1 is interrupted within a call, and again before it has told the others."""
    ema = averaging()
    state, channel = ema._state, type(ema._exchange.channel)
    values, left = state.values, channel._left
    tries: list[int] = []

    def cut_off(*arguments: Any) -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise KeyboardInterrupt
        return left(*arguments)

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    if dist.get_rank() == 1:
        state.values, channel._left = interrupt, cut_off  # type: ignore[method-assign, assignment]

    def swap() -> None:
        with ema.average_parameters():
            pass

    told = caught(swap if call == "swap" else ema.sharded_state_dict)
    state.values, channel._left = values, left  # type: ignore[method-assign]
    assert torch.is_grad_enabled()
    whole_life(ema, folder)
    return told, len(tries)


@pytest.mark.parametrize("call", ["swap", "sharded_state_dict"])
def test_a_second_interrupt_before_the_others_are_told_leaves_nobody_waiting(world, tmp_path, call) -> None:
    """The next call of that rank met the former one of the others: "the values cannot be combined (KeyError: 0)"."""
    (waiting, _), (interrupted_twice, tries) = world(2).run(
        interrupted_before_the_farewell, str(tmp_path / "ema"), call
    )
    assert waiting[0] == "CommunicationError" and interrupted_twice[0] == "KeyboardInterrupt" and tries >= 2
    assert max(waiting[2], interrupted_twice[2]) < 5


def fails_between(folder: str, error: type[Exception]) -> tuple[str, str, float]:
    """A failure at a place where nothing fails as far as anybody knows."""
    ema = averaging()
    if dist.get_rank() == 1:
        real, Replicas.check = Replicas.check, broken(error)  # type: ignore[method-assign]
    told = caught(lambda: ema.save(folder))
    if dist.get_rank() == 1:
        Replicas.check = real  # type: ignore[method-assign]
    whole_life(ema, folder)
    return told


def broken(error: type[Exception]) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise error("no memory")

    return fail


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, OSError, KeyError])
def test_a_failure_where_none_is_expected_is_the_same_error_on_all_ranks(world, tmp_path, error) -> None:
    first, second = world(2).run(fails_between, str(tmp_path / "ema"), error)
    assert first[:2] == second[:2] and first[2] < 5 and "no memory" in first[1]
    assert first[0] == ("CheckpointError" if error is OSError else "CommunicationError")


def fails_in_thread(folder: str) -> list[tuple[str, str]]:
    ema = averaging()
    ema.save(folder, background=True)
    ema.wait()
    results = []
    for _ in range(2):
        if dist.get_rank() == 1:
            real, PartialChecksums.partial = PartialChecksums.partial, broken(MemoryError)  # type: ignore[method-assign]
        ema.save(folder, background=True)
        results.append(caught(ema.wait)[:2])
        if dist.get_rank() == 1:
            PartialChecksums.partial = real  # type: ignore[method-assign]
        whole_life(ema, folder)
    return results


def test_a_failure_behind_training_does_not_poison_the_next_save_behind_it(world, tmp_path) -> None:
    first, second = world(2).run(fails_in_thread, str(tmp_path / "ema"))
    assert first == second and all(kind == "CommunicationError" and "MemoryError" in text for kind, text in first)


def late_beside_a_save(folder: str) -> str:
    """A call that fails while a save is under way behind it leaves that save alone."""
    ema, other = averaging(), averaging()
    held, real = threading.Event(), save_calls.write_average

    def slowly(*arguments: Any) -> None:
        held.wait(10)
        real(*arguments)

    save_calls.write_average = slowly
    try:
        ema.save(folder, background=True)
        with environment(arrival="0.3"):
            if dist.get_rank() == 1:
                time.sleep(0.6)
            told = caught(other.metrics)[0]
        held.set()
        ema.wait()
    finally:
        save_calls.write_average = real
    ema.load(folder)
    return told


def test_a_call_that_failed_leaves_the_save_behind_it_alone(world, tmp_path) -> None:
    assert world(2).run(late_beside_a_save, str(tmp_path / "ema")) == ["CommunicationError"] * 2


def bad_environment(variable: str, value: str, everywhere: bool, folder: str) -> tuple[str, str, float]:
    ema = averaging()
    with environment(**{variable: value} if everywhere or dist.get_rank() == 1 else {}):
        told = caught(lambda: ema.save(folder))
    whole_life(ema, folder)
    return told


@pytest.mark.parametrize(("variable", "value"), [("arrival", "soon"), ("arrival", "0"), ("notice", "nan")])
@pytest.mark.parametrize("everywhere", [True, False])
def test_seconds_that_are_none_are_refused_alike_on_all_ranks(world, tmp_path, variable, value, everywhere) -> None:
    first, second = world(2).run(bad_environment, variable, value, everywhere, str(tmp_path / "ema"))
    assert first[:2] == second[:2] and first[0] == "ConfigError"
    assert f"DIST_EMA_{variable.upper()}_SECONDS is {value!r}" in first[1] and first[2] < 5


@pytest.mark.parametrize("variable", ["arrival", "notice"])
@pytest.mark.parametrize("value", ["abc", "", "-5", "nan", "inf", "0", "0.001"])
def test_seconds_are_read_when_they_are_used(tmp_path, monkeypatch, variable, value) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), SCHEDULE)
    monkeypatch.setenv(f"DIST_EMA_{variable.upper()}_SECONDS", value)
    with pytest.raises(ConfigError, match=f"DIST_EMA_{variable.upper()}_SECONDS is"):
        ema.save(tmp_path / "ema")
    monkeypatch.undo()
    ema.save(tmp_path / "ema")


def leaves_early(folder: str) -> tuple[str, str] | None:
    """Under DDP's join() a rank whose batches are used up answers for DDP only."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(3, 2))
    ema = ShardedEMA(model, SCHEDULE)
    told = None
    with model.join():
        for step in range(1 if dist.get_rank() == 1 else 3):
            model(torch.ones(2, 3)).sum().backward()
            ema.update()
            if step == 1:
                with environment(arrival="0.5"):
                    told = caught(lambda: ema.save(folder))[:2]
    if told is None:  # the call that it has missed
        assert caught(ema.metrics)[0] == "CommunicationError"
    ema.metrics()
    return told


def test_a_save_inside_the_join_of_ddp_names_it_as_the_likely_cause(world, tmp_path) -> None:
    (kind, text), nothing = world(2).run(leaves_early, str(tmp_path / "ema"))
    assert nothing is None and kind == "CommunicationError" and "join(), which ranks with fewer batches leave" in text


def in_own_folders(folder: str, name: str) -> tuple[str, str]:
    ema = averaging()
    ema.save(folder + "-good")
    former = os.getcwd()
    own = Path(folder) / f"node{dist.get_rank()}"
    own.mkdir(parents=True)
    os.chdir(own)
    try:
        kind, text, _ = caught(lambda: CALLS[name](ema, "out/ema"))
    finally:
        os.chdir(former)
    whole_life(ema, folder + "/ema")
    return kind, text


@pytest.mark.parametrize("name", ["save", "snapshot", "consolidate", "load"])
def test_ranks_with_different_working_directories_are_told_so(world, tmp_path, name) -> None:
    first, second = world(2).run(in_own_folders, str(tmp_path / "all"), name)
    assert first == second and first[0] == RankMismatchError.__name__
    assert "differ in path" in first[1] and "give an absolute one" in first[1]
    assert f"working directories {tmp_path / 'all' / 'node0'} and {tmp_path / 'all' / 'node1'}" in first[1]


def destroyed(folder: str) -> str:
    ema = averaging()
    ema.save(folder)
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    texts = []
    for name in ("save", "load", "metrics", "full_state_dict"):
        with pytest.raises(CommunicationError, match=r"process group of 2 ranks .* was destroyed") as error:
            CALLS[name](ema, folder)
        texts.append(str(error.value))
    assert all("end_training" in text and "there is none now" in text for text in texts)
    for kind in ("file", "tcp", "own"):
        start_anew(kind, rank, size, folder)
        with environment(arrival="0.3"):
            if rank == 1:
                time.sleep(0.6)
            with pytest.raises(CommunicationError, match="not all 2 ranks came"):
                ema.save(folder)
        whole_life(ema, folder)
        dist.barrier()
        dist.destroy_process_group()
    return texts[0]


def start_anew(kind: str, rank: int, size: int, folder: str) -> None:
    options: dict[str, Any] = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=20)}
    port = int(os.environ["MASTER_PORT"])
    if kind == "file":
        options["init_method"] = f"file://{folder}-store"
    elif kind == "own":
        options["store"] = dist.TCPStore("127.0.0.1", port + 1, size, rank == 0)
    dist.init_process_group("gloo", **options)


@pytest.mark.ranks
def test_a_destroyed_process_group_is_named_and_a_new_one_of_any_store_serves_the_average(tmp_path) -> None:
    fresh = World(2)
    try:
        first, second = fresh.run(destroyed, str(tmp_path / "ema"))
    finally:
        fresh.stop()
    assert first == second


class Raises:
    """An argument that cannot even be looked at."""

    def __fspath__(self) -> str:
        raise RuntimeError("no such argument")

    __bool__ = __fspath__
    __str__ = __fspath__


def unreadable_arguments(folder: str) -> list[str]:
    ema = ShardedEMA(build_layout("ddp"), SCHEDULE)
    ema.update()
    is_bad = dist.get_rank() == 1
    path: Any = Raises() if is_bad else folder
    flag: Any = Raises() if is_bad else False
    prefix: Any = Raises() if is_bad else "ema"
    calls: list[Callable[[], Any]] = [
        lambda: ema.save(path),
        lambda: ema.snapshot(path),
        lambda: ema.consolidate(path),
        lambda: ema.load(path),
        lambda: ema.start_from(path),
        lambda: ema.save(folder, background=flag),
        lambda: ema.save(folder, only_unchanged=flag),
        lambda: ema.consolidate(folder, only_unchanged=flag),
    ]
    told = []
    with environment(arrival="60"):
        for call in calls:
            with pytest.raises(DistEMAError) as caught:
                call()
            told.append(str(caught.value))
        with pytest.raises(DistEMAError) if is_bad else nullcontext():
            ema.metrics(prefix=prefix)
        ema.save(folder)  # the ranks are at the same call still
    return told


@pytest.mark.ranks
def test_an_argument_that_cannot_be_looked_at_on_one_rank_is_an_error_on_all_of_them(world, tmp_path) -> None:
    first, second = world(2).run(unreadable_arguments, str(tmp_path / "ema"))
    assert first == second
    assert all("rank 1: RuntimeError: no such argument" in text for text in first)


def fills_the_store(folder: str, layout: str) -> list[int]:
    """The number of keys after each turn of calls: good ones, one that ranks differ in, and one that is cut off."""
    ema = averaging(layout)
    store = dist.group.WORLD.get_group_store()
    numbers = []
    for _ in range(4):
        ema.save(folder)
        ema.save(folder, background=True)
        ema.wait()
        ema.load(folder)
        ema.full_state_dict()
        caught(lambda: ema.save(f"{folder}-{dist.get_rank()}"))
        restore = in_prepare(ema, interrupting) if dist.get_rank() == 1 else lambda: None
        caught(ema.metrics)
        restore()
        caught(ema.metrics)
        dist.barrier()
        numbers.append(store.num_keys())
        dist.barrier()
    return numbers


def interrupting() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_run_of_days_does_not_fill_the_store_of_the_process_group(world, tmp_path, layout) -> None:
    for numbers in world(2).run(fills_the_store, str(tmp_path / "ema"), layout):
        assert numbers[1] == numbers[2] == numbers[3], numbers
