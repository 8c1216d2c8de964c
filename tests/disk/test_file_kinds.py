"""Files of other kinds are named as what they are, with what to do; none of them is unpickled or waited for."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dist_ema import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    ConstantSchedule,
    DistEMAError,
    ShardedEMA,
    consolidate_checkpoint,
)
from dist_ema.cli import main
from dist_ema.disk.formats.file_kinds import kind_of
from dist_ema.disk.formats.headers import read_header

STATE = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}


def npz(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, weight=np.ones(3))


def npy(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.ones(3))


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


# What `start_from` takes the tensors of; every other call refuses it.
STARTS = {"torch.save", "torch.save, legacy"}

# What writes it -> what is told.
KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "torch.save": (lambda path: torch.save(STATE, path), "torch.save.*weights_only=True.*save_file"),
    "torch.save, legacy": (
        lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False),
        "a file of torch.save.*weights_only=True",
    ),
    "pickle, protocol 2": (lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)), r"file of torch\.save"),
    "pickle, protocol 5": (lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=5)), r"file of torch\.save"),
    "numpy.savez": (npz, r"numpy\.savez"),
    "numpy.save": (npy, r"numpy\.save"),
    "GGUF": (lambda path: path.write_bytes(b"GGUF\3\0\0\0" + bytes(64)), "GGUF"),
    "HDF5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64)), "HDF5"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08\0" + bytes(64)), "decompress"),
    "pointer of Git LFS": (
        text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548118077\n"),
        "Git LFS.*git lfs pull",
    ),
    "web page": (text("<!DOCTYPE html>\n<html><body>404</body></html>"), "web page.*download it again"),
    "JSON": (text(json.dumps({"weight_map": {"weight": "x.safetensors"}}, indent=2)), "JSON file"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["average.pt", "model.safetensors"])
def test_a_file_of_another_kind_is_named_as_such_wherever_it_is_given(tmp_path, capsys, kind, name) -> None:
    write, told = KINDS[kind]
    path = tmp_path / "run" / name
    path.parent.mkdir()
    write(path)
    ema = ShardedEMA(nn.Linear(3, 2), ConstantSchedule(momentum=0.5))
    ema.update()
    calls: dict[str, Callable[[], object]] = {
        "load": lambda: ema.load(path),
        "start_from": lambda: ema.start_from(path),
        "consolidate_checkpoint": lambda: consolidate_checkpoint(path, tmp_path / "out"),
    }
    if name == "model.safetensors":
        calls["start_from, folder"] = lambda: ema.start_from(path.parent)
    if kind in STARTS:
        calls.pop("start_from")
    for call in calls.values():
        with pytest.raises(CheckpointError, match=told) as caught:
            call()
        assert "should be" not in str(caught.value), caught.value
    for command in (["inspect"], ["verify"], ["diff", str(path)]):
        assert main([command[0], str(path), *command[1:]]) == 1
        assert "it is " in capsys.readouterr().err, command
    assert ema.num_updates == 1 and list(tmp_path.iterdir()) == [path.parent]


@pytest.mark.parametrize("name", ["model.pt", "last.ckpt", "checkpoint.pth"])
def test_a_folder_of_torch_save_is_named_as_such(tmp_path, capsys, name) -> None:
    torch.save(STATE, tmp_path / name)
    ema = ShardedEMA(nn.Linear(3, 2), ConstantSchedule(momentum=0.5))
    with pytest.raises(CheckpointCorruptError, match=rf"it has {name}: .*torch\.save"):
        ema.start_from(tmp_path)
    with pytest.raises(CheckpointNotFoundError):
        ema.load(tmp_path)


def test_a_folder_of_safetensors_of_other_names_says_which_to_give(tmp_path) -> None:
    save_file(STATE, tmp_path / "consolidated.safetensors")
    ema = ShardedEMA(nn.Linear(3, 2), ConstantSchedule(momentum=0.5))
    with pytest.raises(CheckpointCorruptError, match=r"it has consolidated\.safetensors: give"):
        ema.start_from(tmp_path)
    ema.start_from(tmp_path / "consolidated.safetensors")
    with pytest.raises(CheckpointNotFoundError, match=r"is a file, .*start_from"):
        ema.load(tmp_path / "consolidated.safetensors")
    (tmp_path / "consolidated.safetensors").rename(tmp_path / "diffusion_pytorch_model.safetensors")
    ema.start_from(tmp_path)


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path, length) -> None:
    """A header of 640 bytes begins as a pickle of protocol 2 does, one of 19,280 as a zip archive."""
    header = json.dumps({"__metadata__": {"fill": ""}, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    header = header.replace('""', f'"{"x" * (length - len(header))}"')
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    assert list(read_header(path).tensors) == ["w"] and len(header) == length
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointCorruptError, match="is damaged"):
        read_header(path)


def test_a_pipe_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    ema = ShardedEMA(nn.Linear(3, 2), ConstantSchedule(momentum=0.5))
    for call in (ema.start_from, ema.load):
        for path in (tmp_path, tmp_path / "model.safetensors"):
            with pytest.raises(DistEMAError):
                call(path)


def test_nothing_is_said_of_what_nobody_knows() -> None:
    for start in (b"", b"\x80", b"PK", b"\x80\x02" + bytes(6), b"hello world", b"(lp0\n"):
        assert kind_of(start) is None
