"""How the bytes come to disk: one writer for each page, bounded memory, the same bytes whichever way they went."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from disks import on_disk, warnings_of
from layouts_zoo import build_layout, read_whole, set_whole
from tiny import averaged_once
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from twins import assert_same_bits
from zoo import build

from dist_ema import (
    CheckpointError,
    CommunicationError,
    ConstantSchedule,
    ShardedEMA,
)
from dist_ema.checkpoint import parcels, writing
from dist_ema.disk.folders import commit
from dist_ema.ranks import relays, worlds

SCHEDULE = ConstantSchedule(momentum=0.25)
UNITS = ("_PAGE_BYTES", "_LONG_BYTES", "_WINDOW_BYTES", "_CHUNK_BYTES")
# Every way a byte may take: all exchanged, nearly all written in place, pages cut by windows, several rounds, relays.
SIZES = {"defaults": None, "tiny": (16, 64, 48, 32), "in place": (8, 8, 64, 64), "rounds": (64, 10**9, 64, 64)}
SIZES["relays"] = SIZES["tiny"]
LAYOUTS = [("ddp", 3), ("fsdp1_flat", 2), ("fsdp2", 2), ("hsdp", 4), ("tp_uneven", 2), ("fsdp_tp_uneven", 4)]


class units:
    """Context: other sizes of pages, windows and chunks."""

    def __init__(self, sizes: tuple[int, ...] | None) -> None:
        self.sizes = sizes

    def __enter__(self) -> None:
        self.former = [getattr(writing, name) for name in UNITS]
        for name, size in zip(UNITS, self.sizes or self.former, strict=True):
            setattr(writing, name, size)

    def __exit__(self, *exc: object) -> None:
        for name, size in zip(UNITS, self.former, strict=True):
            setattr(writing, name, size)


@contextmanager
def relayed(is_relayed: bool) -> Iterator[None]:
    """Small parcels go by relays, as in a large world: in hops of two."""
    with (
        mock.patch.object(parcels, "_MOST_DIRECT", 1 if is_relayed else 64),
        mock.patch.object(parcels, "_SMALL_BYTES", 150),
        mock.patch.object(relays, "PARTNERS", 2),
    ):
        yield


def traced(call) -> dict[str, set[int]]:
    """File -> offsets of all bytes that this rank writes to it during the call."""
    written: dict[str, set[int]] = {}
    real = writing.write_all

    def note(descriptor: int, content, offset: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        written.setdefault(name, set()).update(range(offset, offset + content.nbytes))
        real(descriptor, content, offset)

    writing.write_all = note
    try:
        call()
    finally:
        writing.write_all = real
    return written


def write_every_way(layout: str, folder: str) -> None:
    model = build_layout(layout)
    ema = ShardedEMA(model, SCHEDULE)
    for step in range(2):
        set_whole(model, step)
        ema.update()
    state = ema.full_state_dict()
    for name, sizes in SIZES.items():
        with units(sizes), relayed(name == "relays"):
            written = traced(lambda name=name: ema.save(os.path.join(folder, name), max_shard_size=900))
            page = writing._PAGE_BYTES
        by_rank: list[dict[str, set[int]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(by_rank, written)
        for file in {file for each in by_rank for file in each}:
            pages = [{offset // page for offset in each.get(file, ())} for each in by_rank]
            assert sum(map(len, pages)) == len(set().union(*pages)), f"{name}: two ranks write into one page of {file}"
            offsets = [len(each.get(file, ())) for each in by_rank]
            size = os.path.getsize(os.path.join(folder, name, file))
            assert sum(offsets) == size, f"{name}: every byte of {file} is written once, the header included"
        again = ShardedEMA(build_layout(layout, seed=1), SCHEDULE)
        again.load(os.path.join(folder, name))
        loaded = again.full_state_dict()
        if dist.get_rank() == 0:
            assert_same_bits(state, loaded)


@pytest.mark.parametrize(("layout", "size"), LAYOUTS, ids=[f"{layout} on {size}" for layout, size in LAYOUTS])
def test_exchanged_or_in_place_the_bytes_are_the_same_and_each_page_has_one_writer(
    world, tmp_path, layout, size
) -> None:
    world(size).run(write_every_way, layout, str(tmp_path))
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in SIZES]
    assert all(content == contents[0] for content in contents), "manifests and checksums too"


def column_model() -> nn.Module:
    """96 MiB, every row in two pieces."""
    model = nn.Module()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    for index in range(6):
        whole = torch.randn(2048, 2048)
        model.register_parameter(f"w{index}", nn.Parameter(distribute_tensor(whole, mesh, [Shard(1)])))
    return model


def peak_bytes(reset: bool = False) -> int:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def memory_of_columns(folder: str) -> tuple[float, float]:
    ema = ShardedEMA(column_model(), SCHEDULE)
    ema.update()
    grown = []
    ema.save(folder)  # the first call of anything takes memory for good
    for call in (lambda: ema.save(folder), lambda: (ema.restart(), ema.load(folder))):
        before = peak_bytes(reset=True)
        call()
        grown.append((peak_bytes() - before) / 2**20)
    return grown[0], grown[1]


def test_exchanging_every_byte_stays_within_64_mib(world, tmp_path) -> None:
    for saved, loaded in world(2).run(memory_of_columns, str(tmp_path / "ema")):
        assert saved < 64 and loaded < 64, f"MiB on top of the shards: save {saved:.0f}, load {loaded:.0f}"


def each_node_its_own_disk(root: str, num_sharing: int) -> tuple[list[str], list[str]]:
    """Ranks below `num_sharing` see one disk, every other its own, all under the same path."""
    rank = dist.get_rank()
    disk = Path(root) / ("shared" if rank < num_sharing else f"node{rank}")
    with on_disk(disk) as here:
        model = build_layout("fsdp2")
        ema = ShardedEMA(model, SCHEDULE)
        for step in range(2):
            set_whole(model, step)
            ema.update()
        told = []
        with units(SIZES["tiny"]):
            told.append(warnings_of(lambda: ema.save(f"{here}/ckpt/ema")))
        again = ShardedEMA(build_layout("fsdp2", seed=1), SCHEDULE)
        told.append(warnings_of(lambda: again.load(f"{here}/ckpt/ema")))
        state, loaded = ema.full_state_dict(), again.full_state_dict()
        if rank == 0:
            assert_same_bits(state, loaded)
        return told, sorted(str(path.relative_to(disk)) for path in disk.rglob("*"))


@pytest.mark.parametrize("num_sharing", [1, 2])
def test_ranks_that_do_not_share_the_disk_are_served_by_those_that_do(world, tmp_path, num_sharing) -> None:
    results = world(3).run(each_node_its_own_disk, str(tmp_path), num_sharing)
    for rank, ((saving, loading), files) in enumerate(results):
        if rank == 0:
            assert f"{3 - num_sharing} of 3 ranks do not see" in saving and "all nodes share" in saving
            assert f"{3 - num_sharing} of 3 ranks do not see" in loading
        else:
            assert saving == loading == ""
        expected = ["ckpt", "ckpt/ema", "ckpt/ema/manifest.json", "ckpt/ema/model.safetensors"]
        assert files == (expected if rank < num_sharing else []), "the others' disks stay empty"


def stale_copies(root: str) -> None:
    """A node whose own disk has an older checkpoint under the same path must not load that."""
    rank = dist.get_rank()
    disk = Path(root) / f"node{rank}"
    with on_disk(disk) as here:
        model = build_layout("ddp")
        ema = ShardedEMA(model, SCHEDULE)
        for step in range(3):
            set_whole(model, step)
            ema.update()
            warnings_of(lambda: ema.save(f"{here}/ema"))
            if step == 0 and rank == 0:
                shutil.copytree(disk / "ema", disk.parent / "node1" / "ema")
            dist.barrier()
        again = ShardedEMA(build_layout("ddp", seed=1), SCHEDULE)
        assert warnings_of(lambda: again.load(f"{here}/ema")).count("do not see") == (rank == 0)
        assert again.num_updates == 3
        state, loaded = ema.full_state_dict(), again.full_state_dict()
        if rank == 0:
            assert_same_bits(state, loaded)


def test_a_stale_copy_on_another_nodes_disk_is_not_loaded(world, tmp_path) -> None:
    for rank in range(2):
        (tmp_path / f"node{rank}").mkdir()
    world(2).run(stale_copies, str(tmp_path))


def one_fails(folder: str, stage: str) -> str:
    """One rank fails at a stage of a save over a good one; the same error on all, soon, and the good one stays."""
    model = build_layout("ddp")
    ema = ShardedEMA(model, SCHEDULE)
    set_whole(model, 0)
    ema.update()
    ema.save(folder)
    set_whole(model, 1)
    ema.update()
    before, live = ema.full_state_dict(), read_whole(model)
    real = os.fsync, writing.host_bytes, commit.publish, commit.stage

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    if dist.get_rank() == {"publish": 0, "stage": 0}.get(stage, 1):
        if stage == "fsync":
            os.fsync = fail
        elif stage == "read the device":
            writing.host_bytes = fail
        elif stage == "publish":
            commit.publish = fail
        elif stage == "stage":
            commit.stage = fail
    began = time.perf_counter()
    try:
        with units(SIZES["tiny"]), pytest.raises(CheckpointError) as caught:
            ema.save(folder)
    finally:
        os.fsync, writing.host_bytes, commit.publish, commit.stage = real
    assert time.perf_counter() - began < 5
    after = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert_same_bits(before, after)
        assert sorted(os.listdir(os.path.dirname(folder))) == ["ema"], "nothing half-written stays"
    assert_same_bits(read_whole(model), live)
    ema.restart()
    ema.load(folder)
    assert ema.num_updates == 1
    return str(caught.value)


@pytest.mark.parametrize("stage", ["stage", "read the device", "fsync", "publish"])
def test_a_failure_of_one_rank_at_any_stage_of_a_save_is_told_on_all_and_keeps_the_former_one(
    world, tmp_path, stage
) -> None:
    messages = world(3).run(one_fails, str(tmp_path / "ema"), stage)
    assert (
        len(set(messages)) == 1
        and ("on 1 of 3 ranks" in messages[0] or "rank 0 failed" in messages[0])
        and "No space left" in messages[0]
    )


def slow_rank_0(folder: str) -> None:
    """Rank 0 takes longer within the call than the others would wait for it to come."""
    ema = ShardedEMA(build_layout("ddp"), SCHEDULE)
    ema.update()
    real = commit.stage, commit.publish

    def slowly(work):
        def wait(*arguments):
            time.sleep(1.5)
            return work(*arguments)

        return wait

    os.environ["DIST_EMA_ARRIVAL_SECONDS"] = "0.5"
    if dist.get_rank() == 0:
        commit.stage, commit.publish = map(slowly, real)
    try:
        ema.save(folder)
        ema.load(folder)
    finally:
        commit.stage, commit.publish = real
        del os.environ["DIST_EMA_ARRIVAL_SECONDS"]


def test_a_rank_0_that_is_slow_within_a_save_is_waited_for(world, tmp_path) -> None:
    world(3).run(slow_rank_0, str(tmp_path / "ema"))


def one_rank_calls(folder: str, caller: int, call: str) -> str:
    ema = ShardedEMA(build_layout("ddp"), SCHEDULE)
    ema.update()
    if dist.get_rank() != caller:
        time.sleep(5)
        return ""
    os.environ["DIST_EMA_ARRIVAL_SECONDS"] = "2"
    began = time.perf_counter()
    with pytest.raises(CommunicationError, match="Every rank must make the same call") as caught:
        getattr(ema, call)(folder)
    assert 1.5 < time.perf_counter() - began < 4
    return str(caught.value)


@pytest.mark.parametrize(("caller", "call"), [(0, "save"), (1, "load")])
def test_a_call_on_one_rank_only_ends_soon_in_a_clear_error(world, tmp_path, caller, call) -> None:
    messages = world(2).run(one_rank_calls, str(tmp_path / "ema"), caller, call)
    world(2).stop()  # one of its ranks has the variable set
    assert f"{call}: rank {caller} waited" in messages[caller]
    assert not list(tmp_path.iterdir())


def killed_in_the_middle(folder: str) -> None:
    ema = ShardedEMA(build_layout("fsdp2"), SCHEDULE)
    ema.update()
    ema.save(folder)
    ema.update()
    if dist.get_rank() == 1:
        writing.host_bytes = lambda *_: os._exit(1)
    began = time.perf_counter()
    with units(SIZES["tiny"]), pytest.raises(CommunicationError, match=r"perhaps one died|rank 1 is gone"):
        ema.save(folder)
    assert time.perf_counter() - began < 10
    raise RuntimeError("the survivor was told")


def test_a_rank_killed_in_the_middle_of_a_save_ends_it_for_the_others(world, tmp_path) -> None:
    with pytest.raises(AssertionError, match="the survivor was told"):
        world(2).run(killed_in_the_middle, str(tmp_path / "ema"))
    ema = ShardedEMA(build_layout_alone(), SCHEDULE)
    ema.load(tmp_path / "ema")
    assert ema.num_updates == 1


def build_layout_alone() -> nn.Module:
    from layouts_zoo import bare

    torch.manual_seed(0)
    return bare("fsdp2")


def dies_while_a_thread_is_prepared(folder: str) -> None:
    ema = ShardedEMA(build_layout("ddp"), SCHEDULE)
    ema.update()
    if dist.get_rank() == 1:
        worlds.World.beside = lambda *_: os._exit(1)
    began = time.perf_counter()
    with pytest.raises(CommunicationError):
        ema.save(folder, background=True)
        ema.wait()
    assert time.perf_counter() - began < 10
    raise RuntimeError("the survivor was told")


def test_a_rank_that_dies_in_the_first_background_save_does_not_hang_the_others(world, tmp_path) -> None:
    with pytest.raises(AssertionError, match="the survivor was told"):
        world(2).run(dies_while_a_thread_is_prepared, str(tmp_path / "ema"))


def may_not_look(folder: str) -> None:
    """What root squashing does to a rank: looking at the folder is refused."""
    ema = averaged_once(build("ddp"))
    real = Path.exists

    def refused(path: Path) -> bool:
        if ".staging" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    if dist.get_rank() == 1:
        Path.exists = refused
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ema.save(folder)
    finally:
        Path.exists = real
    ema.load(folder)


def test_a_rank_that_may_not_look_at_the_folder_is_served(world, tmp_path) -> None:
    world(2).run(may_not_look, str(tmp_path / "ema"))
