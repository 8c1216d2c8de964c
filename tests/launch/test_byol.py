"""The BYOL example: its teacher follows the reference rule, it learns, and what it saves is what it evaluated."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import byol
import pytest
import torch
from digits import nearest_neighbours_accuracy, random_views, read_digits
from layouts_zoo import clean, read_whole
from oracle import NaiveAverage
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).parents[2]
STEPS, MOMENTUM = 12, 0.2
SMALL = ["--steps", str(STEPS), "--batch-size", "16", "--momentum", str(MOMENTUM), "--lr", "0.01"]


def reference_momentum(step: int) -> float:
    """Weight of the new value in call `step`, as the papers' cosine has it; written anew here, not taken from ours."""
    done = min(max(step, 0), STEPS) / STEPS
    return MOMENTUM * (math.cos(math.pi * done) + 1) / 2


class Reference:
    """Whole tensors in float64; call 0 copies."""

    def __init__(self) -> None:
        self.num_updates = 0
        self.values: dict[str, torch.Tensor] = {}

    def update(self, live: dict[str, torch.Tensor]) -> None:
        momentum = reference_momentum(self.num_updates) if self.num_updates else 1.0
        for name, value in live.items():
            self.values[name] = (1 - momentum) * self.values.get(name, 0.0) + momentum * value.double()
        self.num_updates += 1


def buffers(network: nn.Module) -> dict[str, torch.Tensor]:
    return {clean(name): value for name, value in network.named_buffers() if "predictor" not in name}


def follow(sharding: str) -> dict[str, torch.Tensor]:
    run = byol.Run(byol.parse_options(["--sharding", sharding, *SMALL]), torch.device("cpu"))
    assert isinstance(run.student, DistributedDataParallel) == (sharding == "ddp")
    naive, reference = NaiveAverage(reference_momentum), Reference()
    first = read_whole(run.student)
    for step in range(STEPS):
        run.step()
        assert run.ema.num_updates == step + 1
        live, taught = read_whole(run.student), read_whole(run.teacher)
        assert taught.keys() == {name for name in live if not name.startswith("predictor.")}
        naive.update(live)
        reference.update(live)
        for name, value in taught.items():
            assert torch.equal(value, naive.values[name]), f"{name} after update {step}"
            torch.testing.assert_close(value.double(), reference.values[name], rtol=0, atol=1e-6)
        live_buffers = buffers(run.student)
        assert live_buffers.keys() == buffers(run.teacher).keys() and len(live_buffers) > 0
        for name, value in buffers(run.teacher).items():
            assert torch.equal(value, live_buffers[name]), f"{name} after update {step}"
    assert all(not torch.equal(value, first[name]) for name, value in taught.items()), "something did not learn"
    assert any(not torch.equal(value, live[name]) for name, value in taught.items()), "the teacher is the student"
    return taught


@pytest.mark.parametrize(("sharding", "size"), [("ddp", 1), ("ddp", 2), ("fsdp2", 1), ("fsdp2", 2)])
def test_the_teacher_of_the_example_follows_the_reference_rule(world, sharding, size) -> None:
    first, *others = world(size).run(follow, sharding)
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in first.items())


def draw_some() -> list[torch.Tensor]:
    run = byol.Run(byol.parse_options(SMALL), torch.device("cpu"))
    return [run.draw_views() for _ in range(2)]


def test_two_processes_see_the_views_that_one_sees(world) -> None:
    (alone,) = world(1).run(draw_some)
    halves = world(2).run(draw_some)
    for step, views in enumerate(alone):
        together = torch.stack([half[step] for half in halves], dim=1).flatten(0, 1)
        assert torch.equal(together, views)


def test_views_of_the_digits_differ_and_are_drawn_alike_from_a_seed() -> None:
    images = read_digits()[0].images[:8]
    drawn = [random_views(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == images.shape and drawn[0].isfinite().all()


def test_the_majority_of_the_neighbours_decides() -> None:
    known = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.9, 0.2], [0.0, 1.0], [0.1, 3.0]])
    labels = torch.tensor([4, 4, 7, 7, 7])
    asked = torch.tensor([[5.0, 0.1], [0.0, 0.2]])
    assert nearest_neighbours_accuracy(known, labels, asked, torch.tensor([4, 7]), num_neighbours=3) == 1.0
    assert nearest_neighbours_accuracy(known, labels, asked, torch.tensor([7, 7]), num_neighbours=3) == 0.5


@pytest.mark.ranks
def test_the_example_learns_and_its_saved_teacher_has_the_accuracy_of_the_run(tmp_path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--sharding", "fsdp2", "--steps", "60", "--eval-every", "30", "--momentum", "0.3", "--lr", "0.006"]
    done = subprocess.run(
        [*command, "launch/byol/byol.py", *options, "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=150, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "accuracy on raw pixels, and on views: 0.9" in done.stdout
    with (tmp_path / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "30", "60"]
    first, last = float(rows[0]["accuracy"]), float(rows[-1]["accuracy"])
    assert 0.5 < first < last <= 1.0
    assert 0.2 < float(rows[0]["on_views"]) < float(rows[-1]["on_views"]) <= 1.0

    network = byol.Network(with_predictor=True).eval()
    network.load_state_dict(load_file(tmp_path / "teacher" / "model.safetensors"))
    known, asked = read_digits()
    with torch.no_grad():
        features = [network(split.images)[0] for split in (known, asked)]
    found = nearest_neighbours_accuracy(features[0], known.labels, features[1], asked.labels)
    assert found == pytest.approx(last, abs=2 / len(asked.labels)), "other rounding may turn a close vote"
