"""Nodes that do not share a disk: who sees a folder, and whose folder it is after a restart."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from disks import on_disk, on_node, warnings_of
from layouts_zoo import build_layout, set_whole
from torch import nn
from twins import assert_same_bits

from dist_ema import CheckpointCorruptError, CheckpointNotFoundError, ConstantSchedule, RankMismatchError, ShardedEMA
from dist_ema.checkpoint import loading, saving
from dist_ema.checkpoint.nodes import views as nodes

SCHEDULE = ConstantSchedule(momentum=0.25)


def saved_and_loaded(path: str) -> tuple[str, str]:
    """The warnings of a save and of a load, which are checked for what they read."""
    model = build_layout("fsdp2")
    ema = ShardedEMA(model, SCHEDULE)
    for step in range(2):
        set_whole(model, step)
        ema.update()
    saving = warnings_of(lambda: ema.save(path))
    again = ShardedEMA(build_layout("fsdp2", seed=1), SCHEDULE)
    loading = warnings_of(lambda: again.load(path))
    state, loaded = ema.full_state_dict(), again.full_state_dict()
    if dist.get_rank() == 0:
        assert_same_bits(state, loaded)
    return saving, loading


def a_late_cache(root: str, rank_that_is_late: int) -> tuple[str, str]:
    rank = dist.get_rank()
    with ExitStack() as stack:
        stack.enter_context(on_node(f"node{rank // 2}"))
        if rank == rank_that_is_late:
            real, looks = loading._sees_average, []

            def first_look_shows_nothing(saved) -> bool:
                looks.append(saved)
                return len(looks) > 1 and real(saved)

            stack.enter_context(mock.patch.object(saving, "_appears", lambda path: False))
            stack.enter_context(mock.patch.object(loading, "_sees_average", first_look_shows_nothing))
        return saved_and_loaded(f"{root}/ema")


@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_to_which_a_network_disk_shows_the_folder_late_writes_and_reads_like_its_neighbours(
    world, tmp_path, rank
) -> None:
    assert world(4).run(a_late_cache, str(tmp_path), rank) == [("", "")] * 4


def half_a_node(root: str, outside: int) -> tuple[str, str, bool]:
    """One rank sees another disk than the other rank of its node."""
    rank = dist.get_rank()
    real, wrote = saving.write_tensors, []

    def note(exchange, folder, files, pieces, writers, checksums):
        wrote.append(rank in writers)
        return real(exchange, folder, files, pieces, writers, checksums)

    with on_node(f"node{rank // 2}"), on_disk(Path(root) / ("own" if rank == outside else "shared")) as here:
        with mock.patch.object(saving, "write_tensors", note):
            return (*saved_and_loaded(f"{here}/ema"), all(wrote))


@pytest.mark.parametrize(("outside", "writers"), [(3, [0, 1]), (2, [0, 1]), (1, [0, 2, 3])])
def test_a_node_is_not_split_into_ranks_that_see_the_folder_and_ranks_that_do_not(
    world, tmp_path, outside, writers
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "shared").mkdir()
    results = world(4).run(half_a_node, str(tmp_path), outside)
    assert [rank for rank, (_, _, wrote) in enumerate(results) if wrote] == writers
    saving, loading, _ = results[0]
    assert f"{4 - len(writers)} of 4 ranks do not see" in saving and f"{4 - len(writers)} of 4 ranks" in loading
    assert "on the node node0, and a load wants rank 0 there again" in saving
    assert list((tmp_path / "own").iterdir()) == [] and len(list((tmp_path / "shared" / "ema").iterdir())) == 2


def test_containers_of_one_machine_that_mount_other_disks_are_no_node() -> None:
    program = "from dist_ema.checkpoint.nodes.views import file_view; print(file_view())"
    python = [sys.executable, "-c", program]

    def view_of(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode:
            pytest.skip(f"no mount namespace can be made here: {done.stderr[-200:]}")
        return done.stdout.strip()

    assert view_of(*python) == nodes.file_view()
    assert view_of("unshare", "-m", *python) != nodes.file_view()


def after_a_restart(root: str) -> list[tuple[str, str, int]]:
    """Every rank is a node with its own disk, on which an earlier run, whose rank 0 was there, left an average."""
    rank, results = dist.get_rank(), []
    with on_node(f"n{rank}"), on_disk(Path(root) / f"disk{rank}") as here:
        for call in ("load", "load the folder above", "start_from"):
            ema = ShardedEMA(nn.Linear(3, 2), SCHEDULE)
            kind = ""
            try:
                if call == "start_from":
                    kind = warnings_of(lambda ema=ema: ema.start_from(f"{here}/ckpt/ema", num_updates=1))
                else:
                    path = f"{here}/ckpt" if "above" in call else f"{here}/ckpt/ema"
                    kind = warnings_of(lambda ema=ema, path=path: ema.load(path))
            except (CheckpointNotFoundError, CheckpointCorruptError) as error:
                kind = f"{type(error).__name__}: {error}"
            results.append((call, kind, ema.num_updates))
    return results


def restarted(world, tmp_path: Path, updates_on: list[int]) -> dict[str, list[tuple[str, int]]]:
    """Call -> for every rank what it raised or warned, and its number of updates."""
    for rank, num_updates in enumerate(updates_on):
        disk = tmp_path / f"disk{rank}"
        (disk / "ckpt").mkdir(parents=True)
        if num_updates:
            shutil.copytree(tmp_path / f"of{num_updates}", disk / "ckpt" / "ema")
    by_rank = world(len(updates_on)).run(after_a_restart, str(tmp_path))
    return {of_call[0][0]: [result[1:] for result in of_call] for of_call in zip(*by_rank, strict=True)}


@pytest.fixture
def averages(tmp_path) -> None:
    """Averages of 1, 2 and 3 updates, written by a run of one process."""
    ema = ShardedEMA(nn.Linear(3, 2), SCHEDULE)
    for num_updates in (1, 2, 3):
        ema.update()
        ema.save(tmp_path / f"of{num_updates}")


@pytest.mark.usefixtures("averages")
def test_a_checkpoint_that_only_another_node_has_is_named_with_the_way_to_load_it(world, tmp_path) -> None:
    results = restarted(world, tmp_path, [0, 2, 3])
    for call in ("load", "load the folder above"):
        first = results[call][0]
        assert results[call] == [first] * 3 and first[1] == 0
        assert first[0].startswith("CheckpointNotFoundError")
        assert "rank 2, on the node n2, sees one at /proc/self/cwd/ckpt" in first[0]
        assert "of 3 updates, as 1 of 3 ranks do" in first[0] and "rank 0 on that node" in first[0]
    first = results["start_from"][0]
    assert results["start_from"] == [first] * 3
    assert first[0].startswith("CheckpointCorruptError") and "rank 1, on the node n1, sees one at" in first[0]
    assert "as 2 of 3 ranks do" in first[0]


@pytest.mark.usefixtures("averages")
def test_a_checkpoint_that_no_node_has_is_missing_and_no_more(world, tmp_path) -> None:
    for of_ranks in restarted(world, tmp_path, [0, 0]).values():
        assert of_ranks[0] == of_ranks[1] and "But rank" not in of_ranks[0][0] and "Error" in of_ranks[0][0]


@pytest.mark.usefixtures("averages")
def test_an_older_checkpoint_of_rank_0_is_loaded_with_a_word_about_the_newer_one(world, tmp_path) -> None:
    results = restarted(world, tmp_path, [1, 3, 3])
    for call in ("load", "load the folder above"):
        (told, num_updates), *others = results[call]
        assert others == [("", 1), ("", 1)] and num_updates == 1
        assert "has 1 updates on the node n0" in told and "rank 1, on the node n1, sees an average of 3 updates" in told
        assert "as 2 ranks do in all" in told and "rank 0 on that node" in told


@pytest.mark.usefixtures("averages")
@pytest.mark.parametrize("updates_on", [[3, 1, 2], [2, 2, 0]])
def test_a_checkpoint_of_rank_0_that_is_the_newest_is_loaded_without_such_a_word(world, tmp_path, updates_on) -> None:
    results = restarted(world, tmp_path, updates_on)
    assert all("sees an average of" not in told for of_ranks in results.values() for told, _ in of_ranks)
    assert [num_updates for _, num_updates in results["load"]] == [updates_on[0]] * 3


CALLS = {
    "save": lambda ema: ema.save("out/ema"),
    "snapshot": lambda ema: ema.snapshot("out"),
    "consolidate": lambda ema: ema.consolidate("out/export"),
    "load": lambda ema: ema.load("out/ema"),
    "start_from": lambda ema: ema.start_from("out/export", num_updates=1),
}


def a_relative_path(root: str) -> dict[str, str]:
    rank, former = dist.get_rank(), os.getcwd()
    ema = ShardedEMA(nn.Linear(3, 2), SCHEDULE)
    (Path(root) / f"home{rank}").mkdir()
    refusals = {}
    try:
        os.chdir(Path(root) / f"home{rank}")
        with on_node(f"n{rank}"):
            for name, call in CALLS.items():
                with pytest.raises(RankMismatchError) as caught:
                    call(ema)
                refusals[name] = str(caught.value)
    finally:
        os.chdir(former)
    return refusals


def test_a_relative_path_that_leads_elsewhere_on_each_node_is_named_as_such(world, tmp_path) -> None:
    first, second = world(2).run(a_relative_path, str(tmp_path))
    assert first == second and first.keys() == CALLS.keys()
    folders = f"working directories {tmp_path / 'home0'} and {tmp_path / 'home1'}"
    for told in first.values():
        assert f"a relative path, resolved in the {folders}, of rank 0 on the node n0 and rank 1 on the node n1" in told
    assert [path for home in tmp_path.iterdir() for path in home.iterdir()] == []
