"""BEMA: the corrected view is the paper's and trl's, on every layout, and training never notices it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from zoo import build, local_values, set_live

from dist_ema import (
    Bema,
    BemaSchedule,
    CheckpointCorruptError,
    CheckpointMismatchError,
    ConfigError,
    ConstantSchedule,
    MergeSchedule,
    ShardedEMA,
    consolidate_checkpoint,
)

SUPPORT = Path(__file__).parent.parent / "support"
CONSTANTS = {"eta": 0.2, "kappa": 0.5, "rho": 10.0, "gamma": 1.0}
NUM_STEPS = 5


def naive(steps: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The paper's rule in float64; the first values are theta_0."""
    average = {name: value.double() for name, value in steps[0].items()}
    for t, live in enumerate(steps[1:], start=1):
        beta = (10.0 + t) ** -0.5
        average = {name: (1 - beta) * value + beta * live[name].double() for name, value in average.items()}
    alpha = (10.0 + len(steps) - 1) ** -0.2
    return {name: value + alpha * (steps[-1][name].double() - steps[0][name]) for name, value in average.items()}


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    named = {name.removeprefix("module."): value.detach() for name, value in model.named_parameters()}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone() for name, value in named.items()
    }


def assert_near(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    for name, value in expected.items():
        assert (state[name].double() - value).abs().max() <= tolerance, name


def corrected_everywhere(layout: str, folder: str) -> None:
    """The view, the export and the export without the run are the naive rule; the live weights come back."""
    rank = int(os.environ.get("RANK", "0"))
    model = build(layout)
    steps = [set_live(model, 1)]
    start = f"{folder}/start"
    if rank == 0:
        os.makedirs(start)
        plain = build("plain").state_dict()
        kept = {name: value for name, value in plain.items() if name in dict(whole_names(model))}
        save_file(kept | {name: value.clone() for name, value in steps[0].items()}, f"{start}/model.safetensors")
    tracked, read = Bema(**CONSTANTS), Bema(**CONSTANTS, start=start)
    ema = ShardedEMA(model, tracked.schedules)
    ema.update()
    for seed in range(2, 2 + NUM_STEPS):
        steps.append(set_live(model, seed))
        ema.update()
    live, expected = local_values(model), naive(steps)
    for kind, bema in (("track", tracked), ("folder", read)):
        with ema.average_parameters("ema", correct=bema):
            assert_near(whole(model), expected)
        for name, value in local_values(model).items():
            assert torch.equal(value, live[name]), f"{name} came back otherwise after {kind}"
        ema.consolidate(f"{folder}/{kind}", track="ema", correct=bema)
        assert_near(load_file(f"{folder}/{kind}/model.safetensors"), expected)
    ema.save(f"{folder}/ema")
    with pytest.raises((CheckpointMismatchError, CheckpointCorruptError)):
        with ema.average_parameters("ema", correct=Bema(**CONSTANTS, start=f"{folder}/nothing")):
            raise AssertionError("the block must not begin")
    if rank == 0:
        save_file({"other.weight": torch.ones(2, 2)}, f"{folder}/other.safetensors")
    with pytest.raises(CheckpointMismatchError, match="of another model"):
        ema.consolidate(f"{folder}/no", track="ema", correct=Bema(**CONSTANTS, start=f"{folder}/other.safetensors"))
    with pytest.raises(CheckpointMismatchError, match="of another model"):
        with ema.average_parameters("ema", correct=Bema(**CONSTANTS, start=f"{folder}/other.safetensors")):
            raise AssertionError("the block must not begin")
    for name, value in local_values(model).items():
        assert torch.equal(value, live[name]), name
    ema.update()  # no swap is left open
    assert not os.path.exists(f"{folder}/no")
    if rank == 0:
        save_file({name: value.clone() for name, value in steps[-1].items()}, f"{folder}/live.safetensors")
        for kind, bema in (("track", tracked), ("folder", read)):
            made = f"{folder}/{kind}_offline"
            consolidate_checkpoint(f"{folder}/ema", made, track="ema", correct=bema, live=f"{folder}/live.safetensors")
            for name, value in load_file(f"{folder}/{kind}/model.safetensors").items():
                assert torch.allclose(load_file(f"{made}/model.safetensors")[name].double(), value.double(), atol=1e-6)


def whole_names(model: nn.Module) -> list[tuple[str, object]]:
    return [(name.removeprefix("module."), value) for name, value in model.state_dict().items()]


def test_the_corrected_view_and_both_exports_are_the_rule_of_the_paper(tmp_path) -> None:
    corrected_everywhere("plain", str(tmp_path))


@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_two_ranks_see_the_same_corrected_weights_and_the_same_errors(world, tmp_path, layout) -> None:
    world(2).run(corrected_everywhere, layout, str(tmp_path))


def test_it_agrees_with_the_callback_of_trl(tmp_path) -> None:
    """Every 50 steps of a real optimizer, with its frequency, its burn-in and its floor."""
    run = subprocess.run(
        [sys.executable, str(SUPPORT / "launched_bema.py")], capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("agrees") == 5


def test_the_constants_are_checked_where_they_are_given() -> None:
    for wrong in (
        {"eta": -1.0},
        {"kappa": -0.1},
        {"rho": 0.2, "gamma": 0.5},
        {"floor": 1.5},
        {"update_after_step": -1},
    ):
        with pytest.raises(ConfigError):
            Bema(**wrong)
    with pytest.raises(ConfigError, match="s3:"):
        Bema(start="s3://bucket/start")
    assert Bema().schedules == {"ema": BemaSchedule(), "start": MergeSchedule("linear", num_steps=1)}
    assert list(Bema(start="folder").schedules) == ["ema"]


def test_what_cannot_be_corrected_is_refused_and_says_the_way() -> None:
    net = nn.Linear(2, 2)
    ema = ShardedEMA(net, ConstantSchedule(momentum=0.5))
    ema.update()
    for correct, words in ((Bema(), "bema.schedules"), (object(), "expected a dist_ema.Bema")):
        with pytest.raises(ConfigError, match=words), ema.average_parameters(correct=correct):
            pass
    both = ShardedEMA(net, Bema().schedules)
    with pytest.raises(ConfigError, match="Leave one of them out"):
        with both.average_parameters("ema", keep_buffers=True, correct=Bema()):
            pass
    with pytest.raises(ConfigError, match="Leave one of them out"):
        both.consolidate("never", track="ema", only_unchanged=True, correct=Bema())
    both.update()


def test_before_the_first_update_and_within_the_burn_in_there_is_nothing_to_correct(tmp_path) -> None:
    net = nn.Linear(2, 2)
    save_file({name: value + 1.0 for name, value in net.state_dict().items()}, tmp_path / "model.safetensors")
    bema = Bema(start=tmp_path, update_after_step=2)
    ema = ShardedEMA(net, bema.schedules)
    for _ in range(4):  # before, and after the updates number 0, 1 and 2
        live = net.weight.detach().clone()
        with ema.average_parameters(correct=bema):
            assert torch.equal(net.weight, live)
        with torch.no_grad():
            net.weight.mul_(2.0)
        ema.update()
    with ema.average_parameters(correct=bema):
        assert not torch.equal(net.weight, live)


def test_averaged_statistics_and_masks_are_not_corrected_into_negative_variances_or_nan() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
            self.mask = nn.Parameter(torch.tensor([0.0, -torch.inf]), requires_grad=False)
            self.norm = nn.BatchNorm1d(2)

    net, bema = Masked(), Bema(eta=0.0)
    net.norm.running_var.fill_(10.0)
    ema = ShardedEMA(net, bema.schedules, update_buffers=True)
    ema.update()
    with torch.no_grad():
        net.weight.add_(1.0)
        net.norm.running_var.fill_(0.1)
    ema.update()
    with ema.average_parameters("ema"):
        plain = net.norm.running_var.clone()
    with ema.average_parameters("ema", correct=bema):
        assert net.mask.tolist() == [0.0, -torch.inf]
        assert torch.equal(net.norm.running_var, plain) and (plain > 0).all()
        assert torch.allclose(net.weight, torch.tensor([1.0, 2.0]) + 11.0**-0.5 + 1.0)


def test_an_average_that_began_later_is_corrected_by_its_own_age_and_from_its_own_start(tmp_path) -> None:
    def corrected(ema: ShardedEMA, net: nn.Module, track: str) -> float:
        with ema.average_parameters(track, correct=bema):
            return net.weight.item()

    bema, nets = Bema(eta=0.5, rho=1.0), [nn.Linear(1, 1, bias=False) for _ in range(2)]
    old = ShardedEMA(nets[0], ConstantSchedule(momentum=0.5))
    for step in range(50):
        nn.init.constant_(nets[0].weight, float(step))
        old.update()
    for track, schedule in bema.schedules.items():
        old.add_track(track.replace("ema", "bema"), schedule)
    fresh = ShardedEMA(nets[1], bema.schedules)
    nn.init.constant_(nets[1].weight, 49.0)
    assert corrected(old, nets[0], "bema") == corrected(fresh, nets[1], "ema") == 49.0
    for step in range(50, 60):
        for net, ema in zip(nets, (old, fresh), strict=True):
            nn.init.constant_(net.weight, float(step))
            ema.update()
    value = corrected(old, nets[0], "bema")
    assert value == corrected(fresh, nets[1], "ema") > 59.0
    old.save(tmp_path / "old")
    save_file({"weight": nets[0].weight.detach()}, tmp_path / "live.safetensors")
    live = tmp_path / "live.safetensors"
    consolidate_checkpoint(tmp_path / "old", tmp_path / "out", track="bema", correct=bema, live=live)
    assert float(load_file(tmp_path / "out/model.safetensors")["weight"]) == pytest.approx(value, rel=1e-6)


def test_tensors_that_a_checkpoint_did_not_have_are_not_corrected_from_nothing(tmp_path) -> None:
    def net(width: int) -> nn.Module:
        made = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, width)})
        for parameter in made.parameters():
            nn.init.constant_(parameter, 7.0)
        return made

    bema, former = Bema(eta=0.0), net(2)
    ema = ShardedEMA(former, bema.schedules)
    for _ in range(3):
        ema.update()
    ema.save(tmp_path / "former")
    other = net(3)
    resumed = ShardedEMA(other, bema.schedules)
    resumed.load(tmp_path / "former", new="head.*")
    with resumed.average_parameters("ema", correct=bema):
        assert all((parameter == 7.0).all() for parameter in other.parameters())
