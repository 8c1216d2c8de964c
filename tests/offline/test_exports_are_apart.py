"""Whatever is done to a file of an export, the checkpoint that it came from keeps every byte."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile import sealed
from safetensors.torch import save_file
from torch import nn

from dist_ema import ConstantSchedule, EqualSchedule, ShardedEMA, consolidate_checkpoint, synthesize
from dist_ema.cli import main

SMALL = 60  # bytes: several files and an index


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"\xff" * max(path.stat().st_size, 1))


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(0)


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def command(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


EXPORTS: dict[str, Callable[[ShardedEMA, Path, Path, int | str], None]] = {
    "consolidate": lambda ema, _, out, size: ema.consolidate(out, max_shard_size=size),
    "consolidate bfloat16": lambda ema, _, out, size: ema.consolidate(out, dtype=torch.bfloat16, max_shard_size=size),
    "consolidate_checkpoint": lambda _, source, out, size: consolidate_checkpoint(source, out, max_shard_size=size),
    "dist-ema consolidate": lambda _, source, out, size: command("consolidate", source, out, "--max-shard-size", size),
    "synthesize": lambda _, source, out, size: synthesize(source, out, EqualSchedule(), max_shard_size=size) and None,
    "dist-ema synthesize": lambda _, source, out, size: command(
        "synthesize", source, out, "--schedule", "EqualSchedule()", "--max-shard-size", size
    ),
}


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The bytes of every file, and how many names it has."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_nlink) for path in files}


def add_files(folder: Path) -> None:
    """What users put beside the weights."""
    (folder / "config.json").write_text(json.dumps({"model_type": "own"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes").mkdir(exist_ok=True)
    (folder / "notes" / "read.me").write_text("mine")


@pytest.mark.parametrize("size", ["5GB", SMALL])
@pytest.mark.parametrize("name", EXPORTS)
def test_a_program_that_writes_into_an_export_never_writes_into_its_checkpoint(tmp_path, name, size) -> None:
    torch.manual_seed(0)
    ema = ShardedEMA(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), ConstantSchedule(decay=0.5))
    ema.update()
    source, out = tmp_path / "checkpoint" / "ema", tmp_path / "export"
    for _ in range(2):  # the second save carries over what was added to the first
        ema.save(source, max_shard_size=size)
        add_files(source)
    before = content(source)
    assert all(num_names == 1 for _, num_names in before.values())
    for again in (False, True):  # the second time over a former export, with what was added to that
        for change in (overwrite, truncate, append):
            if again:
                EXPORTS[name](ema, source, out, size)
                add_files(out)
            EXPORTS[name](ema, source, out, size)
            files = [path for path in out.rglob("*") if path.is_file()]
            assert len(files) >= (3 if size == SMALL else 1) + 2 * again
            for path in files:
                assert path.stat().st_nlink == 1, path
                change(path)
                assert content(source) == before, (path, change)
            shutil.rmtree(out)


def test_a_snapshot_and_a_save_share_no_file(tmp_path) -> None:
    ema = ShardedEMA(nn.Linear(3, 4), ConstantSchedule(decay=0.5))
    for _ in range(2):
        ema.update()
        ema.save(tmp_path / "ema")
        add_files(tmp_path / "ema")
        ema.snapshot(tmp_path / "snapshots")
        ema.snapshot(tmp_path / "snapshots")
        add_files(tmp_path / "snapshots" / f"updates-{ema.num_updates:09d}")
    ema.save(tmp_path / "ema", background=True)
    ema.wait()
    for folder in ("ema", "snapshots"):
        assert all(num_names == 1 for _, num_names in content(tmp_path / folder).values())


def test_a_folder_of_an_adapter_that_leads_elsewhere_brings_no_small_file_into_an_export(tmp_path) -> None:
    """Else a shared checkpoint would publish files of whoever exports it."""
    torch.manual_seed(0)
    ema = ShardedEMA(nn.Linear(4, 2), ConstantSchedule(decay=0.5))
    ema.update()
    ema.save(tmp_path / "ema")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.json").write_text("secret")
    (tmp_path / "ema" / "sub").symlink_to(tmp_path / "private")
    record = json.loads((tmp_path / "ema" / "manifest.json").read_text())
    record["form"] = {**record["form"], "small_files": ["sub/key.json"]}
    (tmp_path / "ema" / "manifest.json").write_text(sealed(record))
    consolidate_checkpoint(tmp_path / "ema", tmp_path / "export")
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "export").rglob("*") if path.is_file())


def test_the_header_of_an_export_that_names_files_elsewhere_makes_none_of_them_ours(tmp_path) -> None:
    (tmp_path / "other.json").write_text("of the user")
    ema = ShardedEMA(nn.Linear(2, 2), ConstantSchedule(decay=0.5))
    (tmp_path / "export").mkdir()
    names = f"../other.json {tmp_path}/other.json /etc/hostname"
    save_file(
        {"weight": torch.ones(2)},
        tmp_path / "export" / "model.safetensors",
        metadata={"written_by": "dist_ema", "small_files": names},
    )
    (tmp_path / "export" / "notes.txt").write_text("of the user")
    ema.consolidate(tmp_path / "export")
    assert sorted(os.listdir(tmp_path / "export")) == ["README.md", "model.safetensors", "notes.txt"]
    assert (tmp_path / "other.json").read_text() == "of the user"
