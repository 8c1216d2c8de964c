"""Killed at any moment of a save over a former checkpoint, the folder is the whole old or the whole new one.

The command with more kills is launch/crash/kill_saves.py.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import generations
import kill_saves
import killing
import pytest
from generations import ADDED, ADDED_TEXT, COPYING, MAX_SHARD_SIZE, build, fill, outcome_of
from hostile import sealed
from killing import Kill, Result, Trials

from dist_ema import (
    CommunicationError,
    ShardedEMA,
)
from dist_ema.disk.folders import commit
from dist_ema.disk.folders.carried_files import carry_over

OLD, NEW = 1, 2


@pytest.fixture(scope="module")
def forking():
    """A process that has loaded torch and nothing else: it forks the ranks."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield lambda function, *arguments: executor.submit(function, *arguments).result(timeout=120)


def told(results: list[Result]) -> str:
    return "\n".join(f"{result.outcome} {result.reason} {result.kill}\n{result.log}" for result in results)


def kill_at_random(folder: Path) -> tuple[list[Result], list[str]]:
    trials = Trials(folder, 2)
    kill_saves.warm_up(trials)
    results = list(kill_saves.random_kills(trials, 20, random.Random(0)))
    trials.undisturbed(Kill(()))
    return results, generations.beside(trials.target)


@pytest.mark.ranks
def test_killed_at_any_moment_the_folder_is_whole_and_the_survivors_are_told(forking, tmp_path) -> None:
    results, beside = forking(kill_at_random, tmp_path)
    assert all(result.good for result in results), told(results)
    assert sum(result.inside for result in results) >= 8, "most kills must hit the save"
    assert sum(result.survivors for result in results) == 10
    assert beside == []


def kill_at_each_change(folder: Path, size: int, changes: list[str] | None) -> tuple[list[str], list[Result]]:
    trials = Trials(folder, size)
    trials.undisturbed(Kill(()), saves=2)
    found = trials.events(Kill((0,)))
    wanted = [number for number, change in enumerate(found, 1) if changes is None or change in changes]
    return found, [trials.kill(Kill(tuple(range(size)), event=number)) for number in wanted]


@pytest.mark.ranks
def test_killed_before_each_change_in_the_file_system(forking, tmp_path) -> None:
    changes, results = forking(kill_at_each_change, tmp_path, 1, None)
    assert all(result.inside for result in results)
    aside = changes.index("rename ema .ema.old")
    between = changes.index(kill_saves.BETWEEN_RENAMES)
    assert changes.index("mkdir .ema.staging-TOKEN") < changes.index("open manifest.json") < aside < between
    # Before the second rename the old one is read, also when only `.ema.old` is left of it; after it the new one.
    expected = ["old"] * (between + 1) + ["new"] * (len(changes) - between - 1)
    assert [result.outcome for result in results] == expected, told(results)
    staged = (".ema.staging-TOKEN", ".ema.writer-TOKEN")
    assert results[aside].beside == staged
    assert results[between].beside == (".ema.old", *staged)
    assert results[between + 1].beside == (".ema.old", ".ema.writer-TOKEN")
    assert {result.beside for result in results[between + 2 :]} == {
        (".ema.old-TOKEN", ".ema.writer-TOKEN"),  # the old one is being deleted
        (".ema.writer-TOKEN",),
    }


def kill_rank_0_at_turning_points(folder: Path) -> list[Result]:
    trials = Trials(folder, 2)
    trials.undisturbed(Kill(()), saves=2)
    changes = trials.events(Kill((0,)))
    points = ["mkdir .ema.staging-TOKEN", "open manifest.json", "rename ema .ema.old", kill_saves.BETWEEN_RENAMES]
    numbers = [1 + changes.index(point) for point in points]
    return [trials.kill(Kill((0,), event=number)) for number in (*numbers, numbers[-1] + 1)]


@pytest.mark.ranks
def test_survivors_are_told_that_rank_0_died_in_the_commit(forking, tmp_path) -> None:
    results = forking(kill_rank_0_at_turning_points, tmp_path)
    assert [result.outcome for result in results] == ["old", "old", "old", "old", "new"], told(results)
    assert all(result.told == 1 for result in results), told(results)


def kill_in_recovery(folder: Path) -> list[Result]:
    trials = Trials(folder, 1)
    trials.undisturbed(Kill(()), saves=2)
    results = list(kill_saves.kills_in_recovery(trials, until=5))
    trials.undisturbed(Kill(()))
    return results


@pytest.mark.ranks
def test_killed_again_while_it_clears_what_a_kill_left(forking, tmp_path) -> None:
    results = forking(kill_in_recovery, tmp_path)
    assert all(result.good and result.inside for result in results), told(results)
    assert {result.outcome for result in results} == {"old", "new"}


# That all this can fail.


def kill_a_careless_commit(folder: Path) -> list[Result]:
    """The ranks inherit the patches of this process."""

    def careless(staged: commit.Staged, unfit: object = ()) -> None:
        if staged.target.exists():
            carry_over(staged.target, staged.folder)
            shutil.rmtree(staged.target)
        staged.folder.rename(staged.target)

    careful, commit.publish = commit.publish, careless
    try:
        trials = Trials(folder, 1)
        trials.undisturbed(Kill(()), saves=2)
        results = []
        for result in kill_saves.kills_at_changes(trials, everyone=True):
            results.append(result)
            if not result.good:
                break
        return results
    finally:
        commit.publish = careful


@pytest.mark.ranks
def test_a_commit_that_deletes_first_is_caught(forking, tmp_path) -> None:
    *before, last = forking(kill_a_careless_commit, tmp_path)
    assert len(before) > 10 and all(result.outcome == "old" for result in before)
    assert last.outcome == "neither" and last.reason


def kill_before_a_survivor_that_hangs(folder: Path) -> Result:
    save, limit = ShardedEMA.save, killing.HANG_SECONDS

    def hanging(*arguments: object, **options: object) -> None:
        try:
            save(*arguments, **options)
        except CommunicationError:
            time.sleep(60)

    ShardedEMA.save, killing.HANG_SECONDS = hanging, 1.0
    try:
        trials = Trials(folder, 2)
        trials.undisturbed(Kill(()), saves=2)
        return trials.kill(Kill((1,)))
    finally:
        ShardedEMA.save, killing.HANG_SECONDS = save, limit


@pytest.mark.ranks
def test_a_survivor_that_hangs_is_caught(forking, tmp_path) -> None:
    result = forking(kill_before_a_survivor_that_hangs, tmp_path)
    assert (result.survivors, result.told, result.hung) == (1, 0, 1) and not result.good
    assert "in hanging" in result.log, "its stack is told"


@pytest.fixture
def saved(tmp_path) -> tuple[Path, Path]:
    """The folders of the old and of the new generation, both whole."""
    model = build("plain", 1)
    ema = ShardedEMA(model, COPYING)
    folders = tmp_path / "old", tmp_path / "ema"
    for generation, folder in zip((OLD, NEW), folders, strict=True):
        fill(model, generation)
        ema.update()
        ema.save(folder, max_shard_size=MAX_SHARD_SIZE)
        (folder / ADDED).write_text(ADDED_TEXT)
    return folders


def test_whole_folders_are_told_apart(saved) -> None:
    old, new = saved
    assert outcome_of(new, NEW, returned=True) == ("new", "")
    assert outcome_of(old, NEW, returned=False) == ("old", "")
    assert outcome_of(old, NEW, returned=True)[0] == "neither", "a save that has returned is lost"
    assert outcome_of(old, NEW + 1, returned=False)[0] == "neither", "two generations ago"
    new.rename(new.parent / ".ema.old")
    assert outcome_of(new, NEW, returned=False) == ("new", ""), "between the renames of a commit"


def resealed(folder: Path, **changes: object) -> None:
    record = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(sealed({**record, **changes}))


def one_file_of_the_other(folder: Path, other: Path) -> None:
    shutil.copy(sorted(other.glob("model-*"))[0], folder)


def one_file_of_the_other_with_its_checksums(folder: Path, other: Path) -> None:
    one_file_of_the_other(folder, other)
    ours, theirs = (json.loads((path / "manifest.json").read_text())["checksums"]["ema"] for path in (folder, other))
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    first = min(weight_map.values())
    mixed = {fqn: (theirs if weight_map[fqn] == first else ours)[fqn] for fqn in ours}
    resealed(folder, checksums={"ema": mixed})


def part_of_a_file_of_the_other(folder: Path, other: Path) -> None:
    path = sorted(folder.glob("model-*"))[-1]
    content = (other / path.name).read_bytes()
    half = len(content) // 2
    path.write_bytes(path.read_bytes()[:half] + content[half:])


def end_of_a_file_not_written(folder: Path, other: Path) -> None:
    path = sorted(folder.glob("model-*"))[-1]
    content = path.read_bytes()
    path.write_bytes(content[:-4096] + bytes(4096))


def all_files_of_the_other(folder: Path, other: Path) -> None:
    for path in other.glob("model*"):
        shutil.copy(path, folder)


def manifest_of_the_other(folder: Path, other: Path) -> None:
    shutil.copy(other / "manifest.json", folder)


def counter_of_the_other(folder: Path, other: Path) -> None:
    resealed(folder, num_updates=OLD)


def no_manifest(folder: Path, other: Path) -> None:
    (folder / "manifest.json").unlink()


def half_the_files(folder: Path, other: Path) -> None:
    for path in sorted(folder.iterdir())[::2]:
        path.unlink()


def one_file_missing(folder: Path, other: Path) -> None:
    sorted(folder.glob("model-*"))[-1].unlink()


def nothing(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)


def only_staged(folder: Path, other: Path) -> None:
    folder.rename(folder.parent / ".ema.staging")


def added_file_lost(folder: Path, other: Path) -> None:
    (folder / ADDED).unlink()


MIXTURES = [
    *(one_file_of_the_other, one_file_of_the_other_with_its_checksums, part_of_a_file_of_the_other),
    *(end_of_a_file_not_written, all_files_of_the_other, manifest_of_the_other, counter_of_the_other),
    *(no_manifest, half_the_files, one_file_missing, nothing, only_staged, added_file_lost),
]


@pytest.mark.parametrize("mix", MIXTURES, ids=lambda mix: mix.__name__)
def test_a_mixture_or_a_half_folder_is_neither(saved, mix) -> None:
    old, new = saved
    mix(new, old)
    outcome, reason = outcome_of(new, NEW, returned=False)
    assert outcome == "neither" and reason
