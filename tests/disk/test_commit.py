"""What a kill, another job, an interrupt or a full disk leaves: no average is lost, and no later save is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import HALF, averaged_once
from torch import nn

from dist_ema import (
    CheckpointError,
    CheckpointNotFoundError,
    ShardedEMA,
    consolidate_checkpoint,
)
from dist_ema.checkpoint import saving
from dist_ema.disk.folders import claims, commit, contents, mounts


def averaging(num_updates: int, tracks: int = 1) -> ShardedEMA:
    ema = ShardedEMA(nn.Linear(2, 2), HALF if tracks == 1 else dict.fromkeys("ab", HALF))
    for _ in range(num_updates):
        ema.update()
    return ema


def loaded(path: Path, tracks: int = 1) -> int:
    ema = averaging(0, tracks)
    ema.load(path)
    return ema.num_updates


def cut_off(root: Path, tracks: int = 1) -> Path:
    """What a kill between the renames of a commit leaves."""
    averaging(1, tracks).save(root / "ema")
    (root / "ema" / "notes.txt").write_text("added before")
    (root / "ema").rename(root / ".ema.old")
    return root / "ema"


def tokenizer(target: Path) -> None:
    (target / "tokenizer").mkdir(parents=True)
    (target / "tokenizer" / "vocab.txt").write_text("a b c")
    (target / "tokenizer.json").write_text("{}")


def half_an_average(target: Path) -> None:
    shutil.copytree(target.parent / ".ema.old", target)
    next(target.rglob("model.safetensors")).unlink()
    (target / "tokenizer.json").write_text("{}")


def shorter_file(target: Path) -> None:
    half_an_average(target)
    shutil.copytree(target.parent / ".ema.old", target, dirs_exist_ok=True)
    os.truncate(next(target.rglob("model.safetensors")), 100)


@pytest.mark.parametrize("tracks", [1, 2])
@pytest.mark.parametrize("put", [tokenizer, half_an_average, shorter_file], ids=lambda put: put.__name__)
def test_a_file_in_the_target_neither_hides_nor_costs_the_former_average(tmp_path, put, tracks) -> None:
    target = cut_off(tmp_path, tracks)
    put(target)
    for source in (target, tmp_path):
        with pytest.warns(UserWarning, match="is read instead"):
            assert loaded(source, tracks) == 1
    averaging(2, tracks).save(target)
    assert loaded(target, tracks) == 2
    assert (target / "tokenizer.json").exists() and (target / "notes.txt").exists(), "what was added is carried over"
    assert os.listdir(tmp_path) == ["ema"]


def foreign_model(target: Path) -> None:
    target.mkdir()
    (target / "pytorch_model.bin").write_bytes(b"weights of somebody")


def foreign_manifest(target: Path) -> None:
    target.mkdir()
    (target / "manifest.json").write_text('{"name": "an application"}')


def an_export(target: Path) -> None:
    consolidate_checkpoint(target.parent / ".ema.old", target.parent / "export")
    (target.parent / "export").rename(target)


def a_file(target: Path) -> None:
    target.write_text("a file")


@pytest.mark.parametrize("put", [foreign_model, foreign_manifest, an_export, a_file], ids=lambda put: put.__name__)
def test_a_refused_save_removes_nothing(tmp_path, put) -> None:
    target = cut_off(tmp_path)
    put(target)
    (tmp_path / ".ema.trash-0123abcd").mkdir()

    def everything() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = everything()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="is a file" if put is a_file else "would replace it"):
            averaging(2).save(target)
        assert everything() == before
    if put is not a_file:
        with pytest.warns(UserWarning, match="is read instead"):
            assert loaded(target) == 1


def test_a_former_folder_beside_a_whole_one_is_neither_read_nor_kept(tmp_path) -> None:
    averaging(2).save(tmp_path / "ema")
    averaging(1).save(tmp_path / "other")
    (tmp_path / "other").rename(tmp_path / ".ema.old")
    assert loaded(tmp_path / "ema") == loaded(tmp_path) == 2
    averaging(3).save(tmp_path / "ema")
    assert os.listdir(tmp_path) == ["ema"] and loaded(tmp_path) == 3


def test_an_export_that_was_cut_off_is_found_and_replaced(tmp_path) -> None:
    averaging(1).save(tmp_path / "ckpt")
    consolidate_checkpoint(tmp_path / "ckpt", tmp_path / "export")
    (tmp_path / "export").rename(tmp_path / ".export.old")
    tokenizer(tmp_path / "export")
    consolidate_checkpoint(tmp_path / "ckpt", tmp_path / "export", dtype=torch.float16)
    assert sorted(os.listdir(tmp_path)) == ["ckpt", "export"]
    assert {"model.safetensors", "tokenizer.json", "tokenizer"} <= set(os.listdir(tmp_path / "export"))
    with pytest.raises(CheckpointError, match="no saved average of this package"):
        averaging(1).save(tmp_path / "export")


def staged(target: Path, text: str) -> commit.Staged:
    made = commit.stage(target, contents.is_average)
    (made.folder / "manifest.json").write_text(json.dumps({"format": "dist_ema", "content": text}))
    return made


def content(target: Path) -> str:
    return str(json.loads((contents.resolve(target) / "manifest.json").read_text())["content"])


@pytest.mark.parametrize("former", [False, True])
def test_of_two_writers_one_wins_whole_and_the_other_is_told(tmp_path, former) -> None:
    target = tmp_path / "ema"
    if former:
        commit.publish(staged(target, "former"))
    first, second = staged(target, "first"), staged(target, "second")
    assert first.folder != second.folder
    commit.publish(second)
    with pytest.raises(CheckpointError, match="another job"):
        commit.publish(first)
    commit.discard(first)
    assert content(target) == "second" and os.listdir(tmp_path) == ["ema"]
    commit.publish(staged(target, "third"))
    assert content(target) == "third" and os.listdir(tmp_path) == ["ema"]


def test_a_folder_that_came_between_the_last_look_and_the_rename_is_put_back(tmp_path, monkeypatch) -> None:
    target = tmp_path / "ema"
    commit.publish(staged(target, "former"))
    slow, quick = staged(target, "slow"), staged(target, "quick")
    real, renames = Path.rename, []

    def interleaved(source: Path, name: Path) -> Path:
        renames.append(source.name)
        if len(renames) == 1:
            commit.publish(quick)
        return real(source, name)

    monkeypatch.setattr(Path, "rename", interleaved)
    with pytest.raises(CheckpointError, match="another job"):
        commit.publish(slow)
    monkeypatch.undo()
    commit.discard(slow)
    assert content(target) == "quick" and os.listdir(tmp_path) == ["ema"]


@pytest.mark.parametrize("is_killed", [False, True])
def test_an_average_that_came_where_a_file_was_in_the_way_is_put_back(tmp_path, monkeypatch, is_killed) -> None:
    """The first save moved it away unseen, and both returned."""
    target = tmp_path / "ema"
    commit.publish(staged(target, "former"))
    target.rename(tmp_path / ".ema.old")
    tokenizer(target)
    slow, quick = staged(target, "slow"), staged(target, "quick")
    real, renames = Path.rename, []

    def interleaved(source: Path, name: Path) -> Path:
        renames.append(source)
        if len(renames) == 1:
            commit.publish(quick)
        elif is_killed and len(renames) > 1 and source.name.startswith(".ema.old-"):
            raise KeyboardInterrupt  # as if it had been killed before it could put the average back
        return real(source, name)

    monkeypatch.setattr(Path, "rename", interleaved)
    with pytest.raises(KeyboardInterrupt if is_killed else CheckpointError):
        commit.publish(slow)
    monkeypatch.undo()
    assert renames[0] == target and content(target) == "quick"
    commit.discard(slow)
    commit.discard(commit.stage(target, contents.is_average))
    assert content(target) == "quick" and (is_killed or os.listdir(tmp_path) == ["ema"])


def test_a_save_that_began_between_the_renames_of_another_takes_its_place_or_is_told(tmp_path, monkeypatch) -> None:
    target = tmp_path / "ema"
    commit.publish(staged(target, "former"))
    first = staged(target, "first")
    real = Path.rename
    late: list[commit.Staged] = []

    def interleaved(source: Path, name: Path) -> Path:
        if source == first.folder and not late:
            late.append(staged(target, "late"))
            commit.publish(late[0])
        return real(source, name)

    monkeypatch.setattr(Path, "rename", interleaved)
    with pytest.raises(CheckpointError, match="another job"):
        commit.publish(first)
    monkeypatch.undo()
    commit.discard(first)
    assert content(target) == "late" and os.listdir(tmp_path) == ["ema"]


def test_a_whole_average_that_two_dying_writers_moved_away_is_found_again(tmp_path) -> None:
    averaging(1).save(tmp_path / "ema")
    (tmp_path / "ema").rename(tmp_path / ".ema.old-0123456789ab")
    assert loaded(tmp_path / "ema") == 1
    made = commit.stage(tmp_path / "ema", contents.is_average)
    assert sorted(os.listdir(tmp_path))[0] == ".ema.old" and loaded(tmp_path / "ema") == 1
    commit.discard(made)
    averaging(2).save(tmp_path / "ema")
    assert os.listdir(tmp_path) == ["ema"]


WRITES = """
import sys, time
from pathlib import Path
from dist_ema.disk.folders import commit, contents
staged = commit.stage(Path(sys.argv[1]), contents.is_average)
(staged.folder / "model.safetensors").write_bytes(bytes(1000))
print(staged.folder, flush=True)
time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process in the middle of a save to `ema`, and its staging folder."""
    process = subprocess.Popen([sys.executable, "-c", WRITES, str(tmp_path / "ema")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.wait()
    process.stdout.close()


def test_only_what_a_dead_writer_left_is_removed(tmp_path, writer) -> None:
    process, folder = writer
    averaging(1).save(tmp_path / "ema")
    assert (folder / "model.safetensors").exists() and loaded(tmp_path / "ema") == 1
    os.kill(process.pid, signal.SIGKILL)
    while claims._state_and_start(process.pid)[0] not in ("Z", "X", ""):
        time.sleep(0.01)
    averaging(2).save(tmp_path / "ema")  # not reaped: a zombie writes no more
    assert os.listdir(tmp_path) == ["ema"] and loaded(tmp_path / "ema") == 2


def told_by(record: dict[str, Any]) -> Callable[[Path, int], None]:
    def rewrite(path: Path, descriptor: int) -> None:
        os.pwrite(descriptor, (json.dumps({**claims._this_process(), **record}) + " " * 200).encode(), 0)

    return rewrite


@pytest.mark.parametrize(
    ("record", "locked", "reach", "dead"),
    [
        ({"boot": "another"}, True, True, False),
        ({"boot": "another"}, False, True, True),
        ({"boot": "another"}, False, False, False),  # nobody can tell
        ({"table": "pid:[1]"}, True, False, False),  # another container of this machine
        ({"table": "pid:[1]"}, False, False, True),
        ({"pid": 2**22 + 1}, True, True, True),  # a child of the dead one holds the lock
        ({"start": "1"}, False, True, True),  # the number was given to another process
        ({"pid": os.getppid(), "start": None}, True, True, False),
        ({"pid": "four", "boot": ["x"]}, False, True, True),
    ],
)
def test_a_writer_is_dead_only_where_that_can_be_told(tmp_path, monkeypatch, record, locked, reach, dead) -> None:
    monkeypatch.setattr(claims, "locks_reach_other_machines", lambda path: reach)
    claim = claims.Claim(tmp_path / ".ema.writer-0123456789ab")
    assert claim.take()
    told_by(record)(claim.path, claim._descriptor)
    if not locked:
        claim._close()
    assert claims.is_dead(claim.path) is dead
    claim.release()
    assert claims.is_dead(claim.path) and not os.listdir(tmp_path)


def test_a_claim_ends_with_its_save_and_no_child_keeps_it(tmp_path) -> None:
    claim = claims.Claim(tmp_path / ".ema.writer-0123456789ab")
    assert claim.take() and not claims.is_dead(claim.path)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if claim._descriptor == -1 and not list(claims._claims) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not claims.is_dead(claim.path), "its parent goes on"
    path = claim.path
    del claim  # lost by an interrupt
    assert path.exists() and claims.is_dead(path)
    with pytest.raises(FileExistsError):
        claims.Claim(path).take()


def test_the_table_of_mounts_tells_mount_points_and_whose_locks_stay_local(monkeypatch, tmp_path) -> None:
    assert mounts.is_mount_point(Path("/proc")) and not mounts.is_mount_point(tmp_path)
    table = [
        ("/", "ext4", {"rw"}),
        ("/nfs", "nfs4", {"rw", "local_lock=none"}),
        ("/old", "nfs", {"rw", "local_lock=all"}),
        ("/lustre", "lustre", {"rw", "flock"}),
        ("/s3", "fuse.s3fs", {"rw"}),
        ("/nfs/bound", "nfs4", {"rw"}),
    ]
    monkeypatch.setattr(mounts, "_mounts", lambda: [mounts._Mount(Path(p), k, frozenset(o)) for p, k, o in table])
    reach = {place: mounts.locks_reach_other_machines(Path(place) / "run" / "ema") for place, _, _ in table}
    assert reach == {"/": True, "/nfs": True, "/old": False, "/lustre": True, "/s3": False, "/nfs/bound": True}
    assert mounts.is_mount_point(Path("/nfs/bound")), "bound within one file system"


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path, monkeypatch) -> None:
    averaging(1).save(tmp_path / "ckpt")
    (tmp_path / "ema").mkdir()
    monkeypatch.setattr(mounts, "_mounts", lambda: [mounts._Mount(tmp_path / "ema", "ext4", frozenset())])
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("written"))
    for write in (
        lambda: averaging(1).save(tmp_path / "ema"),
        lambda: averaging(1).consolidate(tmp_path / "ema"),
        lambda: consolidate_checkpoint(tmp_path / "ckpt", tmp_path / "ema"),
    ):
        with pytest.raises(CheckpointError, match=r"mount point.*name a folder in it"):
            write()
    assert sorted(os.listdir(tmp_path)) == ["ckpt", "ema"]


def test_too_little_space_is_told_before_the_save_begins(tmp_path, monkeypatch) -> None:
    averaging(1).save(tmp_path / "ema")
    ema = ShardedEMA(nn.Linear(1000, 1000), HALF)
    usage = shutil._ntuple_diskusage

    def has(total: int, free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(total, total - free, free))

    has(10**9, 4_003_000)
    for path in (tmp_path / "ema", tmp_path / "not" / "there"):
        with pytest.raises(CheckpointError, match=r"needs 4,004,\d\d\d bytes, and its file system has 4,003,000 free"):
            ema.save(path)
    assert os.listdir(tmp_path) == ["ema"] and loaded(tmp_path / "ema") == 1
    for total, free in ((0, 0), (10, 100), (10**9, -1)):  # file systems that do not tell
        has(total, free)
        ema.save(tmp_path / f"big{total}")
    has(10**9, 5_000_000)
    consolidate_checkpoint(tmp_path / "big0", tmp_path / "export", dtype=torch.float16)
    has(10**9, 1_000_000)
    with pytest.raises(CheckpointError, match=r"needs 2,002,\d\d\d bytes"):
        consolidate_checkpoint(tmp_path / "big0", tmp_path / "export", dtype=torch.float16)


@pytest.mark.parametrize("fault", ["fsync of the parent", "rmtree", "remove", "rename of the former", "close"])
def test_a_save_does_not_fail_once_the_new_folder_is_in_place(tmp_path, monkeypatch, fault) -> None:
    averaging(1).save(tmp_path / "ema")
    real = Path.rename

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(5, "Input/output error")

    def in_place(source: Path, name: Path) -> Path:
        answer = real(source, name)
        if name == tmp_path / "ema":
            if fault == "fsync of the parent":
                monkeypatch.setattr(os, "fsync", fail)
            elif fault == "rmtree":
                monkeypatch.setattr(shutil, "rmtree", fail)
            elif fault == "remove":
                monkeypatch.setattr(os, "unlink", fail)
                monkeypatch.setattr(Path, "unlink", fail)
            elif fault == "rename of the former":
                monkeypatch.setattr(os, "rename", fail)
            else:
                monkeypatch.setattr(os, "close", fail)
        return answer

    monkeypatch.setattr(Path, "rename", in_place)
    averaging(2).save(tmp_path / "ema")
    monkeypatch.undo()
    assert loaded(tmp_path / "ema") == loaded(tmp_path) == 2
    averaging(3).save(tmp_path / "ema")
    assert os.listdir(tmp_path) == ["ema"] and loaded(tmp_path / "ema") == 3


class Interrupted:
    """Raises KeyboardInterrupt at one line of the package, counted from the first."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0
        self._package = str(Path(commit.__file__).parent)

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        # Python drops an interrupt that comes within a destructor, and the save goes on.
        callers = (frame, frame.f_back)
        if any(each is not None and each.f_code.co_name == "__del__" for each in callers):
            return None
        return self._line if frame.f_code.co_filename.startswith(self._package) else None

    def _line(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


def interrupted_save(target: Path, at: int) -> int:
    """Save, interrupted at that line. The number of lines that ran."""
    ema, hook = averaging(2), Interrupted(at)
    former = sys.gettrace()
    sys.settrace(hook)
    try:
        ema.save(target)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(former)
    return hook.count


def test_an_interrupt_in_a_save_leaves_the_whole_old_or_new_one_and_nothing_in_the_way(tmp_path) -> None:
    averaging(1).save(tmp_path / "ema")
    lines = interrupted_save(tmp_path / "ema", 10**9)
    assert lines > 500
    for at in range(7, lines, 47):
        shutil.rmtree(tmp_path / "ema")
        averaging(1).save(tmp_path / "ema")
        interrupted_save(tmp_path / "ema", at)
        assert loaded(tmp_path / "ema") in (1, 2)
        averaging(3).save(tmp_path / "ema")
        assert os.listdir(tmp_path) == ["ema"] and loaded(tmp_path / "ema") == 3


def test_a_trace_of_a_save_is_seen_whatever_was_cut_off(tmp_path) -> None:
    assert not contents.was_begun(tmp_path / "ema") and not contents.was_begun(tmp_path / "none" / "ema")
    made = commit.stage(tmp_path / "ema", contents.is_average)
    assert contents.was_begun(tmp_path / "ema") and not contents.was_begun(tmp_path / "em")
    commit.discard(made)
    for name in (".ema.old", ".ema.staging", "ema"):
        (tmp_path / name).mkdir()
        assert contents.was_begun(tmp_path / "ema")
        (tmp_path / name).rmdir()
    with pytest.raises(CheckpointNotFoundError):
        contents.resolve(tmp_path / "ema")


def test_a_folder_with_something_mounted_in_it_is_refused_and_what_is_mounted_stays(tmp_path, monkeypatch) -> None:
    averaging(1).save(tmp_path / "ema")
    (tmp_path / "ema" / "logs").mkdir()
    (tmp_path / "ema" / "logs" / "log").write_text("kept")
    mount = mounts._Mount(tmp_path / "ema" / "logs", "ext4", frozenset())
    monkeypatch.setattr(mounts, "_mounts", lambda: iter([mount]))
    with pytest.raises(CheckpointError, match="mounted at"):
        averaging(2).save(tmp_path / "ema")
    assert (tmp_path / "ema" / "logs" / "log").read_text() == "kept" and os.listdir(tmp_path) == ["ema"]


def test_a_folder_with_somebody_elses_manifest_json_is_not_replaced(tmp_path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text('{"name": "my web app"}')
    save_file({"precious": torch.ones(2)}, tmp_path / "app" / "model.safetensors")
    before = {path.name: path.read_bytes() for path in (tmp_path / "app").iterdir()}
    with pytest.raises(CheckpointError, match="no saved average of this package"):
        averaged_once().save(tmp_path / "app")
    assert {path.name: path.read_bytes() for path in (tmp_path / "app").iterdir()} == before


def test_an_average_whose_manifest_is_damaged_can_be_saved_over(tmp_path) -> None:
    averaged_once().save(tmp_path / "ema")
    (tmp_path / "ema" / "manifest.json").write_text("{]")
    averaged_once().save(tmp_path / "ema")
    averaged_once().load(tmp_path / "ema")


def test_a_commit_that_cannot_remove_the_former_folder_succeeds(tmp_path, monkeypatch) -> None:
    """NFS keeps a file that somebody reads, so the folder is not empty."""
    averaged_once().save(tmp_path / "ema")
    real = commit.shutil.rmtree

    def busy(path, ignore_errors=False) -> None:
        if not ignore_errors and ".ema.old" in str(path):
            raise OSError(39, "Directory not empty", str(path))
        real(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(commit.shutil, "rmtree", busy)
    for _ in range(2):
        ema = averaged_once()
        ema.update()
        ema.save(tmp_path / "ema")
        again = ShardedEMA(nn.Linear(2, 2), HALF)
        again.load(tmp_path / "ema")
        assert again.num_updates == 2
    monkeypatch.undo()
    averaged_once().save(tmp_path / "ema")
    assert [path.name for path in tmp_path.iterdir()] == ["ema"]


def test_an_empty_folder_at_the_target_does_not_hide_the_former_average(tmp_path, monkeypatch) -> None:
    averaged_once().save(tmp_path / "ema")
    (tmp_path / "ema").rename(tmp_path / ".ema.old")  # cut off between the renames
    (tmp_path / "ema").mkdir()  # by a launcher that prepares its folders
    for source in (tmp_path / "ema", tmp_path):
        averaged_once().load(source)

    def full(*arguments) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        averaged_once().save(tmp_path / "ema")
    monkeypatch.undo()
    averaged_once().load(tmp_path / "ema")
    averaged_once().save(tmp_path / "ema")
    assert [path.name for path in tmp_path.iterdir()] == ["ema"]


def test_a_commit_whose_second_rename_fails_puts_the_former_folder_back(tmp_path, monkeypatch) -> None:
    averaged_once().save(tmp_path / "ckpt")
    for dtype in (torch.float32, torch.float16):
        consolidate_checkpoint(tmp_path / "ckpt", tmp_path / "export", dtype=dtype)
        before = (tmp_path / "export" / "model.safetensors").read_bytes()
    real = Path.rename

    def fails(source: Path, target: Path) -> Path:
        if ".staging-" in source.name:
            raise OSError(5, "Input/output error")
        return real(source, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(CheckpointError, match=r"export could not be written: .*Input/output"):
        consolidate_checkpoint(tmp_path / "ckpt", tmp_path / "export")
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "export"]


def test_a_folder_of_notes_with_the_name_of_a_new_track_keeps_them(tmp_path) -> None:
    model = nn.Linear(2, 2)
    averaged_once(model).save(tmp_path / "ema")
    (tmp_path / "ema" / "fast").mkdir()
    (tmp_path / "ema" / "fast" / "notes.txt").write_text("keep")
    ema = ShardedEMA(model, {"fast": HALF, "slow": HALF})
    ema.save(tmp_path / "ema")
    assert (tmp_path / "ema" / "fast" / "notes.txt").read_text() == "keep"
