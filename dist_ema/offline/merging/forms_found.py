"""The form of a model folder that any library wrote, by its files; it has no manifest. No communication."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from dist_ema.disk.folders import contents
from dist_ema.disk.formats.file_names import ADAPTER_STEM, DIFFUSERS_STEM, LORA_STEM, WEIGHTS_FILE
from dist_ema.disk.formats.headers import StoredModel, read_small
from dist_ema.disk.forms.card import CARD_NAME
from dist_ema.disk.forms.form import (
    CONFIG_NAME,
    DIFFUSERS,
    HUB,
    LORA,
    PEFT,
    PLAIN,
    TIMM,
    TOP,
    TRANSFORMERS,
    FolderForm,
)
from dist_ema.errors import CheckpointCorruptError

__all__ = ["form_of_folder"]

_KIND_OF = {DIFFUSERS_STEM: DIFFUSERS, ADAPTER_STEM: PEFT, LORA_STEM: LORA}
# What describes a model, its tokens and its code. Other files tell of the run that it comes from.
_SMALL_ENDS = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py")
_OF_A_RUN = (
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    contents.MANIFEST_NAME,
)
_LARGEST_BYTES = 64 * 2**20


def form_of_folder(folder: Path, model: StoredModel) -> FolderForm:
    """The form of a folder, with the small files that describe its model.

    Args:
        folder: the folder.
        model: its files of weights.
    """
    small_files = tuple(sorted(path.name for path in folder.iterdir() if _is_small_file(path)))
    kind = _KIND_OF.get(model.stem) or _kind_by_config(folder, is_one_file=model.index_checksum is None)
    text: dict[str, str] = {}
    for file in model.files.values():
        text |= {key: value for key, value in file.metadata.items() if _is_of_the_library(key, value, model)}
    return FolderForm(kind=kind, headers={TOP: text} if text else {}, small_files=small_files)


def _is_small_file(path: Path) -> bool:
    name = path.name
    if name.startswith(".") or name in (*_OF_A_RUN, CARD_NAME) or " " in name or WEIGHTS_FILE.fullmatch(name):
        return False
    is_plain = path.is_file() and not path.is_symlink() and name.endswith(_SMALL_ENDS)
    return is_plain and not name.endswith(".index.json") and path.stat().st_size <= _LARGEST_BYTES


def _kind_by_config(folder: Path, *, is_one_file: bool) -> str:
    """The kind of a folder with files called "model"."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return PLAIN
    try:
        config = json.loads(read_small(path))
    except (CheckpointCorruptError, ValueError, RecursionError):
        return PLAIN
    if isinstance(config, Mapping) and "model_type" in config:
        return TRANSFORMERS
    if not is_one_file:
        return PLAIN
    return TIMM if isinstance(config, Mapping) and "pretrained_cfg" in config else HUB


def _is_of_the_library(key: str, value: str, model: StoredModel) -> bool:
    marks = (contents.MARK, contents.SMALL_FILES, contents.FOLDER, "format")
    return key not in marks and not (value in model.tensors and key not in model.tensors)
