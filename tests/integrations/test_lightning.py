"""Lightning's Trainer and Fabric: averages follow the steps, live and die with their checkpoints, and are evaluated."""

from __future__ import annotations

import logging
import os
import re
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
    warnings.filterwarnings(
        "ignore", category=UserWarning, message=".*(num_workers|logging interval|exists and is not).*"
    )
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
            self.seeds_batches = False

        def configure_model(self) -> None:
            from torch.distributed.fsdp import FSDPModule, fully_shard

            if layout == "fsdp2" and not isinstance(self.first, FSDPModule):
                mesh = self.device_mesh["data_parallel"]
                fully_shard(self.first, mesh=mesh)
                fully_shard(self.last, mesh=mesh)

        def on_train_batch_start(self, batch: Any, index: int) -> None:
            if self.seeds_batches:  # a resume then draws what the run would have drawn
                torch.manual_seed(100 * self.current_epoch + index)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.last(self.drop(torch.tanh(self.first(rows))))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return nn.functional.mse_loss(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            if index == 0:
                self.seen.append(values_of(self))
            loss = nn.functional.mse_loss(self(batch[0]), batch[1])
            self.log("val_loss", loss, sync_dist=True)
            self.log_dict({"size": loss.abs(), "val/size": loss.abs()}, sync_dist=True)

        test_step = validation_step

        def predict_step(self, batch: Any, index: int) -> torch.Tensor:
            return self(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.05)

    return Tiny()


def values_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's live values."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
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
    _, untouched = fit(root / "bare", layout, enable_checkpointing=False)
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


def ordered() -> tuple[Any, Any]:
    batch = 4 // dist.get_world_size()
    return DataLoader(data(), batch_size=batch), DataLoader(data(4), batch_size=batch)


def seeded(root: Path, layout: str, *callbacks: Any, path: Any = None, **options: Any) -> tuple[Any, Any]:
    module, trainer = module_of(layout), trainer_of(root, layout, *callbacks, **options)
    module.seeds_batches = True
    trainer.fit(module, *ordered(), ckpt_path=path)
    return trainer, module


def case_resume(root: Path, layout: str) -> None:
    """Stopped after a checkpoint, and resumed: as if never stopped."""
    whole = average()
    _, module = seeded(root / "whole", layout, whole, enable_checkpointing=False)
    kept = checkpoint(root, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
    stopped = average(schedule=schedule_of(STEPS))
    seeded(root, layout, stopped, kept, max_epochs=2)
    assert stopped.ema.num_updates == 4
    for path in ["last", root / "saved" / "epoch=1.ckpt"]:
        second = average()
        kept = checkpoint(root, save_top_k=0, save_last=True)
        if path == "last" and dist.get_rank() == 0:
            for name in ("epoch=1.ckpt", "epoch=1.ema"):
                source, target = root / "saved" / name, root / "saved" / name.replace("epoch=1", "last")
                if source.is_dir():
                    shutil.copytree(source, target)
                elif source.exists():
                    shutil.copy(source, target)
        dist.barrier()
        _, resumed = seeded(root, layout, second, kept, path=path)
        assert second.ema.num_updates == STEPS
        assert_same_bits(values_of(resumed), values_of(module))
        assert_same_bits(averaged_values(second.ema, resumed), averaged_values(whole.ema, module))


def case_blends(root: Path, layout: str) -> None:
    """The live weights are the average after every third step, also where a resume between two blends adds a track."""
    steady = ConstantSchedule(momentum=0.3)
    blends: dict[str, Any] = {"evaluate": "live", "blend_every": 3, "blend_weight": 1.0}
    whole, stopped = average(schedule=steady, **blends), average(schedule=steady, **blends)
    _, module = seeded(root / "whole", layout, whole, enable_checkpointing=False)
    assert_same_bits(values_of(module), averaged_values(whole.ema, module))
    kept = checkpoint(root, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
    seeded(root, layout, stopped, kept, max_epochs=2)
    tracks = {"ema": steady, "slow": ConstantSchedule(momentum=0.01)}
    path = root / "saved" / "epoch=1.ckpt"
    with pytest.raises(CheckpointMismatchError, match=r"new_tracks=\{\"slow\""):
        seeded(root, layout, average(schedule=tracks, **blends), path=path, enable_checkpointing=False)
    second = average(schedule=tracks, on_load={"new_tracks": {"slow": "live"}}, **blends)
    _, resumed = seeded(root, layout, second, path=path, enable_checkpointing=False)
    assert second.ema.num_updates == STEPS and second.ema._state.beginnings.starts == {"slow": 4}
    assert_same_bits(values_of(resumed), values_of(module))


def case_lost(root: Path) -> None:
    """What a checkpoint lacks, or has of another time, is not taken for its average."""
    kept = checkpoint(root, save_top_k=-1, every_n_train_steps=2, filename="{step}")
    trainer, module = seeded(root, "plain", average(), kept)
    saved = root / "saved"
    # By hand after fit; a moved checkpoint; one whose average is of another time.
    trainer.save_checkpoint(root / "by hand.pt")
    assert (root / "by hand.pt.ema").is_dir()
    for name in ("step=4.ckpt", "step=4.ema"):
        (shutil.copytree if name.endswith("ema") else shutil.copy)(saved / name, saved / name.replace("4", "5"))
    (saved / "step=4.ckpt").rename(root / "moved.ckpt")
    with pytest.raises(CheckpointNotFoundError, match=r"has no average: there is no .*moved\.ema.*on_missing='live'"):
        seeded(root, "plain", average(), path=root / "moved.ckpt", enable_checkpointing=False)
    anew = average(on_missing="live")
    seeded(root, "plain", anew, path=root / "moved.ckpt", enable_checkpointing=False)
    assert anew.ema.num_updates == STEPS - 4
    shutil.rmtree(saved / "step=5.ema")
    shutil.copytree(saved / "step=2.ema", saved / "step=5.ema")
    with pytest.raises(CheckpointMismatchError, match=r"has 2 updates, the checkpoint .* was saved with 4"):
        seeded(root, "plain", average(), path=saved / "step=5.ckpt", enable_checkpointing=False)
    # Another name, and a run that evaluates live weights only: nothing of it is loaded.
    with pytest.raises(CheckpointNotFoundError, match="other"):
        trainer_of(root, "plain", average(name="other")).test(
            module, loaders()[1], saved / "step=2.ckpt", verbose=False
        )
    trainer_of(root, "plain", average(name="other", evaluate="live")).test(
        module, loaders()[1], saved / "step=2.ckpt", verbose=False
    )


def case_other_module(root: Path) -> None:
    """An evaluation of another module lost the average of the one that was trained, and told nothing."""
    callback = average()
    trainer, module = fit(root, "plain", callback, enable_checkpointing=False)
    ema, other = callback.ema, module_of()
    with pytest.warns(UserWarning, match="'ema' is that of another module than the Trainer evaluates here"):
        trainer.validate(other, loaders()[1], verbose=False)
    assert_same_bits(other.seen[-1], values_of(module_of()))
    trainer.save_checkpoint(root / "of other.ckpt")
    assert not (root / "of other.ema").exists()
    trainer.validate(module, loaders()[1], verbose=False)
    assert callback.ema is ema and ema.num_updates == STEPS
    assert_same_bits(module.seen[-1], averaged_values(ema, module))
    # The checkpoint of the other module does not say that it has an average.
    with pytest.raises(CheckpointNotFoundError, match="has no average"):
        trainer.validate(module, loaders()[1], ckpt_path=root / "of other.ckpt", verbose=False)


def case_both(root: Path, layout: str) -> None:
    """Both weights: two names for the metrics, one validation for everybody else, and the same training."""
    from lightning.pytorch.callbacks import EarlyStopping

    bare, untouched = fit(root / "bare", layout, enable_checkpointing=False)
    live = bare.callback_metrics["val_loss"]
    callback, kept = average(evaluate="both"), checkpoint(root, monitor="val_ema_loss", save_last="link")
    stopping = EarlyStopping("val_loss", patience=2, min_delta=1e9)  # nothing is an improvement but the first
    trainer, module = fit(root, layout, callback, kept, stopping)
    assert_same_bits(values_of(module), values_of(untouched))
    assert len(module.seen) == 1 + 2 * EPOCHS
    assert trainer.callback_metrics["val_loss"] == live
    (metrics,) = trainer.validate(module, loaders()[1], verbose=False)
    assert metrics["val_loss"] == live and metrics["val_ema_loss"] == kept.best_model_score != live
    assert sorted(metrics) == ["ema_size", "size", "val/ema_size", "val/size", "val_ema_loss", "val_loss"]
    assert_same_bits(module.seen[-2], averaged_values(callback.ema, module))
    assert_same_bits(module.seen[-1], values_of(untouched))
    assert "log" not in vars(module) and len(trainer.callbacks) >= 3
    # The link of the last checkpoint, and that of its average.
    best = Path(kept.best_model_path)
    assert os.path.realpath(root / "saved" / "last.ema") == str(best.with_suffix(".ema"))
    assert entries(root) == sorted([best.name, best.stem + ".ema", "last.ckpt", "last.ema"])


def case_hooks_of_others(root: Path) -> None:
    """Saves of other callbacks, whenever they come, have the live weights and the average of now."""
    pl = lightning()
    saves = {}

    class Saver(pl.Callback):
        """It comes before ours, saves while the averages are in the model, and fails in the end."""

        def save(self, trainer: Any, name: str) -> None:
            trainer.save_checkpoint(root / f"{name}.ckpt")
            saves[name] = callback.ema.num_updates

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                self.save(trainer, "batch")

        def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                weights = values_of(module)
                self.save(trainer, "swapped")
                assert_same_bits(values_of(module), weights)
                raise ArithmeticError

    callback = average(schedule={"fast": schedule_of(STEPS), "slow": ConstantSchedule(momentum=0.01)})
    module, trainer = module_of(), trainer_of(root, "plain", Saver(), callback, enable_checkpointing=False)
    with pytest.raises(ArithmeticError):
        trainer.fit(module, *loaders())
    assert saves == {"batch": 3, "swapped": 4}
    assert (root / "batch.ema" / "slow").is_dir()
    live = torch.load(root / "swapped.ckpt")["state_dict"]
    assert_same_bits(values_of(module), {name: live[name] for name in values_of(module)})
    assert not torch.equal(live["first.weight"], load_file(root / "swapped.ema/fast/model.safetensors")["first.weight"])


def case_second_fit(root: Path) -> None:
    """A second fit of a trainer goes on, with the schedule of its number of steps; another trainer begins anew."""
    callback = average()
    module, trainer = module_of(), trainer_of(root, "plain", callback, enable_checkpointing=False)
    naive = NaiveAverage(schedule_of(STEPS).momentum)
    follower = follower_of(naive)
    trainer.callbacks.append(follower)
    trainer.fit(module, *loaders())
    naive.momentum = schedule_of(2 * STEPS).momentum
    trainer.fit_loop.max_epochs = 2 * EPOCHS
    trainer.fit(module, *loaders())
    assert callback.ema.num_updates == 2 * STEPS == naive.num_updates
    assert_same_bits(averaged_values(callback.ema, module), naive.values)
    trainer_of(root, "plain", callback, enable_checkpointing=False).fit(module, *loaders())
    assert callback.ema.num_updates == STEPS


def case_nothing_left(root: Path) -> None:
    """A run resumed at its end takes no step, and has its averages all the same: of two callbacks."""
    tracks = {"long": ConstantSchedule(momentum=0.1), "short": ConstantSchedule(momentum=0.5)}

    def callbacks() -> list[Any]:
        return [average(), average(name="slow", schedule=tracks, evaluate="live", consolidate=True)]

    first, kept = callbacks(), checkpoint(root, save_top_k=1)
    fit(root, "plain", *first, kept)
    best = Path(kept.best_model_path)
    assert entries(root) == sorted(best.stem + end for end in (".ckpt", ".ema", ".slow"))
    assert sorted(os.listdir(root / "slow")) == ["long", "short"]
    second = callbacks()
    trainer, module = fit(root, "plain", *second, path=best, enable_checkpointing=False)
    trainer.save_checkpoint(root / "again.ckpt")
    for name in ("ema/model", "slow/long/model"):
        of_two = [load_file(f"{stem}.{name}.safetensors") for stem in (best.with_suffix(""), root / "again")]
        assert_same_bits(*of_two)
    # Lightning puts other modules into the model at the end of fit, where it has put some in before.
    module.first = nn.Linear(4, 5)
    trainer.test(module, loaders()[1], ckpt_path=best, verbose=False)
    assert_same_bits(module.seen[-1], averaged_of(first[0]))
    with pytest.raises(CheckpointMismatchError, match="the tracks"):
        fit(root, "plain", average(schedule=tracks), path=best, enable_checkpointing=False)


def averaged_of(callback: Any) -> dict[str, torch.Tensor]:
    whole = callback.ema.full_state_dict()
    return {name: value for name, value in whole.items() if name != "constant"}


def case_two_optimizers(root: Path) -> None:
    """A GAN: one update at the end of each batch in which any of the two has stepped, in whatever order."""
    pl = lightning()

    class Gan(pl.LightningModule):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.generator, self.critic = nn.Linear(4, 4), nn.Linear(4, 1)

        def training_step(self, batch: Any, index: int) -> None:
            of_generator, of_critic = self.optimizers()
            order = [[of_critic, of_critic, of_generator], [of_generator, of_critic], [], [of_critic]][index % 4]
            for optimizer in order:
                optimizer.zero_grad()
                self.manual_backward(self.critic(self.generator(batch[0])).square().mean())
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator, self.critic)]

    class Ends(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index % 4 != 2:
                naive.update(values_of(module))

    naive, callback = NaiveAverage(lambda step: 0.3), average(schedule=ConstantSchedule(momentum=0.3))
    trainer = trainer_of(root, "plain", callback, Ends(), accumulate_grad_batches=1, enable_checkpointing=False)
    module = Gan()
    trainer.fit(module, loaders()[0])
    assert callback.ema.num_updates == naive.num_updates == 3 * EPOCHS
    assert_same_bits(averaged_values(callback.ema, module), naive.values)


def case_many_steps_of_one(root: Path, fused: bool) -> None:
    """One optimizer that steps several times a batch, clips after it, and whose scaler skips a step."""
    pl = lightning()

    class Inner(pl.LightningModule):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

        def training_step(self, batch: Any, index: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            for inner in range(3):
                optimizer.zero_grad()
                loss = self.layer(batch[0]).square().mean()
                self.scaler.scale(loss * (float("inf") if inner == 1 else 1.0)).backward()
                self.scaler.step(optimizer)
                self.scaler.update()
                with torch.no_grad():
                    self.layer.weight.clamp_(-0.2, 0.2)
                if inner != 1:
                    naive.update(values_of(self))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.1, fused=fused)

    naive, callback = NaiveAverage(lambda step: 0.3), average(schedule=ConstantSchedule(momentum=0.3))
    trainer = trainer_of(root, "plain", callback, accumulate_grad_batches=1, enable_checkpointing=False, max_epochs=1)
    module = Inner()
    trainer.fit(module, loaders()[0])
    assert callback.ema.num_updates == naive.num_updates == 8
    assert_same_bits(averaged_values(callback.ema, module), naive.values)


def case_fabric(root: Path, layout: str) -> None:
    lightning()
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    def shard(module: nn.Module, mesh: Any) -> nn.Module:
        return fully_shard(module, mesh=mesh["data_parallel"])

    of_ranks = ModelParallelStrategy(shard, data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)
    strategy = of_ranks if layout == "fsdp2" else "ddp"
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy)
    fabric.launch()

    def made() -> tuple[Any, Any, ShardedEMA]:
        torch.manual_seed(5)
        module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        if layout == "fsdp2":
            model = fabric.setup_module(module)
            optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.1))
        else:
            model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=0.1))
        return model, optimizer, ShardedEMA(model, schedule_of(STEPS))

    def train(model: Any, optimizer: Any, ema: ShardedEMA, steps: range, naive: NaiveAverage | None = None) -> None:
        for step in range(2 * steps.start, 2 * steps.stop):
            rows = torch.randn(4, 4, generator=torch.Generator().manual_seed(step + 100 * fabric.global_rank))
            with fabric.no_backward_sync(model, enabled=step % 2 == 0):
                fabric.backward(model(rows).square().mean())
            if step % 2 == 1:
                optimizer.step()
                optimizer.zero_grad()
                ema.update()
                if naive is not None:
                    naive.update(values_of(model.module))

    naive = NaiveAverage(schedule_of(STEPS).momentum)
    model, optimizer, ema = made()
    train(model, optimizer, ema, range(STEPS), naive)
    assert_same_bits(averaged_values(ema, model.module), naive.values)
    stopped, of_stopped, first = made()
    train(stopped, of_stopped, first, range(3))
    first.save(root / "state" / "ema")
    state = {"model": stopped, "optimizer": of_stopped}
    fabric.save(root / "state" / "model.ckpt", state)
    resumed, of_resumed, second = made()
    fabric.load(root / "state" / "model.ckpt", {"model": resumed, "optimizer": of_resumed})
    second.load(root / "state" / "ema")
    train(resumed, of_resumed, second, range(3, STEPS))
    assert_same_bits(averaged_values(second, resumed.module), naive.values)
    ema.consolidate(root / "export")
    assert set(load_file(root / "export" / "model.safetensors")) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def case_bad_input(root: Path) -> None:
    """Refused before anything is trained, on all ranks alike, in the words of Lightning."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    layout = "ddp" if dist.get_world_size() > 1 else "plain"
    for callbacks, message in [
        ([average(), average()], "EMACallbacks with the names"),
        ([average(), average(name="other")], "give evaluate='live'"),
    ]:
        with pytest.raises(AttachError, match=message):
            fit(root, layout, *callbacks, enable_checkpointing=False)
    with pytest.raises(ConfigError, match="which is a URL"):
        fit(root, layout, average(), ModelCheckpoint("memory://x/saved"))
    with pytest.raises(ConfigError, match="has no such number"):
        fit(root, layout, average(), enable_checkpointing=False, max_epochs=-1)
    pl = lightning()
    with pytest.raises(AttachError, match="Trainer runs with Other"):
        from lightning.pytorch.strategies import Strategy

        class Other(Strategy):
            """A strategy of another library."""

        Other.__abstractmethods__ = frozenset()
        average()._check(type("T", (), {"strategy": Other(), "callbacks": []})(), "fit")
    if dist.get_world_size() > 1:
        with pytest.raises(AttachError, match="counts 1 process"):
            pl.Trainer(accelerator="cpu", devices=1, logger=False, callbacks=[average()]).fit(module_of(), loaders()[0])
        # One rank alone fails: all have its error.
        wrong = average(schedule=lambda steps: CosineSchedule(total_steps=steps if dist.get_rank() == 0 else "x"))
        with pytest.raises(ConfigError, match="rank 1"):
            fit(root, layout, wrong, enable_checkpointing=False)


def case_folders() -> None:
    lightning()
    from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

    from dist_ema.integrations.lightning_saves import writes_folders

    assert writes_folders(ModelParallelStrategy()) and writes_folders(FSDPStrategy(state_dict_type="sharded"))
    whole = [
        DDPStrategy(),
        FSDPStrategy(state_dict_type="full"),
        ModelParallelStrategy(save_distributed_checkpoint=False),
    ]
    assert not any(map(writes_folders, whole))


def case_page(root: Path) -> None:
    """The scripts of the page, as they stand."""
    lightning()
    page = (Path(__file__).parents[2] / "docs" / "integrations" / "lightning.md").read_text()
    root.mkdir(exist_ok=True)
    os.chdir(root)
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        assert len(code.splitlines()) <= 40
        exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})
    assert len(list(root.glob("checkpoints/epoch*"))) == 2


LAYOUTS = [("plain", 1), ("ddp", 2), ("fsdp2", 2)]


@pytest.mark.parametrize(("layout", "ranks"), LAYOUTS)
def test_a_run_averages_exactly_evaluates_saves_and_rotates(world, tmp_path, layout, ranks) -> None:
    world(ranks).run(case_run, tmp_path, layout)


@pytest.mark.parametrize(("layout", "ranks"), LAYOUTS)
def test_a_run_that_was_stopped_and_resumed_is_as_if_never_stopped(world, tmp_path, layout, ranks) -> None:
    world(ranks).run(case_resume, tmp_path, layout)


@pytest.mark.parametrize(("layout", "ranks"), LAYOUTS[1:])
def test_blends_keep_their_rhythm_over_a_resume_that_adds_a_track(world, tmp_path, layout, ranks) -> None:
    world(ranks).run(case_blends, tmp_path, layout)


def test_a_checkpoint_without_its_average_or_with_another_is_refused(world, tmp_path) -> None:
    world(1).run(case_lost, tmp_path)


def test_an_evaluation_of_another_module_loses_no_average_and_is_told(world, tmp_path) -> None:
    world(1).run(case_other_module, tmp_path)


@pytest.mark.parametrize(("layout", "ranks"), LAYOUTS[:2])
def test_both_weights_are_validated_and_nobody_else_counts_it(world, tmp_path, layout, ranks) -> None:
    world(ranks).run(case_both, tmp_path, layout)


def test_a_save_during_an_evaluation_has_the_live_weights_and_so_has_the_model_after_an_error(world, tmp_path) -> None:
    world(1).run(case_hooks_of_others, tmp_path)


def test_a_second_fit_goes_on_and_another_trainer_begins_anew(world, tmp_path) -> None:
    world(1).run(case_second_fit, tmp_path)


def test_a_run_that_has_no_step_left_has_its_averages(world, tmp_path) -> None:
    world(1).run(case_nothing_left, tmp_path)


def test_two_optimizers_make_one_update_a_batch(world, tmp_path) -> None:
    world(1).run(case_two_optimizers, tmp_path)


@pytest.mark.parametrize("fused", [False, True])
def test_each_step_of_one_optimizer_is_an_update_and_a_skipped_one_is_none(world, tmp_path, fused) -> None:
    world(1).run(case_many_steps_of_one, tmp_path, fused)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_model_set_up_by_fabric_is_averaged_under_its_own_names(world, tmp_path, layout) -> None:
    world(2).run(case_fabric, tmp_path, layout)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_cannot_be_served_is_refused_by_name_before_training(world, tmp_path, ranks) -> None:
    world(ranks).run(case_bad_input, tmp_path)


def test_the_names_by_which_lightning_writes_folders_are_these(world) -> None:
    world(1).run(case_folders)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluate": "best"}, "expected 'averaged', 'live' or 'both'"),
        ({"on_missing": "skip"}, "expected 'error' or 'live'"),
        ({"name": "a/b"}, "folder name"),
        ({"consolidate": 1}, "expected True or False"),
        ({"on_load": {"tracks": {}}}, "expected keywords of ShardedEMA.load: .*new_tracks"),
        ({"blend_every": 0}, "blend_every is 0"),
        ({"intervall": 2}, r"\['intervall'\], expected options of ShardedEMA"),
    ],
)
def test_an_argument_out_of_range_is_refused_at_once(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        average(**options)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_scripts_of_the_page_run_on_any_number_of_ranks(world, tmp_path, ranks) -> None:
    world(ranks).run(case_page, tmp_path)
