"""A merge in place of a learning-rate decay, on real text: one run at a constant rate, beside runs that do decay.

    python launch/pretrain/merge_run.py --out runs/merge

One model trains at a constant learning rate. At some steps a decay is wanted: the run is forked `--window` steps
before, and the fork decays its rate to nothing along the curve, as a real run would. The trunk itself decays nothing.
It keeps an average by `MergeSchedule` over the same window, and an EMA. All are evaluated on the same text, after
equally many steps; a fork and the trunk see the same batches. Writes merge.csv, merge.svg and, for `dist-ema merge`,
some of the last values of the trunk as safetensors.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from byte_lm import ByteLM, ByteLMConfig, next_byte_loss
from evaluation import validation_loss
from safetensors.torch import save_file
from text import Crops, read_corpus, validation_windows
from torch import Tensor
from tqdm import tqdm

from dist_ema import ConstantSchedule, MergeSchedule, ShardedEMA

CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda s: 1 - s,
    "1-sqrt": lambda s: 1 - math.sqrt(s),
    "cosine": lambda s: (1 + math.cos(math.pi * s)) / 2,
}
COLORS = {"constant rate": "#b0622f", "EMA": "#7a9a3a", "merge": "#1f5fa8", "decay": "#444444"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """The loss of one set of weights after `step` steps, in nats per byte. `extra_steps` were spent for it alone."""

    step: int
    weights: str
    loss: float
    extra_steps: int


class Training:
    """A model, its optimizer, and how far it is."""

    def __init__(self, options: argparse.Namespace, crops: Crops) -> None:
        torch.manual_seed(options.seed)
        config = ByteLMConfig(width=options.width, depth=options.depth, heads=options.heads, context=options.context)
        self.model = ByteLM(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr, betas=(0.9, 0.95), foreach=True)
        self.options, self.crops, self.step = options, crops, 0

    def forked(self) -> Training:
        """Another training that goes on from here."""
        fork = copy.copy(self)
        fork.model = copy.deepcopy(self.model)
        fork.optimizer = torch.optim.AdamW(fork.model.parameters(), lr=self.options.lr, betas=(0.9, 0.95), foreach=True)
        fork.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return fork

    def advance(self, factor: float = 1.0) -> None:
        """Take one step at that share of the learning rate."""
        warmup = min(1.0, (self.step + 1) / self.options.warmup_steps)
        self.optimizer.param_groups[0]["lr"] = self.options.lr * factor * warmup
        first = self.step * self.options.batch_size
        batch = torch.stack([self.crops[index] for index in range(first, first + self.options.batch_size)])
        next_byte_loss(self.model, batch).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1


def run(options: argparse.Namespace) -> list[Row]:
    corpus = read_corpus(options.data, context=options.context)
    samples = options.steps * options.batch_size
    trunk = Training(options, Crops(corpus.train, context=options.context, seed=options.seed, num_samples=samples))
    windows = validation_windows(corpus.validation, context=options.context, num_windows=options.eval_windows)
    ends = [options.steps * (point + 1) // options.points for point in range(options.points)]
    # Value k of the window is that after step `end - window + k`: update number `end - window` brings value 1.
    merges = {
        f"merge-{end}": MergeSchedule(options.shape, num_steps=options.window, start_step=end - options.window)
        for end in ends
    }
    ema = ShardedEMA(trunk.model, {**merges, "EMA": ConstantSchedule(momentum=options.momentum)})
    rows: list[Row] = []

    def add(weights: str, training: Training, loss: float, extra_steps: int = 0) -> None:
        rows.append(Row(step=training.step, weights=weights, loss=loss, extra_steps=extra_steps))

    with tqdm(total=options.steps + options.points * options.window, unit=" steps", disable=None) as bar:
        while trunk.step < options.steps:
            if trunk.step + options.window in ends:
                fork = trunk.forked()
                for taken in range(options.window):
                    # Step j of the decay has the rate w((j - 1) / n): the coefficients are those of this curve.
                    fork.advance(CURVES[options.shape](taken / options.window))
                    bar.update()
                    if (taken + 1) % max(1, options.window // 4) == 0 or taken + 1 == options.window:
                        add("decay", fork, validation_loss(fork.model, windows), taken + 1)
            trunk.advance()
            ema.update()
            bar.update()
            keep_last(trunk, options)
            if trunk.step % options.eval_every == 0 or trunk.step in ends:
                add("constant rate", trunk, validation_loss(trunk.model, windows))
                names = {"EMA": "EMA", **({"merge": f"merge-{trunk.step}"} if trunk.step in ends else {})}
                for name, track in names.items():
                    with ema.average_parameters(track):
                        add(name, trunk, validation_loss(trunk.model, windows))
    return rows


def keep_last(trunk: Training, options: argparse.Namespace) -> None:
    """Write every tenth part of the last window's values: sources for `dist-ema merge`."""
    into = trunk.step - (options.steps - options.window)
    stride = max(1, options.window // 10)
    if into > 0 and into % stride == 0:
        path = options.out / "values" / f"{trunk.step}.safetensors"
        path.parent.mkdir(exist_ok=True)
        tensors: dict[str, Tensor] = {name: value.contiguous() for name, value in trunk.model.state_dict().items()}
        save_file(tensors, path)


def table(rows: list[Row], options: argparse.Namespace) -> str:
    by_step: dict[int, dict[str, float]] = {}
    for row in rows:
        by_step.setdefault(row.step, {})[row.weights] = row.loss
    lines = [
        f"| step | constant rate | EMA, momentum {options.momentum:g} | merge of the last {options.window} | "
        f"decay over the last {options.window} |",
        "|---|---|---|---|---|",
    ]
    for step, losses in sorted(by_step.items()):
        if losses.keys() == COLORS.keys():
            lines.append(f"| {step} | " + " | ".join(f"{losses[name]:.4f}" for name in COLORS) + " |")
    return "\n".join(lines)


def draw(rows: list[Row], options: argparse.Namespace, path: Path) -> None:
    plt.rcParams["svg.hashsalt"] = "dist_ema"  # the same picture of the same numbers
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    first = options.steps // options.points // 2
    for name in ("constant rate", "EMA"):
        points = [(row.step, row.loss) for row in rows if row.weights == name and row.step >= first]
        axes.plot(*zip(*points, strict=True), color=COLORS[name], linewidth=1.2, label=name)
    live = {row.step: row.loss for row in rows if row.weights == "constant rate"}
    fork: list[tuple[int, float]] = []
    for row in [row for row in rows if row.weights == "decay"]:
        before = row.step - row.extra_steps
        fork = fork or ([(before, live[before])] if before in live else [])
        fork.append((row.step, row.loss))
        if row.extra_steps == options.window:
            label = "decay of the rate" if row.step == options.steps else None
            axes.plot(*zip(*fork, strict=True), color=COLORS["decay"], linewidth=1, linestyle="--", label=label)
            axes.plot(*fork[-1], color=COLORS["decay"], marker="s", markersize=4)
            fork = []
    merged = [(row.step, row.loss) for row in rows if row.weights == "merge"]
    axes.plot(*zip(*merged, strict=True), color=COLORS["merge"], linestyle="none", marker="o", label="merge, no decay")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("validation loss (nats per byte)")
    axes.set_title(f'"{options.shape}" over the last {options.window} steps: merged, or decayed', fontsize=11)
    axes.legend(frameon=False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Merge, EMA and learning-rate decay at equal steps.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, number, says in (
        ("width", 128, "of the model"),
        ("depth", 2, "layers"),
        ("heads", 4, "of attention"),
        ("context", 64, "bytes"),
        ("steps", 2000, "of the trunk"),
        ("window", 400, "values in a merge, steps in a decay"),
        ("points", 4, "steps at which a decay is wanted, evenly spaced"),
        ("batch-size", 16, "sequences a step"),
        ("warmup-steps", 30, "steps"),
        ("eval-every", 100, "steps"),
        ("eval-windows", 256, "windows of the validation text"),
        ("seed", 0, "of the model and the batches"),
    ):
        parser.add_argument(f"--{name}", type=int, default=number, help=says)
    parser.add_argument("--lr", type=float, default=3e-3, help="constant after the warm-up")
    parser.add_argument("--momentum", type=float, default=0.01, help="of the EMA")
    parser.add_argument("--shape", choices=tuple(CURVES), default="1-sqrt", help="of the decay")
    parser.add_argument("--data", type=Path, help="folder of text files; else Python's own library source")
    parser.add_argument("--out", type=Path, default=Path("runs/merge"))
    options = parser.parse_args(arguments)
    if not 1 <= options.window <= options.steps // options.points:
        parser.error(f"--window must be at least 1 and at most --steps / --points ({options.steps // options.points})")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = run(options)
    with (options.out / "merge.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "weights", "loss", "extra_steps"))
        writer.writerows((row.step, row.weights, row.loss, row.extra_steps) for row in rows)
    draw(rows, options, options.out / "merge.svg")
    print(table(rows, options))
    spent = options.points * options.window
    print(f"\nsteps: {options.steps} of the trunk; the decays took {spent} more, the merges none")


if __name__ == "__main__":
    main()
