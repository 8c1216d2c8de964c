"""The folders of snapshots: their names, and which of them are of later updates. No communication."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["LIVE_SNAPSHOT", "SNAPSHOT", "snapshots_after"]

# The order of the names is the order of the numbers of updates. Snapshots of averages and of live weights may lie side
# by side.
SNAPSHOT = "updates-{:09d}"
LIVE_SNAPSHOT = "live-{:09d}"


def snapshots_after(form: str, num_updates: int, folder: Path) -> tuple[int, str]:
    """How many snapshots with names of a form are of more updates, and the first one's name; empty if there is none."""
    if not folder.is_dir():  # a save in the background may not have made it yet
        return 0, ""
    snapshots = [path.name for path in folder.iterdir() if re.fullmatch(form.partition("{")[0] + r"\d{9}", path.name)]
    later = [name for name in snapshots if name > form.format(num_updates)]
    return len(later), min(later, default="")
