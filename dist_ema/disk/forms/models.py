"""What a form is decided by: a model, and the tensors of it that are written. No communication."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["Model", "Tensors", "dtype_text", "files_in", "files_written", "json_text", "origin_of"]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model without its wrappers.

    Attributes:
        module: the module.
        class_of: returns the class of a module as its author wrote it; sharding may have put another in its place.
    """

    module: nn.Module
    class_of: Callable[[nn.Module], type]

    @property
    def author_class(self) -> type:
        """The class of the model, as its author wrote it."""
        return self.class_of(self.module)

    def base(self, module: str, name: str) -> type | None:
        """The class of that name that the model is of, or None. It need not be imported; `module` defines it."""
        bases = self.author_class.__mro__
        return next((base for base in bases if (base.__module__, base.__name__) == (module, name)), None)

    def is_a(self, module: str, name: str) -> bool:
        """Whether the model is of that class, as `base` finds it."""
        return self.base(module, name) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensors:
    """The tensors of a model that are written.

    Attributes:
        written: fqn -> shape and dtype.
        aliases: further names of tied tensors -> the name in `written`.
        names: the names of all tensors of the model.
        is_part: whether tensors of the model are left out.
        dtype: the dtype of the floating-point tensors, for configurations that name it.
        is_beside_adapters: whether the folder lies in a folder of PEFT, whose sub-folders are taken for its adapters.
    """

    written: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    aliases: Mapping[str, str]
    names: Collection[str]
    is_part: bool
    dtype: torch.dtype
    is_beside_adapters: bool = False


def files_written(write: Callable[[str], object]) -> dict[str, bytes]:
    """Name -> content of what a library writes into a folder that it is given."""
    with tempfile.TemporaryDirectory(prefix="dist_ema-") as folder:
        write(folder)
        return files_in(Path(folder))


def files_in(folder: Path) -> dict[str, bytes]:
    """Name -> content of the files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def json_text(record: Mapping[str, Any]) -> bytes:
    """A record as the content of a file."""
    return json.dumps(record, indent=2, sort_keys=True).encode() + b"\n"


def dtype_text(dtype: torch.dtype) -> str:
    """The dtype as configurations spell it: "float32"."""
    return str(dtype).removeprefix("torch.")


# The hub refuses to take a card whose base model has another form: huggingface_hub's validate_repo_id has the rule.
_REPO_ID = re.compile(
    r"(?=.{1,96}\Z)(?:[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?/)?[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?", re.ASCII
)


def origin_of(value: object) -> str:
    """The name of a model on the hub, if this is one: "owner/name" or "name", and no path of this machine."""
    if not isinstance(value, str) or not _REPO_ID.fullmatch(value) or "--" in value or ".." in value:
        return ""
    return "" if value.endswith(".git") or Path(value).exists() else value
