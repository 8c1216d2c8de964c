"""A stream of whole tensors: equal to the whole state dict, bounded in memory, and no rank is left waiting."""

from __future__ import annotations

import ctypes
import gc
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from averaged_layouts import SCHEDULE, averaged
from layouts_zoo import set_whole
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from dist_ema import CommunicationError, ConfigError, RankMismatchError, ShardedEMA, SwapError
from dist_ema.boxes.owners import boxes_of_run
from dist_ema.boxes.shards import Box
from dist_ema.live.elsewhere.chunks import Portion, Sized, chunks_of
from dist_ema.live.elsewhere.routes import ALIGNMENT, Tensors, routes_of
from dist_ema.ranks import deliveries
from dist_ema.ranks.broadcasts import Passing


def assert_equal(got: dict[str, torch.Tensor], whole: dict[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    assert got.keys() == whole.keys()
    for name, value in whole.items():
        expected = value if dtype is None or not value.is_floating_point() else value.to(dtype)
        assert got[name].dtype == expected.dtype, name
        assert got[name].shape == expected.shape, name
        assert torch.equal(got[name], expected), name


def stream_in_every_way(layout: str) -> None:
    _, ema = averaged(layout)
    size, rank = dist.get_world_size(), dist.get_rank()
    box = [ema.full_state_dict()]
    dist.broadcast_object_list(box)
    (whole,) = box
    some = [1, 3] if size == 4 else [size - 1]
    # A bucket of 64 bytes cuts every tensor in portions, one of 300 the larger ones.
    for bucket_bytes, ranks, dtype in [
        (64, None, None),
        (300, some, torch.bfloat16),
        (64, [0], None),
        (2**20, None, torch.bfloat16),
        (2**20, range(size), None),
    ]:
        got = dict(ema.whole_tensors(dtype=dtype, bucket_bytes=bucket_bytes, ranks=ranks))  # keeps every tensor
        if ranks is None or rank in ranks:
            assert_equal(got, whole, dtype)
            assert got["head.weight"] is got["embed.weight"]
        else:
            assert got == {}
    ema.update()


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        ("plain", 1),
        ("ddp", 3),  # a 0-dim parameter
        ("fsdp2", 2),
        ("fsdp2", 4),  # empty shards
        ("fsdp1_orig", 3),
        ("hsdp", 4),
        ("tp_uneven", 3),
        ("fsdp_tp_uneven", 4),
        ("packed", 3),
        ("offset", 3),
    ],
)
def test_every_tensor_is_that_of_the_whole_state_dict_bit_for_bit_and_stays_so(world, layout, size) -> None:
    world(size).run(stream_in_every_way, layout)


def stop_early() -> None:
    model, ema = averaged("fsdp2")
    rank, size = dist.get_rank(), dist.get_world_size()
    expected = dict(ema.whole_tensors())

    def streamed() -> dict[str, torch.Tensor]:
        return dict(ema.whole_tensors(bucket_bytes=64))

    # One rank leaves its loop: by `break`, by an error of its own, without having begun, and by an interrupt.
    for name, _ in ema.whole_tensors(bucket_bytes=64):
        if rank == 1 and name == "hidden.weight":
            break
    assert_equal(streamed(), expected, None)
    try:
        for _ in ema.whole_tensors(bucket_bytes=64):
            if rank == 0:
                raise ValueError("of the consumer")
    except ValueError:
        assert rank == 0
    assert_equal(streamed(), expected, None)
    stream = ema.whole_tensors(bucket_bytes=64)
    if rank == 0:
        del stream
    else:
        dict(stream)
    assert_equal(streamed(), expected, None)
    former = signal.signal(signal.SIGALRM, interrupt)
    try:
        stream = ema.whole_tensors(bucket_bytes=16)
        signal.setitimer(signal.ITIMER_REAL, 0.002 if rank == 1 else 0)
        dict(stream)
        assert rank == 0
    except KeyboardInterrupt:
        assert rank == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    dist.barrier()
    assert_equal(streamed(), expected, None)
    total = torch.ones(())
    dist.all_reduce(total)  # training's group is as it was
    assert total == size
    set_whole(model, 9)
    ema.update()


def test_an_interrupt_after_the_wait_for_a_message_does_not_let_it_be_waited_for_again() -> None:
    raise_in_c = getattr(ctypes.CDLL(None), "raise")  # the handler runs when the call of C is over
    message = Passing(partial(SimpleNamespace, wait=partial(raise_in_c, signal.SIGUSR1)))

    class Interrupt(BaseException):
        pass

    def handler(*_: object) -> None:
        raise Interrupt

    former = signal.signal(signal.SIGUSR1, handler)
    try:
        message.begin()
        with pytest.raises(Interrupt):
            message.wait()
        message.wait()
    finally:
        signal.signal(signal.SIGUSR1, former)


class Odd(nn.Module):
    """A long averaged matrix, a counter that is not averaged, and a frozen matrix whose memory is turned."""

    def __init__(self) -> None:
        super().__init__()
        self.long = nn.Parameter(torch.arange(64 * 1024.0).view(64, 1024))
        self.register_buffer("seen", torch.zeros(32 * 1024, dtype=torch.int64))
        self.turned = nn.Parameter(torch.arange(64 * 1024.0).view(1024, 64).t(), requires_grad=False)


@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize("at", ["begin", "wait"])
def test_a_message_that_fails_is_told_of_and_leaves_no_stream_open(monkeypatch, chunk, at) -> None:
    def fail() -> None:
        raise RuntimeError("Connection closed by peer")

    filled: list[object] = []

    def failing(*_: object) -> list[Passing]:
        filled.append(None)
        if len(filled) != chunk + 1:
            return []
        return [Passing(fail if at == "begin" else partial(SimpleNamespace, wait=fail))]

    ema = ShardedEMA(nn.Linear(64, 64), SCHEDULE)
    ema.update()
    monkeypatch.setattr("dist_ema.live.elsewhere.stream.deliveries", failing)
    with pytest.raises(CommunicationError, match=rf"chunk {chunk + 1} of \d+ did not get through .*closed by peer"):
        dict(ema.whole_tensors(bucket_bytes=2**10))
    ema.update()


def change_what_is_sent() -> list[bool]:
    model = Odd()
    ema = ShardedEMA(model, SCHEDULE, exclude=["seen", "turned"])
    ema.update()
    expected = {name: value.clone() for name, value in ema.whole_tensors()}
    for bucket_bytes in (2**18, 2**22):  # each tensor in portions, and all of them in one chunk
        for ranks in (None, [1]):
            got, before = {}, None
            for name, value in ema.whole_tensors(bucket_bytes=bucket_bytes, ranks=ranks):
                got[name] = value
                if before is not None:
                    before.zero_()  # a tensor that was handed out is its receiver's
                    before.copy_(expected[next(other for other in got if got[other] is before)])
                before = value
            if ranks is None or dist.get_rank() in ranks:
                assert_equal(got, expected, None)
    # A counter that a loop moves meanwhile is sent as it was at one moment, the same to all.
    for number, (name, value) in enumerate(ema.whole_tensors(bucket_bytes=2**18)):
        if name == "seen":
            seen = value
        model.seen.add_(number + 1)
    everywhere = [torch.empty_like(seen) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, seen)
    return [torch.equal(seen, other) for other in everywhere]


def test_what_is_changed_in_the_loop_spoils_no_tensor_on_any_rank(world) -> None:
    for same in world(2).run(change_what_is_sent):
        assert all(same)


def broadcast_to_few(layout: str) -> None:
    former, deliveries._FEW = deliveries._FEW, 1
    try:
        stream_in_every_way(layout)
    finally:
        deliveries._FEW = former


def test_broadcasts_bring_the_same_as_messages_to_each_rank(world) -> None:
    world(2).run(broadcast_to_few, "fsdp2")
    world(4).run(broadcast_to_few, "hsdp")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_rank_that_leaves_its_stream_early_keeps_nobody_waiting_and_spoils_no_group(world) -> None:
    world(2).run(stop_early)


def move_within(layout: str) -> None:
    _, ema = averaged(layout)
    before = dict(ema.whole_tensors())
    seen = {}
    for number, (name, value) in enumerate(ema.whole_tensors(bucket_bytes=64)):
        seen[name] = value
        if number == 1:
            for call in (ema.update, ema.restart, ema.copy_to_model, lambda: ema.load("nowhere"), ema.whole_tensors):
                with pytest.raises(SwapError, match="within a stream of whole_tensors"):
                    call()
            with pytest.raises(SwapError, match="within a stream of whole_tensors"), ema.average_parameters():
                pass
    assert_equal(seen, before, None)
    with ema.average_parameters(), pytest.raises(SwapError, match="while the averaged weights"):
        ema.whole_tensors()
    open_stream = ema.whole_tensors()
    next(open_stream)
    with pytest.raises(SwapError):
        ema.update()
    open_stream.close()
    ema.update()
    del open_stream
    # A rank that receives nothing is through when the call returns.
    only = ema.whole_tensors(ranks=[0])
    if dist.get_rank() == 1:
        ema.update()
    dict(only)
    if dist.get_rank() == 0:
        ema.update()


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_an_average_cannot_move_while_it_is_streamed(world, layout) -> None:
    world(2).run(move_within, layout)


def ask_wrongly() -> None:
    _, ema = averaged("fsdp2")
    rank = dist.get_rank()
    for wrong in ({"ranks": []}, {"ranks": [2]}, {"ranks": [True]}, {"bucket_bytes": 0}, {"dtype": torch.int8}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ema.whole_tensors(**wrong)
        with pytest.raises((ConfigError, RankMismatchError)):  # the same on all ranks, if one rank errs
            ema.whole_tensors(**(wrong if rank == 1 else {}))
    with pytest.raises(RankMismatchError, match="ranks"):
        ema.whole_tensors(ranks=[rank])
    assert dict(ema.whole_tensors())


def test_wrong_requests_and_requests_that_differ_are_refused_on_all_ranks(world) -> None:
    world(2).run(ask_wrongly)


def send_bytes(rank_alone: bool) -> int:
    model = nn.Linear(64, 64)
    fully_shard(model)
    ema = ShardedEMA(model, SCHEDULE)
    ema.update()
    dict(ema.whole_tensors())
    # Records go through the store, and only once; messages are a call of the process group, not a dispatched operation.
    texts = ema._elsewhere._ownership._kept
    with CommDebugMode() as mode:
        dict(ema.whole_tensors(ranks=[0] if rank_alone else None))
    assert ema._elsewhere._ownership._kept is texts
    return mode.get_total_counts()


def test_who_owns_what_is_exchanged_once(world) -> None:
    world(2).run(send_bytes, False)
    world(2).run(send_bytes, True)


MIB = 2**20
BUCKET, LARGEST = 24 * MIB, 48 * MIB


class Wide(nn.Module):
    """96 tensors of 1 MiB before and after two of 48: the second is begun before the first is handed out."""

    def __init__(self) -> None:
        super().__init__()
        widths = [256] * 48 + [256 * 48] * 2 + [256] * 48
        self.layers = nn.ParameterList(nn.Parameter(torch.ones(width, 1024)) for width in widths)


def peak_of_a_stream(ranks: list[int] | None) -> tuple[float, bool]:
    model = Wide()
    fully_shard(model)
    ema = ShardedEMA(model, SCHEDULE)
    ema.update()
    for _ in ema.whole_tensors(bucket_bytes=MIB, ranks=ranks):  # what torch and gloo take once
        pass
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    for _, value in ema.whole_tensors(bucket_bytes=BUCKET, ranks=ranks):
        del value
    return (resident("VmHWM") - before) / MIB, ranks is None or dist.get_rank() in ranks


def resident(kind: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0])


@pytest.mark.parametrize("ranks", [None, [0]])
def test_a_stream_takes_no_more_than_two_buckets_or_two_largest_tensors_and_64_mib(world, ranks) -> None:
    for extra, receives in world(2).run(peak_of_a_stream, ranks):
        assert extra <= 2 * max(BUCKET, LARGEST) / MIB + 64
        assert receives or extra <= BUCKET / MIB  # who only sends has its segments


def test_chunks_have_every_element_once_in_order_and_keep_to_their_bytes() -> None:
    sizes = [(0,), (), (3,), (50, 7), (1000, 3), (2, 2), (2, 30, 1000)]
    itemsizes = (4, 8, 2, 4, 2, 1, 4)
    tensors = [Sized(torch.Size(size).numel(), itemsize) for size, itemsize in zip(sizes, itemsizes, strict=True)]
    # Two owners, of which the second has two boxes of the fourth tensor.
    owners = [
        [
            [],
            [Box("b", (), ())],
            [],
            [Box("d", (0, 0), (20, 7))],
            [Box("e", (0, 0), (1000, 1))],
            [],
            [Box("g", (0, 0, 0), (1, 30, 1000)), Box("g", (1, 0, 0), (1, 11, 1000))],
        ],
        [
            [],
            [],
            [Box("c", (0,), (3,))],
            [Box("d", (20, 0), (30, 2)), Box("d", (20, 2), (30, 5))],
            [Box("e", (0, 1), (1000, 2))],
            [Box("f", (0, 0), (2, 2))],
            [Box("g", (1, 11, 0), (1, 19, 1000))],
        ],
    ]
    for most_bytes in (1, 7, 64, 1000, 10**6):
        num_tensors = len(sizes) if most_bytes >= 1000 else len(sizes) - 1  # the last would be cut in 60,000 portions
        chunks = chunks_of(tensors[:num_tensors], most_bytes)
        portions = [portion for chunk in chunks for portion in chunk]
        assert portions == [
            Portion(index, number, portion.total)
            for index in range(num_tensors)
            for portion in [next(portion for portion in portions if portion.tensor == index)]
            for number in range(portion.total)
        ]
        for least_direct_bytes in (1, 50, 10**7):
            counts = [torch.zeros(size, dtype=torch.int64) for size in sizes[:num_tensors]]
            for chunk in chunks:
                total = 0
                for owned in owners:
                    routes = routes_of(chunk, owned, Tensors(sizes, itemsizes), least_direct_bytes)
                    end = 0
                    for portion, direct, packed in zip(chunk, routes.direct, routes.packed, strict=True):
                        count, itemsize = counts[portion.tensor], itemsizes[portion.tensor]
                        for run in direct:
                            assert run.nbytes == run.numel * itemsize >= least_direct_bytes
                            assert run.start_byte % ALIGNMENT == 0
                            # Where its elements lie end to end is where the box has them.
                            flat = torch.zeros_like(count)
                            flat.view(-1)[run.start_byte // itemsize :][: run.numel] = 1
                            for _, part in boxes_of_run(owned[portion.tensor][run.owned], run.first, run.numel):
                                count[part.region] += flat[part.region]
                            total += run.nbytes
                        for run in packed:
                            assert run.start_byte >= end and run.start_byte % itemsize == 0
                            end = run.start_byte + run.nbytes
                            assert run.nbytes == run.numel * itemsize
                            for _, part in boxes_of_run(owned[portion.tensor][run.owned], run.first, run.numel):
                                count[part.region] += 1
                    assert routes.packed_bytes == end
                    total += end
                assert total <= most_bytes + 2 * 8 * len(chunk)
            assert all(bool((count == 1).all()) for count in counts)


def test_rows_go_directly_and_columns_and_small_or_odd_runs_are_packed() -> None:
    chunk = (Portion(0, 0, 1),)

    def is_direct(shape: tuple[int, ...], box: Box, itemsize: int = 4) -> bool:
        routes = routes_of(chunk, [[box]], Tensors([shape], [itemsize]), 1024)
        assert [len(routes.direct[0]), len(routes.packed[0])] in ([1, 0], [0, 1])
        return bool(routes.direct[0])

    assert is_direct((64, 64), Box("w", (16, 0), (16, 64)))
    assert is_direct((1, 4, 64, 64), Box("w", (0, 3, 16, 0), (1, 1, 16, 64)))
    assert is_direct((4096,), Box("w", (1024,), (512,)))
    assert not is_direct((64, 64), Box("w", (0, 16), (64, 16)))
    assert not is_direct((4, 64, 64), Box("w", (0, 16, 0), (4, 16, 64)))
    assert not is_direct((64, 64), Box("w", (16, 0), (3, 64)))  # a message costs more
    assert not is_direct((64, 63), Box("w", (1, 0), (16, 63)))  # it begins where no other dtype may lie
