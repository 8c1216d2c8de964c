"""The safetensors layout: where each box of each tensor lies in the final files, and writing and reading there.

A safetensors file is an 8-byte little-endian header length, a JSON header, and the tensors' bytes, row-major,
end to end (https://github.com/huggingface/safetensors#format). Names, shapes and dtypes are known to every
rank, so every rank computes the same header and writes its boxes at their places; nobody needs the whole:

    | length | header | wte: rank 0 ... rank 1 ... | w1: rank 0 | w2: rank 0 ... rank 1 | ... |

Tensors lie in the order of the model, larger elements first so that every tensor is aligned. No communication.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from dist_ema.errors import ConfigError, UnsupportedModelError
from dist_ema.layout import Box

__all__ = [
    "DTYPE_NAMES",
    "INDEX_NAME",
    "ONE_FILE_NAME",
    "Entry",
    "FileLayout",
    "ModelFiles",
    "host_bytes",
    "plan_files",
    "read_box",
    "write_box",
    "write_whole",
]

INDEX_NAME = "model.safetensors.index.json"
ONE_FILE_NAME = "model.safetensors"
_FILE_PATTERN = "model{suffix}.safetensors"

# Dtypes of torch in the format's own spelling, in its documented set.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

# Bytes converted, brought to the host and written at a time: bounds the extra memory of a save.
_CHUNK_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a whole tensor lies: `start` is the byte offset from the beginning of its file."""

    fqn: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """One safetensors file: its name, its header (length included), its entries by fqn, its size in bytes."""

    name: str
    header: bytes
    entries: Mapping[str, Entry]
    size_bytes: int


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """The safetensors files of a model folder, and the content of its index where there are several."""

    files: tuple[FileLayout, ...]
    index: bytes | None

    def locate(self) -> dict[str, tuple[FileLayout, Entry]]:
        """Name of a tensor -> its file and its place there."""
        return {fqn: (file, entry) for file in self.files for fqn, entry in file.entries.items()}


def plan_files(
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    *,
    max_shard_size: int | str,
    metadata: Mapping[str, str],
) -> ModelFiles:
    """Lay out whole tensors in files of at most `max_shard_size` bytes (or "5GB"), as huggingface_hub splits them.

    Args:
        tensors: name, dtype and shape of each, in the order of the model.
        max_shard_size: a larger tensor has a file of its own.
        metadata: text for the headers, such as the aliases of tied tensors.

    Raises:
        ConfigError: `max_shard_size` cannot be read.
        UnsupportedModelError: a dtype has no name in the format.
    """
    for fqn, dtype, _ in tensors:
        if dtype not in DTYPE_NAMES:
            raise UnsupportedModelError(f"{fqn} has dtype {dtype}, which safetensors cannot store")
    ordered = {
        fqn: Entry(fqn, dtype, shape, start=0)
        for fqn, dtype, shape in sorted(tensors, key=lambda tensor: -tensor[1].itemsize)
    }
    try:
        split = split_state_dict_into_shards_factory(
            ordered,
            get_storage_size=lambda entry: entry.nbytes,
            filename_pattern=_FILE_PATTERN,
            max_shard_size=max_shard_size,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"max_shard_size is {max_shard_size!r}, expected bytes or '5GB': {error}") from error
    files = tuple(
        _plan_file(name, [ordered[fqn] for fqn in fqns], metadata) for name, fqns in split.filename_to_tensors.items()
    )
    if not split.is_sharded:
        return ModelFiles(files, None)
    index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
    return ModelFiles(files, json.dumps(index, indent=2).encode() + b"\n")


def _plan_file(name: str, entries: Sequence[Entry], metadata: Mapping[str, str]) -> FileLayout:
    header: dict[str, Any] = {"__metadata__": {**metadata, "format": "pt"}}
    ends = list(itertools.accumulate((entry.nbytes for entry in entries), initial=0))
    for entry, (start, stop) in zip(entries, itertools.pairwise(ends), strict=True):
        header[entry.fqn] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    placed = {
        entry.fqn: dataclasses.replace(entry, start=len(prefix) + start)
        for entry, start in zip(entries, ends[:-1], strict=True)
    }
    return FileLayout(name, prefix, placed, len(prefix) + ends[-1])


def write_whole(path: Path, content: bytes, *, size_bytes: int | None = None) -> None:
    """Write a new file from its beginning, extend it to `size_bytes` where given, and fsync it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write_all(descriptor, memoryview(content), 0)
        if size_bytes is not None:
            os.ftruncate(descriptor, size_bytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_box(descriptor: int, entry: Entry, box: Box, values: torch.Tensor) -> None:
    """Write the values of `box` at their places in the open file, converted to the entry's dtype.

    Args:
        descriptor: file open for writing, already of its final size.
        entry: the whole tensor's place.
        box: which piece of it `values` is.
        values: tensor of shape `box.sizes`, on any device, of any strides.
    """
    for offset, run in _contiguous_runs(entry, box, values):
        step = max(1, _CHUNK_BYTES // entry.dtype.itemsize)
        for index, chunk in enumerate(run.reshape(-1).split(step)):
            _write_all(descriptor, _as_bytes(chunk, entry.dtype), offset + index * step * entry.dtype.itemsize)


def _contiguous_runs(entry: Entry, box: Box, values: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Byte offset in the file and values of each longest stretch of the box that is contiguous in the file."""
    if box.numel == 0:
        return
    inner = len(box.sizes)
    while inner > 0 and box.sizes[inner - 1] == entry.shape[inner - 1]:
        inner -= 1
    # Dims from `outer` on make one stretch: all full behind the first of them.
    outer = max(inner - 1, 0)
    strides = [math.prod(entry.shape[dim + 1 :]) for dim in range(len(entry.shape))]
    for index in itertools.product(*(range(size) for size in box.sizes[:outer])):
        place = (*index, *(0 for _ in box.sizes[outer:]))
        element = sum((start + at) * stride for start, at, stride in zip(box.offsets, place, strides, strict=True))
        yield entry.start + element * entry.dtype.itemsize, values[index]


def _as_bytes(values: torch.Tensor, dtype: torch.dtype) -> memoryview:
    return memoryview(host_bytes(values, dtype).numpy())  # type: ignore[arg-type]


def host_bytes(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The row-major bytes of a tensor of any device, strides and dtype, converted: a CPU uint8 tensor of one dim."""
    flat = values.detach().to(device="cpu", dtype=dtype).resolve_conj().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.stride() != (1,):
        # A single element may keep a stride that a view of its bytes refuses.
        flat = torch.empty(flat.shape, dtype=flat.dtype).copy_(flat)
    return flat.view(torch.uint8)


def _write_all(descriptor: int, content: memoryview, offset: int) -> None:
    while content.nbytes:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def read_box(handle: Any, box: Box, values: torch.Tensor) -> None:
    """Read the values of `box` into `values`, of shape `box.sizes`, in bounded pieces.

    Args:
        handle: the file, opened by `safetensors.safe_open(..., framework="pt")`: only the bytes of the box are
            touched.
        box: which piece of its tensor to read.
        values: tensor of the box's sizes, on any device.
    """
    if box.numel == 0:
        return
    if not box.sizes:
        values.copy_(handle.get_tensor(box.fqn))
        return
    rows = max(1, _CHUNK_BYTES // (values[0].numel() * values.element_size()))
    source = handle.get_slice(box.fqn)
    for first in range(0, box.sizes[0], rows):
        count = min(rows, box.sizes[0] - first)
        start = box.offsets[0] + first
        region = (slice(start, start + count), *box.region[1:])
        values[first : first + count].copy_(source[region])
