"""Nodes with disks of their own, simulated: a path that is the same on all ranks, and leads each to another folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from dist_ema.checkpoint.nodes import views as nodes


@contextmanager
def on_disk(disk: Path) -> Iterator[str]:
    """Gives a path that is the same on all ranks, and on each of them leads to its own `disk`."""
    disk.mkdir(exist_ok=True)
    former, real = os.getcwd(), os.path.realpath
    os.chdir(disk)
    os.path.realpath = os.path.abspath  # which is /proc/self/cwd and must stay unresolved
    try:
        yield "/proc/self/cwd"
    finally:
        os.chdir(former)
        os.path.realpath = real


@contextmanager
def on_node(name: str) -> Iterator[None]:
    """This process is on a node of that name, and sees what the processes there see."""
    with mock.patch("socket.gethostname", lambda: name), mock.patch.object(nodes, "file_view", lambda: name):
        yield


def warnings_of(call: Callable[[], object]) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return "; ".join(str(each.message) for each in caught)
