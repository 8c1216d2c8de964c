"""Averages of other libraries, saved their way after 13 updates, and the 5 updates that those libraries make then.

Each function is one row of docs/coming_from.md. An average begins here at the library's file and sees the same live
weights. Not a test: `test_coming_from.py` runs it. These libraries print and warn while they import and train.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_ema import (
    AnnealedSchedule,
    CheckpointCorruptError,
    ConstantSchedule,
    EqualSchedule,
    HalfLifeSchedule,
    InverseGammaSchedule,
    RampSchedule,
    ShardedEMA,
)

BEFORE, AFTER = 13, 5
State = dict[str, torch.Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def train(model: nn.Module) -> None:
    """One step, as large as steps at the beginning of a run are."""
    with torch.no_grad():
        for number, value in enumerate(model.state_dict().values()):
            if value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(number)), alpha=0.02)


def whole(module: nn.Module, *, buffers: bool = False) -> State:
    tensors = {name: value.detach().clone() for name, value in module.named_parameters()}
    if buffers:
        tensors |= {name: value.clone() for name, value in module.named_buffers() if value.is_floating_point()}
    return tensors


class Recorded:
    """The live weights and the library's average, update by update; the file is saved between two of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.live: list[State] = []
        self.averaged: list[State] = []

    def add(self, model: nn.Module, averaged: State) -> None:
        self.live.append({name: value.detach().clone() for name, value in model.state_dict().items()})
        self.averaged.append(averaged)

    def followed(self, path: Path, schedule: Any, *, num_updates: int | None = None, **options: Any) -> dict[str, Any]:
        """How far an average that begins at the file is from the library's own, at its beginning and after each."""
        assert len(self.live) == BEFORE + AFTER
        model = copy.deepcopy(self.model)
        ema = ShardedEMA(model, schedule, **options)
        ema.start_from(path, **({} if num_updates is None else {"num_updates": num_updates}))
        begun = ema.num_updates
        distances = [distance(ema.full_state_dict(), self.averaged[BEFORE - 1])]
        for live, averaged in zip(self.live[BEFORE:], self.averaged[BEFORE:], strict=True):
            model.load_state_dict(live)
            ema.update()
            distances.append(distance(ema.full_state_dict(), averaged))
        moved = distance(self.averaged[-1], self.averaged[BEFORE - 1])
        return {"begun": begun, "distance": max(distances), "moved": moved}


def distance(state: State, reference: State) -> float:
    pairs = [(state[name].double(), value.double()) for name, value in reference.items() if value.numel()]
    return max((one - other).abs().max().item() for one, other in pairs)


def run(make: Callable[[nn.Module], Any], step: Callable[[Any, nn.Module, int], object], averaged: Any) -> Any:
    """Train with the library's average; `save` is called after 13 updates."""

    def of(save: Callable[[Any, nn.Module], object]) -> Recorded:
        model = net()
        theirs, recorded = make(model), Recorded(model)
        for number in range(BEFORE + AFTER):
            train(model)
            step(theirs, model, number)
            recorded.add(model, averaged(theirs))
            if number == BEFORE - 1:
                save(theirs, model)
        return recorded

    return of


def diffusers(folder: Path) -> dict[str, Any]:
    from diffusers import UNet2DModel
    from diffusers.training_utils import EMAModel

    def recorded_of(path: Path, **options: Any) -> Recorded:
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(4, 4),
            norm_num_groups=2,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
        theirs = EMAModel(unet.parameters(), decay=0.9, model_cls=UNet2DModel, model_config=unet.config, **options)
        names, recorded = [name for name, _ in unet.named_parameters()], Recorded(unet)
        for number in range(BEFORE + AFTER):
            train(unet)
            theirs.step(unet.parameters())
            recorded.add(unet, dict(zip(names, [value.clone() for value in theirs.shadow_params], strict=True)))
            if number == BEFORE - 1:
                theirs.save_pretrained(path)
        return recorded

    ramp = recorded_of(folder / "unet_ema")
    warm_up = {"inv_gamma": 2.0, "power": 0.75, "update_after_step": 3}
    warm = recorded_of(folder / "warm", use_ema_warmup=True, **warm_up)
    schedule = InverseGammaSchedule(max_decay=0.9, **warm_up)
    return {
        "the default": ramp.followed(folder / "unet_ema", RampSchedule(max_decay=0.9)),
        "its file": ramp.followed(
            folder / "unet_ema" / "diffusion_pytorch_model.safetensors", RampSchedule(max_decay=0.9)
        ),
        "use_ema_warmup": warm.followed(folder / "warm", schedule),
        "another counter": warm.followed(folder / "warm", schedule, num_updates=4),
    }


def timm(folder: Path) -> dict[str, Any]:
    import no_torchvision

    utils = no_torchvision.import_timm().utils

    def recorded_of(name: str, **options: Any) -> Recorded:
        def save(theirs: Any, model: nn.Module) -> None:
            torch.save(theirs.state_dict(), folder / f"{name}.pt")
            saver = utils.CheckpointSaver(
                model,
                torch.optim.SGD(model.parameters(), lr=0.1),
                args=argparse.Namespace(model="net", lr=0.1),
                model_ema=theirs,
                checkpoint_dir=str(folder),
                recovery_dir=str(folder),
            )
            saver.save_checkpoint(0, metric=0.5)
            os.rename(folder / "last.pth.tar", folder / f"{name}.pth.tar")

        return run(
            lambda model: utils.ModelEmaV3(model, decay=0.9, **options),
            lambda theirs, model, number: theirs.update(model, step=number + 1),
            lambda theirs: whole(theirs.module, buffers=True),
        )(save)

    plain = recorded_of("plain")
    warm = recorded_of("warm", use_warmup=True, warmup_gamma=2.0, warmup_power=0.75)
    schedule = InverseGammaSchedule(max_decay=0.9, inv_gamma=2.0, power=0.75)
    options = {"num_updates": BEFORE, "update_buffers": True}
    return {
        "state dict": plain.followed(folder / "plain.pt", ConstantSchedule(decay=0.9), update_buffers=True),
        "checkpoint": plain.followed(folder / "plain.pth.tar", ConstantSchedule(decay=0.9), **options),
        "use_warmup": warm.followed(folder / "warm.pth.tar", schedule, **options),
        "another counter": warm.followed(folder / "warm.pth.tar", schedule, update_buffers=True),
    }


def torch_averaged_model(folder: Path) -> dict[str, Any]:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    def recorded_of(name: str, **options: Any) -> Recorded:
        return run(
            lambda model: AveragedModel(model, **options),
            lambda theirs, model, number: theirs.update_parameters(model),
            lambda theirs: whole(theirs.module),
        )(lambda theirs, model: torch.save(theirs.state_dict(), folder / f"{name}.pt"))

    equal = recorded_of("swa")
    ema = recorded_of("ema", multi_avg_fn=get_ema_multi_avg_fn(0.9))
    return {
        "SWA": equal.followed(folder / "swa.pt", EqualSchedule()),
        "get_ema_multi_avg_fn": ema.followed(folder / "ema.pt", ConstantSchedule(decay=0.9)),
        "another counter": equal.followed(folder / "swa.pt", EqualSchedule(), num_updates=1),
    }


def ema_pytorch(folder: Path) -> dict[str, Any]:
    from ema_pytorch import EMA

    def recorded_of(name: str, **options: Any) -> Recorded:
        return run(
            lambda model: EMA(model, beta=0.9, **options),
            lambda theirs, model, number: theirs.update(),
            lambda theirs: whole(theirs.ema_model, buffers=True),
        )(lambda theirs, model: torch.save(theirs.state_dict(), folder / f"{name}.pt"))

    often = recorded_of("often", update_every=1, update_after_step=5, power=0.75)
    seldom = recorded_of("seldom", update_every=2, update_after_step=4, include_online_model=False)
    schedule = InverseGammaSchedule(max_decay=0.9, update_after_step=5, power=0.75)
    return {
        "update_every=1": often.followed(folder / "often.pt", schedule, update_buffers=True),
        "update_every=2": seldom.followed(
            folder / "seldom.pt",
            InverseGammaSchedule(max_decay=0.9, update_after_step=4),
            interval=2,
            update_buffers=True,
        ),
        "another counter": often.followed(folder / "often.pt", schedule, update_buffers=True, num_updates=6),
    }


def mmengine(folder: Path) -> dict[str, Any]:
    from mmengine.hooks import EMAHook, Hook
    from mmengine.model import BaseModel, MomentumAnnealingEMA, StochasticWeightAverage
    from mmengine.runner import Runner

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, rows: torch.Tensor, mode: str = "loss") -> Any:
            return {"loss": (self.layer(rows) - 1.0).square().mean()}

    class Recorder(Hook):
        priority = "LOWEST"

        def before_run(self, runner: Any) -> None:
            self.recorded = Recorded(runner.model)

        def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
            (hook,) = (hook for hook in runner.hooks if isinstance(hook, EMAHook))
            self.recorded.add(runner.model, whole(hook.ema_model.module))

    torch.manual_seed(0)
    recorder = Recorder()
    runner = Runner(
        Model(),
        str(folder / "run"),
        train_dataloader={
            "dataset": [(row,) for row in torch.randn(72, 4)],
            "batch_size": 4,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": {"type": "default_collate"},
        },
        train_cfg={"by_epoch": False, "max_iters": BEFORE + AFTER},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.3}},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": BEFORE, "by_epoch": False}},
        custom_hooks=[{"type": "EMAHook", "ema_type": "ExponentialMovingAverage", "momentum": 0.1}, recorder],
        log_level="ERROR",
    )
    runner.train()
    file = folder / "run" / f"iter_{BEFORE}.pth"
    try:
        recorder.recorded.followed(file, ConstantSchedule(momentum=0.1))
        raise AssertionError("its pickle is of more than tensors")
    except CheckpointCorruptError as error:
        lines = str(error).partition(":\n")[2]
    os.chdir(folder)
    exec("\n".join(line.strip() for line in lines.splitlines()), {"torch": torch})

    def averaged(name: str, kind: type, schedule: Any, **options: Any) -> dict[str, Any]:
        recorded = run(
            lambda model: kind(model, **options),
            lambda theirs, model, number: theirs.update_parameters(model),
            lambda theirs: whole(theirs.module),
        )(lambda theirs, model: torch.save({"ema_state_dict": theirs.state_dict()}, folder / f"{name}.pth"))
        return recorded.followed(folder / f"{name}.pth", schedule)  # type: ignore[no-any-return]

    return {
        "EMAHook": recorder.recorded.followed(folder / "average.pt", ConstantSchedule(momentum=0.1)),
        "MomentumAnnealingEMA": averaged(
            "annealed", MomentumAnnealingEMA, AnnealedSchedule(0.01, gamma=5), momentum=0.01, gamma=5
        ),
        "StochasticWeightAverage": averaged("swa", StochasticWeightAverage, EqualSchedule()),
    }


def lightning(folder: Path) -> dict[str, Any]:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
    from torch.utils.data import DataLoader, TensorDataset

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(4, 3)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return (self.model(batch[0]) - 1.0).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.3)

    class Recorder(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.module, self.inner = Recorded(Module()), Recorded(Module().model)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            averaged = whole(theirs._average_model.module)
            self.module.add(pl_module, averaged)
            inner = {name.removeprefix("model."): value for name, value in averaged.items()}
            self.inner.add(pl_module.model, inner)

    def fit(average: WeightAveraging, name: str) -> Recorder:
        nonlocal theirs
        theirs, recorder = average, Recorder()
        torch.manual_seed(0)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=BEFORE + AFTER,
            callbacks=[
                theirs,
                recorder,
                ModelCheckpoint(folder, filename=name, every_n_train_steps=BEFORE, save_top_k=-1),
            ],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), DataLoader(TensorDataset(torch.randn(72, 4)), batch_size=4))
        return recorder

    theirs: Any = None
    ema, equal = fit(EMAWeightAveraging(decay=0.9), "ema"), fit(WeightAveraging(), "swa")
    return {
        "EMAWeightAveraging": ema.module.followed(folder / "ema.ckpt", ConstantSchedule(decay=0.9)),
        "WeightAveraging": equal.module.followed(folder / "swa.ckpt", EqualSchedule()),
        "of the model in the module": equal.inner.followed(folder / "swa.ckpt", EqualSchedule()),
        "another counter": equal.module.followed(folder / "swa.ckpt", EqualSchedule(), num_updates=1),
    }


def trl(folder: Path) -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel
    from trl import BEMACallback

    lag = 4
    theirs = BEMACallback(update_freq=1, ema_power=0.6, bias_power=64.0, lag=lag)  # 4^-64: without the correction
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1))
    arguments = types.SimpleNamespace(output_dir=str(folder))
    state = types.SimpleNamespace(global_step=0, is_world_process_zero=True)
    theirs.on_train_begin(arguments, state, None, model=model)
    recorded = Recorded(model)
    for number in range(BEFORE + AFTER):
        train(model)
        state.global_step = number + 1
        theirs.on_step_end(arguments, state, None, model=model)
        recorded.add(model, whole(theirs.running_model))
        if number == BEFORE - 1:
            theirs.on_train_end(arguments, state, None)
    schedule = InverseGammaSchedule(inv_gamma=1.0, power=0.6, max_decay=1 - 1e-9)
    return {
        "BEMACallback": recorded.followed(folder / "bema", schedule, num_updates=BEFORE + lag),
        "another counter": recorded.followed(folder / "bema", schedule, num_updates=BEFORE),
    }


def torchtitan(folder: Path) -> dict[str, Any]:
    """It keeps checkpoints of torch's DCP; its releases have no average, so the formula is compared."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    def step(theirs: dict[str, State], model: nn.Module, number: int) -> None:
        decay = 2.0 ** (-1.0 / (0.05 * (number + 1)))
        live = {name: value.detach().double().clone() for name, value in model.named_parameters()}
        old = theirs.get("averaged", live) if number else live
        theirs["averaged"] = {name: decay * old[name] + (1 - decay) * value for name, value in live.items()}

    def save(theirs: dict[str, State], model: nn.Module) -> None:
        tensors = {name: value.clone() for name, value in model.state_dict().items()}
        tensors |= {name: value.float() for name, value in theirs["averaged"].items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"model": tensors}, checkpoint_id=folder / "step-13", no_dist=True)
            dcp_to_torch_save(folder / "step-13", folder / "weights.pt")

    recorded = run(lambda model: {}, step, lambda theirs: dict(theirs["averaged"]))(save)
    schedule = HalfLifeSchedule(fraction=0.05)
    try:
        recorded.followed(folder / "step-13", schedule)
        raise AssertionError("a folder of DCP is no model folder")
    except CheckpointCorruptError as error:
        assert "dcp_to_torch" in str(error), error
    return {"dcp_to_torch": recorded.followed(folder / "weights.pt", schedule, num_updates=BEFORE)}


ROWS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "diffusers": diffusers,
    "timm": timm,
    "torch": torch_averaged_model,
    "ema-pytorch": ema_pytorch,
    "mmengine": mmengine,
    "Lightning": lightning,
    "TRL": trl,
    "torchtitan": torchtitan,
}

if __name__ == "__main__":
    target = Path(sys.argv[1])
    results = {}
    for library in sys.argv[2:] or ROWS:
        (target / library).mkdir()
        results[library] = ROWS[library](target / library)
    (target / "results.json").write_text(json.dumps(results, indent=1))
