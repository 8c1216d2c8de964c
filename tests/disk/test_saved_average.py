"""A saved average is read as one: its manifest and the checksum by which ranks know it are of the same bytes."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from dist_ema import ConstantSchedule, ShardedEMA
from dist_ema.disk import manifest, saved_average
from dist_ema.disk.formats.checksums import checksum
from dist_ema.disk.formats.headers import read_small
from dist_ema.disk.saved_average import read_saved


def test_a_save_that_comes_and_goes_between_two_reads_of_the_manifest_is_not_paired_with_the_other_one(
    tmp_path, monkeypatch
) -> None:
    """A folder is put aside, another stands in its place for one read, and the first comes back.

    Nobody who looks before and after can tell, so a manifest that is read twice is of one average and its checksum of
    the other: then every other rank takes the folder for another one than rank 0 has read.
    """
    ema = ShardedEMA(nn.Linear(3, 2), ConstantSchedule(decay=0.9))
    ema.update()
    ema.save(tmp_path / "ema")
    former, later, aside = tmp_path / "ema" / "manifest.json", tmp_path / "later.json", tmp_path / "aside.json"
    ema.update()
    ema.save(tmp_path / "other")
    later.write_bytes((tmp_path / "other" / "manifest.json").read_bytes())
    num_reads = 0

    def every_second_read_meets_the_other_save(path: Path) -> bytes:
        nonlocal num_reads
        num_reads += path == former
        if path != former or num_reads % 2:
            return read_small(path)
        os.replace(former, aside)
        os.replace(later, former)
        try:
            return read_small(path)
        finally:
            os.replace(former, later)
            os.replace(aside, former)

    # Where a manifest is parsed or summed; `raising` is for a module that reads none any more.
    for module in (manifest, saved_average):
        monkeypatch.setattr(module, "read_small", every_second_read_meets_the_other_save, raising=False)
    saved = read_saved(tmp_path / "ema")
    assert num_reads > 0
    assert saved.manifest_checksum == checksum(saved.manifest.to_bytes())
    assert saved.manifest.num_updates == 1
