"""The models that benchmarks average: parameters of real shapes under real names, without a forward."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from measuring import add_device
from torch import nn

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Listing:
    """Names and shapes of a model's parameters and floating-point buffers, and how many rounds tell its cost."""

    parameters: Shapes
    buffers: Shapes = field(default_factory=dict)
    rounds: int = 15


def gpt2(*, width: int = 768, layers: int = 12, vocabulary: int = 50257, rounds: int = 15) -> Listing:
    """GPT-2 small has 148 parameters, 124.4 million elements."""
    shapes: Shapes = {"wte.weight": (vocabulary, width), "wpe.weight": (1024, width)}
    for layer in range(layers):
        for name, (rows, columns) in {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, 4 * width),
            "mlp.c_proj": (4 * width, width),
        }.items():
            shapes |= {f"h.{layer}.{name}.weight": (rows, columns), f"h.{layer}.{name}.bias": (columns,)}
        shapes |= {f"h.{layer}.ln_{norm}.{name}": (width,) for norm in (1, 2) for name in ("weight", "bias")}
    return Listing(shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}, rounds=rounds)


def resnet50() -> Listing:
    """161 parameters, 25.6 million elements; 106 buffers of the batch norms, whose counters are left out."""
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7)}
    norms: dict[str, int] = {"bn1": 64}
    inner = 64
    for layer, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            at = f"layer{layer}.{block}"
            convolutions = {
                "conv1": (width, inner, 1, 1),
                "conv2": (width, width, 3, 3),
                "conv3": (4 * width, width, 1, 1),
            }
            for number, (name, shape) in enumerate(convolutions.items(), start=1):
                shapes[f"{at}.{name}.weight"] = shape
                norms[f"{at}.bn{number}"] = shape[0]
            if block == 0:
                shapes[f"{at}.downsample.0.weight"] = (4 * width, inner, 1, 1)
                norms[f"{at}.downsample.1"] = 4 * width
            inner = 4 * width
    shapes |= {f"{norm}.{name}": (size,) for norm, size in norms.items() for name in ("weight", "bias")}
    shapes |= {"fc.weight": (1000, 2048), "fc.bias": (1000,)}
    buffers: Shapes = {
        f"{norm}.{name}": (size,) for norm, size in norms.items() for name in ("running_mean", "running_var")
    }
    return Listing(shapes, buffers, rounds=40)


MODELS: dict[str, Callable[[], Listing]] = {
    "gpt2": gpt2,
    "resnet50": resnet50,
    "tiny": lambda: Listing({f"p{index}": (64,) for index in range(500)}, rounds=200),
    "gpt2-xl": lambda: gpt2(width=1600, layers=48),  # 1.56 billion elements
    "quarter": lambda: gpt2(layers=3, vocabulary=50257 // 4),
    "small": lambda: gpt2(width=16, layers=2, vocabulary=256, rounds=100),
}


def build(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """The model of this name with random values, its modules nested as its names are."""
    listing = MODELS[name]()
    model = nn.Module()

    def place(fqn: str) -> tuple[nn.Module, str]:
        *path, last = fqn.split(".")
        module = model
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        return module, last

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    for fqn, shape in listing.parameters.items():
        module, last = place(fqn)
        module.register_parameter(last, nn.Parameter(values(shape)))
    for fqn, shape in listing.buffers.items():
        module, last = place(fqn)
        module.register_buffer(last, values(shape))
    return model


@dataclass(frozen=True)
class Case:
    """A model that is built anew, and for how many rounds it is measured."""

    name: str
    dtype: str
    device: str
    rounds: int

    def build(self) -> nn.Module:
        return build(self.name, getattr(torch, self.dtype), self.device)

    def __str__(self) -> str:
        return f"{self.name}, live {self.dtype}, {self.device}, {self.rounds} rounds"


def add_cases(parser: argparse.ArgumentParser, *, dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> None:
    """Options for one table of each model and dtype; without --rounds, as many as the model wants."""
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["gpt2", "resnet50", "tiny"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=list(dtypes), help="live")
    add_device(parser)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for name in options.models:
        for dtype in options.dtypes:
            gc.collect()  # the former case: a device has no room for two large ones
            yield Case(name, dtype, options.device, options.rounds or MODELS[name]().rounds)
