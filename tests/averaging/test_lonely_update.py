"""A rank that updates alone finishes: the other ranks are elsewhere, in no collective, and nothing waits for them.

Counting collectives is not enough: torch's CommDebugMode sees neither a barrier nor a send or a receive. Here every
way out of the process raises at once while a rank updates, and the other ranks wait at a plain key of a file.
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from accelerated import accelerator_of, prepared, take_step
from layouts_zoo import build_layout
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from dist_ema import ConstantSchedule, CosineSchedule, ShardedEMA, attach

TOKENS = torch.arange(8).view(2, 4)
LAYOUTS = ["plain", "ddp", "fsdp2", "hsdp", "fsdp1_orig", "fsdp1_flat", "fsdp1_no_shard"]
TRACKS = {"long": ConstantSchedule(decay=0.9), "short": CosineSchedule(0.3, 0.01, total_steps=9)}
OPTIONS: dict[str, dict[str, object]] = {
    "several tracks and buffers": {"schedule": TRACKS, "update_buffers": True},
    "what is not finite is left out": {"skip_nonfinite": True, "update_buffers": True},
    "compensated": {"compensated": True},
    "every second step": {"interval": 2, "interval_correction": True},
    "beside training": {"overlap": True},
    "a teacher": {"into": True},
    "a teacher, what is not finite left out": {"into": True, "skip_nonfinite": True},
}

# What a process group or a store has to reach other ranks with.
_OF_GROUPS = ("all", "_all", "barrier", "broadcast", "gather", "monitored", "recv", "reduce", "_reduce", "scatter")
_OF_GROUPS += ("send",)
_OF_STORES = ("set", "compare_set", "get", "add", "check", "wait", "append", "multi_", "queue_", "barrier")
_HARMLESS = ("allocate_tensor", "set_timeout")


@contextmanager
def spied() -> Iterator[None]:
    """Whatever leaves this process raises at once; what torch's own counter sees raises at the end."""
    genuine: list[tuple[type, str, object]] = []

    def forbid(owner: type, name: str) -> None:
        def call(*args: object, **kwargs: object) -> None:
            raise AssertionError(f"{owner.__name__}.{name} was called")

        genuine.append((owner, name, vars(owner)[name]))  # as it lies there: unbound
        setattr(owner, name, call)

    backend = dist.ProcessGroupGloo.__mro__[1]
    for owner in (dist.ProcessGroup, dist.ProcessGroupGloo, backend, dist.Store):
        starts = _OF_STORES if owner is dist.Store else _OF_GROUPS
        for name in list(vars(owner)):
            if name.startswith(starts) and name not in _HARMLESS:
                forbid(owner, name)
    try:
        with CommDebugMode() as counted:
            yield
        assert counted.get_total_counts() == 0, counted.get_comm_counts()
    finally:
        for owner, name, method in genuine:
            setattr(owner, name, method)


class Elsewhere:
    """Where the other ranks wait while one works alone: at keys of a file, which no process group knows of."""

    def __init__(self, path: str) -> None:
        self._store = dist.FileStore(path, dist.get_world_size())
        self._count = 0

    def verdict(self, rank: int, work: Callable[[], object], *, spies: bool = True) -> str:
        """What was wrong when `rank` did the work alone; the same text on every rank, empty if all was well."""
        self._count += 1
        key = str(self._count)
        if dist.get_rank() == rank:
            told = ""
            try:
                with spied() if spies else nullcontext():
                    work()
            except Exception as error:
                told = f"{type(error).__name__}: {error}"
            self._store.set(key, told or "all well")
        self._store.wait([key], datetime.timedelta(seconds=60))
        return self._store.get(key).decode().replace("all well", "")


def step(model: nn.Module, number: int) -> None:
    """As an optimizer does: every rank changes what it holds. Buffers change too, and sometimes a value is none."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            local.add_(number + 1)
        for parameter in list(model.parameters())[:1] if number % 2 else ():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.view(-1)[:1] = float("nan")


def every_update_alone(layout: str, folder: str) -> None:
    elsewhere = Elsewhere(f"{folder}/keys")
    for number, (what, options) in enumerate(OPTIONS.items()):
        options = dict(options)
        teacher = build_layout(layout, seed=1, frozen=True) if options.pop("into", False) else None
        schedule = options.pop("schedule", ConstantSchedule(decay=0.9))

        def made(model: nn.Module, make: Callable[..., ShardedEMA]) -> ShardedEMA:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of plain replicas, and of the memory of an option
                return make(model)

        make = partial(ShardedEMA, schedule=schedule, into=teacher, **options)
        model = build_layout(layout)
        ema = made(model, make)

        def all_update(when: str, average: ShardedEMA = ema, what: str = what, model: nn.Module = model) -> None:
            for rank in range(dist.get_world_size()):
                wrong = elsewhere.verdict(rank, average.update)
                assert not wrong, f"{layout}, {what}, {when}, rank {rank}: {wrong}"

        all_update("the first update")
        for each in range(3):
            step(model, each)
            all_update(f"update {each + 1}")
        if layout != "plain":
            with torch.no_grad():
                model(TOKENS)  # leaves root groups gathered
        all_update("after a forward")
        path = f"{folder}/{number}"
        ema.save(path)
        all_update("after a save")
        ema.load(path)
        all_update("after a load into the average that goes on")
        with ema.average_parameters(next(iter(ema.tracks))):
            pass
        all_update("after a swap")
        ema.restart()
        all_update("after a restart")
        ema.detach()
        fresh = made(model, make)
        fresh.load(path)
        all_update("after a load into a new average", fresh)
        step(model, 0)
        all_update("the one after it", fresh)
        fresh.detach()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_that_updates_alone_finishes(world, tmp_path, layout) -> None:
    world(2).run(every_update_alone, layout, str(tmp_path))


def every_step_alone(layout: str, folder: str) -> None:
    """The steps of an attached optimizer, whose hook updates, and the updates of a fused one that overflows."""
    elsewhere = Elsewhere(f"{folder}/keys")
    with accelerator_of(layout) as accelerator:
        model, optimizer = prepared(accelerator, layout, "sgd")
        ema = attach(accelerator, model, optimizer, ConstantSchedule(decay=0.9))
        for number in range(3):
            for rank in range(dist.get_world_size()):
                wrong = elsewhere.verdict(rank, partial(take_step, model, optimizer, number))
                assert not wrong, f"{layout}, step {number}, rank {rank}: {wrong}"
        for number in range(3):
            for rank in range(dist.get_world_size()):
                overflow = torch.tensor([float(number % 2)])
                wrong = elsewhere.verdict(rank, partial(ema.update, found_inf=overflow))
                assert not wrong, f"{layout}, flag {number % 2}, rank {rank}: {wrong}"
        assert ema.num_updates == 5
        ema.detach()


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_rank_that_steps_an_attached_optimizer_alone_finishes(world, tmp_path, layout) -> None:
    world(2).run(every_step_alone, layout, str(tmp_path))


def barrier(rank: int, group: dist.ProcessGroup) -> None:
    dist.barrier(group)


def monitored_barrier(rank: int, group: dist.ProcessGroup) -> None:
    dist.monitored_barrier(group, timeout=datetime.timedelta(seconds=1))


def send(rank: int, group: dist.ProcessGroup) -> None:
    dist.send(torch.ones(1), 1 - rank, group)


def receive(rank: int, group: dist.ProcessGroup) -> None:
    dist.recv(torch.ones(1), 1 - rank, group)


def send_all(rank: int, group: dist.ProcessGroup) -> None:
    dist.batch_isend_irecv([dist.P2POp(dist.isend, torch.ones(1), 1 - rank, group)])


def reduce(rank: int, group: dist.ProcessGroup) -> None:
    dist.all_reduce(torch.ones(1), group=group)


def gather_objects(rank: int, group: dist.ProcessGroup) -> None:
    dist.all_gather_object([None, None], rank, group)


def functional(rank: int, group: dist.ProcessGroup) -> None:
    torch.distributed.nn.functional.all_reduce(torch.ones(1), group=group)


def functional_of_dtensor(rank: int, group: dist.ProcessGroup) -> None:
    mesh = dist.DeviceMesh.from_group(group, "cpu")
    DTensor.from_local(torch.ones(1), mesh, [dist.tensor.Shard(0)], run_check=False).full_tensor()


def ask_the_store(rank: int, group: dist.ProcessGroup) -> None:
    group.get_group_store().set(f"rank {rank}", "was here")


CARELESS = [
    barrier,
    monitored_barrier,
    send,
    receive,
    send_all,
    reduce,
    gather_objects,
    functional,
    functional_of_dtensor,
    ask_the_store,
]


class Careless(ShardedEMA):
    """An average whose update says something to the other ranks."""

    talk: Callable[[], None] | None = None

    def update(self) -> None:
        super().update()
        if self.talk is not None:
            self.talk()


def careless_updates(folder: str) -> None:
    """Something that communicates within `update` is told by the check; where it waits, without the spies too.

    A small message that is sent and left lying is seen by the spies alone.
    """
    elsewhere = Elsewhere(f"{folder}/keys")
    ema = Careless(build_layout("fsdp2"), ConstantSchedule(decay=0.9))
    group = dist.new_group(timeout=datetime.timedelta(seconds=1))
    dist.barrier(group)
    for talk in CARELESS:
        ema.talk = partial(talk, dist.get_rank(), group)
        assert elsewhere.verdict(0, ema.update), f"{talk.__name__} was not seen"
    ema.talk = None
    assert not elsewhere.verdict(0, ema.update), "the spies are gone, and the average is as good as before"
    for talk in (barrier, receive, reduce):
        spoilt = dist.new_group(timeout=datetime.timedelta(seconds=1))  # nobody uses it again
        ema.talk = partial(talk, dist.get_rank(), spoilt)
        assert elsewhere.verdict(0, ema.update, spies=False), f"{talk.__name__} was waited for, and nobody was missed"


def test_an_update_that_communicates_is_seen(world, tmp_path) -> None:
    world(2).run(careless_updates, str(tmp_path))
