"""Lightning's Trainer and Fabric: averages follow the steps, live and die with their checkpoints, and are evaluated."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import NaiveAverage
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from twins import assert_same_bits

from dist_ema import (
    AttachError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigError,
    ConstantSchedule,
    CosineSchedule,
    ShardedEMA,
)

EPOCHS = 3
STEPS = 6  # of the whole run: 4 batches of 2 an epoch, two of them accumulated for a step


def schedule_of(steps: int) -> CosineSchedule:
    return CosineSchedule(0.5, 0.05, total_steps=steps)


def lightning() -> Any:
    """Lightning itself, imported in a rank only: its warnings are no failures there."""
    import lightning.pytorch as pl

    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", category=UserWarning, message=".*(num_workers|logging interval|exists and is not).*")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return pl


def data(rows: int = 16) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(rows, 4, generator=generator), torch.randn(rows, 1, generator=generator))


def module_of(layout: str = "plain") -> Any:
    pl = lightning()

    class Tiny(pl.LightningModule):
        """Its validation records the weights that it sees; its training draws random numbers (dropout)."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.first = nn.Linear(4, 5)
            self.drop = nn.Dropout(0.2)
            self.last = nn.Linear(5, 1)
            self.register_buffer("constant", torch.arange(3.0))
            self.seen: list[dict[str, torch.Tensor]] = []

        def configure_model(self) -> None:
            from torch.distributed.fsdp import FSDPModule, fully_shard

            if layout == "fsdp2" and not isinstance(self.first, FSDPModule):
                mesh = self.device_mesh["data_parallel"]
                fully_shard(self.first, mesh=mesh)
                fully_shard(self.last, mesh=mesh)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.last(self.drop(torch.tanh(self.first(rows))))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return nn.functional.mse_loss(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            if index == 0:
                self.seen.append(values_of(self))
            self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]), sync_dist=True)

        test_step = validation_step

        def predict_step(self, batch: Any, index: int) -> torch.Tensor:
            return self(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.05)

    return Tiny()


def values_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's live values."""
    return {
        name: (value.to_local() if hasattr(value, "to_local") else value).detach().clone()
        for name, value in module.named_parameters()
    }


def follower_of(naive: NaiveAverage) -> Any:
    """A callback that averages naively, after every optimizer step that Lightning counts."""
    pl = lightning()

    class Follower(pl.Callback):
        steps = 0

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step > self.steps:
                self.steps = trainer.global_step
                naive.update(values_of(module))

    return Follower()


def trainer_of(root: Path, layout: str, *callbacks: Any, **options: Any) -> Any:
    pl = lightning()
    strategy = {"plain": "auto", "ddp": "ddp"}.get(layout)
    if layout == "fsdp2":
        from lightning.pytorch.strategies import ModelParallelStrategy

        strategy = ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)
    options = {"max_epochs": EPOCHS, "accumulate_grad_batches": 2, "num_sanity_val_steps": 1} | options
    return pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


def loaders() -> tuple[Any, Any]:
    batch = 4 // dist.get_world_size()
    return DataLoader(data(), batch_size=batch, shuffle=True), DataLoader(data(4), batch_size=batch)


def average(**options: Any) -> Any:
    from dist_ema.integrations.lightning import EMACallback

    return EMACallback(options.pop("schedule", schedule_of), **options)


def checkpoint(root: Path, **options: Any) -> Any:
    from lightning.pytorch.callbacks import ModelCheckpoint

    return ModelCheckpoint(dirpath=root / "saved", **options)


def fit(root: Path, layout: str, *callbacks: Any, path: Any = None, **options: Any) -> tuple[Any, Any]:
    """A whole run of a new module. Every run draws the same random numbers."""
    module, trainer = module_of(layout), trainer_of(root, layout, *callbacks, **options)
    torch.manual_seed(7)
    trainer.fit(module, *loaders(), ckpt_path=path)
    return trainer, module


def entries(root: Path) -> list[str]:
    dist.barrier()
    return sorted(os.listdir(root / "saved"))


def averaged_values(ema: ShardedEMA, module: nn.Module) -> dict[str, torch.Tensor]:
    with ema.average_parameters(ema.tracks[0]):
        return values_of(module)


def case_run(root: Path, layout: str) -> None:
    """Accumulation, exactness, evaluation, files, rotation, and what training notices."""
    bare, untouched = fit(root / "bare", layout, enable_checkpointing=False)
    naive = NaiveAverage(schedule_of(STEPS).momentum)
    callback, rotated = average(consolidate=True), checkpoint(root, save_top_k=1, save_last=True)
    trainer, module = fit(root, layout, callback, follower_of(naive), rotated)
    assert naive.num_updates == STEPS == callback.ema.num_updates
    assert_same_bits(averaged_values(callback.ema, module), naive.values)
    # Training is bit for bit training without the callback, and the model holds the live weights.
    assert_same_bits(values_of(module), values_of(untouched))
    # The sanity check sees the live weights, every validation the averaged ones of its time.
    assert len(module.seen) == 1 + EPOCHS
    assert_same_bits(module.seen[-1], naive.values)
    assert not torch.equal(module.seen[-1]["first.weight"], untouched.seen[-1]["first.weight"])
    # One checkpoint, one average; and the last one's own.
    best = Path(rotated.best_model_path)
    beside = [] if layout == "fsdp2" else [best.stem + ".ema", "last.ema"]
    assert entries(root) == sorted([best.name, "last.ckpt", *beside])
    inner = [best / "ema", root / "saved/last.ckpt/ema"] if layout == "fsdp2" else [root / "saved" / n for n in beside]
    full = callback.ema.full_state_dict()
    for folder in [*inner, root / "ema"]:
        if dist.get_rank() == 0:
            assert_same_bits(load_file(folder / "model.safetensors"), full)
    # Outside of fit, and in a process that never trained, from the checkpoint alone.
    trainer.test(module, loaders()[1], verbose=False)
    assert_same_bits(module.seen[-1], naive.values)
    assert_same_bits(values_of(module), values_of(untouched))
    fresh = module_of(layout)
    trainer_of(root, layout, average()).validate(fresh, loaders()[1], ckpt_path=best, verbose=False)
    assert_same_bits(fresh.seen[-1], naive.values)
    assert_same_bits(values_of(fresh), values_of(untouched))


def case_resume(root: Path, layout: str) -> None:
    """Stopped after a checkpoint, and resumed: as if never stopped."""
    whole, module = average(), None
    _, module = fit(root / "whole", layout, whole, enable_checkpointing=False)
    first = average(schedule=schedule_of(STEPS))
    kept = checkpoint(root, save_top_k=-1, filename="{epoch}")
    fit(root, layout, first, kept, limit_train_batches=4, max_epochs=2)
    assert first.ema.num_updates == 4
    # Another process, which draws the random numbers of the third epoch.
    second = average()
    resumed, trainer = module_of(layout), trainer_of(root, layout, second, enable_checkpointing=False)
    torch.manual_seed(7)
    replay = module_of(layout)
    del replay
    trainer.fit(resumed, *loaders(), ckpt_path=root / "saved" / "epoch=1.ckpt")
    assert second.ema.num_updates == STEPS


@pytest.mark.parametrize(("layout", "ranks"), [("plain", 1), ("ddp", 2), ("fsdp2", 2)])
def test_a_run_averages_exactly_evaluates_saves_and_rotates(world, tmp_path, layout, ranks) -> None:
    world(ranks).run(case_run, tmp_path, layout)
