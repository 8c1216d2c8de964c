"""Pretrain a byte-level language model with accelerate, keeping a sharded average of its weights.

    torchrun --nproc_per_node 2 launch/pretrain/pretrain.py --sharding fsdp2 --steps 600 --out runs/demo
    accelerate launch --config_file launch/configs/fsdp2.yaml launch/pretrain/pretrain.py
    python launch/pretrain/pretrain.py --resume runs/demo/checkpoint-400 --sharding fsdp2 --steps 600 --out runs/demo

A step sees the same global batch on any number of processes, so a run may stop on one and go on on another.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from byte_lm import ByteLM, ByteLMConfig
from evaluation import validation_loss
from journal import Row, add_row, read_rows, start_journal, table
from latest import find_latest, mark_latest
from layouts import LAYOUTS, files_in
from options import parse_options
from text import Crops, read_corpus, validation_windows
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from dist_ema import ConstantSchedule, CosineSchedule, ShardedEMA, attach

LOG_EVERY_STEPS = 10


class Progress:
    """How many optimizer steps are done; accelerate saves and restores it with every checkpoint."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class StepClock:
    """Seconds per optimizer step, in stretches that leave evaluation and saving out."""

    def __init__(self) -> None:
        self.stretches: list[float] = []
        self.start()

    def start(self) -> None:
        self.num_steps, self.began = 0, time.perf_counter()

    def stop(self) -> None:
        """Close a stretch. The caller has just waited for the device, so its work is counted."""
        self.stretches.append((time.perf_counter() - self.began) / self.num_steps)


class Trainer:
    """Everything one run holds. Between ``prepare`` and the end the loop does not know of the average."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.layout = LAYOUTS[options.sharding]
        self.accelerator = self.open_accelerator()
        set_seed(options.seed)
        config = ByteLMConfig(width=options.width, depth=options.depth, heads=options.heads, context=options.context)
        corpus = read_corpus(options.data, context=options.context)
        crops = Crops(
            corpus.train,
            context=options.context,
            seed=options.seed,
            num_samples=options.steps * options.batch_size,
        )
        # Read in order: what sample i is was decided by Crops.
        loader = DataLoader(crops, batch_size=options.batch_size // options.accumulation)
        model = self.layout.cut(ByteLM(config), self.accelerator, options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), foreach=True)
        warmup = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, options.warmup_steps)))
        self.model, self.optimizer, self.loader, self.warmup = self.layout.prepare(
            self.accelerator, model, optimizer, loader, warmup
        )
        self.layout.check(self.accelerator, self.model, options)

        self.schedule = CosineSchedule(
            momentum=options.momentum, end_momentum=options.end_momentum, total_steps=options.steps
        )
        self.parts = self.layout.parts(self.model)
        self.ema = attach(self.accelerator, self.parts, self.optimizer, self.schedule, interval=options.interval)

        self.progress = Progress()
        self.accelerator.register_for_checkpointing(self.progress)
        windows = validation_windows(corpus.validation, context=options.context, num_windows=options.eval_windows)
        self.windows = windows.to(self.accelerator.device)
        self.clock = StepClock()
        self.journal = options.out / "loss.csv"
        self.resume()
        if self.accelerator.is_main_process:
            options.out.mkdir(parents=True, exist_ok=True)
            config.write(options.out / "model.json")
            start_journal(self.journal, from_step=self.progress.step)
        self.accelerator.wait_for_everyone()

    def open_accelerator(self) -> Accelerator:
        accelerator = self.layout.open(self.options)
        num_batches = accelerator.num_processes // self.layout.num_alike(self.options)
        if self.options.batch_size % (num_batches * self.options.accumulation):
            raise ValueError(
                f"--batch-size {self.options.batch_size} is not a multiple of {num_batches} "
                f"processes with batches of their own times {self.options.accumulation} micro-batches"
            )
        return accelerator

    def resume(self) -> None:
        if self.options.resume == Path("auto"):
            self.options.resume = broadcast_object_list([find_latest(self.options.out)])[0]  # as rank 0 sees it
        if self.options.resume is not None:
            written = files_in(self.options.resume)
            if written != self.layout.files:
                names = [name for name, layout in LAYOUTS.items() if layout.files == written]
                raise ValueError(
                    f"{self.options.resume} is a checkpoint of {' or '.join(names)}, or of nothing: it cannot go on "
                    f"with --sharding {self.options.sharding}. Only its average loads in every layout, by ema.load of "
                    "the folder ema in it"
                )
            self.layout.before_load(self.model, self.optimizer.optimizer)
            self.accelerator.load_state(str(self.options.resume))
            self.accelerator.print(f"resumed at step {self.progress.step}, {self.ema.num_updates} updates")
        if self.progress.step >= self.options.stop_at:
            raise ValueError(f"{self.options.resume} is at step {self.progress.step}: nothing left to train")

    def train(self) -> None:
        accelerator, options, progress = self.accelerator, self.options, self.progress
        loader = accelerator.skip_first_batches(self.loader, progress.step * options.accumulation)
        bar = tqdm(total=options.steps, initial=progress.step, unit=" steps", disable=not accelerator.is_main_process)
        losses: list[Tensor] = []  # of the micro-batches since the last evaluation, on the device
        self.model.train()
        self.clock.start()
        for windows in loader:
            with accelerator.accumulate(self.model):
                losses.append(self.layout.backward(accelerator, self.model, windows))
                if accelerator.sync_gradients:
                    self.layout.clip(accelerator, self.model)
                self.optimizer.step()
                self.warmup.step()
                self.optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            progress.step += 1
            self.clock.num_steps += 1
            is_last = progress.step == options.stop_at
            is_evaluation = is_last or progress.step % options.eval_every == 0
            is_save = is_last or progress.step % options.save_every == 0
            if is_evaluation or is_save or progress.step % LOG_EVERY_STEPS == 0:
                bar.set_postfix(loss=f"{losses[-1].item():.3f}", momentum=f"{self.momentum():.5f}", refresh=False)
                bar.update(progress.step - bar.n)
                self.clock.stop()
                if is_evaluation:
                    self.evaluate(torch.stack(losses).mean())
                    losses.clear()
                if is_save:
                    self.save(options.out / f"checkpoint-{progress.step}")
                self.clock.start()
            if is_last:
                break
        bar.close()

    def save(self, checkpoint: Path) -> None:
        """Collective: a checkpoint that `--resume auto` takes only once all ranks have written it."""
        self.accelerator.save_state(str(checkpoint))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            mark_latest(checkpoint)

    def momentum(self) -> float:
        """Of the latest update, which was call number ``num_updates - 1``."""
        return float(self.schedule.momentum(max(0, self.ema.num_updates - 1)))

    def evaluate(self, train_loss: Tensor) -> None:
        """Collective: both validation losses, into the journal."""
        train = self.accelerator.reduce(train_loss, reduction="mean").item()
        live = self.validation_loss()
        with self.ema.average_parameters():
            averaged = self.validation_loss()
        if self.accelerator.is_main_process:
            row = Row(step=self.progress.step, train=train, live=live, averaged=averaged, momentum=self.momentum())
            add_row(self.journal, row)

    def validation_loss(self) -> float:
        # Processes that train on the same batches run the model together: their sums are added up as often as counted.
        num_alike = self.layout.num_alike(self.options)
        return validation_loss(
            self.model,
            self.windows,
            rank=self.accelerator.process_index // num_alike,
            num_ranks=self.accelerator.num_processes // num_alike,
        )

    def report(self) -> None:
        """Collective: print the table, and what the average costs."""
        update_ms = 1000 * self.seconds_per_update()
        step_ms = 1000 * median(self.clock.stretches)
        held = self.accelerator.gather(torch.tensor([self.ema.nbytes], device=self.accelerator.device)).tolist()
        if self.accelerator.is_main_process:
            print(table(read_rows(self.journal)))
            print("averaged weights, bytes per rank:", ", ".join(f"{nbytes:,}" for nbytes in held))
            print(
                f"one update {update_ms:.3f} ms, one training step {step_ms:.1f} ms: "
                f"{update_ms / step_ms:.2%} of the step",
                flush=True,
            )

    def seconds_per_update(self, num_calls: int = 20) -> float:
        """Median time of one update of a throwaway average of the same model."""
        throwaway = ShardedEMA(self.parts, ConstantSchedule(momentum=0.001))
        throwaway.update()  # call number 0 only copies
        seconds = []
        for _ in range(num_calls):
            self.wait_for_device()
            began = time.perf_counter()
            throwaway.update()
            self.wait_for_device()
            seconds.append(time.perf_counter() - began)
        return median(seconds)

    def wait_for_device(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    trainer = Trainer(parse_options())
    trainer.train()
    trainer.report()
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.device.type == "cuda":
        trainer.accelerator.end_training()  # NCCL wants its group destroyed
    elif torch.distributed.is_initialized():
        # gloo's threads now and then abort the process while it is torn down, after all work is done ("terminate called
        # without an active exception"), whether the group is destroyed or not: leave without a teardown.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
