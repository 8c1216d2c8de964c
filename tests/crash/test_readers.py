"""A reader of a folder into which a job saves gets one whole average, and never calls it damaged.

The command with more saves is launch/crash/readers.py.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import readers
import torch
import torch.distributed as dist
from torch import nn

from dist_ema import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    ConstantSchedule,
    ShardedEMA,
    consolidate_checkpoint,
)
from dist_ema.checkpoint import loading, reading
from dist_ema.disk.folders import steady_reading as steady

HALF = ConstantSchedule(momentum=0.5)


def saved(path: Path, value: float, dtype: torch.dtype = torch.float32) -> ShardedEMA:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    ema = ShardedEMA(model, HALF)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    ema.update()
    ema.save(path, max_shard_size=300)
    return ema


def short_run(folder: Path) -> dict[str, Counter[str]]:
    torch.set_num_threads(1)
    return readers.count_reads(folder, saves=25, pause_seconds=0.03)


def test_every_reader_of_ours_gets_one_whole_average_while_a_job_saves(tmp_path) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        results = executor.submit(short_run, tmp_path).result(timeout=300)
    log = tmp_path / "log"
    bad = {name: found for name, found in results.items() if readers.is_bad(name, found)}
    assert not bad, log.read_text()[-4000:] if log.exists() else "no reads"
    assert sum(found["again"] for found in results.values()) > 0, "some must have met a save"


def test_a_read_that_went_well_on_a_mixture_is_begun_again(tmp_path) -> None:
    """Without checksums, the first file of the old folder and the others of the new one look sound."""
    saved(tmp_path / "ema", 1.0)
    ema, real, calls = ShardedEMA(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), HALF), reading.read_boxes, []

    def replaced_half_way(exchange, folder, tensors, wanted, blind, partial):
        failure = real(exchange, folder, tensors, wanted[:1], blind, partial)
        calls.append(len(calls))
        if len(calls) == 1:
            saved(tmp_path / "ema", 2.0)
        return real(exchange, folder, tensors, wanted[1:], blind, partial) or failure

    reading.read_boxes = replaced_half_way
    try:
        ema.load(tmp_path / "ema", verify=False)
    finally:
        reading.read_boxes = real
    assert len(calls) == 2
    assert all(bool((values == 2.0).all()) for values in ema.full_state_dict().values())


def test_weights_without_a_manifest_are_read_again_too(tmp_path) -> None:
    source, export = saved(tmp_path / "ema", 1.0), tmp_path / "export"
    consolidate_checkpoint(tmp_path / "ema", export)
    saved(tmp_path / "other", 2.0)
    real, calls = reading.read_boxes, []

    def replaced_after(*arguments):
        failure = real(*arguments)
        calls.append(len(calls))
        if len(calls) == 1:
            consolidate_checkpoint(tmp_path / "other", export)
        return failure

    reading.read_boxes = replaced_after
    try:
        source.start_from(export)
    finally:
        reading.read_boxes = real
    assert len(calls) == 2
    assert all(bool((values == 2.0).all()) for values in source.full_state_dict().values())


def test_what_is_damaged_and_not_replaced_is_read_once_and_told(tmp_path) -> None:
    ema = saved(tmp_path / "ema", 1.0)
    path = next((tmp_path / "ema").glob("model-00002*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    real, calls = reading.read_boxes, []
    reading.read_boxes = lambda *arguments: calls.append(1) or real(*arguments)
    try:
        with pytest.raises(CheckpointCorruptError, match="damaged"):
            ema.load(tmp_path / "ema")
    finally:
        reading.read_boxes = real
    assert len(calls) == 1
    with pytest.raises(CheckpointNotFoundError):
        ema.load(tmp_path / "none")


def test_an_export_of_a_mixture_is_not_committed(tmp_path) -> None:
    saved(tmp_path / "ema", 1.0)
    attempts = []

    def replaced(num_bytes: int) -> None:
        if not attempts:
            attempts.append(1)
            saved(tmp_path / "ema", 2.0)

    consolidate_checkpoint(tmp_path / "ema", tmp_path / "out", dtype=torch.float64, progress=replaced)
    tensors = readers.load_file(tmp_path / "out" / "model.safetensors")
    assert all(bool((values == 2.0).all()) for values in tensors.values())


def test_a_folder_that_is_always_replaced_is_told_to_be_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(steady, "LEAST_SECONDS", 0.0)
    ema = saved(tmp_path / "ema", 0.0)
    values = iter(range(1, 100))
    with pytest.raises(CheckpointError, match=r"replaced each of 3 times .* no job saves into"):
        consolidate_checkpoint(
            tmp_path / "ema", tmp_path / "out", progress=lambda num_bytes: void(saved(tmp_path / "ema", next(values)))
        )
    real = reading.read_boxes

    def replaced(*arguments):
        saved(tmp_path / "ema", next(values))
        return real(*arguments)

    monkeypatch.setattr(reading, "read_boxes", replaced)
    with pytest.raises(CheckpointError, match=r"replaced each of 3 times .* no job saves into"):
        ema.load(tmp_path / "ema")
    assert sorted(os.listdir(tmp_path)) == ["ema"]


def void(value: object) -> None:
    """Nothing."""


def replaced_before_the_others_look(folder: str) -> None:
    """All ranks begin again together, and none is taken for one that does not see the folder."""
    path = Path(folder)
    model = nn.Linear(8, 8)
    ema = ShardedEMA(model, HALF)
    ema.update()
    ema.save(path / "ema")
    ema.update()
    ema.save(path / "next")
    real, calls = loading.read_saved, []

    def replaced(target, *rest):
        found = real(target, *rest)
        calls.append(1)
        if len(calls) == 1:
            shutil.rmtree(path / "ema")
            (path / "next").rename(path / "ema")
        return found

    loading.read_saved = replaced
    try:
        again = ShardedEMA(model, HALF)
        again.load(path / "ema")  # UserWarnings are errors here
    finally:
        loading.read_saved = real
    assert again.num_updates == 2
    assert len(calls) == (2 if dist.get_rank() == 0 else 0)


def test_ranks_that_look_after_the_folder_was_replaced_begin_again_together(world, tmp_path) -> None:
    world(3).run(replaced_before_the_others_look, str(tmp_path))
