"""Averages that nobody tracked, made from the snapshots of two that were: how far are they from the real ones?

    python launch/studies/posthoc.py --steps 300 --out runs/posthoc

Trains the byte-level language model of the demo in one process. Power-function averages of relative width 0.05 and
0.10 are tracked and kept as bfloat16 snapshots; those of widths 0.075, 0.15 and 0.2 are synthesized after the run, and
compared with the same averages tracked all along in float32. "nearest tracked" is how far the better of the two
tracked ones is.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from dist_ema import PowerSchedule, ShardedEMA, synthesize

sys.path.append(str(Path(__file__).parents[1] / "pretrain"))
from byte_lm import ByteLM, ByteLMConfig, next_byte_loss
from text import Crops, read_corpus

TRACKED = (0.05, 0.10)
WANTED = (0.075, 0.15, 0.2)
LARGEST_ERROR = 0.02


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare synthesized averages with tracked ones.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--snapshots", type=int, default=20, help="evenly spaced over the run")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3, help="constant")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--data", type=Path, help="folder of text files; else Python's own library source")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/posthoc"))
    options = parser.parse_args()
    if not 1 <= options.snapshots <= options.steps:
        parser.error(f"--snapshots must be between 1 and --steps ({options.steps})")
    return options


def name_of(sigma_rel: float) -> str:
    return f"sigma_{round(sigma_rel * 1000):03d}"


def averaging(model: ByteLM, widths: tuple[float, ...]) -> ShardedEMA:
    return ShardedEMA(model, {name_of(sigma): PowerSchedule(sigma_rel=sigma) for sigma in widths})


def train(options: argparse.Namespace, snapshots: Path) -> ShardedEMA:
    """Train, write the snapshots, and return the averages that are wanted, tracked all along."""
    torch.manual_seed(options.seed)
    config = ByteLMConfig(width=options.width, depth=options.depth)
    corpus = read_corpus(options.data, context=config.context)
    num_samples = options.steps * options.batch_size
    crops = Crops(corpus.train, context=config.context, seed=options.seed, num_samples=num_samples)
    model = ByteLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95))
    tracked, truth = averaging(model, TRACKED), averaging(model, WANTED)
    at = {options.steps * (index + 1) // options.snapshots for index in range(options.snapshots)}
    batches = DataLoader(crops, batch_size=options.batch_size)
    for step, windows in enumerate(tqdm(batches, unit=" steps", disable=None), start=1):
        loss = next_byte_loss(model, windows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tracked.update()
        truth.update()
        if step in at:
            tracked.snapshot(snapshots, dtype=torch.bfloat16)
    print(f"{options.steps} steps, last loss {loss.item():.3f}, {len(at)} snapshots of tracks {TRACKED}")
    return truth


def relative_distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """`||ours - theirs|| / ||theirs||` over all tensors."""
    difference = sum(float((ours[name].double() - value.double()).square().sum()) for name, value in theirs.items())
    return float((difference / sum(float(value.double().square().sum()) for value in theirs.values())) ** 0.5)


def main() -> None:
    options = parse_options()
    snapshots = options.out / "snapshots"
    shutil.rmtree(snapshots, ignore_errors=True)  # of a former run
    truth = train(options, snapshots)
    last = [load_file(path) for path in sorted(snapshots.iterdir())[-1].glob("*/model.safetensors")]
    errors = []
    print("sigma_rel   error     nearest tracked   profile error   sum |weights|   seconds")
    for sigma in WANTED:
        began = time.perf_counter()
        made = synthesize(snapshots, options.out / name_of(sigma), PowerSchedule(sigma_rel=sigma))
        seconds = time.perf_counter() - began
        wanted = truth.full_state_dict(name_of(sigma))
        errors.append(relative_distance(load_file(made.folder / "model.safetensors"), wanted))
        nearest = min(relative_distance(each, wanted) for each in last)
        told = f"{sigma:9.3f}   {errors[-1]:6.3%}   {nearest:15.3%}   {made.profile_error:13.3%}"
        print(f"{told}   {made.amplification:13.2f}   {seconds:7.2f}")
    if max(errors) > LARGEST_ERROR:
        sys.exit(f"an error is above {LARGEST_ERROR:.0%}")


if __name__ == "__main__":
    main()
