"""Statistics that `update_bn` computes for the averaged weights stay with the average, and never with the live ones."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from buffered import HALF, Net, buffers_of, trained
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import update_bn

from dist_ema import (
    CheckpointMismatchError,
    ConfigError,
    ConstantSchedule,
    ModelChangedError,
    RankMismatchError,
    ShardedEMA,
    SwapError,
    consolidate_checkpoint,
)

STATISTICS = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")


def batches(shift: float = 3.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(int(shift))
    return [torch.randn(16, 4, generator=generator) + shift for _ in range(5)]


def step(net: nn.Module, ema: ShardedEMA) -> None:
    """One step of training: weights and statistics move."""
    net.train()
    net(torch.randn(16, 4)).square().mean().backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= 0.1 * parameter.grad
            parameter.grad = None
    ema.update()


def after_steps(number: int = 3, **options) -> tuple[Net, ShardedEMA]:
    net = Net()
    ema = ShardedEMA(net, options.pop("schedule", HALF), exclude="rotation", **options)
    for _ in range(number):
        step(net, ema)
    return net, ema


def recalibrate(net: nn.Module, ema: ShardedEMA, track: str | None = None, shift: float = 3.0) -> dict:
    """Keep statistics of other batches with the average, and return what was in the model then."""
    live = copy.deepcopy(net.state_dict())
    with ema.average_parameters(track, keep_buffers=True):
        update_bn(batches(shift), net)
        inside = copy.deepcopy(net.state_dict())
    assert all(torch.equal(live[name], value) for name, value in net.state_dict().items()), "live ones come back"
    assert not torch.equal(inside[STATISTICS[0]], live[STATISTICS[0]]) and inside[STATISTICS[2]] == 5
    return inside


def assert_shows(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    "options", [{}, {"update_buffers": True}, {"update_buffers": True, "compensated": True}], ids=str
)
def test_recalibrated_statistics_are_in_all_that_shows_the_average(tmp_path, options) -> None:
    net, ema = after_steps(**options)
    inside = recalibrate(net, ema)
    with ema.average_parameters():
        assert_shows(net.state_dict(), inside)
    assert_shows(ema.full_state_dict(), inside)
    assert_shows(ema.sharded_state_dict(), inside)
    for background in (False, True):
        ema.save(tmp_path / "saved", background=background)
        ema.wait()
        assert_shows(load_file(tmp_path / "saved" / "model.safetensors"), inside)
    ema.snapshot(tmp_path / "snapshots")
    assert_shows(load_file(tmp_path / "snapshots" / "updates-000000003" / "model.safetensors"), inside)
    ema.consolidate(tmp_path / "export")
    assert_shows(load_file(tmp_path / "export" / "model.safetensors"), inside)
    consolidate_checkpoint(tmp_path / "saved", tmp_path / "later")
    assert_shows(load_file(tmp_path / "later" / "model.safetensors"), inside)
    ema.copy_to_model()
    assert_shows(net.state_dict(), inside)


@pytest.mark.parametrize("update_buffers", [False, True])
def test_a_resumed_average_still_has_them_and_goes_on_bit_for_bit(tmp_path, update_buffers) -> None:
    net, ema = after_steps(update_buffers=update_buffers)
    inside = recalibrate(net, ema)
    ema.save(tmp_path)
    other = copy.deepcopy(net)
    again = ShardedEMA(other, HALF, exclude="rotation", update_buffers=update_buffers)
    again.load(tmp_path)
    assert_shows(again.full_state_dict(), inside)
    with again.average_parameters():
        assert_shows(other.state_dict(), inside)
    again.save(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    for model, average in ((net, ema), (other, again)):
        torch.manual_seed(7)
        step(model, average)
    assert_shows(again.full_state_dict(), ema.full_state_dict())
    again.load(tmp_path)  # over averages in use
    assert_shows(again.full_state_dict(), inside)


def test_old_statistics_never_stand_beside_weights_that_have_moved_and_the_save_says_so(tmp_path) -> None:
    net, ema = after_steps()
    recalibrate(net, ema)
    step(net, ema)
    assert torch.equal(ema.full_state_dict()[STATISTICS[0]], net.norm.running_mean)
    with pytest.warns(UserWarning, match="has moved it since: what is written has the live buffers.*keep_buffers=True"):
        ema.save(tmp_path / "a")
    assert torch.equal(load_file(tmp_path / "a" / "model.safetensors")[STATISTICS[0]], net.norm.running_mean)
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["kept_buffers"] == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.save(tmp_path / "a")  # the warning comes once
        inside = recalibrate(net, ema)
        ema.save(tmp_path / "a")
    assert_shows(load_file(tmp_path / "a" / "model.safetensors"), inside)


def test_averaged_statistics_go_on_from_the_recalibrated_ones(tmp_path) -> None:
    net, ema = after_steps(update_buffers=True)
    inside = recalibrate(net, ema)
    step(net, ema)
    shown = ema.full_state_dict()
    assert torch.equal(shown[STATISTICS[0]], torch.lerp(inside[STATISTICS[0]], net.norm.running_mean, 0.5))
    assert shown[STATISTICS[2]] == net.norm.num_batches_tracked, "an integer has no average"
    ema.save(tmp_path)  # no warning: no statistics were lost


def test_an_averaged_buffer_that_the_block_left_alone_is_not_rounded_to_the_live_dtype() -> None:
    net = Net().bfloat16()
    ema = ShardedEMA(net, HALF, exclude="rotation", update_buffers=True)
    for value in (1.0, 2.0, 3.3, 0.7):
        net.norm.running_mean.fill_(value)
        ema.update()
    average = ema.full_state_dict()[STATISTICS[0]].clone()
    assert not torch.equal(average, average.bfloat16().float())
    with ema.average_parameters(keep_buffers=True):
        net.norm.running_var.fill_(5.0)
    shown = ema.full_state_dict()
    assert torch.equal(shown[STATISTICS[0]], average) and torch.equal(shown[STATISTICS[1]], torch.full((8,), 5.0))


def test_updates_that_do_not_move_the_average_leave_them_in_place() -> None:
    net, ema = after_steps(1, interval=3)  # calls number 0, 3, 6, ... average
    inside = recalibrate(net, ema)
    for _ in range(2):
        step(net, ema)
        assert_shows(ema.full_state_dict(), inside)
    step(net, ema)
    assert torch.equal(ema.full_state_dict()[STATISTICS[0]], net.norm.running_mean)
    net, ema = after_steps()
    inside = recalibrate(net, ema)
    ema.update(found_inf=torch.ones(()))  # an overflow: the step was skipped
    assert_shows(ema.full_state_dict(), inside)
    ema.update(found_inf=torch.zeros(()))
    assert torch.equal(ema.full_state_dict()[STATISTICS[0]], net.norm.running_mean)


@pytest.mark.parametrize("update_buffers", [False, True])
def test_before_the_first_update_they_are_kept_beside_the_live_weights(tmp_path, update_buffers) -> None:
    net, ema = after_steps(0, update_buffers=update_buffers)
    inside = recalibrate(net, ema)
    assert_shows(ema.full_state_dict(), inside)
    ema.save(tmp_path)
    again = ShardedEMA(Net(), HALF, exclude="rotation", update_buffers=update_buffers)
    again.load(tmp_path)
    assert torch.equal(again.full_state_dict()[STATISTICS[1]], inside[STATISTICS[1]])
    step(net, ema)
    assert torch.equal(ema.full_state_dict()[STATISTICS[0]], net.norm.running_mean)


def test_tracks_have_statistics_of_their_own(tmp_path) -> None:
    net, ema = after_steps(schedule={"short": HALF, "long": ConstantSchedule(decay=0.9)})
    short, long = recalibrate(net, ema, "short", 3.0), recalibrate(net, ema, "long", -3.0)
    assert not torch.equal(short[STATISTICS[0]], long[STATISTICS[0]])
    ema.save(tmp_path)
    again = ShardedEMA(Net(), {"short": HALF, "long": ConstantSchedule(decay=0.9)}, exclude="rotation")
    again.load(tmp_path)
    for track, inside in (("short", short), ("long", long)):
        assert_shows(load_file(tmp_path / track / "model.safetensors"), inside)
        assert_shows(again.full_state_dict(track), inside)
    net, ema = after_steps(schedule={"short": HALF, "long": HALF})
    inside = recalibrate(net, ema, "short")
    assert_shows(ema.full_state_dict("short"), inside)
    assert torch.equal(ema.full_state_dict("long")[STATISTICS[0]], net.norm.running_mean)


def test_nothing_is_kept_when_the_block_ends_in_an_exception_or_by_default() -> None:
    net, ema = after_steps()
    before = ema.full_state_dict()
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), ema.average_parameters(keep_buffers=True):
            update_bn(batches(), net)
            raise error
        assert_shows(ema.full_state_dict(), before)
    with ema.average_parameters():
        update_bn(batches(), net)
    assert_shows(ema.full_state_dict(), before)
    try:  # an exception that is being handled outside does not end the block
        raise KeyError
    except KeyError:
        inside = recalibrate(net, ema)
    assert_shows(ema.full_state_dict(), inside)

    @ema.average_parameters(keep_buffers=True)
    def evaluate() -> None:
        update_bn(batches(-2.0), net)

    evaluate()
    assert not torch.equal(ema.full_state_dict()[STATISTICS[0]], inside[STATISTICS[0]]), "a decorated function keeps"
    ema.restart()
    assert torch.equal(ema.full_state_dict()[STATISTICS[0]], net.norm.running_mean)


def test_a_later_block_goes_on_from_the_kept_ones_and_replaces_them() -> None:
    net, ema = after_steps()
    inside = recalibrate(net, ema)
    with ema.average_parameters(keep_buffers=True):
        assert_shows(net.state_dict(), inside)
        with pytest.raises(SwapError):
            ema.average_parameters(keep_buffers=True).__enter__()
        net.norm.running_mean.add_(1)
        assert torch.equal(ema.full_state_dict()[STATISTICS[0]], net.norm.running_mean), "within the block, the model's"
    assert torch.equal(ema.full_state_dict()[STATISTICS[0]], inside[STATISTICS[0]] + 1)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_state_dict_has_them_and_a_state_of_dcp_says_that_it_has_not(tmp_path) -> None:
    net, ema = after_steps()
    assert "kept_buffers" not in ema.state_dict()
    inside = recalibrate(net, ema)
    torch.save(ema.state_dict(), tmp_path / "state.pt")
    dcp.save({"ema": ema.stateful()}, checkpoint_id=tmp_path / "dcp")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = ShardedEMA(Net(), HALF, exclude="rotation")
    again.load_state_dict(state)
    assert_shows(again.full_state_dict(), inside)
    del state["kept_buffers"]["ema"][STATISTICS[1]]
    with pytest.raises(CheckpointMismatchError, match="other kept buffers"):
        again.load_state_dict(state)
    other = ShardedEMA(Net(), HALF, exclude="rotation")
    with pytest.warns(UserWarning, match="recalibrated buffers were kept.*are not in it"):
        dcp.load({"ema": other.stateful()}, checkpoint_id=tmp_path / "dcp")
    assert torch.equal(other.full_state_dict()["first.weight"], inside["first.weight"])


def test_a_buffer_that_cannot_be_kept_is_an_error_at_the_end_of_the_block_and_the_live_ones_are_back() -> None:
    net, ema = after_steps()
    live = copy.deepcopy(net.state_dict())
    with pytest.raises(ModelChangedError, match="mask"), ema.average_parameters(keep_buffers=True):
        net.mask = torch.zeros(5, dtype=torch.bool)
    assert_shows(net.state_dict(), live)
    assert ema._state.kept_buffers("ema") is None
    recalibrate(net, ema)


def test_what_cannot_keep_them_is_refused() -> None:
    net, ema = after_steps()
    with pytest.raises(ConfigError, match="keep_buffers is 'no'"), ema.average_parameters(keep_buffers="no"):
        pass
    teacher = copy.deepcopy(net).requires_grad_(False)
    taught = ShardedEMA(net, HALF, exclude="rotation", into=teacher)
    with pytest.raises(ConfigError, match="into="), taught.average_parameters(keep_buffers=True):
        pass
    with taught.average_parameters():
        pass


def on_ranks(layout: str, update_buffers: bool, folder: str) -> None:
    rank = dist.get_rank()
    net, _, ema = trained(layout, update_buffers)
    live = buffers_of(net)
    with ema.average_parameters(keep_buffers=True):
        update_bn(batches(3.0 + rank), net)  # a rank with batches of its own
        own = buffers_of(net)
    assert all(torch.equal(live[name], value) for name, value in buffers_of(net).items())
    ema.save(f"{folder}/saved")
    saved = load_file(f"{folder}/saved/model.safetensors")
    assert torch.equal(saved["norm.running_mean"], batch_statistics(rank, own))
    with ema.average_parameters():
        for name in STATISTICS:
            assert torch.equal(
                net.get_buffer(name), own[name] if layout == "fsdp2" and not update_buffers else saved[name]
            )
    shown = ema.sharded_state_dict()[STATISTICS[0]]
    shown = shown.full_tensor() if isinstance(shown, DTensor) else shown
    assert torch.equal(shown, own[STATISTICS[0]] if layout == "fsdp2" and not update_buffers else saved[STATISTICS[0]])
    assert all(torch.equal(live[name], value) for name, value in buffers_of(net).items())

    net, _, again = trained(layout, update_buffers)
    again.load(f"{folder}/saved")
    with again.average_parameters():  # on every rank what the file has, also where a swap sends nothing
        for name in STATISTICS:
            assert torch.equal(net.get_buffer(name), saved[name])
    again.save(f"{folder}/again")
    assert saved.keys() == load_file(f"{folder}/again/model.safetensors").keys()
    for name, value in load_file(f"{folder}/again/model.safetensors").items():
        assert torch.equal(value, saved[name])


def batch_statistics(rank: int, own: dict[str, torch.Tensor]) -> torch.Tensor:
    """The statistics of rank 0, which count."""
    counted = own["norm.running_mean"].clone()
    dist.broadcast(counted, 0)
    return counted


@pytest.mark.ranks
@pytest.mark.parametrize("update_buffers", [False, True])
@pytest.mark.parametrize("layout", ["ddp", "plain", "fsdp2", "hsdp"])
def test_the_owners_statistics_count_on_all_ranks(world, tmp_path, layout, update_buffers) -> None:
    world(2).run(on_ranks, layout, update_buffers, str(tmp_path))


def one_rank_fails(folder: str) -> str:
    _, _, ema = trained("ddp", False)
    try:
        with ema.average_parameters(keep_buffers=True):
            if dist.get_rank() == 1:
                raise ValueError
    except ValueError:
        pass
    try:
        ema.save(f"{folder}/saved")
    except RankMismatchError as error:
        return str(error)
    return "saved"


@pytest.mark.ranks
def test_a_block_that_ended_in_an_exception_on_one_rank_alone_is_seen_at_the_save(world, tmp_path) -> None:
    texts = world(2).run(one_rank_fails, str(tmp_path))
    assert texts[0] == texts[1] and "kept_buffers" in texts[0] and not (tmp_path / "saved").exists()
