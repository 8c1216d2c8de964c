"""What the average adds to a whole training step of the demo's model, through accelerate and the hook of `attach`.

    python launch/bench/step.py
    python launch/bench/step.py --device cuda --overlap --width 2048 --depth 20 --heads 16 \
        --context 512 --batch-size 16 --mixed-precision bf16 --rounds 4 --repeats 1

One process trains one model by two optimizers in turn, in shuffled order; an average is attached to one of them. They
are made anew several times, since where tensors happen to lie in memory is worth more than the average costs. In
every round the update is timed by itself too. CPU time with one thread.

On a GPU a round is several steps on end, up to the moment at which the last update is done too: an update beside the
next step costs what it takes from that.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from measuring import Report, Spread, add_device, benchmark_parser, measure, milliseconds
from torch import nn

from dist_ema import CosineSchedule, attach

sys.path.append(str(Path(__file__).parents[1] / "pretrain"))
from byte_lm import NUM_SYMBOLS, ByteLM, ByteLMConfig, next_byte_loss


class Run:
    """The demo's model and optimizers, stepped on random bytes: what a step costs does not depend on the text."""

    def __init__(self, options: argparse.Namespace) -> None:
        config = ByteLMConfig(width=options.width, depth=options.depth, heads=options.heads, context=options.context)
        self.accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision=options.mixed_precision)
        with self.accelerator.device:  # a billion random numbers take a CPU long
            model: nn.Module = ByteLM(config)
        plain, averaging = (
            torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), foreach=True) for _ in range(2)
        )
        self.model, self.plain, self.averaging = self.accelerator.prepare(model, plain, averaging)
        schedule = CosineSchedule(momentum=0.05, end_momentum=0.01, total_steps=1500)
        self.ema = attach(
            self.accelerator,
            self.model,
            self.averaging,
            schedule,
            device="cpu" if options.offload else None,
            overlap=options.overlap,
        )
        self.steps_of_a_round = options.steps
        windows = torch.randint(NUM_SYMBOLS, (options.batch_size, options.context + 1))
        self.windows = windows.to(self.accelerator.device)

    def steps(self, optimizer: AcceleratedOptimizer) -> None:
        for _ in range(self.steps_of_a_round):
            self.step(optimizer)
        self.ema.wait()

    def updates(self) -> None:
        for _ in range(self.steps_of_a_round):
            self.ema.update()
        self.ema.wait()

    def step(self, optimizer: AcceleratedOptimizer) -> None:
        loss = next_byte_loss(self.model, self.windows)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Share of a training step that the average adds.", rounds=None)
    parser.add_argument("--repeats", type=int, default=4, help="of all rounds, with everything made anew")
    for name, size in {"width": 128, "depth": 2, "heads": 4, "context": 64, "batch-size": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    add_device(parser)
    parser.add_argument("--steps", type=int, default=None, help="of a round; 1 on a CPU, 10 on a GPU if left out")
    parser.add_argument("--overlap", action="store_true", help="have updates run beside training")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no", help="of accelerate")
    parser.add_argument("--offload", action="store_true", help="keep the averages in host memory")
    options = parser.parse_args(arguments)
    on_cpu = options.device == "cpu"
    options.steps = options.steps or (1 if on_cpu else 10)
    options.rounds = options.rounds or (100 if on_cpu else 10)
    # Updates are timed alone as well, so steps and updates by hand take turns on purpose.
    warnings.filterwarnings("ignore", message=r"update\(\) of the average")
    report = Report("step", options)
    calls: dict[str, Callable[[], object]] = {}
    found: dict[str, list[float]] = {"plain": [], "averaging": [], "update": []}
    run: Run | None = None
    for _ in range(options.repeats):
        calls.clear()
        run = None
        gc.collect()  # the former one is a cycle of hooks
        run = Run(options)
        numel = sum(parameter.numel() for parameter in run.model.parameters())
        calls |= {
            "plain": functools.partial(run.steps, run.plain),
            "averaging": functools.partial(run.steps, run.averaging),
            "update": run.updates,
        }
        for name, seconds in measure(calls, options.rounds, options.device).items():
            found[name] += seconds
        run.ema.detach()
    added = [100 * (own / base - 1) for own, base in zip(found["averaging"], found["plain"], strict=True)]
    shares = [100 * own / base for own, base in zip(found["update"], found["plain"], strict=True)]
    report.add(
        f"{numel:,} parameters, batches of "
        f"{options.batch_size} x {options.context}, {options.repeats} times {options.rounds} rounds",
        [
            {
                "step, ms": milliseconds(found["plain"]) / options.steps,
                "update, ms": milliseconds(found["update"]) / options.steps,
                "update to step, %": Spread.of(shares),
                "step with the hook to one without, +%": Spread.of(added),
            }
        ],
    )


if __name__ == "__main__":
    main()
