"""Writes schedules.json: the momentum of other tools at some of their updates, seen in the tools themselves.

    python tests/golden/make_schedules.py

An average of 0 that meets a live value of 1 becomes the momentum. So each tool makes one update of its own, in float64,
with its counter put where it stands before that update. `steps` are our update numbers ([Note: counting] in
dist_ema/schedules/base.py), `what` tells how the tool counts. Where only the tool's first update is a copy, not the
schedule's, `steps` begin at 1. `float` is how precisely the tool computes its momentum.

It needs torch, diffusers, timm, ema-pytorch, mmengine, mmpretrain, mosaicml and k-diffusion; the tests do not.
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

STEPS = [0, 1, 2, 3, 4, 5, 6, 7, 50, 999, 31_622, 10**6]  # 4 to 7: averages that begin after 5 steps
TENS = [10, 20, 50, 1000, 10**6]


def without_package(*names: str) -> None:
    """Lets a package's files be imported alone: its __init__ wants far more than the file that averages."""
    for name in names:
        sys.modules[name] = importlib.util.module_from_spec(importlib.util.find_spec(name))


without_package("timm", "timm.utils", "k_diffusion", "mmpretrain", "mmpretrain.models", "mmpretrain.models.utils")

from composer.algorithms.ema.ema import EMA as ComposerEMA  # noqa: E402
from composer.algorithms.ema.ema import compute_ema  # noqa: E402
from diffusers.training_utils import EMAModel  # noqa: E402
from ema_pytorch import EMA, KarrasEMA  # noqa: E402
from k_diffusion.utils import EMAWarmup, ema_update  # noqa: E402
from mmengine.logging import MessageHub  # noqa: E402
from mmengine.model import ExponentialMovingAverage, MomentumAnnealingEMA, StochasticWeightAverage  # noqa: E402
from mmpretrain.models.utils.ema import CosineEMA  # noqa: E402
from timm.utils.model_ema import ModelEmaV3  # noqa: E402


def scalar(value: float) -> nn.Module:
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, value)
    return model


def diffusers_momentum(step: int, **options: object) -> float:
    ema = EMAModel(scalar(0.0).parameters(), **options)
    ema.optimization_step = step
    ema.step(scalar(1.0).parameters())
    return ema.shadow_params[0].item()


def timm_momentum(step: int, **options: object) -> float:
    ema = ModelEmaV3(scalar(0.0), **options)
    ema.update(scalar(1.0), step=step + 1)
    return ema.module.weight.item()


def k_diffusion_momentum(step: int, **options: object) -> float:
    averaged = scalar(0.0)
    ema_update(scalar(1.0), averaged, EMAWarmup(last_epoch=step, **options).get_value())
    return averaged.weight.item()


def ema_pytorch_momentum(step: int, **options: object) -> float:
    ema = EMA(scalar(1.0), scalar(0.0), update_every=1, **options)
    ema.step.fill_(step)
    ema.initted.fill_(step > 0)
    ema.update()
    return ema.ema_model.weight.item()


def karras_momentum(step: int, **options: object) -> float:
    ema = KarrasEMA(scalar(1.0), ema_model=scalar(0.0), update_every=1, **options)
    ema.step.fill_(step - 1)
    ema.initted.fill_(True)
    ema.update()
    return ema.ema_model.weight.item()


def mmengine_momentum(step: int, kind: type[nn.Module], **options: object) -> float:
    averaged = kind(scalar(0.0), **options)
    averaged.steps.fill_(step)
    averaged.update_parameters(scalar(1.0))
    return averaged.module.weight.item()


def cosine_momentum(step: int, max_iters: int, tensor_steps: bool, **options: object) -> float:
    MessageHub.get_current_instance().update_info("max_iters", max_iters)
    if tensor_steps:
        return mmengine_momentum(step, CosineEMA, **options)
    averaged = scalar(0.0)
    CosineEMA(averaged, **options).avg_func(averaged.weight.data, scalar(1.0).weight.data, step)
    return averaged.weight.item()


def torch_momentum(step: int, **options: object) -> float:
    averaged = AveragedModel(scalar(0.0), **options)
    averaged.n_averaged.fill_(step)
    averaged.update_parameters(scalar(1.0))
    return averaged.module.weight.item()


def composer_momentum(step: int, **options: object) -> float:
    averaged = scalar(0.0)
    compute_ema(scalar(1.0), averaged, smoothing=ComposerEMA(**options).smoothing)
    return averaged.weight.item()


ENTRIES: list[dict[str, object]] = []


def entry(
    package: str,
    what: str,
    ours: str,
    momentum: Callable[..., float],
    options: dict[str, object],
    *,
    steps: Iterable[int] = STEPS,
    precision: str = "float64",
) -> None:
    steps = list(steps)
    ENTRIES.append(
        {
            "tool": f"{package} {version(package).split('+')[0]}",
            "what": what,
            "ours": ours,
            "steps": steps,
            "momentum": [momentum(step, **options) for step in steps],
            "float": precision,
        }
    )


def main() -> None:
    what = "EMAModel.step, the call number from 0; adds 1 to it and get_decay takes it off again"
    bounds = {"decay": 0.99, "min_decay": 0.3, "update_after_step": 5}
    entry("diffusers", what, "RampSchedule()", diffusers_momentum, {})
    ours = "RampSchedule(max_decay=0.99, min_decay=0.3, update_after_step=5)"
    entry("diffusers", what, ours, diffusers_momentum, bounds)
    warm_up = {"use_ema_warmup": True}
    entry("diffusers", what, "InverseGammaSchedule()", diffusers_momentum, warm_up)
    ours = "InverseGammaSchedule(inv_gamma=2.0, power=0.75, max_decay=0.99, min_decay=0.3, update_after_step=5)"
    entry("diffusers", what, ours, diffusers_momentum, warm_up | bounds | {"inv_gamma": 2.0, "power": 0.75})

    what = "ModelEmaV3.update(model, step), which is given the updates made so far with this one: ours plus 1"
    warm_up = {"use_warmup": True}
    entry("timm", what, "InverseGammaSchedule()", timm_momentum, warm_up)
    options = warm_up | bounds | {"warmup_gamma": 2.0, "warmup_power": 0.75}
    entry("timm", what, ours, timm_momentum, options)
    options = {"decay": 0.99, "update_after_step": 5}
    entry("timm", what, "after(5, ConstantSchedule(decay=0.99))", timm_momentum, options)

    what = "EMAWarmup.get_value before its step(), counted as ours"
    ours = "InverseGammaSchedule(inv_gamma=2.0, power=0.75, max_decay=0.9999, update_after_step=5)"
    options = {"inv_gamma": 2.0, "power": 0.75, "max_value": 0.9999, "start_at": 5}
    entry("k-diffusion", what, ours, k_diffusion_momentum, options)

    what = "EMA.update at every call, counted as ours"
    options = {"update_after_step": 0}
    entry("ema-pytorch", what, "InverseGammaSchedule()", ema_pytorch_momentum, options, precision="float32")
    ours = "InverseGammaSchedule(inv_gamma=2.0, power=0.75, max_decay=0.99, min_decay=0.3, update_after_step=5)"
    options = {"inv_gamma": 2.0, "power": 0.75, "beta": 0.99, "min_value": 0.3, "update_after_step": 5}
    entry("ema-pytorch", what, ours, ema_pytorch_momentum, options, precision="float32")
    what = "KarrasEMA.update at every call; its call number k, from 0, has the beta of our update k + 1"
    for options in ({"gamma": 6.94}, {"sigma_rel": 0.05}, {"sigma_rel": 0.1}, {"sigma_rel": 0.25}):
        (name, value), *_ = options.items()
        entry("ema-pytorch", what, f"PowerSchedule({name}={value})", karras_momentum, options, steps=STEPS[1:])

    what = "MomentumAnnealingEMA.update_parameters, counted as ours"
    options = {"kind": MomentumAnnealingEMA}
    entry("mmengine", what, "AnnealedSchedule()", mmengine_momentum, options)
    options |= {"momentum": 0.01, "gamma": 7}
    entry("mmengine", what, "AnnealedSchedule(0.01, gamma=7.0)", mmengine_momentum, options)
    what = "StochasticWeightAverage.update_parameters, counted as ours"
    entry("mmengine", what, "EqualSchedule()", mmengine_momentum, {"kind": StochasticWeightAverage})
    options = {"kind": StochasticWeightAverage, "interval": 10}
    entry("mmengine", what, "EqualSchedule(every_steps=10)", mmengine_momentum, options)
    what = "ExponentialMovingAverage.update_parameters, counted as ours"
    options = {"kind": ExponentialMovingAverage, "momentum": 0.0002}
    entry("mmengine", what, "ConstantSchedule(momentum=0.0002)", mmengine_momentum, options, steps=STEPS[1:])

    for start, end, total_steps in ((0.004, 0.0, 10**6), (0.3, 0.02, 1000)):
        ours = f"CosineSchedule({start}, {end}, total_steps={total_steps})"
        steps = [step for step in (*STEPS[1:], total_steps // 2, total_steps) if step <= total_steps]
        for tensor_steps, precision in ((True, "float32"), (False, "float64")):
            method = "update_parameters" if tensor_steps else "avg_func with an int for its steps"
            what = f"CosineEMA.{method}, counted as ours"
            options = {"momentum": start, "end_momentum": end, "max_iters": total_steps, "tensor_steps": tensor_steps}
            entry("mmpretrain", what, ours, cosine_momentum, options, steps=steps, precision=precision)

    what = "AveragedModel.update_parameters, counted as ours"
    entry("torch", what, "EqualSchedule()", torch_momentum, {})
    what += "; get_ema_multi_avg_fn"
    options = {"multi_avg_fn": get_ema_multi_avg_fn(0.999)}
    entry("torch", what, "ConstantSchedule(decay=0.999)", torch_momentum, options, steps=STEPS[1:])

    what = "compute_ema with the smoothing of EMA(half_life), the same at every update"
    ours = "ConstantSchedule(half_life_steps=1000)"
    entry("mosaicml", what, ours, composer_momentum, {"half_life": "1000ba"}, steps=STEPS[1:])
    what = "compute_ema with the smoothing of EMA(half_life, update_interval), the same at every 10th update"
    options = {"half_life": "1000ba", "update_interval": "10ba"}
    entry("mosaicml", what, f"every(10, {ours})", composer_momentum, options, steps=TENS)

    lines = ",\n".join(json.dumps(each) for each in ENTRIES)
    (Path(__file__).parent / "schedules.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
