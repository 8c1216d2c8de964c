"""The safetensors files that this package writes, and the place of every tensor in them.

A safetensors file is an 8-byte little-endian header length, a JSON header, and the tensors' bytes, row-major,
end to end (https://github.com/huggingface/safetensors#format). Every rank knows the names, shapes and dtypes,
so every rank computes the same header and writes its boxes at their places; no rank needs a whole tensor:

    | length | header | wte: rank 0 ... rank 1 ... | w1: rank 0 | w2: rank 0 ... rank 1 | ... |

Tensors lie in the order of the model, larger elements first, so every tensor is aligned. No communication.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from dist_ema.disk.formats.file_names import MODEL_STEM, index_name
from dist_ema.disk.formats.headers import LONGEST_HEADER_BYTES, METADATA, TORCH_DTYPES, StoredTensor
from dist_ema.errors import ConfigError, UnsupportedModelError

__all__ = [
    "DTYPE_NAMES",
    "Entry",
    "FileLayout",
    "ModelFiles",
    "dtype_of",
    "host_bytes",
    "lay_out_files",
    "write_all",
    "write_whole",
]

# The kernel decides when shorter writes reach the disk.
_LONG_BYTES = 2**18

# The dtypes of torch in the format's spelling.
DTYPE_NAMES = {getattr(torch, name): code for code, name in TORCH_DTYPES.items()}


def dtype_of(stored: StoredTensor) -> torch.dtype:
    """The dtype of a tensor in a file, as torch has it."""
    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[stored.dtype])
    return dtype


@dataclasses.dataclass(frozen=True)
class Entry:
    """The place of a whole tensor: `start` is the byte offset from the beginning of its file, `name` its name there."""

    fqn: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    name: str

    @property
    def nbytes(self) -> int:
        """The bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """One safetensors file: its path in the folder, its header (length included), its entries by fqn, its bytes."""

    name: str
    header: bytes
    entries: Mapping[str, Entry]
    size_bytes: int


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """The files of a model folder.

    Attributes:
        files: the files with the tensors.
        index: the content of the index, where there are several files.
        stem: what the names of the files begin with.
        texts: path in the folder -> content of further small files, such as config.json.
        unfit: the names of small files that do not describe these tensors, and must not lie beside them.
    """

    files: tuple[FileLayout, ...]
    index: bytes | None
    stem: str = MODEL_STEM
    texts: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    unfit: Collection[str] = ()

    @property
    def index_name(self) -> str:
        """The name of the index."""
        return index_name(self.stem)

    @property
    def sub_folders(self) -> list[str]:
        """The sub-folders of the files, `.` among them."""
        paths = [*(file.name for file in self.files), *self.texts]
        return list(dict.fromkeys([".", *(os.path.dirname(path) or "." for path in paths)]))

    def locate(self) -> dict[str, tuple[FileLayout, Entry]]:
        """The name of a tensor -> its file and its place there."""
        return {fqn: (file, entry) for file in self.files for fqn, entry in file.entries.items()}


def lay_out_files(
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    *,
    max_shard_size: int | str,
    metadata: Mapping[str, str],
    stem: str = MODEL_STEM,
    names: Mapping[str, str] | None = None,
) -> ModelFiles:
    """Lay out whole tensors in files of at most `max_shard_size` bytes (or "5GB"), as huggingface_hub splits them.

    Args:
        tensors: name, dtype and shape of every tensor, in the order of the model.
        max_shard_size: the largest size of a file; a larger tensor has a file of its own.
        metadata: text for the headers, such as the aliases of tied tensors.
        stem: what the names of the files begin with.
        names: name -> another name that a tensor has in its file.

    Raises:
        ConfigError: `max_shard_size` cannot be read.
        UnsupportedModelError: a dtype has no name in the format, a name is no text, or a header would be too long.
    """
    if isinstance(max_shard_size, bool) or (isinstance(max_shard_size, int | float) and not max_shard_size >= 1):
        raise ConfigError(f"max_shard_size is {max_shard_size!r}, expected bytes or text such as '5GB'")
    names = names or {}
    for fqn, dtype, _ in tensors:
        if names.get(fqn, fqn) == METADATA:
            raise UnsupportedModelError(f"a tensor is called {fqn!r}, which safetensors reserves: rename it")
        if dtype not in DTYPE_NAMES:
            raise UnsupportedModelError(f"{fqn} has dtype {dtype}, which safetensors cannot store")
        _check_text(fqn)
    for name in metadata:
        _check_text(name)
    ordered = {
        fqn: Entry(fqn, dtype, shape, start=0, name=names.get(fqn, fqn))
        for fqn, dtype, shape in sorted(tensors, key=lambda tensor: -tensor[1].itemsize)
    }
    try:
        split = split_state_dict_into_shards_factory(
            ordered,
            get_storage_size=lambda entry: entry.nbytes,
            filename_pattern=stem + "{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"max_shard_size is {max_shard_size!r}, expected bytes or text such as '5GB'") from error
    if str(max_shard_size).strip().startswith("-"):
        raise ConfigError(f"max_shard_size is {max_shard_size!r}, expected bytes or text such as '5GB'")
    files = tuple(
        _plan_file(name, [ordered[fqn] for fqn in fqns], metadata) for name, fqns in split.filename_to_tensors.items()
    )
    if not split.is_sharded:
        return ModelFiles(files, None, stem)
    weight_map = {names.get(fqn, fqn): file for fqn, file in split.tensor_to_filename.items()}
    index = {"metadata": split.metadata, "weight_map": dict(sorted(weight_map.items()))}
    return ModelFiles(files, json.dumps(index, indent=2).encode() + b"\n", stem)


def _check_text(fqn: str) -> None:
    """Refuse half a character: JSON would write it as an escape, and no reader of the format would read the file."""
    try:
        fqn.encode()
    except UnicodeEncodeError:
        raise UnsupportedModelError(
            f"a tensor is called {fqn[:200]!r}, which UTF-8 cannot carry (half of a surrogate pair), so safetensors "
            "cannot store it: rename the module or parameter"
        ) from None


def _plan_file(name: str, entries: Sequence[Entry], metadata: Mapping[str, str]) -> FileLayout:
    header: dict[str, Any] = {METADATA: {**metadata, "format": "pt"}}
    ends = list(itertools.accumulate((entry.nbytes for entry in entries), initial=0))
    for entry, (start, stop) in zip(entries, itertools.pairwise(ends), strict=True):
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST_HEADER_BYTES:
        raise UnsupportedModelError(
            f"the header of {name} would have {len(text):,} bytes for {len(entries):,} tensors, and safetensors reads "
            f"at most {LONGEST_HEADER_BYTES:,}: give a smaller max_shard_size, which makes more files with shorter "
            "headers, or use fewer and shorter names"
        )
    prefix = len(text).to_bytes(8, "little") + text
    placed = {
        entry.fqn: dataclasses.replace(entry, start=len(prefix) + start)
        for entry, start in zip(entries, ends[:-1], strict=True)
    }
    return FileLayout(name, prefix, placed, len(prefix) + ends[-1])


def write_whole(path: Path, content: bytes, *, size_bytes: int | None = None) -> None:
    """Write a new file from its beginning, extend it to `size_bytes` if that is given, and fsync it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(descriptor, content, 0)
        if size_bytes is not None:
            os.ftruncate(descriptor, size_bytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def host_bytes(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The row-major bytes of a tensor of any device, strides and dtype, converted: a CPU uint8 tensor of one dim."""
    flat = values.detach().to(device="cpu", dtype=dtype).resolve_conj().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.stride() != (1,):
        # A single element may keep a stride that a view of its bytes refuses.
        flat = torch.empty(flat.shape, dtype=flat.dtype, device="cpu").copy_(flat)
    return flat.view(torch.uint8)


def write_all(descriptor: int, content: Any, offset: int) -> None:
    """Write a contiguous buffer of bytes at an offset of the open file, and have the disk begin with a long one.

    The kernel would keep the bytes in memory until the fsync, and the disk would be idle. The advice that the bytes are
    not read again makes it start at once. Measured: 256 MiB from each of 2 ranks, written and fsynced, took 0.7 of the
    time.
    """
    rest, at = memoryview(content), offset
    while rest.nbytes:
        written = os.pwrite(descriptor, rest, at)
        rest, at = rest[written:], at + written
    if at - offset >= _LONG_BYTES and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, at - offset, os.POSIX_FADV_DONTNEED)
