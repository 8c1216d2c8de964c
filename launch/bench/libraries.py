"""The averages of other libraries, set up as their users do, at a constant decay from the first update on.

Each maker gets a model, the decay, and the dtype that the average shall have; what a library has for that it uses, and
what cannot do it raises, here or at its update. Imports are inside: a library may not be there. torchtitan is not here:
its newest release, 0.3.0, has no average.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_ema import ConstantSchedule, ShardedEMA


@dataclass(frozen=True)
class Average:
    """One update, and the averaged parameters in the model's order."""

    update: Callable[[], object]
    values: Callable[[], Iterable[torch.Tensor]]


Maker = Callable[[nn.Module, float, torch.dtype], Average]


def sharded_ema(**more: Any) -> Maker:
    def make(model: nn.Module, decay: float, dtype: torch.dtype) -> Average:
        ema = ShardedEMA(model, ConstantSchedule(momentum=1 - decay), dtype=dtype, **more)

        def values() -> list[torch.Tensor]:
            state = ema.full_state_dict()
            return [state[name] for name, _ in model.named_parameters()]

        return Average(ema.update, values)

    return make


def averaged_model(model: nn.Module, decay: float, dtype: torch.dtype) -> Average:
    average = AveragedModel(copy.deepcopy(model).to(dtype), multi_avg_fn=get_ema_multi_avg_fn(decay))
    return Average(lambda: average.update_parameters(model), average.module.parameters)


def timm(**more: Any) -> Maker:
    def make(model: nn.Module, decay: float, dtype: torch.dtype) -> Average:
        # By its path: the package itself wants torchvision.
        found = importlib.util.find_spec("timm")
        if found is None or found.submodule_search_locations is None:
            raise ImportError("timm is not installed")
        path = Path(found.submodule_search_locations[0], "utils", "model_ema.py")
        spec = importlib.util.spec_from_file_location("timm_model_ema", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        wanted = None if dtype == next(model.parameters()).dtype else dtype
        average = module.ModelEmaV3(model, decay=decay, dtype=wanted, **more)
        return Average(lambda: average.update(model), average.module.parameters)

    return make


def ema_pytorch(**more: Any) -> Maker:
    def make(model: nn.Module, decay: float, dtype: torch.dtype) -> Average:
        from ema_pytorch import EMA

        average = EMA(
            model,
            ema_model=copy.deepcopy(model).to(dtype),
            beta=decay,
            min_value=decay,
            update_after_step=-1,
            update_every=1,
            include_online_model=False,
            coerce_dtype=dtype != next(model.parameters()).dtype,
            **more,
        )
        return Average(average.update, average.ema_model.parameters)

    return make


def diffusers(**more: Any) -> Maker:
    def make(model: nn.Module, decay: float, dtype: torch.dtype) -> Average:
        from diffusers.training_utils import EMAModel

        average = EMAModel(model.parameters(), decay=decay, min_decay=decay, **more)
        average.to(dtype=dtype)
        return Average(lambda: average.step(model.parameters()), lambda: average.shadow_params)

    return make


def mmengine(model: nn.Module, decay: float, dtype: torch.dtype) -> Average:
    from mmengine.model import ExponentialMovingAverage

    average = ExponentialMovingAverage(model, momentum=1 - decay)
    average.to(dtype)
    return Average(lambda: average.update_parameters(model), average.module.parameters)


def lightning(model: nn.Module, decay: float, dtype: torch.dtype) -> Average:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

    module, callback = Module(), EMAWeightAveraging(device=next(model.parameters()).device, decay=decay)
    trainer = cast(Trainer, SimpleNamespace(global_step=0))  # it is asked for nothing else
    callback.setup(trainer, module, "fit")
    average = callback._average_model
    assert average is not None
    average.to(dtype)

    def update() -> None:
        trainer.global_step += 1  # type: ignore[misc]
        callback.on_train_batch_end(trainer, module, None, None, 0)

    return Average(update, average.module.parameters)


@dataclass(frozen=True)
class Library:
    """A way to average, and the distribution that has it."""

    title: str
    distribution: str
    make: Maker

    def __str__(self) -> str:
        return f"{self.distribution} {importlib.metadata.version(self.distribution).split('+')[0]} {self.title}"

    def is_installed(self) -> bool:
        try:
            importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return False
        return True


LIBRARIES = (
    Library("AveragedModel, get_ema_multi_avg_fn", "torch", averaged_model),
    Library("ModelEmaV3", "timm", timm()),
    Library("ModelEmaV3, foreach=False", "timm", timm(foreach=False)),
    Library("EMA", "ema-pytorch", ema_pytorch()),
    Library("EMA, use_foreach=True", "ema-pytorch", ema_pytorch(use_foreach=True)),
    Library("EMAModel", "diffusers", diffusers()),
    Library("EMAModel, foreach=True", "diffusers", diffusers(foreach=True)),
    Library("ExponentialMovingAverage", "mmengine", mmengine),
    Library("EMAWeightAveraging", "lightning", lightning),
)
