"""BYOL (arXiv 2006.07733) on small digits: a teacher that is an average and runs forward at every step.

    torchrun --nproc-per-node 2 launch/byol/byol.py --sharding fsdp2 --steps 600 --out runs/byol
    python launch/byol/byol.py --steps 600 --out runs/byol

The student predicts what the teacher makes of another view of the same picture; no label is used. Every rank draws
the views of the whole batch and takes its part, so a step sees the same views on any number of processes. BatchNorm is
the plain one, which runs everywhere: each rank normalises by its own part, both views together.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import Digits, nearest_neighbours_accuracy, random_views, read_digits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR

from dist_ema import CosineSchedule, ShardedEMA

# The last two are the k-NN accuracy of the teacher's features, on the test pictures and on random views of them.
COLUMNS = ("step", "seconds", "loss", "momentum", "accuracy", "on_views")


def hidden_layer(num_in: int, num_hidden: int, num_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(num_in, num_hidden, bias=False),
        nn.BatchNorm1d(num_hidden),
        nn.ReLU(),
        nn.Linear(num_hidden, num_out),
    )


def convolution(num_in: int, num_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU()
    )


class Network(nn.Module):
    """The student; the teacher is one without a predictor."""

    def __init__(self, *, with_predictor: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(convolution(1, 16, 1), convolution(16, 32, 2), convolution(32, 64, 2))
        self.projector = hidden_layer(64, 256, 64)
        self.predictor = hidden_layer(64, 256, 64) if with_predictor else nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (64 a picture), and what the two networks are compared by.

        Both in one call: a sharded module gathers its parts when it is itself called, not when a part of it is.
        """
        features = self.encoder(images).mean(dim=(2, 3))
        return features, self.predictor(self.projector(features))


def byol_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """The mean of 2 - 2 cos; each half of the rows is one view, and predicts the target of the other."""
    first, second = target.chunk(2)
    return 2 - 2 * F.cosine_similarity(predicted, torch.cat([second, first])).mean()


class Run:
    """Student, teacher, and what moves them. Needs a process group, if only of one."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.rank, self.num_ranks, self.device = dist.get_rank(), dist.get_world_size(), device
        if options.batch_size % self.num_ranks:
            raise ValueError(f"--batch-size {options.batch_size} is not a multiple of {self.num_ranks} processes")
        self.batch_size = options.batch_size
        self.known, test = read_digits()
        views = random_views(test.images, torch.Generator().manual_seed(0))
        self.asked = (test, Digits(views, test.labels))
        self.views_generator = torch.Generator().manual_seed(options.seed)

        torch.manual_seed(options.seed)  # the same student on every rank
        student: nn.Module = Network(with_predictor=True).to(device)
        self.teacher = Network(with_predictor=False).to(device).requires_grad_(False)
        if options.sharding == "fsdp2":
            mesh = init_device_mesh(device.type, (self.num_ranks,))
            for network in (student, self.teacher):
                fully_shard(network, mesh=mesh)  # a large one: its blocks first
        else:
            # Without a gradient there is nothing to reduce: DDP refuses the teacher, and it is a plain replica.
            student = DistributedDataParallel(student)
        self.student = student
        self.schedule = CosineSchedule(momentum=options.momentum, end_momentum=0.0, total_steps=options.steps)
        # The teacher begins as a copy of the student: how it was initialised does not matter.
        self.ema = ShardedEMA(student, self.schedule, into=self.teacher, exclude="predictor.*")
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=options.lr, weight_decay=1e-3)
        self.rate = OneCycleLR(self.optimizer, options.lr, total_steps=options.steps, pct_start=0.1)

    def step(self) -> Tensor:
        """Collective: one optimizer step, then one update of the teacher. The loss of this rank's part."""
        views = self.draw_views()
        with torch.no_grad():
            _, target = self.teacher(views)  # in train mode as in the paper: by the statistics of this batch
        _, predicted = self.student(views)
        loss = byol_loss(predicted, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.rate.step()
        self.ema.update()
        return loss.detach()

    def draw_views(self) -> Tensor:
        """Two views of each picture of this rank's part of the batch: all first ones, then all second ones."""
        generator = self.views_generator
        images = self.known.images[torch.randint(len(self.known.images), (self.batch_size,), generator=generator)]
        both = [random_views(images, generator)[self.rank :: self.num_ranks] for _ in range(2)]
        return torch.cat(both).to(self.device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Collective: what the teacher's encoder makes of them, by the running statistics of this rank's BatchNorm."""
        self.teacher.eval()
        found: Tensor = self.teacher(images.to(self.device))[0].cpu()
        self.teacher.train()
        return found

    def accuracies(self, features: Callable[[Tensor], Tensor]) -> list[str]:
        """Of the k-NN classifier over such features, on the test pictures and on views of them."""
        known = features(self.known.images)
        found = [
            nearest_neighbours_accuracy(known, self.known.labels, features(asked.images), asked.labels)
            for asked in self.asked
        ]
        return [f"{accuracy:.4f}" for accuracy in found]


def train(run: Run, options: argparse.Namespace) -> None:
    """Collective: all steps, a row of the journal for every evaluation, and the teacher at the end."""
    journal = options.out / "accuracy.csv"
    if run.rank == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        journal.write_text(",".join(COLUMNS) + "\n")
        print("accuracy on raw pixels, and on views:", *run.accuracies(lambda images: images.flatten(1)))
        print(*(f"{column:>9}" for column in COLUMNS), flush=True)
    began = time.perf_counter()
    loss = torch.tensor(float("nan"))
    for step in range(options.steps + 1):
        if step:
            loss = run.step()
        if step % options.eval_every == 0 or step == options.steps:
            momentum = run.schedule.momentum(max(0, step - 1))  # of the latest update
            accuracies = run.accuracies(run.features)
            seconds = time.perf_counter() - began
            row = [str(step), f"{seconds:.1f}", f"{loss.item():.4f}", f"{momentum:.5f}", *accuracies]
            if run.rank == 0:
                print(*(f"{value:>9}" for value in row), flush=True)
                with journal.open("a") as file:
                    file.write(",".join(row) + "\n")
    run.ema.save(options.out / "teacher")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="BYOL on scikit-learn's digits, with the teacher kept by dist_ema.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--sharding", choices=("ddp", "fsdp2"), default="ddp", help="of student and teacher")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of the whole run")
    parser.add_argument("--batch-size", type=int, default=256, help="pictures a step, over all processes")
    parser.add_argument("--lr", type=float, default=3e-3, help="at its highest, after a tenth of the steps")
    parser.add_argument("--momentum", type=float, default=0.05, help="of the teacher at the start; it ends at 0")
    parser.add_argument("--eval-every", type=int, default=100, help="steps; the first and the last are evaluated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/byol"), help="accuracy.csv, and the teacher at the end")
    options = parser.parse_args(arguments)
    for name in ("steps", "batch_size", "eval_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def open_group() -> torch.device:
    """Join the processes of torchrun, or begin a group of one; the device of this rank."""
    has_gpu = torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if not has_gpu:
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def main() -> None:
    options = parse_options()
    device = open_group()
    train(Run(options, device), options)
    if device.type == "cuda":
        dist.destroy_process_group()
    else:
        # gloo's threads now and then abort the process while it is torn down, after all work is done: see pretrain.py.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
