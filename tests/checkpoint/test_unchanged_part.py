"""After a structural change the average of the tensors that are as they were can still be saved, and gone on from."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from twins import assert_same_bits
from zoo import set_live

from dist_ema import ConstantSchedule, ModelChangedError, ShardedEMA
from dist_ema.disk.saved_average import damaged_tensors, read_saved

SCHEDULE = ConstantSchedule(momentum=0.25)


def body_and_head(seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict({"body": nn.Linear(4, 5), "norm": nn.BatchNorm1d(5), "head": nn.Linear(5, 3)})


def averaged(model: nn.Module, num_updates: int = 3) -> tuple[ShardedEMA, dict[str, torch.Tensor]]:
    """The average and, on rank 0, its whole values."""
    ema = ShardedEMA(model, SCHEDULE)
    for step in range(num_updates):
        set_live(model, step)
        ema.update()
    return ema, ema.full_state_dict()


def without_head(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("head.")}


def another_shape(model: nn.Module) -> None:
    model["head"] = nn.Linear(5, 2)


def same_shape(model: nn.Module) -> None:
    model["head"] = nn.Linear(5, 3)


def no_head(model: nn.Module) -> None:
    del model["head"]


def parameters_of_another_shape(model: nn.Module) -> None:
    model["head"].weight = nn.Parameter(torch.zeros(2, 5))
    model["head"].bias = nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize("num_updates", [0, 3])
@pytest.mark.parametrize("change", [another_shape, same_shape, no_head, parameters_of_another_shape])
def test_the_average_is_not_lost_with_a_replaced_head(tmp_path, change, num_updates) -> None:
    model = body_and_head()
    ema, expected = averaged(model, num_updates)
    change(model)
    with pytest.warns(UserWarning, match=r"head\.weight, head\.bias \(2 of 9 tensors\)") as told:
        ema.save(tmp_path / "ema", only_unchanged=True)
    assert len(told) == 1 and told[0].filename == __file__
    with pytest.warns(UserWarning, match="left out") as told:
        ema.consolidate(tmp_path / "export", only_unchanged=True)
    assert len(told) == 1
    saved = read_saved(tmp_path / "ema")
    assert set(saved.manifest.tensors) == set(without_head(expected))
    assert not [name for name, _, is_damaged in damaged_tensors(saved) if is_damaged]
    for folder in ("ema", "export"):
        assert_same_bits(load_file(tmp_path / folder / "model.safetensors"), without_head(expected))


def test_a_run_with_a_new_head_goes_on_from_the_unchanged_tensors(tmp_path) -> None:
    model = body_and_head()
    ema, expected = averaged(model)
    another_shape(model)
    with pytest.warns(UserWarning, match=r"load\(path, new=\['head.weight', 'head.bias'\]\)"):
        ema.save(tmp_path / "ema", only_unchanged=True)
    again = ShardedEMA(model, SCHEDULE)
    again.load(tmp_path / "ema", new="head.*")
    assert again.num_updates == 3
    assert_same_bits(without_head(again.full_state_dict()), without_head(expected))
    live = model["head"].weight.detach().clone()
    assert torch.equal(again.full_state_dict()["head.weight"], live)
    before = again.full_state_dict()["body.weight"]
    again.update()
    assert torch.equal(again.full_state_dict()["body.weight"], before.lerp(model["body"].weight.detach(), 0.25))


def test_the_refusal_of_a_changed_model_names_the_way_to_keep_its_average(tmp_path) -> None:
    model = body_and_head()
    ema, _ = averaged(model)
    another_shape(model)
    calls: list[Any] = [lambda: ema.save(tmp_path / "a"), lambda: ema.consolidate(tmp_path / "b")]
    for call in [*calls, lambda: ema.snapshot(tmp_path / "c")]:
        with pytest.raises(ModelChangedError, match="only_unchanged=True"):
            call()
    for call in (ema.full_state_dict, ema.sharded_state_dict):
        with pytest.raises(ModelChangedError):
            call()
    assert not list(tmp_path.iterdir())


def test_nothing_is_said_and_nothing_left_out_where_nothing_changed(tmp_path) -> None:
    ema, expected = averaged(body_and_head())
    ema.save(tmp_path / "ema", only_unchanged=True)
    assert_same_bits(load_file(tmp_path / "ema" / "model.safetensors"), expected)
    ema.save(tmp_path / "whole")
    assert (tmp_path / "whole" / "manifest.json").read_bytes() == (tmp_path / "ema" / "manifest.json").read_bytes()


def test_a_model_of_which_nothing_is_left_is_refused_and_nothing_is_written(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    ema, _ = averaged(model)
    model[0] = nn.Linear(3, 3)
    with pytest.raises(ModelChangedError, match="nothing to write"):
        ema.save(tmp_path / "ema", only_unchanged=True)
    assert not list(tmp_path.iterdir())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


def test_a_tie_that_was_cut_does_not_give_the_new_head_the_average_of_the_embedding(tmp_path) -> None:
    model = Tied()
    ema, expected = averaged(model)
    model.head.weight = nn.Parameter(torch.zeros(6, 4))
    with pytest.warns(UserWarning, match=r"head\.weight are new"):
        ema.save(tmp_path / "ema", only_unchanged=True)
    saved = read_saved(tmp_path / "ema").manifest
    assert set(saved.tensors) == {"embed.weight"} and not saved.aliases
    again = ShardedEMA(model, SCHEDULE)
    again.load(tmp_path / "ema", new="head.weight")
    assert torch.equal(again.full_state_dict()["embed.weight"], expected["embed.weight"])
    assert not again.full_state_dict()["head.weight"].any()


def test_the_same_tensors_in_another_module_are_not_left_out(tmp_path) -> None:
    """What convert_sync_batchnorm does: new modules, the same parameters."""
    model = body_and_head()
    ema, expected = averaged(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(model["norm"], nn.SyncBatchNorm)
    ema.save(tmp_path / "ema", only_unchanged=True)
    assert_same_bits(load_file(tmp_path / "ema" / "model.safetensors"), expected)


class Configured(nn.Module):
    class Config:
        model_type = "own"

        def to_json_string(self) -> str:
            return "{}"

    def __init__(self) -> None:
        super().__init__()
        self.config, self.body, self.head = Configured.Config(), nn.Linear(2, 2), nn.Linear(2, 2)


def test_a_part_of_a_model_has_no_config_that_would_make_the_rest_at_random(tmp_path) -> None:
    model = Configured()
    ema, _ = averaged(model)
    ema.consolidate(tmp_path / "whole")
    assert (tmp_path / "whole" / "config.json").exists()
    model.head = nn.Linear(2, 3)
    with pytest.warns(UserWarning, match="left out"):
        ema.consolidate(tmp_path / "part", only_unchanged=True)
    assert sorted(path.name for path in (tmp_path / "part").iterdir()) == ["README.md", "model.safetensors"]


def laid_out(layout: str) -> tuple[nn.Module, nn.Sequential]:
    """The wrapped model, and the module in which the head is replaced."""
    inner = nn.Sequential(OrderedDict(body=nn.Linear(4, 5), head=nn.Linear(5, 3)))
    if layout == "ddp":
        return DistributedDataParallel(inner), inner
    if layout == "fsdp1":
        inner.body = FullyShardedDataParallel(inner.body, use_orig_params=True, device_id=torch.device("cpu"))
        return FullyShardedDataParallel(inner, use_orig_params=True, device_id=torch.device("cpu")), inner
    fully_shard(inner.body)
    fully_shard(inner.head)
    fully_shard(inner)
    return inner, inner


def with_a_new_head(layout: str, folder: str) -> str:
    torch.manual_seed(0)
    model, inner = laid_out(layout)
    ema, expected = averaged(model)
    torch.manual_seed(1)
    inner.head = nn.Linear(5, 2)
    if layout == "fsdp2":
        fully_shard(inner.head)
    path = Path(folder, layout)
    with pytest.raises(ModelChangedError, match="only_unchanged=True") as refused:
        ema.save(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ema.save(path, only_unchanged=True)
        ema.consolidate(f"{path}-export", only_unchanged=True)
        ema.save(f"{path}-behind", only_unchanged=True, background=True)
        ema.wait()
    assert len([each for each in caught if "left out" in str(each.message)]) == (3 if dist.get_rank() == 0 else 0)
    dist.barrier()
    again = ShardedEMA(model, SCHEDULE)
    for source in (path, f"{path}-behind"):
        again.load(source, new="head.*")
        state = again.full_state_dict()
        if dist.get_rank() == 0:
            assert_same_bits(without_head(state), without_head(expected))
            assert state["head.weight"].shape == (2, 5)
            assert_same_bits(load_file(f"{path}-export/model.safetensors"), without_head(expected))
    return str(refused.value)


@pytest.mark.parametrize("size", [2, 3])
def test_on_several_ranks_the_unchanged_tensors_are_whole_whatever_the_layout(world, tmp_path, size) -> None:
    for layout in ("ddp", "fsdp2", "fsdp1"):
        told = world(size).run(with_a_new_head, layout, str(tmp_path))
        assert len(set(told)) == 1
    for file in ("model.safetensors", "manifest.json"):
        assert (tmp_path / "ddp" / file).read_bytes() == (tmp_path / "fsdp2" / file).read_bytes()


def changed_on_one_rank(folder: str) -> str:
    torch.manual_seed(0)
    model = body_and_head()
    ema, _ = averaged(model)
    if dist.get_rank() == 1:
        another_shape(model)
    with pytest.raises(Exception, match=r"head\.weight has changed on some of the ranks that hold it") as caught:
        ema.save(Path(folder, "ema"), only_unchanged=True)
    return str(caught.value)


def test_ranks_whose_models_changed_otherwise_are_refused_alike(world, tmp_path) -> None:
    first, second = world(2).run(changed_on_one_rank, str(tmp_path))
    assert first == second and not list(tmp_path.iterdir())


def test_the_unchanged_part_of_a_teacher_is_kept(tmp_path) -> None:
    student, teacher = body_and_head(), body_and_head().requires_grad_(False)
    ema = ShardedEMA(student, SCHEDULE, into=teacher)
    for step in range(2):
        set_live(student, step)
        ema.update()
    expected = without_head(ema.full_state_dict())
    another_shape(student)
    another_shape(teacher)
    with pytest.warns(UserWarning, match="head.weight, head.bias"):
        ema.save(tmp_path / "ema", only_unchanged=True)
    assert_same_bits(load_file(tmp_path / "ema" / "model.safetensors"), expected)


def test_a_changed_model_is_not_taken_for_one_that_was_trained(tmp_path) -> None:
    """One warning, of what is left out, and none of weights that moved without an update."""
    model = body_and_head()
    ema = ShardedEMA(model, SCHEDULE)
    ema.expect_updates()
    another_shape(model)
    with pytest.warns(UserWarning, match="left out") as told:
        ema.save(tmp_path / "ema", only_unchanged=True)
    assert len(told) == 1
