"""A saved average is read as one: its manifest and the checksum by which ranks know it are of the same bytes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from torch import nn
from upgrades import FOLDER

from dist_ema import ConstantSchedule, ShardedEMA
from dist_ema.disk import manifest, saved_average
from dist_ema.disk.formats.checksums import checksum
from dist_ema.disk.formats.headers import read_header, read_small
from dist_ema.disk.saved_average import SavedAverage, read_saved


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


def fixtures_and_an_old_one(tmp_path: Path) -> list[Path]:
    """Every saved average of an earlier version, one of format version 1, and a folder with a name that is no UTF-8."""
    old, odd = tmp_path / "version 1", Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    shutil.copytree(FOLDER / "one_track", old)
    shutil.copytree(FOLDER / "one_track", odd)
    record = json.loads((old / "manifest.json").read_bytes())
    for name in ("checksum", "checksums", "files", "num_refused"):
        record.pop(name, None)
    (old / "manifest.json").write_text(json.dumps({**record, "format_version": 1}))
    whole = [path.parent for path in FOLDER.rglob("manifest.json") if not path.parent.name.startswith(".")]
    return [*whole, old, odd]


def test_what_rank_0_has_read_of_a_folder_reaches_a_rank_that_sees_none_of_it_unchanged(tmp_path) -> None:
    folders = fixtures_and_an_old_one(tmp_path)
    assert len(folders) > 15
    for folder in folders:
        saved = read_saved(folder)
        sent = json.dumps(saved.to_json())
        received = SavedAverage.from_json(json.loads(sent))
        assert received == saved, folder
        assert list(received.manifest.tensors) == list(saved.manifest.tensors), "the order of the model"
        for track, model in saved.models.items():
            assert received.models[track].tensors == model.tensors
            for name in model.files:
                assert read_header(received.folder_of(track) / name) == received.models[track].files[name]


def test_a_record_that_was_spoilt_on_its_way_is_not_taken(tmp_path) -> None:
    record = read_saved(FOLDER / "one_track").to_json()
    for spoilt in ({"num_updates": -1}, {"tracks": {}}, {"tensors": {"w": {"shape": [-1]}}}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            SavedAverage.from_json({**record, "manifest": {**record["manifest"], **spoilt}})
