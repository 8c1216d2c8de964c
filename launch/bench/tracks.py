"""What several averages of one model cost together, against as many separate ones, in one interleaved run.

    OMP_NUM_THREADS=1 python launch/bench/tracks.py --rounds 15

A separate update of fp32 moves 12 bytes a parameter: it reads the live and the averaged value, and writes the latter.
Three tracks that read the live value once move (1 + 2 * 3) / (3 * 3) = 0.78 of the bytes of three separate updates.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from update import SHAPES, measure, module_of

from dist_ema import ConstantSchedule, ShardedEMA


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Ratio of several tracks to as many separate averages.")
    parser.add_argument("--model", choices=tuple(SHAPES), default="gpt2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the live weights")
    parser.add_argument("--tracks", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    model = module_of(SHAPES[options.model](), getattr(torch, options.dtype))
    schedules = {f"track{index}": ConstantSchedule(momentum=0.001 * (index + 1)) for index in range(options.tracks)}
    together = ShardedEMA(model, schedules)
    separate = [ShardedEMA(model, schedule) for schedule in schedules.values()]
    for ema in (together, *separate):
        ema.update()

    def update_separate() -> None:
        for ema in separate:
            ema.update()

    seconds = measure({"separate": update_separate, "together": together.update}, options.rounds)
    ratios = sorted(a / b for a, b in zip(seconds["together"], seconds["separate"], strict=True))
    print(
        f"{options.model}, live {options.dtype}, {options.tracks} tracks, {torch.get_num_threads()} thread(s): "
        f"{1000 * statistics.median(seconds['together']):.1f} ms together, "
        f"{1000 * statistics.median(seconds['separate']):.1f} ms separate, ratio {statistics.median(ratios):.3f} "
        f"(p10 {ratios[len(ratios) // 10]:.3f}, p90 {ratios[9 * len(ratios) // 10]:.3f}); "
        f"bytes allow {(1 + 2 * options.tracks) / (3 * options.tracks):.3f}"
    )


if __name__ == "__main__":
    main()
