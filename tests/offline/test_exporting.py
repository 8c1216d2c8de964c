"""Exports made without the run, and which weights a path means where several are in reach."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerated import accelerator_of
from safetensors.torch import load_file, save_file
from tiny import averaged_once
from torch import nn

from dist_ema import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigError,
    ConstantSchedule,
    ShardedEMA,
    attach,
    consolidate_checkpoint,
)
from dist_ema.cli import main
from dist_ema.disk.folders import file_copies as sharing

HALF = ConstantSchedule(momentum=0.5)


def averaging(schedule=HALF) -> tuple[nn.Module, ShardedEMA]:
    torch.manual_seed(0)
    model = nn.Linear(64, 8)
    ema = ShardedEMA(model, schedule)
    for _ in range(2):
        ema.update()
        with torch.no_grad():
            model.weight.mul_(2.0)
    return model, ema


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Live weights at the top, the average in a folder: what accelerate writes in one process and under DDP."""
    model, ema = averaging()
    ema.save(tmp_path / "ckpt" / "ema")
    save_file(model.state_dict(), tmp_path / "ckpt" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "ckpt"


def overwrite_in_place(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")


def write_from_the_beginning(path: Path) -> None:
    path.write_bytes(b"another model")


def map_into_memory(path: Path) -> None:
    values = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
    values[-4:] = 0


def save_with_safetensors(path: Path) -> None:
    save_file({"x": torch.zeros(3)}, path)


def save_with_torch(path: Path) -> None:
    torch.save({"x": torch.zeros(3)}, path)


def copy_over(path: Path) -> None:
    shutil.copy(__file__, path)


def change_its_mode(path: Path) -> None:
    path.chmod(0)


WRITERS = [
    overwrite_in_place,
    write_from_the_beginning,
    map_into_memory,
    save_with_safetensors,
    save_with_torch,
    copy_over,
    change_its_mode,
]


@pytest.mark.parametrize("by", ["function", "command"])
@pytest.mark.parametrize("size", ["5GB", "1KB"])
def test_whoever_writes_into_an_export_does_not_write_into_the_checkpoint(checkpoint, tmp_path, by, size) -> None:
    averaging()[1].save(checkpoint / "ema", max_shard_size=size)
    content = {path: path.read_bytes() for path in (checkpoint / "ema").iterdir()}
    modes = {path: path.stat().st_mode for path in content}
    for write in WRITERS:
        if by == "function":
            consolidate_checkpoint(checkpoint, tmp_path / "export", max_shard_size=size)
        else:
            assert main(["consolidate", str(checkpoint), str(tmp_path / "export"), "--max-shard-size", size]) == 0
        exported = sorted((tmp_path / "export").glob("*.safetensors"))
        assert [path.read_bytes() for path in exported] == [content[checkpoint / "ema" / p.name] for p in exported]
        for path in exported:
            write(path)
        assert {path: path.read_bytes() for path in (checkpoint / "ema").iterdir()} == content, write.__name__
        assert {path: path.stat().st_mode for path in content} == modes, write.__name__
        shutil.rmtree(tmp_path / "export")


def test_no_file_of_a_checkpoint_has_a_second_name_after_any_call(checkpoint, tmp_path) -> None:
    (checkpoint / "ema" / "notes.txt").write_text("added by somebody")
    _, ema = averaging()
    ema.save(checkpoint / "ema")
    ema.consolidate(tmp_path / "export")
    consolidate_checkpoint(checkpoint, tmp_path / "export")
    ema.snapshot(tmp_path / "snapshots")
    several = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_nlink > 1]
    assert several == [] and (checkpoint / "ema" / "notes.txt").exists()


def test_a_link_is_made_only_where_it_is_asked_for(checkpoint, tmp_path, monkeypatch) -> None:
    stored = checkpoint / "ema" / "model.safetensors"
    with pytest.raises(ConfigError, match="link is 'no'"):
        consolidate_checkpoint(checkpoint, tmp_path / "a", link="no")
    consolidate_checkpoint(checkpoint, tmp_path / "a", link=True)
    assert (tmp_path / "a" / "model.safetensors").samefile(stored)
    assert main(["consolidate", str(checkpoint), str(tmp_path / "b"), "--link"]) == 0
    assert stored.stat().st_nlink == 3
    consolidate_checkpoint(checkpoint, tmp_path / "b")  # replaces the folder, never the file within
    assert stored.stat().st_nlink == 2
    consolidate_checkpoint(checkpoint, tmp_path / "c", link=True, dtype=torch.bfloat16)
    assert stored.stat().st_nlink == 2, "a file that changes is a new one"
    monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(95, "no links here")))
    consolidate_checkpoint(checkpoint, tmp_path / "d", link=True)
    assert stored.stat().st_nlink == 2
    assert (tmp_path / "d" / "model.safetensors").read_bytes() == stored.read_bytes()


@pytest.mark.parametrize("way", ["copy", "clone", "link"])
def test_an_export_of_a_damaged_average_is_refused_however_it_is_made(checkpoint, tmp_path, monkeypatch, way) -> None:
    overwrite_in_place(checkpoint / "ema" / "model.safetensors")
    if way == "clone":
        monkeypatch.setattr(fcntl, "ioctl", shared_blocks)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointCorruptError, match="not those that were saved"):
        consolidate_checkpoint(checkpoint, tmp_path / "export", link=way == "link")
    assert sorted(tmp_path.rglob("*")) == before


def shared_blocks(target: int, request: int, source: int) -> int:
    """What FICLONE does, on a file system that cannot: the target has the content of the source."""
    assert request == 0x40049409
    os.pwrite(target, os.pread(source, os.fstat(source).st_size, 0), 0)
    return 0


@pytest.mark.parametrize("way", ["copy", "clone"])
def test_a_copy_is_read_once_and_is_durable(checkpoint, tmp_path, monkeypatch, way) -> None:
    if way == "clone":
        monkeypatch.setattr(fcntl, "ioctl", shared_blocks)
    durable, seen = [], []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda d: durable.append(os.readlink(f"/proc/self/fd/{d}")) or real(d))
    consolidate_checkpoint(checkpoint, tmp_path / "export", progress=seen.append)
    assert sum(seen) == 64 * 8 * 4 + 8 * 4
    exported = tmp_path / "export" / "model.safetensors"
    assert exported.read_bytes() == (checkpoint / "ema" / "model.safetensors").read_bytes()
    assert any(path.endswith("model.safetensors") for path in durable)


def test_where_blocks_cannot_be_shared_no_file_stays(checkpoint, tmp_path) -> None:
    source = checkpoint / "ema" / "model.safetensors"
    if sharing.clone(source, tmp_path / "clone"):
        assert (tmp_path / "clone").read_bytes() == source.read_bytes()
        assert not (tmp_path / "clone").samefile(source)
    else:
        assert not (tmp_path / "clone").exists()
    assert not sharing.clone(tmp_path / "missing", tmp_path / "other") and not (tmp_path / "other").exists()


def test_diff_of_a_checkpoint_is_of_its_average_and_not_of_its_live_weights(checkpoint, tmp_path, capsys) -> None:
    consolidate_checkpoint(checkpoint, tmp_path / "export")
    capsys.readouterr()
    assert main(["diff", str(checkpoint), str(tmp_path / "export")]) == 0
    told = capsys.readouterr().out
    assert "0.000e+00  all 2 tensors" in told
    assert f"a: {checkpoint / 'ema'}" in told and f"b: {tmp_path / 'export'}" in told
    assert main(["diff", str(tmp_path / "export"), str(checkpoint), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["relative"] == 0.0
    assert (facts["a"], facts["b"]) == (str(tmp_path / "export"), str(checkpoint / "ema"))
    live = str(checkpoint / "model.safetensors")
    assert main(["diff", live, str(tmp_path / "export"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["relative"] > 0.1 and facts["a"] == live


def test_live_weights_in_several_files_are_given_by_their_index(checkpoint, tmp_path, capsys) -> None:
    model, ema = averaging()
    (checkpoint / "model.safetensors").unlink()
    index = checkpoint / "model.safetensors.index.json"
    for name, value in model.state_dict().items():
        save_file({name: value}, checkpoint / f"{name}.safetensors")
    index.write_text(json.dumps({"weight_map": {name: f"{name}.safetensors" for name in model.state_dict()}}))
    assert main(["diff", str(index), str(checkpoint), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["relative"] > 0.1 and facts["a"] == str(index)
    ema.start_from(index)
    assert torch.equal(ema.full_state_dict()["weight"], model.weight)


def test_of_several_averages_in_a_checkpoint_one_has_to_be_named(checkpoint, tmp_path, capsys) -> None:
    _, ema = averaging({"short": HALF, "long": ConstantSchedule(momentum=0.1)})
    ema.save(checkpoint / "other")
    for call in (["diff", str(checkpoint), str(checkpoint)], ["verify", str(checkpoint)]):
        assert main(call) == 1
        assert "several averages (ema, other): give the folder of one" in capsys.readouterr().err
    _, begun = averaging()
    with pytest.raises(CheckpointNotFoundError, match=r"several averages \(ema, other\): give the folder of one"):
        begun.start_from(checkpoint)
    with pytest.raises(CheckpointMismatchError, match=r"2 tracks.*other/short, .*other/long"):
        begun.start_from(checkpoint / "other")
    begun.start_from(checkpoint / "other" / "short")
    assert main(["diff", str(checkpoint / "other"), str(checkpoint / "ema")]) == 1
    assert "name one of these" in capsys.readouterr().err
    tracks = ["--track", "short", "--track-b", "ema"]
    assert main(["diff", str(checkpoint / "other"), str(checkpoint / "ema"), *tracks]) == 0


def test_an_average_that_begins_at_a_checkpoint_begins_at_its_average(checkpoint) -> None:
    _, ema = averaging()
    expected = load_file(checkpoint / "ema" / "model.safetensors")
    live = load_file(checkpoint / "model.safetensors")
    ema.start_from(checkpoint)
    assert torch.equal(ema.full_state_dict()["weight"], expected["weight"])
    assert not torch.equal(expected["weight"], live["weight"])
    ema.start_from(checkpoint / "model.safetensors")
    assert torch.equal(ema.full_state_dict()["weight"], live["weight"])
    (checkpoint / "ema").rename(checkpoint / ".ema.old")  # a commit that was cut off
    ema.start_from(checkpoint)
    assert torch.equal(ema.full_state_dict()["weight"], expected["weight"])


def test_a_folder_with_a_manifest_of_another_program_hides_no_model(checkpoint, tmp_path, capsys) -> None:
    consolidate_checkpoint(checkpoint, tmp_path / "export")
    (tmp_path / "export" / "web").mkdir()
    (tmp_path / "export" / "web" / "manifest.json").write_text('{"name": "a web application"}')
    capsys.readouterr()
    assert main(["diff", str(tmp_path / "export"), str(checkpoint)]) == 0
    averaging()[1].start_from(tmp_path / "export")


def test_diff_of_what_accelerate_saved_finds_nothing_changed(tmp_path, capsys) -> None:
    with accelerator_of("one process") as accelerator:
        model = nn.Linear(4, 3)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
        attach(accelerator, model, optimizer, HALF)
        for _ in range(3):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        accelerator.save_state(tmp_path / "ckpt")
    assert (tmp_path / "ckpt" / "model.safetensors").exists(), "the live weights"
    consolidate_checkpoint(tmp_path / "ckpt", tmp_path / "export")
    assert main(["diff", str(tmp_path / "ckpt"), str(tmp_path / "export")]) == 0
    assert "0.000e+00  all 2 tensors" in capsys.readouterr().out


def test_a_pipe_in_the_place_of_a_former_export_does_not_hang(tmp_path) -> None:
    averaged_once().save(tmp_path / "ckpt")
    consolidate_checkpoint(tmp_path / "ckpt", tmp_path / "export")
    os.mkfifo(tmp_path / "export" / "manifest.json")
    with pytest.raises(CheckpointError, match="give the name of a new or empty folder"):
        consolidate_checkpoint(tmp_path / "ckpt", tmp_path / "export")
