"""The command line of the trainer."""

from __future__ import annotations

import argparse
from pathlib import Path

from layouts import LAYOUTS, default_layout, default_replicas, default_tp_size


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Pretrain a byte-level language model, with a sharded average of its weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    model = parser.add_argument_group("model")
    model.add_argument("--width", type=int, default=128)
    model.add_argument("--depth", type=int, default=4)
    model.add_argument("--heads", type=int, default=4)
    model.add_argument("--context", type=int, default=128, help="bytes")

    training = parser.add_argument_group("training")
    training.add_argument("--data", type=Path, help="folder of text files; else Python's own library source")
    training.add_argument("--steps", type=int, default=1000, help="optimizer steps of the whole run")
    training.add_argument("--batch-size", type=int, default=16, help="sequences a step, over all processes")
    training.add_argument("--accumulation", type=int, default=1, help="micro-batches a step")
    training.add_argument("--lr", type=float, default=1e-3, help="constant after the warm-up")
    training.add_argument("--warmup-steps", type=int, default=20)
    training.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), help="else accelerate's config")
    training.add_argument("--sharding", choices=tuple(LAYOUTS), default=default_layout())
    training.add_argument("--replicas", type=int, help="of the model, for hsdp; else accelerate's config, else 2")
    training.add_argument("--tp-size", type=int, help="shares of wide layers, for fsdp2_tp; else as configured, else 2")
    training.add_argument("--seed", type=int, default=0)

    average = parser.add_argument_group("average")
    average.add_argument("--momentum", type=float, default=0.05, help="weight of the new value at the start")
    average.add_argument("--end-momentum", type=float, default=0.01, help="and at the last step")
    average.add_argument("--interval", type=int, default=1, help="steps between two updates of the average")

    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, default=Path("runs/byte-lm"), help="must be shared by all nodes")
    run.add_argument("--save-every", type=int, default=500, help="steps; the last step is always saved")
    run.add_argument("--eval-every", type=int, default=100, help="steps; the last one is always evaluated")
    run.add_argument("--eval-windows", type=int, default=256, help="windows of the validation text")
    run.add_argument("--stop-at", type=int, help="save and leave after this step; --steps stays the plan")
    run.add_argument("--resume", type=Path, help="folder of a checkpoint; auto: the newest one in --out, if any")

    options = parser.parse_args(arguments)
    for name in ("steps", "batch_size", "accumulation", "save_every", "eval_every", "eval_windows"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.replicas is not None and options.sharding != "hsdp":
        parser.error(f"--replicas is for --sharding hsdp, not {options.sharding}")
    if options.tp_size is not None and options.sharding != "fsdp2_tp":
        parser.error(f"--tp-size is for --sharding fsdp2_tp, not {options.sharding}")
    options.replicas = default_replicas() if options.replicas is None else options.replicas
    options.tp_size = default_tp_size() if options.tp_size is None else options.tp_size
    options.stop_at = options.steps if options.stop_at is None else options.stop_at
    if not 1 <= options.stop_at <= options.steps:
        parser.error(f"--stop-at must be between 1 and --steps ({options.steps})")
    return options
