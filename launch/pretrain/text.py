"""The corpus: bytes of text files, split by file, and the two ways the trainer looks at them.

No network and no download: without a folder of your own, the text is the source of the standard library of
the Python that runs this. Both sides of the split are pure functions of the files, and training sample ``i``
is a pure function of ``(seed, i)``: no process count, no resume and no worker can change what is read.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
VALIDATION_SHARE = 26 / 256  # of the files, about a tenth


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Two disjoint sets of files, each laid end to end as one uint8 tensor."""

    train: Tensor
    validation: Tensor


def text_files(folder: Path | None) -> list[tuple[str, Path]]:
    """``(relative path, path)`` of every file of the corpus, sorted by relative path.

    Without a folder: the ``*.py`` files of the standard library, tests left out. With one: all its files.
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    pattern = "*.py" if folder is None else "*"
    found = []
    for path in root.rglob(pattern):
        relative = path.relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)
        skipped = folder is None and not SKIPPED_FOLDERS.isdisjoint(relative.parts)
        if path.is_file() and not hidden and not skipped:
            found.append((relative.as_posix(), path))
    return sorted(found)


def is_validation(relative_path: str) -> bool:
    """Which side of the split a file is on: a hash of its name, so that other files cannot move it."""
    return hashlib.sha256(relative_path.encode()).digest()[0] < VALIDATION_SHARE * 256


def read_corpus(folder: Path | None, *, context: int) -> Corpus:
    """Read every file. Raises ``ValueError`` where one side is too short for a single window."""
    sides: dict[bool, list[bytes]] = {False: [], True: []}
    for relative, path in text_files(folder):
        sides[is_validation(relative)].append(path.read_bytes())
    corpus = Corpus(train=as_bytes_tensor(sides[False]), validation=as_bytes_tensor(sides[True]))
    for name, side in (("train", corpus.train), ("validation", corpus.validation)):
        if len(side) <= context:
            raise ValueError(
                f"the {name} side of the corpus has {len(side)} bytes, a window needs {context + 1}: "
                "point --data at a folder with more text files"
            )
    return corpus


def as_bytes_tensor(pieces: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"\n".join(pieces) or b"\n"), dtype=torch.uint8)


class Crops(Dataset[Tensor]):
    """Training sample ``i``: ``context + 1`` bytes (int64) from a place drawn by ``RNG(seed, i)``."""

    def __init__(self, data: Tensor, *, context: int, seed: int, num_samples: int) -> None:
        self.data = data
        self.context = context
        self.seed = seed
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Tensor:
        start = np.random.default_rng([self.seed, index]).integers(len(self.data) - self.context)
        return self.data[start : start + self.context + 1].long()


def validation_windows(data: Tensor, *, context: int, num_windows: int) -> Tensor:
    """``num_windows`` windows of ``context + 1`` bytes, evenly spaced over the text: int64, one a row."""
    starts = np.linspace(0, len(data) - context - 1, num_windows).astype(np.int64)
    return torch.stack([data[start : start + context + 1] for start in starts.tolist()]).long()
