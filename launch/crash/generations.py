"""A model whose checkpoints tell their generation: generation g has g in every element and g updates behind it.

So a folder tells by itself whether it is one whole generation, and which. The reading needs no process group.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_ema import CosineSchedule, DistEMAError
from dist_ema.disk.formats.model_files import dtype_of
from dist_ema.disk.saved_average import damaged_tensors, read_saved, stored_bytes

# A file that somebody has added to the folder: every save must carry it on.
ADDED, ADDED_TEXT = "notes.txt", "added by hand"
# In the names of what lies beside the folder.
TOKEN = re.compile(r"-[0-9a-f]{12}$")
# Makes several files and an index.
MAX_SHARD_SIZE = 2_500_000
# Update 0 copies the live values, every later one has momentum 1: the average is the live values, exactly.
COPYING = CosineSchedule(momentum=0.5, end_momentum=1.0, total_steps=1)


class Model(nn.Module):
    """6 MB: long stretches that ranks write in place, short ones that they exchange first, buffers, two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(1024, 600)
        self.uneven = nn.Linear(301, 1201)
        self.square = nn.Linear(701, 701)
        self.narrow = nn.Linear(5, 3)
        self.register_buffer("running", torch.zeros(1001))
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))


def build(layout: str, size: int) -> nn.Module:
    """Collective: every rank must call it. The model as "plain", "ddp" or "fsdp2" over all ranks."""
    model = Model()
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    return model


@torch.no_grad()
def fill(model: nn.Module, generation: int) -> None:
    """Make the live values those of a generation."""
    for values in (*model.parameters(), *model.buffers()):
        values.fill_(generation)


def generation_of(target: Path, *, added: bool = True) -> int:
    """The generation at `target`, all of it: files, checksums, values, counter and the added file, if there is one.

    Raises:
        DistEMAError: something is missing, or a size or the checksum of a manifest or header differs.
        ValueError: a tensor has another checksum, or other values than the counter says, or the added file is another.
        OSError: the added file cannot be read.
    """
    saved = read_saved(target)
    generation = saved.manifest.num_updates
    damaged = [name for name, _, is_damaged in damaged_tensors(saved) if is_damaged]
    if damaged:
        raise ValueError(f"checksums differ: {', '.join(damaged)}")
    for track, model in saved.models.items():
        for fqn, stored in model.tensors.items():
            for piece in stored_bytes(saved.folder_of(track), stored):
                values = torch.frombuffer(piece, dtype=dtype_of(stored))
                if not bool((values == generation).all()):
                    found = values.unique().tolist()[:5]
                    raise ValueError(f"{fqn} holds the values {found}, the number of updates is {generation}")
    if added and (saved.folder / ADDED).read_text() != ADDED_TEXT:
        raise ValueError(f"{ADDED} is another")
    return generation


def outcome_of(target: Path, new: int, *, returned: bool) -> tuple[str, str]:
    """Whether generation `new` or the one before it is at `target`: "old", "new" or "neither", and why neither.

    Args:
        target: the folder.
        new: the generation whose save was cut off.
        returned: whether that save has returned on some rank: the old one is then a lost save, "neither".
    """
    try:
        found = generation_of(target)
    except (DistEMAError, ValueError, OSError) as error:
        return "neither", f"{type(error).__name__}: {error}"
    if found == new or (found == new - 1 and not returned):
        return "new" if found == new else "old", ""
    return "neither", f"it is generation {found}; the save of {new} {'has' if returned else 'had not'} returned"


def beside(target: Path) -> list[str]:
    """What lies beside the folder; tokens, which are random, are left out."""
    return sorted(TOKEN.sub("-TOKEN", path.name) for path in target.parent.iterdir() if path.name != target.name)
