"""What reviewers of the checkpoints broke; each was seen to fail before it was mended."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hostile import sealed
from safetensors.torch import save_file
from test_rank_averages import assert_same_bits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from zoo import build, set_live

from dist_ema import (
    CheckpointCorruptError,
    CheckpointError,
    CommunicationError,
    ConfigError,
    ConstantSchedule,
    DistEMAError,
    ShardedEMA,
    UnsupportedModelError,
    consolidate_checkpoint,
)
from dist_ema.checkpoint import save_calls
from dist_ema.checkpoint import saving as checkpoint
from dist_ema.cli import main
from dist_ema.disk.folders import commit

HALF = ConstantSchedule(momentum=0.5)


def averaging(model: nn.Module | None = None) -> ShardedEMA:
    ema = ShardedEMA(model if model is not None else nn.Linear(2, 2), HALF)
    ema.update()
    return ema


def test_a_state_dict_loaded_after_a_new_head_is_not_overwritten_by_the_live_weights(tmp_path) -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2)})
    averaging(model).save(tmp_path / "ema")
    model["head"] = nn.Linear(2, 2)
    ema = ShardedEMA(model, HALF)
    ema.load(tmp_path / "ema", new="head.*")
    state = {name: torch.full_like(value, 7.0) for name, value in ema.sharded_state_dict().items()}
    ema.load_sharded_state_dict(state, num_updates=9)
    assert all((value == 7.0).all() for value in ema.full_state_dict().values())


def test_a_folder_with_somebody_elses_manifest_json_is_not_replaced(tmp_path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text('{"name": "my web app"}')
    save_file({"precious": torch.ones(2)}, tmp_path / "app" / "model.safetensors")
    before = {path.name: path.read_bytes() for path in (tmp_path / "app").iterdir()}
    with pytest.raises(CheckpointError, match="no saved average of ours"):
        averaging().save(tmp_path / "app")
    assert {path.name: path.read_bytes() for path in (tmp_path / "app").iterdir()} == before


def test_an_average_whose_manifest_is_damaged_can_be_saved_over(tmp_path) -> None:
    averaging().save(tmp_path / "ema")
    (tmp_path / "ema" / "manifest.json").write_text("{]")
    averaging().save(tmp_path / "ema")
    averaging().load(tmp_path / "ema")


LOSES_IT = """
import gc, sys, torch
from dist_ema import ConstantSchedule, ShardedEMA
def main():
    ema = ShardedEMA(torch.nn.Linear(2, 2), ConstantSchedule(momentum=0.5))
    ema.update()
    ema.save(sys.argv[1], background=True)
main()
gc.collect()
print("end of program")
"""


def test_the_error_of_a_background_save_outlives_its_average(tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    command = [sys.executable, "-c", LOSES_IT, str(tmp_path / "full")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "end of program" in done.stdout and "no saved average of ours" in done.stderr


def two_in_the_background(folder: str) -> None:
    model = build("ddp")
    first, second = averaging(model), averaging(model)
    running, real = [], save_calls.write_average

    def slowly(*arguments) -> None:
        running.append(len(threading.enumerate()))
        assert len(running) % 2 == 1, "two at a time on one process group"
        time.sleep(0.2 * (1 + dist.get_rank()))
        real(*arguments)
        running.append(0)

    save_calls.write_average = slowly
    try:
        for _ in range(2):
            first.save(os.path.join(folder, "first"), background=True)
            second.save(os.path.join(folder, "second"), background=True)
            second.wait()
            first.wait()
    finally:
        save_calls.write_average = real
    first.load(os.path.join(folder, "second"))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        again = averaging(model)
        again.save(os.path.join(folder, "again"), background=True)
        again.wait()
        del again
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2, "each background save keeps descriptors"


def test_two_averages_save_in_the_background_one_after_the_other(world, tmp_path) -> None:
    world(2).run(two_in_the_background, str(tmp_path))


def may_not_look(folder: str) -> None:
    """What root squashing does to a rank: looking at the folder is refused."""
    ema = averaging(build("ddp"))
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


def warnings_are_errors(folder: str) -> str:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    ema = averaging(model)
    with torch.no_grad():
        model.weight.add_(1e-5 * dist.get_rank())
    with warnings.catch_warnings():
        if dist.get_rank() == 0:
            warnings.simplefilter("error")
        with pytest.raises(DistEMAError) as caught:
            ema.save(folder)
    return str(caught.value)


def test_a_warning_that_is_an_error_on_rank_0_ends_the_call_on_all(world, tmp_path) -> None:
    first, second = world(2).run(warnings_are_errors, str(tmp_path / "ema"))
    assert first == second and "drifted apart" in first
    assert not list(tmp_path.iterdir())


def experts(dtype: torch.dtype) -> nn.Module:
    """Long stretches at distances: experts, sharded within each."""
    model = nn.Module()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    torch.manual_seed(0)
    whole = torch.randn(3, 2, 3_000_000).to(dtype)
    model.register_parameter("w", nn.Parameter(distribute_tensor(whole, mesh, [Shard(1)])))
    return model


def load_experts(folder: str) -> None:
    ema = averaging(experts(torch.bfloat16))
    ema.save(os.path.join(folder, "ema"))
    ema.consolidate(os.path.join(folder, "half"), dtype=torch.bfloat16)
    expected = ema.full_state_dict()
    for ready in (False, True):
        again = ShardedEMA(experts(torch.bfloat16), HALF)
        if ready:
            again.update()
        again.load(os.path.join(folder, "ema"))
        state = again.full_state_dict()
        if dist.get_rank() == 0:
            assert_same_bits(state, expected)
    again.start_from(os.path.join(folder, "half"))
    state = again.full_state_dict()
    if dist.get_rank() == 0:
        assert torch.equal(state["w"], expected["w"].bfloat16().float())


def test_stretches_longer_than_a_chunk_are_read_into_other_dtypes(world, tmp_path) -> None:
    world(2).run(load_experts, str(tmp_path))


def test_a_commit_that_cannot_remove_the_former_folder_succeeds(tmp_path, monkeypatch) -> None:
    """NFS keeps a file that somebody reads, so the folder is not empty."""
    averaging().save(tmp_path / "ema")
    real = commit.shutil.rmtree

    def busy(path, ignore_errors=False) -> None:
        if not ignore_errors and ".ema.old" in str(path):
            raise OSError(39, "Directory not empty", str(path))
        real(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(commit.shutil, "rmtree", busy)
    for _ in range(2):
        ema = averaging()
        ema.update()
        ema.save(tmp_path / "ema")
        again = ShardedEMA(nn.Linear(2, 2), HALF)
        again.load(tmp_path / "ema")
        assert again.num_updates == 2
    monkeypatch.undo()
    averaging().save(tmp_path / "ema")
    assert [path.name for path in tmp_path.iterdir()] == ["ema"]


def test_an_empty_folder_at_the_target_does_not_hide_the_former_average(tmp_path, monkeypatch) -> None:
    averaging().save(tmp_path / "ema")
    (tmp_path / "ema").rename(tmp_path / ".ema.old")  # cut off between the renames
    (tmp_path / "ema").mkdir()  # by a launcher that prepares its folders
    for source in (tmp_path / "ema", tmp_path):
        averaging().load(source)

    def full(*arguments) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        averaging().save(tmp_path / "ema")
    monkeypatch.undo()
    averaging().load(tmp_path / "ema")
    averaging().save(tmp_path / "ema")
    assert [path.name for path in tmp_path.iterdir()] == ["ema"]


def test_a_commit_whose_second_rename_fails_puts_the_former_folder_back(tmp_path, monkeypatch) -> None:
    averaging().save(tmp_path / "ckpt")
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


def test_a_working_folder_that_was_removed_is_no_reason_not_to_save(tmp_path) -> None:
    averaging().save(tmp_path / "ema")
    (tmp_path / "gone").mkdir()
    former = os.getcwd()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        averaging().save(tmp_path / "ema")
        with pytest.raises(ConfigError, match="working folder was removed"):
            averaging().save("relative")
    finally:
        os.chdir(former)


def load_deep(folder: str) -> str:
    with pytest.raises(CheckpointCorruptError) as caught:
        averaging().load(folder)
    return str(caught.value)


@pytest.mark.parametrize("depth", [40, 900, 100_000])
def test_a_deeply_nested_manifest_is_refused_on_every_rank(world, tmp_path, capsys, depth) -> None:
    averaging().save(tmp_path / "ema")
    path = tmp_path / "ema" / "manifest.json"
    record = json.loads(path.read_text())
    record["written_by"] = {}
    text = sealed(record) if depth > 1000 else None
    if text is None:
        for _ in range(depth):
            record["written_by"] = {"x": record["written_by"]}
        text = sealed(record)
    else:
        text = text.replace('"written_by": {}', '"written_by": ' + '{"x":' * depth + "1" + "}" * depth)
    path.write_text(text)
    first, second = world(2).run(load_deep, str(tmp_path / "ema"))
    assert first == second
    assert main(["inspect", str(tmp_path / "ema")]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_pipe_in_the_place_of_a_former_export_does_not_hang(tmp_path) -> None:
    averaging().save(tmp_path / "ckpt")
    consolidate_checkpoint(tmp_path / "ckpt", tmp_path / "export")
    os.mkfifo(tmp_path / "export" / "manifest.json")
    with pytest.raises(CheckpointError, match="give the name of a new or empty folder"):
        consolidate_checkpoint(tmp_path / "ckpt", tmp_path / "export")


def test_a_tensor_with_the_name_that_the_format_reserves_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.register_parameter("__metadata__", nn.Parameter(torch.ones(2)))
    with pytest.raises(UnsupportedModelError, match="reserves"):
        ShardedEMA(model, HALF)


@pytest.mark.parametrize("size", [0, -1, "-5GB", True, float("nan"), "2 gigs", "foo"])
def test_shard_sizes_that_are_none_are_refused(tmp_path, size) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        averaging().save(tmp_path / "ema", max_shard_size=size)


def test_a_folder_of_notes_with_the_name_of_a_new_track_keeps_them(tmp_path) -> None:
    model = nn.Linear(2, 2)
    averaging(model).save(tmp_path / "ema")
    (tmp_path / "ema" / "fast").mkdir()
    (tmp_path / "ema" / "fast" / "notes.txt").write_text("keep")
    ema = ShardedEMA(model, {"fast": HALF, "slow": HALF})
    ema.save(tmp_path / "ema")
    assert (tmp_path / "ema" / "fast" / "notes.txt").read_text() == "keep"


def test_many_files_need_few_descriptors(tmp_path) -> None:
    import resource

    model = nn.ParameterList([torch.ones(4) for _ in range(300)])
    averaging(model).save(tmp_path / "ema", max_shard_size=16)
    former = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, former[1]))
    try:
        averaging(nn.ParameterList([torch.ones(4) for _ in range(300)])).load(tmp_path / "ema")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, former)


def test_the_command_line_writes_what_its_stream_can_encode(tmp_path) -> None:
    averaging().save(tmp_path / "größe" / "ema")
    command = [sys.executable, "-m", "dist_ema.cli", "inspect", str(tmp_path / "größe")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "gr\\xf6" in done.stdout and done.stderr == ""
    for redirection, complaint in ((">&-", "no standard output"), (">/dev/full", "No space left")):
        line = f"{sys.executable} -m dist_ema.cli inspect '{tmp_path / 'größe'}' {redirection}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert done.returncode == 1 and complaint in done.stderr and "Traceback" not in done.stderr


def group_destroyed(folder: str) -> None:
    ema = averaging(build("ddp"))
    real = save_calls.write_average

    def slowly(*arguments) -> None:
        time.sleep(1.0)
        real(*arguments)

    save_calls.write_average = slowly
    ema.save(folder, background=True)
    set_live(build("plain"), 0)
    dist.destroy_process_group()
    with pytest.raises(CommunicationError, match=r"before wait\(\)"):
        ema.wait()
    raise RuntimeError("was told")


def test_a_process_group_destroyed_under_a_background_save_is_told_in_plain_words(world, tmp_path) -> None:
    with pytest.raises(AssertionError, match="was told"):
        world(2).run(group_destroyed, str(tmp_path / "ema"))
