"""The merge that a run keeps online is the offline merge of its checkpoints, on any ranks and through a resume."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_ema import MergeSchedule, ShardedEMA, consolidate_checkpoint, merge
from dist_ema.schedules.merging import merge_coefficients

SHAPES = ("linear", "1-sqrt", "cosine")
# Values 1 to 6 are those of updates 2 to 7; the run stops after update 4 and goes on elsewhere.
START, COUNT, STOP, END = 2, 6, 5, 8


def laid_out(layout: str) -> nn.Module:
    model = bare()
    if layout == "ddp":
        return DistributedDataParallel(model)
    return fully_shard(model)


def value(step: int) -> dict[str, torch.Tensor]:
    """The live weights after step `step`; far apart, as they never are in a run."""
    torch.manual_seed(step)
    return {name: torch.randn_like(tensor) for name, tensor in bare().state_dict().items()}


def bare() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def stretch(folder: str, layout: str, first: int, last: int) -> None:
    """Updates `first` to `last - 1`, with a checkpoint of the live weights after each in the window."""
    warnings.simplefilter("ignore")
    model = laid_out(layout)
    tracks = {shape: MergeSchedule(shape, num_steps=COUNT, start_step=START) for shape in SHAPES}
    ema = ShardedEMA(model, tracks)
    if first:
        ema.load(f"{folder}/ema")
    for step in range(first, last):
        set_model_state_dict(model, value(step), options=StateDictOptions(full_state_dict=True))
        ema.update()
        if START <= step < START + COUNT:
            live = get_model_state_dict(model)
            if step % 3 == 0:
                dcp.save({"model": live}, checkpoint_id=f"{folder}/live-{step}/pytorch_model_fsdp_0")
            elif dist.get_rank() == 0:
                Path(f"{folder}/live-{step}").mkdir()
                save_file(value(step), f"{folder}/live-{step}/model.safetensors")
    ema.save(f"{folder}/ema")
    dist.barrier()


ROUTES = [("ddp", 1, "fsdp2", 4), ("fsdp2", 2, "ddp", 2), ("ddp", 4, "fsdp2", 1)]


def test_online_and_offline_merges_agree(world: Callable, tmp_path) -> None:
    """With each other and with the closed form; from any ranks to any ranks in the middle of the window."""
    online, offline = {}, {}
    for at, (layout, size, later_layout, later_size) in enumerate(ROUTES):
        folder = tmp_path / str(at)
        folder.mkdir()
        world(size).run(stretch, str(folder), layout, 0, STOP)
        world(later_size).run(stretch, str(folder), later_layout, STOP, END + 1)
        sources = [folder / f"live-{step}" for step in range(START, START + COUNT)]
        for shape in SHAPES:
            consolidate_checkpoint(folder / "ema", folder / shape, track=shape)
            online[at, shape] = load_file(folder / shape / "model.safetensors")
            merge(folder / f"offline-{shape}", sources, decay=shape)
            offline[at, shape] = load_file(folder / f"offline-{shape}" / "model.safetensors")
    for shape in SHAPES:
        values = [value(step) for step in range(START, START + COUNT)]
        for name in values[0]:
            closed = torch.zeros_like(values[0][name], dtype=torch.float64)
            for weight, tensors in zip(merge_coefficients(shape, COUNT), values, strict=True):
                closed.add_(tensors[name].double(), alpha=weight)
            for at in range(len(ROUTES)):
                ours, theirs = online[at, shape][name], offline[at, shape][name]
                assert torch.equal(theirs, closed.float()), "one sum in float64, rounded once"
                assert torch.equal(ours, online[0, shape][name]), "the same arithmetic on any ranks"
                error = (ours.double() - closed).norm() / closed.norm()
                assert error < 1e-6, (shape, name)


def test_a_merge_is_the_same_from_any_number_of_pieces(world: Callable, tmp_path) -> None:
    for size in (1, 2, 4):
        world(size).run(pieces, str(tmp_path / str(size)))
        merge(tmp_path / f"out-{size}", [tmp_path / str(size)])
        merged = load_file(tmp_path / f"out-{size}" / "model.safetensors")
        assert all(torch.equal(merged[name], tensor) for name, tensor in value(0).items())


def pieces(folder: str) -> None:
    warnings.simplefilter("ignore")
    model = laid_out("fsdp2")
    set_model_state_dict(model, value(0), options=StateDictOptions(full_state_dict=True))
    dcp.save(get_model_state_dict(model), checkpoint_id=folder)
