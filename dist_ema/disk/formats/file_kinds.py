"""The kind of a file that is no safetensors file, by its first bytes, and of a folder, by the names in it.

Nothing is unpickled. No communication.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["folder_kind", "kind_of", "kind_text"]

_CONVERT = (
    "give this file to ShardedEMA.start_from, which takes its tensors, or read it with torch's load(path, "
    "weights_only=True), save its tensors with safetensors.torch.save_file, and give that file"
)
_TORCH = f"it is a file of torch.save, which is not read here (a pickle may run code): {_CONVERT}"

# The first bytes -> the tool that writes them, and the advice.
_KINDS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (
        re.compile(rb"PK\x03\x04.{26}[^\x00]*?\.npy", re.DOTALL),
        "it is a file of numpy.savez: save its arrays with safetensors.numpy.save_file",
    ),
    (re.compile(rb"PK\x03\x04"), f"it is a zip archive, as torch.save writes it, which is not read here: {_CONVERT}"),
    # A pickle of protocol 2 to 5. The length of a header of 640 bytes begins alike, but goes on with zeros.
    (re.compile(rb"\x80[\x02-\x05](?!\x00\x00\x00\x00\x00\x00)"), _TORCH),
    (re.compile(rb"version https://git-lfs"), "it is a pointer of Git LFS, not the file itself: run git lfs pull"),
    (
        re.compile(rb"GGUF"),
        "it is a GGUF file, which holds other tensors under other names: give its source",
    ),
    (re.compile(rb"\x89HDF\r\n\x1a\n"), "it is an HDF5 file (Keras, h5py): save its arrays with safetensors"),
    (re.compile(rb"\x93NUMPY"), "it is a file of numpy.save: save its arrays with safetensors.numpy.save_file"),
    (re.compile(rb"\x1f\x8b|\x28\xb5\x2f\xfd|BZh|\xfd7zXZ\x00"), "it is compressed: decompress it first"),
    (
        re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE),
        "it is a web page, not the file that was to be downloaded: download it again",
    ),
    (re.compile(rb"\s*[{\[]\s*[\"{\[\]}\d]"), "it is a JSON file: give the folder it lies in, or a safetensors file"),
)
_LONGEST = 512  # bytes

# The files by which a folder of another library is known -> what it is, and the advice.
_FOLDERS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"\.metadata|.*\.distcp"),
        "it is a checkpoint of torch's DCP: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER "
        "average.pt` makes a file that ShardedEMA.start_from reads; an average that ShardedEMA.stateful has put there "
        "is loaded by DCP",
    ),
    (
        re.compile(r"_CHECKPOINT_METADATA|_METADATA|manifest\.ocdbt|.*\.orbax-.*"),
        "it is a checkpoint of orbax (JAX): save its arrays with safetensors",
    ),
    (
        re.compile(r"saved_model\.pb|checkpoint|.*\.data-\d{5}-of-\d{5}|.*\.h5|.*\.keras"),
        "it is a model of TensorFlow or Keras: save its arrays with safetensors",
    ),
    (re.compile(r".*\.msgpack"), "it is a model of Flax: load it with from_flax=True and save it with safetensors"),
    (
        re.compile(r"model_index\.json"),
        "it is a pipeline of diffusers: give the folder of one of its models, such as unet",
    ),
    (
        re.compile(r"zero_to_fp32\.py|latest_checkpointed_iteration\.txt|mp_rank_.*|.*_optim_states\.pt"),
        "it is a checkpoint of DeepSpeed or Megatron, in slices: make whole weights with that library's own tool (of "
        "DeepSpeed zero_to_fp32, which lies there)",
    ),
)


def folder_kind(names: Sequence[str]) -> str | None:
    """The kind of a folder of another library with files of these names, with the advice; None if it is unknown."""
    for pattern, kind in _FOLDERS:
        if any(pattern.fullmatch(name) for name in names):
            return kind
    return None


def kind_of(start: bytes) -> str | None:
    """The kind of a file with these first bytes, with the advice; None if it is unknown."""
    return next((kind for pattern, kind in _KINDS if pattern.match(start)), None)


def kind_text(path: Path) -> str:
    """The end of a refusal of the file: ": it is ...", or "" if it cannot be read or its kind is unknown."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            kind = kind_of(os.pread(descriptor, _LONGEST, 0))
        finally:
            os.close(descriptor)
    except OSError:
        return ""
    return "" if kind is None else f": {kind}"
