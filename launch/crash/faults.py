"""Failing calls of the operating system and of allocators, for calls that come from the package only.

`Faults` replaces functions of `os`, `shutil`, torch and numpy in this process. It counts the calls that the package
makes to each, and has the call of a given number fail as the real one does: by an OSError, a RuntimeError of torch, a
MemoryError.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from dist_ema.checkpoint import writing

FILE_CALLS = (
    *("open", "close", "pwrite", "pread", "preadv", "fsync", "ftruncate", "fstat", "stat", "lstat", "statvfs"),
    *("mkdir", "rmdir", "rename", "replace", "unlink", "remove", "link", "symlink", "scandir", "listdir"),
    *("posix_fadvise", "utime", "chmod", "readlink"),
)
TREE_CALLS = ("rmtree", "copy2", "copytree")
TORCH_CALLS = ("empty", "zeros", "ones", "full", "tensor", "empty_like", "zeros_like", "cat", "stack", "frombuffer")
TENSOR_CALLS = ("clone", "to", "cpu", "contiguous", "reshape")
NUMPY_CALLS = ("empty", "zeros", "concatenate")

# Frames between a call of the package and the system: pathlib, shutil, tempfile.
_DEPTH = 14
# Code that opens files for its own ends while the package runs.
_FOREIGN = ("importlib", "linecache", "logging", "warnings", "traceback", "tokenize", "inspect")


class Faults:
    """Counts the calls of the package, and fails one of them. For one process, for as long as it lives."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failed = ""
        self._armed: tuple[str, int] | None = None
        self._is_on = False
        self._lock = threading.Lock()
        for name in FILE_CALLS:
            if hasattr(os, name):
                self._replace(os, name, f"os.{name}", from_package, _io_error)
        for name in TREE_CALLS:
            self._replace(shutil, name, f"shutil.{name}", from_package, _io_error)
        for name in TORCH_CALLS:
            self._replace(torch, name, f"torch.{name}", called_by_package, _no_memory_of_torch)
        for name in TENSOR_CALLS:
            self._replace(torch.Tensor, name, f"Tensor.{name}", called_by_package, _no_memory_of_torch)
        for name in NUMPY_CALLS:
            self._replace(np, name, f"numpy.{name}", called_by_package, _no_memory)
        self._replace(writing, "bytearray", "bytearray", called_by_package, _no_memory)

    @contextlib.contextmanager
    def counting(self, armed: tuple[str, int] | None = None) -> Iterator[None]:
        """Count the calls in the block; the one that is `armed` (its name, and its number from 1) fails."""
        self.counts, self.failed, self._armed, self._is_on = Counter(), "", armed, True
        try:
            yield
        finally:
            self._is_on = False

    def _replace(
        self, owner: Any, name: str, told: str, is_ours: Callable[[], bool], error: Callable[[], Exception]
    ) -> None:
        real = getattr(owner, name, None) or bytearray

        def call(*arguments: Any, **options: Any) -> Any:
            if self._is_on and is_ours():
                with self._lock:
                    self.counts[told] += 1
                    fails = self._armed == (told, self.counts[told])
                if fails:
                    self.failed = told
                    if told == "os.close":  # the descriptor is gone, whatever is told
                        real(*arguments, **options)
                    raise error()
            return real(*arguments, **options)

        setattr(owner, name, call)


def called_by_package() -> bool:
    """Whether the caller of the replaced function is the package itself."""
    return str(sys._getframe(2).f_globals.get("__name__")).startswith("dist_ema.")


def from_package() -> bool:
    """Whether the package called the replaced function, itself or through the standard library."""
    frame = sys._getframe(2)
    for _ in range(_DEPTH):
        name = str(frame.f_globals.get("__name__"))
        if name.startswith("dist_ema."):
            return True
        if name.startswith(_FOREIGN) or frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def _io_error() -> Exception:
    return OSError(errno.EIO, "Input/output error (tried)")


def _no_memory_of_torch() -> Exception:
    return RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory (tried)")


def _no_memory() -> Exception:
    return MemoryError("Unable to allocate (tried)")
