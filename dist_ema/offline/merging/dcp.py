"""Checkpoints of torch's DCP (a folder with `.metadata`), read without a process group and in bounded memory.

Torch's own reader unpickles `.metadata` as it is, so a hostile file runs code. Here only the classes of such a record
are allowed in it, and the tensors are loaded as weights only. No communication.

A stored piece, which is what one rank wrote of a tensor, is loaded whole by torch: it is the bound of the memory.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from dist_ema.errors import CheckpointCorruptError

__all__ = ["METADATA_NAME", "DcpCheckpoint"]

METADATA_NAME = ".metadata"

# The modules whose records and enumerations a `.metadata` file is made of.
_RECORD_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
# Functions without an effect beyond what they return.
_PLAIN = (("torch.serialization", "_get_layout"), ("collections", "OrderedDict"))
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")


class DcpCheckpoint:
    """The tensors of a checkpoint of DCP.

    Args:
        folder: the folder with `.metadata`.

    Raises:
        CheckpointCorruptError: the record cannot be read, or holds anything but a record.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            with (folder / METADATA_NAME).open("rb") as file:
                metadata: Metadata = _Unpickler(file).load()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
            self.tensors: dict[str, TensorStorageMetadata] = {
                name: entry
                for name, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            planner_data: object = metadata.planner_data
        except Exception as error:  # whatever a damaged pickle leads to
            raise CheckpointCorruptError(
                f"{folder / METADATA_NAME} is not a readable record of a DCP checkpoint: {str(error)[:300]}"
            ) from error
        self.paths: Mapping[str, tuple[object, ...]] = planner_data if isinstance(planner_data, dict) else {}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return tuple(self.tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype on disk."""
        dtype: torch.dtype = self.tensors[name].properties.dtype
        return dtype

    def has_checksum(self, name: str) -> bool:
        """DCP saves none."""
        return False

    def check(self, name: str, checksum: int) -> None:
        """DCP saves no checksums."""

    def piece_numel(self, name: str) -> int:
        """Elements of the largest stored piece of a tensor."""
        return max((math.prod(chunk.sizes) for chunk in self.tensors[name].chunks), default=0)

    def read(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes of a tensor, from that element on.

        Raises:
            CheckpointCorruptError: a file is missing or damaged, or no file has the values.
        """
        shape, dtype = self.shape(name), self.dtype(name)
        count = buffer.nbytes // dtype.itemsize
        if not count:
            return
        row = math.prod(shape[1:])
        first, last = (start // row, -(-(start + count) // row)) if shape else (0, 1)
        target = torch.frombuffer(buffer, dtype=dtype)
        is_whole_rows = (start, count) == (first * row, (last - first) * row)
        rows = target if is_whole_rows else torch.empty((last - first) * row, dtype=dtype, device="cpu")
        self._read_rows(name, first, rows.view((last - first, *shape[1:]) if shape else ()))
        if not is_whole_rows:
            target.copy_(rows[start - first * row : start - first * row + count])

    def _read_rows(self, name: str, first: int, rows: torch.Tensor) -> None:
        items, covered = [], 0
        for chunk in self.tensors[name].chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            begin, end = (max(offsets[0], first), min(offsets[0] + sizes[0], first + len(rows))) if sizes else (0, 1)
            if begin >= end:
                continue
            lengths = (end - begin, *sizes[1:]) if sizes else ()
            item = ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=MetadataIndex(name),
                dest_offsets=torch.Size((begin - first, *offsets[1:]) if sizes else ()),
                storage_index=MetadataIndex(name, chunk.offsets),
                storage_offsets=torch.Size((begin - offsets[0], *(0 for _ in sizes[1:])) if sizes else ()),
                lengths=torch.Size(lengths),
            )
            items.append(item)
            covered += math.prod(lengths)
        if covered != rows.numel():
            raise CheckpointCorruptError(
                f"{self.folder} has {covered} of {rows.numel()} values of {name[:200]!r} in the rows from {first}: its "
                "pieces leave holes, or overlap"
            )
        try:
            self._reader.read_data(LoadPlan(items), _Planner(rows)).wait()
        except Exception as error:  # torch raises whatever a damaged file leads to
            raise CheckpointCorruptError(
                f"{self.folder} cannot be read: {name[:200]!r}: {type(error).__name__}: {str(error)[:300]}"
            ) from error


class _Planner(DefaultLoadPlanner):
    """Puts what is read into rows of one tensor."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self._rows = rows

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of the rows that an item fills."""
        part = self._rows
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, offset, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """The part is a view of the rows."""


class _Unpickler(pickle.Unpickler):
    """Refuses everything that is not part of a record of DCP."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name, if a record may have it."""
        if "." not in name:
            if module in _RECORD_MODULES:
                kind = getattr(importlib.import_module(module), name, None)
                is_record = dataclasses.is_dataclass(kind) or (isinstance(kind, type) and issubclass(kind, enum.Enum))
                if is_record and getattr(kind, "__module__", None) == module:
                    return kind
            if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
                return getattr(torch, name)
            if (module, name) in _PLAIN:
                return super().find_class(module, name)
            if module.partition(".")[0] == "pathlib" and name in _PATHS:
                return Path
        raise pickle.UnpicklingError(f"it has {module}.{name}, which is no part of such a record and may run code")
