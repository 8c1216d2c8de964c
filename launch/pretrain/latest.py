"""Which checkpoint of a run is the newest whole one: what a job that was queued again goes on from."""

from __future__ import annotations

import os
from pathlib import Path

_NAME = "latest"


def mark_latest(checkpoint: Path) -> None:
    """Call on one rank, once all ranks have written the checkpoint: a kill before that leaves the former one marked."""
    mark = checkpoint.parent / _NAME
    written = mark.with_name(f".{_NAME}.tmp")
    written.write_text(f"{checkpoint.name}\n")
    os.replace(written, mark)


def find_latest(out: Path) -> Path | None:
    """The checkpoint that was marked last; None in the folder of a run that has none yet."""
    try:
        return out / (out / _NAME).read_text().strip()
    except FileNotFoundError:
        return None
