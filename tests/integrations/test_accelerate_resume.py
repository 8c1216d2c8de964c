"""Runs stopped and resumed by accelerate's `save_state` and `load_state`: the averages go on as if never stopped.

Every run here trains for real: shuffled batches, AdamW, two micro-batches per step, and two averages by name.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration, FullyShardedDataParallelPlugin
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import ProjectConfiguration
from accelerated import accelerator_of, prepared, take_step
from cpu_fsdp import force_fsdp
from disks import on_disk, on_node, warnings_of
from ranks import World
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset
from twins import assert_same_bits
from zoo import local_values

from dist_ema import (
    CheckpointNotFoundError,
    CommunicationError,
    ConfigError,
    CosineSchedule,
    ShardedEMA,
    attach,
)
from dist_ema.checkpoint import save_calls

MICRO_BATCHES_PER_EPOCH = 5  # an odd number: the last step of an epoch has one micro-batch only
STEPS_PER_EPOCH = 3
STOP, END = 4, 8  # stops after the first step of the second epoch
SCHEDULES = {
    "fast": CosineSchedule(0.5, 0.05, total_steps=END),
    "slow": CosineSchedule(0.1, 0.0, total_steps=END),
}


class Block(nn.Module):
    """A unit of its own under FSDP; its rows divide evenly by no number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)
        self.wide = nn.Linear(5, 7)
        self.back = nn.Linear(7, 5)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.back(torch.tanh(self.wide(self.norm(hidden))))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(5, 11)
        self.register_buffer("constant", torch.arange(3.0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embed(tokens)))


def reset_accelerate() -> None:
    """Drop what accelerate keeps per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def opened(layout: str, state_dict_type: str = "SHARDED_STATE_DICT", **options: Any) -> Accelerator:
    common = {
        "cpu": True,
        "gradient_accumulation_steps": 2,
        "dataloader_config": DataLoaderConfiguration(use_seedable_sampler=True),
        **options,
    }
    if layout == "ddp":
        return Accelerator(**common)
    of_version = {"fsdp_version": 2, "reshard_after_forward": True}
    if layout == "fsdp1":
        of_version = {"fsdp_version": 1, "reshard_after_forward": "FULL_SHARD", "use_orig_params": True}
    plugin = FullyShardedDataParallelPlugin(
        state_dict_type=state_dict_type,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
        **of_version,
    )
    mesh = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2) if layout == "hsdp" else None
    os.environ.pop("ACCELERATE_USE_PARALLELISM_CONFIG", None)  # accelerate refuses it on CPU
    accelerator = Accelerator(fsdp_plugin=plugin, **common)
    force_fsdp(accelerator, plugin, mesh)
    return accelerator


def check_layout(layout: str, model: nn.Module) -> None:
    """That accelerate made what was asked for, and not DDP without a word."""
    if layout == "ddp":
        assert isinstance(model, nn.parallel.DistributedDataParallel) or dist.get_world_size() == 1
    elif layout == "fsdp1":
        units = FullyShardedDataParallel.fsdp_modules(model)
        assert len(units) == 3
        assert dist.get_world_size() == 1 or all(
            unit.sharding_strategy == ShardingStrategy.FULL_SHARD for unit in units
        )
    else:
        shape = (2, 2) if layout == "hsdp" else (dist.get_world_size(),)
        assert all(isinstance(each, DTensor) and each.device_mesh.shape == shape for each in model.parameters())


class Run:
    """A training run: everything that `prepare` returned, its averages, and the number of steps done."""

    def __init__(self, accelerator: Accelerator, layout: str, schedules: dict[str, Any], **options: Any) -> None:
        torch.manual_seed(0)
        self.accelerator, self.layout, self.step = accelerator, layout, 0
        num_samples = 2 * MICRO_BATCHES_PER_EPOCH * accelerator.num_processes
        data = TensorDataset(torch.randint(0, 11, (num_samples, 4)))
        model = Tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        self.model, self.optimizer, self.loader = accelerator.prepare(
            model, optimizer, DataLoader(data, batch_size=2, shuffle=True)
        )
        check_layout(layout, self.model)
        self.averages: dict[str, ShardedEMA] = {}
        for name, schedule in schedules.items():
            self.attach(name, schedule, **options)
        accelerator.register_for_checkpointing(self)

    def attach(self, name: str, schedule: Any, **options: Any) -> None:
        self.averages[name] = attach(self.accelerator, self.model, self.optimizer, schedule, name=name, **options)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def train(self, until: int) -> None:
        """Go on to that step, also from the middle of an epoch."""
        while self.step < until:
            epoch, steps_done = divmod(self.step, STEPS_PER_EPOCH)
            loader = self.loader
            if steps_done:
                loader = self.accelerator.skip_first_batches(loader, 2 * steps_done)
            loader.set_epoch(epoch)
            for (tokens,) in loader:
                with self.accelerator.accumulate(self.model):
                    logits = self.model(tokens[:, :-1])
                    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
                    self.accelerator.backward(loss)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                self.step += self.accelerator.sync_gradients
                if self.step == until and self.accelerator.sync_gradients:
                    break

    def save(self, folder: str | None = None) -> None:
        self.accelerator.save_state(folder)
        self.accelerator.wait_for_everyone()

    def load(self, folder: str | None = None) -> None:
        if self.layout == "fsdp1":
            # accelerate 1.15 loads nothing into an empty optimizer under FSDP1. The step of it is not counted.
            get_optimizer_state_dict(self.model, self.optimizer.optimizer)
        self.accelerator.load_state(folder)

    def values(self) -> dict[str, dict[str, torch.Tensor]]:
        """Collective. What this rank holds of the live weights; on rank 0 also every average, whole."""
        averages = {name: average.full_state_dict() for name, average in self.averages.items()}
        return {"live": local_values(self.model), **averages}

    def counts(self) -> list[int]:
        return [average.num_updates for average in self.averages.values()]


@contextmanager
def new_run(
    layout: str, state_dict_type: str = "SHARDED_STATE_DICT", schedules: dict[str, Any] = SCHEDULES, **options: Any
) -> Iterator[Run]:
    """A run from step 0; `options` of the accelerator are those that `attach` does not know."""
    of_attach = {name: options.pop(name) for name in ("on_missing", "background") if name in options}
    try:
        reset_accelerate()
        yield Run(opened(layout, state_dict_type, **options), layout, schedules, **of_attach)
    finally:
        reset_accelerate()


def assert_same_values(found: dict[str, dict[str, torch.Tensor]], expected: dict[str, dict[str, torch.Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].keys() == expected[name].keys()
        assert_same_bits(found[name], expected[name])


def assert_on_disk(values: dict[str, dict[str, torch.Tensor]], folder: str) -> None:
    """On rank 0: the averages are those in the checkpoint."""
    for name in SCHEDULES if dist.get_rank() == 0 else ():
        assert_same_bits(values[name], load_file(os.path.join(folder, name, "model.safetensors")))


def stopped_and_resumed(layout: str, state_dict_type: str, folder: str) -> None:
    with new_run(layout, state_dict_type) as never_stopped:
        never_stopped.train(END)
        assert never_stopped.counts() == [END, END]
        expected = never_stopped.values()
    if dist.get_rank() == 0:
        assert not torch.equal(expected["fast"]["head.weight"], expected["slow"]["head.weight"])
    with new_run(layout, state_dict_type) as first:
        first.train(STOP)
        at_stop = first.values()
        first.save(folder)
        assert_same_values(first.values(), at_stop)
        assert_on_disk(at_stop, folder)
    with new_run(layout, state_dict_type) as second:
        second.load(folder)
        assert second.step == STOP and second.counts() == [STOP, STOP]
        assert_same_values(second.values(), at_stop)
        second.train(END)
        assert second.counts() == [END, END]
        assert_same_values(second.values(), expected)


def loaded_elsewhere(layout: str, state_dict_type: str, folder: str) -> None:
    with new_run(layout, state_dict_type) as run:
        run.load(folder)
        assert run.step == STOP and run.counts() == [STOP, STOP]
        assert_on_disk(run.values(), folder)


SHARDED, FULL = "SHARDED_STATE_DICT", "FULL_STATE_DICT"


@pytest.mark.parametrize(
    ("layout", "size", "state_dict_type", "elsewhere"),
    [
        ("ddp", 2, SHARDED, [("ddp", 1), ("ddp", 4)]),  # the state dict type says nothing to DDP
        # Not on 4 ranks: torch's DCP then wants a key of the optimizer's state that 2 ranks did not write.
        ("fsdp1", 2, SHARDED, [("fsdp1", 1)]),
        # One process only: with several, accelerate sets offload_to_cpu=True for a full state dict of FSDP1, and on CPU
        # torch then frees weights that it still uses: the process dies of SIGSEGV, with or without an average.
        ("fsdp1", 1, FULL, []),
        ("fsdp2", 2, SHARDED, [("fsdp2", 1), ("fsdp2", 4)]),
        ("fsdp2", 2, FULL, [("fsdp2", 1), ("fsdp2", 4)]),
        ("hsdp", 4, SHARDED, [("fsdp2", 2)]),
    ],
)
def test_a_resumed_run_equals_the_one_that_was_never_stopped(
    world, tmp_path, layout, size, state_dict_type, elsewhere
) -> None:
    folder = str(tmp_path / "ckpt")
    world(size).run(stopped_and_resumed, layout, state_dict_type, folder)
    for other_layout, other_size in elsewhere:
        world(other_size).run(loaded_elsewhere, other_layout, state_dict_type, folder)


def automatic_naming(layout: str, folder: str) -> None:
    configuration = {"project_dir": folder, "automatic_checkpoint_naming": True, "total_limit": 2}
    with new_run(layout, project_config=ProjectConfiguration(**configuration)) as first:
        for step in range(1, 5):
            first.train(step)
            first.save()
        at_stop = first.values()
        first.train(5)
    with new_run(layout, project_config=ProjectConfiguration(**configuration)) as second:
        second.load()
        assert second.step == 4 and second.counts() == [4, 4]
        assert_same_values(second.values(), at_stop)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_new_run_takes_the_latest_automatic_checkpoint_and_older_ones_are_gone(world, tmp_path, layout) -> None:
    world(2).run(automatic_naming, layout, str(tmp_path))
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["checkpoint_2", "checkpoint_3"]
    for folder in folders:
        assert (folder / "fast" / "manifest.json").exists() and (folder / "slow" / "manifest.json").exists()
        assert not [path for path in folder.iterdir() if path.name.startswith(".")], "a staging folder is left"


def averages_that_are_missing(layout: str, folder: str) -> list[str]:
    only = {"fast": SCHEDULES["fast"]}
    with new_run(layout, schedules={}) as without:
        without.train(STOP)
        without.save(folder)
        with pytest.raises(ConfigError, match="on_missing"):
            without.attach("fast", SCHEDULES["fast"], on_missing="ignore")
    with new_run(layout, schedules=only) as run, pytest.raises(CheckpointNotFoundError) as not_there:
        run.load(folder)

    with new_run(layout, schedules={}) as run:
        run.load(folder)
        run.attach("fast", SCHEDULES["fast"])
        run.train(END)
        expected = run.values()
    with new_run(layout, schedules=only, on_missing="live") as run:
        run.train(2)  # an average that has begun is forgotten
        run.load(folder)
        assert run.step == STOP and run.counts() == [0]
        run.train(STOP + 1)
        assert run.counts() == [1]
        live = ShardedEMA(run.model, SCHEDULES["fast"]).full_state_dict()  # one without updates shows the live model
        assert_same_values({"fast": run.averages["fast"].full_state_dict()}, {"fast": live})
        run.train(END)
        assert run.counts() == [END - STOP]
        assert_same_values(run.values(), expected)
        if dist.get_rank() == 0:
            os.mkdir(os.path.join(folder, "fast"))
        run.accelerator.wait_for_everyone()
        with pytest.raises(CheckpointNotFoundError) as incomplete:
            run.load(folder)
        run.accelerator.wait_for_everyone()
        if dist.get_rank() == 0:  # what a kill in the middle of a save leaves
            os.rename(os.path.join(folder, "fast"), os.path.join(folder, ".fast.staging"))
        run.accelerator.wait_for_everyone()
        with pytest.raises(CheckpointNotFoundError) as cut_off:
            run.load(folder)
        assert run.counts() == [END - STOP]
        assert_same_values({"fast": run.averages["fast"].full_state_dict()}, {"fast": expected["fast"]})
    return [str(not_there.value), str(incomplete.value), str(cut_off.value)]


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_checkpoint_without_the_average_is_refused_or_begins_a_new_one(world, tmp_path, layout) -> None:
    folder = tmp_path / "ckpt"
    first, second = world(2).run(averages_that_are_missing, layout, str(folder))
    assert first == second
    not_there, incomplete, cut_off = first
    assert "attach with on_missing='live'" in not_there
    for told in (incomplete, cut_off):
        assert "on_missing" not in told and "was cut off" in told and str(folder / "fast") in told


def saved_behind_training(layout: str, folder: str) -> None:
    foreground, background = os.path.join(folder, "foreground"), os.path.join(folder, "background")
    may_write, write_average = threading.Event(), save_calls.write_average

    def write_late(*arguments: Any) -> None:
        assert may_write.wait(20)
        time.sleep(0.3)
        write_average(*arguments)

    with new_run(layout, background=True) as run:
        run.train(STOP)
        at_stop = run.values()
        for name, average in run.averages.items():
            average.save(os.path.join(foreground, name))
        with mock.patch.object(save_calls, "write_average", write_late):
            run.save(background)
            run.train(END)
            expected = run.values()
            assert not os.path.exists(os.path.join(background, "fast"))
            may_write.set()
            for average in run.averages.values():
                average.wait()
        run.accelerator.wait_for_everyone()
        for name in SCHEDULES:
            for file in ("model.safetensors", "manifest.json"):
                assert Path(background, name, file).read_bytes() == Path(foreground, name, file).read_bytes()
        run.load(background)
        assert run.step == STOP and run.counts() == [STOP, STOP]
        assert_same_values(run.values(), at_stop)
        run.train(STOP + 1)
        with mock.patch.object(save_calls, "write_average", write_late):
            run.save(background)
            run.load(background)  # joins the save
        assert run.counts() == [STOP + 1, STOP + 1]
        run.train(END)
        assert_same_values(run.values(), expected)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_save_behind_training_holds_the_values_of_the_call(world, tmp_path, layout) -> None:
    world(2).run(saved_behind_training, layout, str(tmp_path))


def ended_early(folder: str) -> None:
    write_average = save_calls.write_average

    def write_late(*arguments: Any) -> None:
        time.sleep(0.5)
        write_average(*arguments)

    # The real one also destroys the process group, which the tests after this one need.
    ends = mock.patch.object(Accelerator, "end_training", lambda self: None)
    with ends, mock.patch.object(save_calls, "write_average", write_late), new_run("ddp", background=True) as run:
        run.train(1)
        run.save(folder)
        run.accelerator.end_training()
        assert os.path.exists(os.path.join(folder, "slow", "manifest.json"))


def test_the_end_of_training_waits_for_a_save_behind_it(world, tmp_path) -> None:
    world(2).run(ended_early, str(tmp_path / "ckpt"))


def test_a_save_behind_training_needs_more_than_one_checkpoint(tmp_path) -> None:
    configuration = ProjectConfiguration(project_dir=str(tmp_path), automatic_checkpoint_naming=True, total_limit=1)
    accelerator = Accelerator(cpu=True, project_config=configuration)
    model = torch.nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ConfigError, match="total_limit"):
        attach(accelerator, model, optimizer, SCHEDULES["fast"], background=True)


def saved_by_rank_0_alone(folder: str) -> float | None:
    with new_run("ddp") as run:
        run.train(1)
        os.environ["DIST_EMA_ARRIVAL_SECONDS"] = "2"
        if dist.get_rank() != 0:
            return None
        begin = time.monotonic()
        with pytest.raises(CommunicationError, match="is_main_process"):
            run.accelerator.save_state(folder)
        return time.monotonic() - begin


@pytest.mark.ranks
def test_a_save_state_on_rank_0_alone_ends_with_an_error_and_no_average(tmp_path) -> None:
    fresh = World(2)  # its ranks have the variable set
    try:
        seconds, nothing = fresh.run(saved_by_rank_0_alone, str(tmp_path / "ckpt"))
    finally:
        fresh.stop()
    assert nothing is None and 1.5 < seconds < 15
    assert not list(tmp_path.rglob("*manifest*"))


def on_the_other_nodes_disk(root: str, left_behind: str) -> tuple[str, int]:
    rank = dist.get_rank()
    with on_node(f"n{rank}"), on_disk(Path(root) / f"disk{rank}") as here, accelerator_of("ddp") as accelerator:
        os.makedirs("ckpt/.ema.staging" if left_behind == "trace" and rank else "ckpt")
        model, optimizer = prepared(accelerator, "ddp")
        ema = attach(accelerator, model, optimizer, SCHEDULES["fast"], on_missing="live")
        take_step(model, optimizer, 1)
        if left_behind == "average":
            warnings_of(lambda: ema.save(f"{here}/ckpt/ema"))
            if rank == 0:  # which was on the other node
                shutil.move("ckpt/ema", f"{root}/disk1/ckpt/ema")
            accelerator.wait_for_everyone()
        with pytest.raises(CheckpointNotFoundError) as caught:
            accelerator.load_state(f"{here}/ckpt")
        ema.detach()
        return str(caught.value), ema.num_updates


@pytest.mark.parametrize("left_behind", ["average", "trace"])
def test_an_average_on_another_nodes_disk_is_not_begun_anew_as_if_there_were_none(world, tmp_path, left_behind) -> None:
    first, second = world(2).run(on_the_other_nodes_disk, str(tmp_path), left_behind)
    assert first == second and first[1] == 1
    assert "on the disk of another node" in first[0]
    assert ("rank 1, on the node n1, sees one at" in first[0]) == (left_behind == "average")
