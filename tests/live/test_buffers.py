"""Buffers within a swap: every rank sees those of the files, and has its own back afterwards."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from buffered import Net, buffers_of, persistent, trained
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

X = torch.ones(2, 4)


def swapped(layout: str, update_buffers: bool, folder: str) -> None:
    net, model, ema = trained(layout, update_buffers)
    ema.save(folder)
    dist.barrier()
    files = load_file(os.path.join(folder, "model.safetensors"))
    before = buffers_of(net)
    model.eval()
    with torch.no_grad(), ema.average_parameters():
        seen = buffers_of(net)
        out = model(X)
    for name in sorted(persistent(net)):
        assert torch.equal(seen[name], files[name].to(seen[name].dtype)), name
    assert torch.equal(seen["scratch"], before["scratch"]), "not in the files, so left alone"
    fresh = Net().eval()
    fresh.load_state_dict(files)
    with torch.no_grad():
        assert torch.equal(fresh(X), out), "a forward within the block is that of the files"
    after = buffers_of(net)
    assert all(torch.equal(after[name], before[name]) for name in before), "each rank has its own back"
    if dist.get_rank():
        assert not torch.equal(before["norm.running_mean"], seen["norm.running_mean"])
    state = ema.sharded_state_dict()
    for name in sorted(persistent(net)):
        value = state[name].full_tensor() if isinstance(state[name], DTensor) else state[name]
        assert torch.equal(value, files[name]), name


@pytest.mark.parametrize("update_buffers", [False, True])
@pytest.mark.parametrize("layout", ["ddp", "plain", "hsdp"])
def test_within_a_swap_every_rank_evaluates_with_the_statistics_of_the_files(
    world, tmp_path, layout, update_buffers
) -> None:
    """Without broadcast_buffers rank 1 evaluated with its own, whatever the files said (YOLOX#1176)."""
    world(2).run(swapped, layout, update_buffers, str(tmp_path / "ema"))


def no_shard(folder: str) -> None:
    net, _, ema = trained("fsdp1_no_shard", False)
    before = buffers_of(net)
    ema.save(folder)
    dist.barrier()
    files = load_file(os.path.join(folder, "model.safetensors"))
    with ema.average_parameters():
        assert torch.equal(net.norm.running_mean, files["norm.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in buffers_of(net).items())


def test_replicas_of_fsdp1_evaluate_with_the_statistics_of_the_files_too(world, tmp_path) -> None:
    world(2).run(no_shard, str(tmp_path / "ema"))


def for_good(update_buffers: bool) -> None:
    net, _, ema = trained("ddp", update_buffers)
    expected: list[Any] = [None, None]
    with ema.average_parameters():
        dist.all_gather_object(expected, buffers_of(net))
    ema.copy_to_model()
    for name, value in buffers_of(net).items():
        if name != "scratch":
            assert torch.equal(value, expected[0][name]) and torch.equal(value, expected[1][name]), name


@pytest.mark.parametrize("update_buffers", [False, True])
def test_copy_to_model_gives_every_rank_the_buffers_of_rank_0_for_good(world, update_buffers) -> None:
    world(2).run(for_good, update_buffers)


def forward_in_train_mode(layout: str) -> None:
    net, model, ema = trained(layout, layout == "ddp")
    before = buffers_of(net)
    with pytest.raises(ZeroDivisionError), ema.average_parameters():
        torch.manual_seed(dist.get_rank())
        with torch.no_grad():
            model.train()(torch.randn(16, 4) + 5)
        assert not torch.equal(net.norm.running_mean, before["norm.running_mean"])
        net.small = torch.ones(7, dtype=torch.int16)  # another shape
        net.mask = torch.zeros(3)  # another dtype
        net.scalar = None
        raise ZeroDivisionError
    after = buffers_of(net)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value) and after[name].dtype == value.dtype, name
    model.eval()
    with torch.no_grad():
        model(X)
    ema.update()


@pytest.mark.parametrize(("layout", "size"), [("ddp", 2), ("hsdp", 2), ("fsdp2", 2), ("plain", 1)])
def test_buffers_that_a_forward_within_the_block_changes_are_put_back_bit_for_bit(world, layout, size) -> None:
    world(size).run(forward_in_train_mode, layout)


def sharded_alone() -> int:
    net, _, ema = trained("fsdp2", False)
    before = buffers_of(net)
    with CommDebugMode() as counted, ema.average_parameters():
        assert all(torch.equal(value, before[name]) for name, value in buffers_of(net).items())
    return counted.get_total_counts()


def test_under_fsdp2_a_swap_stays_local_and_each_rank_keeps_its_own_buffers(world) -> None:
    assert world(2).run(sharded_alone) == [0, 0]
