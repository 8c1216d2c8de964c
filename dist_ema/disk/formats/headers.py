"""Safetensors files of any origin: their headers are checked before they are used. No communication.

A header may be damaged or hostile. Lengths, dtypes, offsets and names are checked against each other and against the
file's size before a byte of a tensor is read: https://github.com/huggingface/safetensors#format. The module loads no
torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_ema.checks import file_name
from dist_ema.disk.formats.checksums import checksum
from dist_ema.disk.formats.file_kinds import folder_kind, kind_text
from dist_ema.disk.formats.file_names import MODEL_STEM, index_name, one_file_name, stem_in
from dist_ema.errors import CheckpointCorruptError, ConfigError

__all__ = [
    "ITEM_BYTES",
    "LARGEST_RECORD_BYTES",
    "LONGEST_HEADER_BYTES",
    "METADATA",
    "TORCH_DTYPES",
    "StoredFile",
    "StoredModel",
    "StoredTensor",
    "index_of_files",
    "open_regular",
    "read_exactly",
    "read_header",
    "read_model_folder",
    "read_small",
]

# The entry of a header that is no tensor.
METADATA = "__metadata__"

LONGEST_HEADER_BYTES = 100_000_000  # the limit of the format's own reader

# The largest JSON file beside the tensors. The manifest is the longest: 120 bytes and the name for each tensor, 20
# bytes and the name for its checksum in each track. 100,000 tensors with names of 100 characters in 8 tracks make
# 118 MB, and the limit is twice that. A larger file is refused unread: parsed it would take ten times the memory.
LARGEST_RECORD_BYTES = 256 * 2**20

# The dtypes that this package writes or reads: the format's spelling -> torch's, and the bytes of an element.
TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_ITEM_BYTES = {"BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}
ITEM_BYTES = {code: _ITEM_BYTES.get(code) or int(code[1:]) // 8 for code in TORCH_DTYPES}

_LARGEST_SIZE = 2**62


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: the name of the file.
        dtype: the dtype, as safetensors spells it.
        shape: the shape.
        start: the byte offset from the beginning of the file.
        part: of a file of torch.save the part with the tensor; `start` counts from the beginning of the part then.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    part: str | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of the whole tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """A file whose header is in order, or a part of a file of torch.save.

    Attributes:
        size_bytes: the size of the whole file.
        header_checksum: CRC-32 of the header, with its length; of a part, of the names, dtypes and shapes.
        metadata: the text in the header.
        tensors: the tensors that the header describes.
    """

    size_bytes: int
    header_checksum: int
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]

    @property
    def part(self) -> str | None:
        """Of a file of torch.save the part that is read of it."""
        return next((tensor.part for tensor in self.tensors.values()), None)

    def called(self, name: str) -> StoredFile:
        """The same file by another name: its path from the folder above, say."""
        tensors = {fqn: dataclasses.replace(tensor, file=name) for fqn, tensor in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)

    def to_json(self) -> dict[str, Any]:
        """The header as JSON; see `StoredModel.to_json`."""
        tensors = {fqn: [tensor.dtype, list(tensor.shape), tensor.start] for fqn, tensor in self.tensors.items()}
        return {**vars(self), "metadata": dict(self.metadata), "tensors": tensors, "part": self.part}

    @classmethod
    def from_json(cls, name: str, record: Mapping[str, Any]) -> StoredFile:
        """The file called `name`, of what `to_json` returned."""
        fields = dict(record)
        part = fields.pop("part")
        tensors = {
            fqn: StoredTensor(name, dtype, tuple(shape), start, part)
            for fqn, (dtype, shape, start) in record["tensors"].items()
        }
        return cls(**{**fields, "tensors": tensors})


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """The safetensors files of a folder.

    Attributes:
        files: the name of a file -> its header.
        tensors: the name of a tensor -> its place.
        index_checksum: CRC-32 of the index file; None for a single file.
        stem: what the names of the files begin with.
        names: the name of a tensor -> its name in the file, where that is another one.
    """

    files: Mapping[str, StoredFile]
    tensors: Mapping[str, StoredTensor]
    index_checksum: int | None
    stem: str = MODEL_STEM
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The model as JSON, for ranks that cannot read the folder. It was checked when it was read."""
        return {
            "files": {name: file.to_json() for name, file in self.files.items()},
            "file_of": {fqn: tensor.file for fqn, tensor in self.tensors.items()},
            "index_checksum": self.index_checksum,
            "stem": self.stem,
            "names": dict(self.names),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> StoredModel:
        """The model, of what `to_json` returned."""
        files = {name: StoredFile.from_json(name, file) for name, file in record["files"].items()}
        names = record["names"]
        tensors = {fqn: files[name].tensors[names.get(fqn, fqn)] for fqn, name in record["file_of"].items()}
        return cls(files, tensors, record["index_checksum"], record["stem"], names)


def read_model_folder(folder: Path, stem: str | None = None) -> StoredModel:
    """The tensors of a model folder: of the files that its index lists, or of its one file (see file_names.py).

    Args:
        folder: the folder.
        stem: what the names of the files begin with; None for what the folder has.

    Raises:
        CheckpointCorruptError: a file is missing, or a header or the index is not in order.
    """
    stem = stem or stem_in(folder)
    if stem is None:
        raise CheckpointCorruptError(
            f"{folder} has neither {one_file_name(MODEL_STEM)} nor {index_name(MODEL_STEM)}, expected a folder of "
            f"safetensors: {_other_weights(folder)}"
        )
    index_path = folder / index_name(stem)
    if not os.path.lexists(index_path):
        name = one_file_name(stem)
        file = read_header(folder / name)
        return StoredModel({name: file}, file.tensors, None, stem)
    content = read_small(index_path)
    file_of = index_of_files(index_path, content)
    files = {name: read_header(folder / name) for name in dict.fromkeys(file_of.values())}
    tensors = {}
    for fqn, name in file_of.items():
        if fqn not in files[name].tensors:
            raise CheckpointCorruptError(f"{index_path} says that {fqn[:200]!r} is in {name}, but it is not")
        tensors[fqn] = files[name].tensors[fqn]
    return StoredModel(files, tensors, checksum(content), stem)


def _other_weights(folder: Path) -> str:
    """The weights that the folder has in place of the expected files, with the advice."""
    try:
        all_names = sorted(path.name for path in folder.iterdir())
    except OSError:
        all_names = []
    names = [name for name in all_names if not name.startswith(".")]
    tensors = [name for name in names if name.endswith(".safetensors")]
    if tensors:
        return f"it has {', '.join(tensors[:3])}: give one of these files, if it holds the whole model"
    kind = folder_kind(all_names)
    if kind is not None:
        return kind
    for name in names:
        if name.endswith(_PICKLED_ENDS):
            return f"it has {name}{kind_text(folder / name)}"
    if inside := [name for name in names if stem_in(folder / name) is not None]:
        return f"it has folders with weights ({', '.join(inside[:3])}): give one of these"
    return "one of them is missing, or it is another kind of folder"


_PICKLED_ENDS = (".bin", ".pt", ".pth", ".ckpt", ".tar", ".pkl", ".npz", ".gguf", ".h5")


def read_header(path: Path) -> StoredFile:
    """The header of a safetensors file, checked.

    Raises:
        CheckpointCorruptError: there is no such file, or its header is not in order.
    """
    try:
        descriptor = open_regular(path)
    except OSError as error:
        raise CheckpointCorruptError(f"{path} is missing or cannot be read: {error.strerror}") from error
    try:
        size_bytes = os.fstat(descriptor).st_size
        prefix = os.pread(descriptor, 8, 0)
        length = int.from_bytes(prefix, "little")  # checked before it is used
        if len(prefix) < 8 or length > min(size_bytes - 8, LONGEST_HEADER_BYTES):
            kind = kind_text(path)
            raise CheckpointCorruptError(
                f"{path} is no safetensors file{kind}"
                if kind
                else f"{path} is damaged: its header should be {length} bytes long, the file has {size_bytes}"
            )
        text = os.pread(descriptor, length, 8)
    finally:
        os.close(descriptor)
    try:
        metadata, tensors = _parse(path.name, text, size_bytes)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path} is damaged: its header is not in order ({_short(error)})") from error
    return StoredFile(size_bytes, checksum(prefix + text), metadata, tensors)


def open_regular(path: Path) -> int:
    """Open a file for reading, without waiting for the writer of a pipe.

    Raises:
        OSError: the file is missing, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is no regular file", str(path))
    return descriptor


def read_small(path: Path) -> bytes:
    """The whole content of a JSON file, of at most `LARGEST_RECORD_BYTES`; a larger one is not read.

    Raises:
        CheckpointCorruptError: the file is missing, larger, or no regular file.
    """
    try:
        descriptor = open_regular(path)
    except OSError as error:
        raise CheckpointCorruptError(f"{path} cannot be read: {error.strerror}") from error
    try:
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes > LARGEST_RECORD_BYTES:
            raise CheckpointCorruptError(
                f"{path} has {size_bytes:,} bytes, expected at most {LARGEST_RECORD_BYTES:,}: no file of its kind is "
                "larger"
            )
        content = bytearray(size_bytes)
        read_exactly(descriptor, content, 0)
        return bytes(content)
    finally:
        os.close(descriptor)


def _parse(file: str, text: bytes, size_bytes: int) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    record = json.loads(text.decode(), object_pairs_hook=_without_repeats)
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    metadata = record.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not text")
    first = 8 + len(text)
    spans = []
    tensors = {}
    for fqn, entry in record.items():
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in ITEM_BYTES:
            raise ValueError(f"{fqn[:80]!r} has the dtype {str(dtype)[:80]!r}")
        if not isinstance(shape, list) or not all(_is_size(size) for size in (*shape, start, stop)):
            raise ValueError(f"{fqn[:80]!r} has a shape or offsets that are no sizes")
        tensor = StoredTensor(file, dtype, tuple(shape), first + start)
        if math.prod(shape) >= _LARGEST_SIZE or tensor.nbytes != stop - start:
            raise ValueError(f"the offsets of {fqn[:80]!r} do not fit its shape")
        spans.append((start, stop, fqn))
        tensors[fqn] = tensor
    end = 0
    for start, stop, fqn in sorted(spans):
        if start != end:
            raise ValueError(f"{fqn[:80]!r} overlaps another tensor, or leaves a hole before it")
        end = stop
    if first + end != size_bytes:
        raise ValueError(f"it describes {first + end} bytes, the file has {size_bytes}")
    return metadata, tensors


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < _LARGEST_SIZE


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a name appears twice")
    return record


def index_of_files(path: Path, content: bytes) -> dict[str, str]:
    """The name of a tensor -> the name of its file, of the content of an index.

    Raises:
        CheckpointCorruptError: the content is no index of files in the same folder.
    """
    try:
        weight_map = json.loads(content, object_pairs_hook=_without_repeats)["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("its weight_map lists nothing")
        return {fqn: file_name("weight_map", name) for fqn, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
        raise CheckpointCorruptError(f"{path} is not an index of files of weights: {_short(error)}") from error


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def read_exactly(descriptor: int, buffer: Any, offset: int) -> None:
    """Fill a writable buffer of bytes from an offset of the open file.

    Raises:
        CheckpointCorruptError: the file ends before the buffer is full.
    """
    rest = memoryview(buffer)
    while rest.nbytes:
        count = os.preadv(descriptor, [rest], offset)
        if count == 0:
            raise CheckpointCorruptError("a file ended before all of its tensors were read")
        rest, offset = rest[count:], offset + count
