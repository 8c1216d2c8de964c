"""Files of torch.save, read as weights only, with their tensors laid end to end as in a safetensors file.

A pickle can run code when it is read. So torch's `weights_only` unpickler reads it, which makes tensors, containers,
numbers and text, and refuses everything else. The tensors of the usual (zip) form stay in the file: they are mapped
into memory, and only the pages that are used are read. A file of the form before torch 1.6 is read as a whole.

What is read is a dict of tensors by name, or a dict of such dicts. Each of these is a *part* of the file, and its key
is the name of the part ("" for the file's own dict, "a.b" for a dict within a dict). The tensors of a part get byte
offsets as if they lay end to end, so that boxes of them are read as those of a safetensors file are. No communication.
"""

from __future__ import annotations

import argparse
import bisect
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_ema.disk.formats.checksums import checksum
from dist_ema.disk.formats.headers import LONGEST_HEADER_BYTES, TORCH_DTYPES, StoredFile, StoredTensor, open_regular
from dist_ema.errors import CheckpointCorruptError, CheckpointMismatchError

__all__ = ["PartBytes", "PickledFile", "is_pickled", "mmengine_lines"]

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_CODES = {getattr(torch, name): code for code, name in TORCH_DTYPES.items()}
_ZIP = b"PK\x03\x04"
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
# How a pickle of torch.save names the class of a tensor of which this process would hold a slice.
_DTENSOR = b"torch.distributed.tensor\nDTensor\n"


def is_pickled(path: Path) -> bool:
    """Whether a file is of torch.save, or a pickle, by its first bytes. Nothing is unpickled."""
    try:
        descriptor = open_regular(path)
    except OSError:
        return False
    try:
        start, size_bytes = os.pread(descriptor, 512, 0), os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    if int.from_bytes(start[:8], "little") <= min(size_bytes - 8, LONGEST_HEADER_BYTES):
        return False  # a safetensors file
    return (start.startswith(_ZIP) and b".npy" not in start[30:]) or _PICKLE.match(start) is not None


class PickledFile:
    """A file of torch.save.

    Attributes:
        content: what was saved.
        parts: the name of a part -> its tensors by their names.
    """

    def __init__(self, path: Path) -> None:
        """Read everything but the tensors.

        Raises:
            CheckpointCorruptError: the file is damaged, or holds more than `weights_only` reads.
            CheckpointMismatchError: it holds no tensors by name, or slices.
        """
        self._path = path
        self._size_bytes = os.path.getsize(path)
        self.content = _load(path)
        parts = list(_parts(self.content))
        self.parts = dict(parts)
        if len(parts) != len(self.parts):
            raise CheckpointMismatchError(
                f"{path} has two dicts of tensors of the same keys, once with a dot: save the one that you mean alone"
            )
        if not self.parts:
            raise CheckpointMismatchError(f"{path} holds no tensors by name{_instead(self.content)}")

    def stored(self, part: str) -> StoredFile:
        """The tensors of a part, laid end to end.

        Raises:
            CheckpointMismatchError: the file has no such part, or a tensor of it is of a kind that is not read.
        """
        if part not in self.parts:
            raise CheckpointMismatchError(f"{self._path} has no {part!r} any more, expected it as when it was found")
        tensors, start = {}, 0
        for name, tensor in self.parts[part].items():
            code = _CODES.get(tensor.dtype)
            if code is None or tensor.layout is not torch.strided or tensor.device.type != "cpu":
                raise CheckpointMismatchError(
                    f"{self._path} has {name} as a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}, "
                    "expected a dense one of a usual dtype: save it anew as such"
                )
            tensors[name] = StoredTensor(self._path.name, code, tuple(tensor.shape), start, part)
            start += tensors[name].nbytes
        layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        return StoredFile(self._size_bytes, checksum(json.dumps(layout).encode()), {}, tensors)


class PartBytes:
    """The bytes of a part, laid end to end."""

    def __init__(self, path: Path, part: str) -> None:
        file = PickledFile(path)
        self._stored = list(file.stored(part).tensors.items())
        self._starts = [stored.start for _, stored in self._stored]
        self._values = file.parts[part]
        self._now: tuple[str, Bytes] = ("", np.empty(0, np.uint8))  # tensors come one after the other

    def fill(self, start: int, stride_bytes: int, rows: Bytes) -> None:
        """Copy bytes of one tensor; a row begins `stride_bytes` after the former one."""
        if not rows.size:
            return
        # Of several tensors that begin here all but the last are empty.
        name, stored = self._stored[bisect.bisect_right(self._starts, start) - 1]
        if self._now[0] != name:
            self._now = (name, self._values[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        for number, row in enumerate(rows):
            first = start - stored.start + number * stride_bytes
            row[:] = self._now[1][first : first + row.size]


def _load(path: Path) -> Any:
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _check_archive(path)
        # timm's training script saves its options beside the weights: a bag of values, as torch's own classes are.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (CheckpointCorruptError, CheckpointMismatchError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointCorruptError(_more_than_tensors(path, str(error))) from None
    except Exception as error:  # a damaged file may fail anywhere in torch
        text = str(error).partition("\n")[0][:200]
        raise CheckpointCorruptError(f"{path} is damaged, or no file of torch.save: {text}") from error


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            # A mapped record must lie in the file as it is, and torch.save writes no other.
            if record.compress_type != zipfile.ZIP_STORED:
                raise CheckpointCorruptError(
                    f"{path} is a compressed zip archive, which torch.save does not write: decompress it first"
                )
            if record.filename.endswith("/data.pkl") and _DTENSOR in archive.read(record):
                raise CheckpointMismatchError(
                    f"{path} holds DTensors, of which each rank has saved its slice: save whole tensors, as "
                    "get_model_state_dict(..., options=StateDictOptions(full_state_dict=True)) gives them"
                )


def _more_than_tensors(path: Path, error: str) -> str:
    """The refusal of a file with objects, with the lines that take the tensors out of it."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch lists them of its zip form only
        names = []
    names = sorted(set(names) - {"argparse.Namespace"}) or re.findall(r"(?:GLOBAL|global:?) ([\w.]+)", error)
    shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    text = (
        f"{path} is no file of torch.save with tensors alone{f': it has {shown}' if shown else ''}. Nothing else is "
        "unpickled here, since a pickle may run code. If you trust who made it, take the tensors out of it"
    )
    if any(name.startswith("mmengine.") for name in names):
        return f"{text} (mmengine keeps the averaged weights in state_dict):\n{mmengine_lines(path)}"
    if names and all(name.startswith("torch.nn.") for name in names):
        return (
            f"{text}, which are those of a module:\n"
            f"    module = torch.load({str(path)!r}, weights_only=False)\n"
            '    torch.save(module.state_dict(), "average.pt")'
        )
    return (
        f"{text}, where KEY is that of the averaged weights, such as 'state_dict_ema':\n"
        f"    checkpoint = torch.load({str(path)!r}, weights_only=False)\n"
        '    torch.save(checkpoint[KEY], "average.pt")'
    )


def mmengine_lines(path: Path) -> str:
    """What makes a file of tensors of a checkpoint of mmengine: the averaged weights, and the number of updates."""
    return (
        f"    checkpoint = torch.load({str(path)!r}, weights_only=False)\n"
        '    torch.save({"state_dict": checkpoint["state_dict"], "averaging_state": {"n_averaged": '
        'checkpoint["ema_state_dict"]["steps"]}}, "average.pt")'
    )


def _parts(content: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    if not isinstance(content, dict):
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and _is_tensor(value)}
    if tensors:
        yield prefix, tensors
    for key, value in content.items():
        if isinstance(key, str) and depth < 2:
            yield from _parts(value, f"{prefix}.{key}" if prefix else key, depth + 1)


def _is_tensor(value: object) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter)


def _instead(content: object) -> str:
    if isinstance(content, dict) and isinstance(content.get("shadow_params"), list):
        return (
            ": its shadow_params are a list, and an average is matched by name. With diffusers' EMAModel save the "
            "average by save_pretrained; else make a dict: {name: value for (name, _), value in "
            "zip(model.named_parameters(), state['shadow_params'], strict=True)}"
        )
    keys = f" with the keys {', '.join(map(str, content))[:200]}" if isinstance(content, dict) else ""
    return f", expected a dict of them: it is a {type(content).__name__}{keys}"
