from __future__ import annotations

import itertools
import json
import math
import os
import stat
import struct
import zlib

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import averaged_once

from dist_ema import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    UnsupportedModelError,
)
from dist_ema.boxes.shards import Box
from dist_ema.checkpoint.reading import read_boxes
from dist_ema.checkpoint.writing import write_tensors
from dist_ema.disk.folders import commit, contents
from dist_ema.disk.formats.byte_ranges import Strip, strips_of_box
from dist_ema.disk.formats.checksums import PartialChecksums, whole_checksums
from dist_ema.disk.formats.headers import read_model_folder
from dist_ema.disk.formats.model_files import lay_out_files, write_whole
from dist_ema.ranks.exchange import Exchange

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def values_of(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = math.prod(shape)
    return (torch.arange(count) % 7 - (0 if dtype in (torch.uint8, torch.bool) else 3)).to(dtype).view(shape)


def write_folder(folder, tensors: dict[str, torch.Tensor], boxes, **options):
    """Write `tensors` piece by piece, in the given boxes, as ranks would."""
    files = lay_out_files(
        [(fqn, value.dtype, tuple(value.shape)) for fqn, value in tensors.items()],
        max_shard_size=options.pop("max_shard_size", "5GB"),
        metadata={"alias": "w"},
    )
    for file in files.files:
        write_whole(folder / file.name, file.header, size_bytes=file.size_bytes)
    pieces = [(box, tensors[fqn][box.region]) for fqn in tensors for box in boxes(fqn, tuple(tensors[fqn].shape))]
    assert write_tensors(Exchange(), folder, files, pieces, [0], None) is None
    return files


def read(folder, box: Box, values: torch.Tensor) -> None:
    tensors = read_model_folder(folder).tensors
    checksums = PartialChecksums({fqn: stored.nbytes for fqn, stored in tensors.items()})
    assert read_boxes(Exchange(), folder, tensors, [(box.fqn, box, values)], [], checksums) is None


def one_box(fqn, shape):
    return [Box(fqn, (0,) * len(shape), shape)]


def quarters(fqn, shape):
    """Boxes cut along two dims, so that no box is contiguous in the file."""
    if len(shape) < 2:
        return one_box(fqn, shape)
    rows, columns = shape[0] // 2, shape[-1] // 2
    halves = [(0, rows), (rows, shape[0] - rows)], [(0, columns), (columns, shape[-1] - columns)]
    middle = shape[1:-1]
    return [
        Box(fqn, (r, *(0 for _ in middle), c), (height, *middle, width))
        for r, height in halves[0]
        for c, width in halves[1]
    ]


@pytest.mark.parametrize("boxes", [one_box, quarters])
def test_files_written_in_boxes_are_read_by_safetensors(tmp_path, boxes) -> None:
    tensors = {f"t{index}": values_of(dtype, (5, 3, 4)) for index, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(2.5), "counter": torch.tensor(7), "empty": torch.zeros(0, 3)}
    (file,) = write_folder(tmp_path, tensors, boxes).files
    loaded = load_file(tmp_path / file.name)
    assert set(loaded) == set(tensors)
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and loaded[name].shape == value.shape
        assert loaded[name].reshape(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8)), name


def test_a_0_dim_float_and_an_integer_counter_and_the_pt_format_are_kept(tmp_path) -> None:
    """What torch's own HuggingFaceStorageWriter gets wrong."""
    write_folder(tmp_path, {"scale": torch.tensor(1.5), "count": torch.tensor(3)}, one_box)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt", "alias": "w"}
        assert handle.get_tensor("scale").item() == 1.5 and handle.get_tensor("count").item() == 3


def test_tensors_are_aligned_and_leave_no_holes(tmp_path) -> None:
    tensors = {
        "a": torch.ones(3, dtype=torch.bfloat16),
        "b": torch.ones(3),
        "c": torch.tensor(True),
        "d": torch.tensor(1),
    }
    (file,) = write_folder(tmp_path, tensors, one_box).files
    content = (tmp_path / file.name).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__")
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert spans[0][0] == 0 and spans[-1][1] == len(content) - 8 - length
    assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))
    assert (8 + length) % 8 == 0
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in file.entries.values())


def test_several_files_have_the_index_of_huggingface(tmp_path) -> None:
    tensors = {f"w{index}": torch.full((10,), float(index)) for index in range(5)}
    files = write_folder(tmp_path, tensors, one_box, max_shard_size=100)
    assert [file.name for file in files.files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads(files.index)
    assert index["metadata"]["total_size"] == 200 and set(index["weight_map"]) == set(tensors)
    for name, file_name in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file_name)[name], tensors[name])


@pytest.mark.parametrize("boxes", [one_box, quarters])
def test_boxes_are_read_back(tmp_path, boxes) -> None:
    value = torch.randn(6, 5)
    write_folder(tmp_path, {"w": value}, one_box)
    for box in boxes("w", (6, 5)):
        values = torch.empty(box.sizes)
        read(tmp_path, box, values)
        assert torch.equal(values, value[box.region])


def test_large_boxes_are_written_and_read_in_bounded_chunks(tmp_path, monkeypatch) -> None:
    for module in ("reading", "writing"):
        monkeypatch.setattr(f"dist_ema.checkpoint.{module}._CHUNK_BYTES", 64)
    value = torch.randn(33, 7)
    write_folder(tmp_path, {"w": value.t()}, one_box)  # not contiguous either
    for columns in (33, 20):
        values = torch.empty(7, columns)
        read(tmp_path, Box("w", (0, 0), (7, columns)), values)
        assert torch.equal(values, value.t()[:, :columns])


def test_file_modes_follow_the_umask(tmp_path) -> None:
    former = os.umask(0o022)
    try:
        write_folder(tmp_path, {"w": torch.ones(2)}, one_box)
    finally:
        os.umask(former)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o644


def test_bad_max_shard_size_and_unstorable_dtypes_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        lay_out_files([("w", torch.float32, (2,))], max_shard_size="five", metadata={})
    with pytest.raises(UnsupportedModelError, match="complex128"):
        lay_out_files([("w", torch.complex128, (2,))], max_shard_size=100, metadata={})


def test_checksums_of_pieces_make_the_checksum_of_the_whole() -> None:
    content = bytes(range(256)) * 5
    halves = [PartialChecksums({"w": 1280, "empty": 0}) for _ in range(2)]
    for number, (start, stop) in enumerate(itertools.pairwise([0, 1, 7, 600, 600, 1280])):
        halves[number % 2].add("w", start, content[start:stop])
    combined = [ours ^ theirs for ours, theirs in zip(*(half.partial() for half in halves), strict=True)]
    assert whole_checksums({"w": 1280, "empty": 0}, combined) == {"w": zlib.crc32(content), "empty": 0}
    columns = PartialChecksums({"w": 1280})
    rows = np.frombuffer(content, dtype=np.uint8).reshape(64, 20)
    columns.add_rows("w", 0, 20, np.ascontiguousarray(rows[:, :7]))
    columns.add_rows("w", 7, 20, np.ascontiguousarray(rows[:, 7:]))
    assert whole_checksums({"w": 1280}, columns.partial()) == {"w": zlib.crc32(content)}


def test_strips_cover_their_box_and_cuts_cover_their_strip() -> None:
    shape = (4, 3, 5)
    places = np.arange(10, 10 + 60 * 2).reshape(*shape, 2)
    for sizes in itertools.product((1, 2, 4), (1, 3), (1, 2, 5)):
        offsets = tuple(whole - size for whole, size in zip(shape, sizes, strict=True))
        box = Box("w", offsets, sizes)
        strips = [strip for _, strip in strips_of_box(10, shape, 2, box)]
        expected = places[box.region].reshape(-1).tolist()
        assert [byte for strip in strips for byte in bytes_of(strip)] == expected
        for strip in strips:
            for start, stop in itertools.combinations(range(8, 132, 2), 2):
                found = sorted(byte for cut in strip.cuts(start, stop) for byte in bytes_of(cut.strip))
                assert found == [byte for byte in bytes_of(strip) if start <= byte < stop]


def bytes_of(strip: Strip) -> list[int]:
    starts = range(strip.start, strip.start + strip.count * strip.stride_bytes, strip.stride_bytes)
    return [byte for start in starts for byte in range(start, start + strip.run_bytes)]


def fill(target, text: str) -> commit.Staged:
    staged = commit.stage(target, contents.is_average)
    (staged.folder / "manifest.json").write_text(f'{{"format": "dist_ema", "content": "{text}"}}')
    return staged


def content_of(folder) -> str:
    return json.loads((folder / "manifest.json").read_text())["content"]


def test_commit_replaces_the_former_folder_and_leaves_nothing_else(tmp_path) -> None:
    target = tmp_path / "ema"
    for text in ("old", "new"):
        commit.publish(fill(target, text))
    assert content_of(target) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["ema"]


def test_a_save_cut_off_while_staging_leaves_the_former_one(tmp_path) -> None:
    target = tmp_path / "ema"
    commit.publish(fill(target, "old"))
    half = fill(target, "half")
    assert content_of(contents.resolve(target)) == "old"
    del half  # its writer is gone
    commit.publish(fill(target, "newer"))
    assert content_of(target) == "newer"


def test_a_commit_cut_off_between_its_renames_leaves_the_whole_old_one(tmp_path) -> None:
    target = tmp_path / "ema"
    commit.publish(fill(target, "old"))
    cut_off = fill(target, "new")
    target.rename(tmp_path / ".ema.old")  # the first of the two renames
    assert content_of(contents.resolve(target)) == "old"
    del cut_off
    newest = fill(target, "newest")  # the next save must not remove the only good one before its own commit
    assert content_of(contents.resolve(target)) == "old"
    commit.publish(newest)
    assert content_of(target) == "newest"
    assert [path.name for path in tmp_path.iterdir()] == ["ema"]


def test_foreign_folders_are_neither_replaced_nor_read(tmp_path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="no saved average"):
        commit.stage(tmp_path / "own", contents.is_average)
    with pytest.raises(CheckpointNotFoundError, match="there is no folder"):
        contents.resolve(tmp_path / "none")
    with pytest.raises(CheckpointNotFoundError, match="is a file"):
        contents.resolve(tmp_path / "own" / "notes.txt")


@pytest.mark.parametrize("size", [0, -1, "-5GB", True, float("nan"), "2 gigs", "foo"])
def test_shard_sizes_that_are_none_are_refused(tmp_path, size) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        averaged_once().save(tmp_path / "ema", max_shard_size=size)
