"""DeepSpeed's ZeRO-1, 2 and 3: averages, swaps and files of what is partitioned, and updates after the engine's steps.

DeepSpeed runs in worlds of its own: its import changes much, and warns.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from oracle import NaiveAverage
from ranks import World
from safetensors.torch import load_file
from torch.distributed.tensor.debug import CommDebugMode
from twins import assert_same_bits
from zoo import Nasty

from dist_ema import (
    AttachError,
    ConfigError,
    CosineSchedule,
    ModelChangedError,
    ShardedEMA,
    UnsupportedModelError,
    attach,
)

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
SCHEDULE = CosineSchedule(0.3, 0.01, total_steps=12)


@pytest.fixture(scope="module")
def own_world() -> Iterator[Callable[[int], World]]:
    worlds: dict[int, World] = {}

    def started(size: int) -> World:
        if size not in worlds:
            worlds[size] = World(size)
            worlds[size].run(import_deepspeed)  # it takes longer than most cases
        return worlds[size]

    yield started
    for each in worlds.values():
        each.stop()


def import_deepspeed() -> None:
    from deepspeeded import imported

    imported()


def followed(engine: Any, emas: list[ShardedEMA], naive: NaiveAverage, steps: range) -> None:
    """Train and update; the naive average is taken after `engine.step`."""
    from deepspeeded import read_whole, train

    for step in steps:
        train(engine, step)
        for ema in emas:
            with CommDebugMode() as traffic:
                ema.update()
            assert traffic.get_total_counts() == 0
        naive.update(read_whole(engine.module))


def on_rank_0(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if dist.get_rank() == 0:
        assert_same_bits(state, expected)


def whole_life(kind: str, folder: str, whole_engine: bool) -> None:
    from deepspeeded import batch, engine_of, read_whole, train

    engine = engine_of(kind)
    model = engine if whole_engine else engine.module
    ema, naive = ShardedEMA(model, SCHEDULE), NaiveAverage(SCHEDULE.momentum)
    followed(engine, [ema], naive, range(4))
    on_rank_0(ema.full_state_dict(), naive.values)

    live, dtype = read_whole(model), next(engine.module.parameters()).dtype
    averaged = {name: value.to(dtype) for name, value in naive.values.items()}
    with torch.no_grad():
        engine(batch(0))  # what it gathers must not outlive the swap
        with ema.average_parameters():
            reference = Nasty(scalar=False).to(dtype)
            reference.load_state_dict(averaged, strict=False)
            assert torch.equal(engine(batch(7)), reference(batch(7)))
            assert_same_bits(read_whole(model), averaged)
        assert_same_bits(read_whole(model), live)
        reference.load_state_dict(live, strict=False)
        assert torch.equal(engine(batch(7)), reference(batch(7)))

    ema.save(folder)
    ema.consolidate(folder + "_export", dtype=torch.bfloat16)
    if dist.get_rank() == 0:
        assert_same_bits(load_file(os.path.join(folder, "model.safetensors")), naive.values)
        export = load_file(os.path.join(folder + "_export", "model.safetensors"))
        assert_same_bits(export, {name: value.bfloat16() for name, value in naive.values.items()})
    resumed = ShardedEMA(model, SCHEDULE)
    resumed.load(folder)
    followed(engine, [ema, resumed], naive, range(4, 6))
    for each in (ema, resumed):
        on_rank_0(each.full_state_dict(), naive.values)
    ema.copy_to_model()
    assert_same_bits(read_whole(model), {name: value.to(dtype) for name, value in naive.values.items()})
    train(engine, 6)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *((kind, size) for kind in ("zero1", "zero2", "zero3") for size in (2, 3)),
        *((kind, 2) for kind in ("zero3_init", "zero3_persistent", "zero3_offload", "zero3_nodes")),
        *((kind, 2) for kind in ("none_bf16", "zero1_bf16", "zero2_bf16", "zero3_bf16", "zero3_fp16")),
    ],
)
def test_averages_swaps_and_files_of_a_partitioned_model_are_those_of_whole_tensors(
    own_world, tmp_path, kind, size
) -> None:
    """ZeRO-3 averaged nothing, in silence; what a forward gathers is stale after a swap."""
    own_world(size).run(whole_life, kind, str(tmp_path / "ema"), size == 2)


def trained_alone(kind: str, folder: str, masters: bool) -> None:
    from deepspeeded import engine_of

    engine = engine_of(kind)
    frozen = {name for name, parameter in engine.module.named_parameters() if not parameter.requires_grad}
    options: Any = {"trainable_only": True, "averaged_only": True, "masters": masters}
    runs = [engine.module.get_parameter(name).ds_tensor for name in frozen] if kind == "zero3" else []
    for run in runs:  # quantised, it could not be read as it lies
        run.ds_quant_scale = torch.ones(1)
    ema, naive = ShardedEMA(engine, SCHEDULE, **options), NaiveAverage(SCHEDULE.momentum)
    for run in runs:  # this engine does not know how to gather it
        del run.ds_quant_scale
    followed(engine, [ema], naive, range(3))
    with ema.average_parameters():
        pass
    ema.save(folder)
    resumed = ShardedEMA(engine, SCHEDULE, **options)
    resumed.load(folder)
    followed(engine, [ema, resumed], naive, range(3, 5))
    ema.save(folder + "_on")
    resumed.save(folder + "_resumed")
    if dist.get_rank() == 0:
        on, again = (load_file(os.path.join(folder + what, "model.safetensors")) for what in ("_on", "_resumed"))
        assert frozen and on.keys() == {shard.fqn for shard in ema._state.plan.specs if shard.averaged}
        assert not frozen.intersection(on)
        assert_same_bits(on, again)
        if not masters:
            assert_same_bits(on, {name: naive.values[name] for name in on})
    dist.barrier()


@pytest.mark.parametrize(("kind", "masters"), [("zero1", False), ("zero3", False), ("zero2_bf16", True)])
def test_what_is_frozen_is_left_out_and_need_not_be_readable(own_world, tmp_path, kind, masters) -> None:
    own_world(2).run(trained_alone, kind, str(tmp_path / "ema"), masters)


def attributes_of_zero3() -> None:
    from deepspeeded import batch, configuration, engine_of, imported, read_whole, train

    rank, size = dist.get_rank(), dist.get_world_size()
    engine = engine_of("zero3_persistent")
    whole = read_whole(engine.module)
    engine.optimizer.empty_partition_cache()
    parameters = dict(engine.module.named_parameters())
    for name, parameter in parameters.items():
        assert parameter.shape == (0,) and parameter.ds_status.name == "NOT_AVAILABLE"
        assert parameter.ds_shape == whole[name].shape and parameter.ds_numel == whole[name].numel()
        run = parameter.ds_tensor
        assert dist.get_world_size(parameter.ds_process_group) == size
        assert run.numel() == -(-parameter.ds_numel // size) and run.final_location is None
        values = whole[name].flatten()[rank * run.numel() :][: run.numel()]
        assert torch.equal(run[: len(values)], values)
        assert parameter._z3_optimizer is engine.optimizer and not engine.optimizer.zenflow
        assert not engine.optimizer.swap_optimizer
    with imported().zero.GatheredParameters([parameters["hidden.weight"]]):
        assert parameters["hidden.weight"]._ds_z3_gathered_param_context_depth == 1
        assert parameters["hidden.weight"].ds_status.name == "AVAILABLE"
        assert not getattr(parameters["norm.weight"], "_ds_z3_gathered_param_context_depth", 0)
    assert not getattr(parameters["hidden.weight"], "_ds_z3_gathered_param_context_depth", 0)

    # A small one stays gathered, and stale, until it is freed.
    train(engine, 0)
    small = parameters["norm.weight"]
    assert small.ds_persist and small.ds_status.name == "AVAILABLE"
    former = small.detach().clone()
    small.ds_tensor.mul_(2.0)
    assert torch.equal(small, former)
    engine.optimizer.empty_partition_cache()
    assert torch.equal(read_whole(engine.module)["norm.weight"], 2.0 * former)

    # Before there is an optimizer a parameter frees itself.
    with imported().zero.Init(config_dict_or_path=configuration("zero3")):
        early = torch.nn.Linear(3, 2)
    early.weight.all_gather()
    assert early.weight.ds_status.name == "AVAILABLE" and not hasattr(early.weight, "_z3_optimizer")
    early.weight.partition()
    assert early.weight.ds_status.name == "NOT_AVAILABLE"

    # The second copy within a node outlives a write.
    second = engine_of("zero3_nodes")
    with torch.no_grad():
        former = second(batch(0))
        assert second.module.norm.weight.ds_secondary_tensor is not None
        second.module.norm.weight.ds_tensor.mul_(2.0)
        assert torch.equal(second(batch(0)), former)


def test_the_attributes_of_zero_3_are_what_a_run_takes_them_for(own_world) -> None:
    own_world(2).run(attributes_of_zero3)


class Cut(Exception):
    """Cuts a forward off."""


def cut_off(*_: object) -> None:
    raise Cut


def awkward_moments() -> None:
    from deepspeeded import batch, engine_of, imported, read_whole, train

    engine = engine_of("zero3_persistent")
    ema, naive = ShardedEMA(engine, SCHEDULE), NaiveAverage(SCHEDULE.momentum)
    followed(engine, [ema], naive, range(3))
    parameters = list(engine.module.parameters())
    with imported().zero.GatheredParameters(parameters[:1]):
        for call in (lambda: ShardedEMA(engine, SCHEDULE), ema.copy_to_model, lambda: ema.save("/nowhere")):
            with pytest.raises(ModelChangedError, match=r"within deepspeed\.zero\.GatheredParameters"):
                call()
        with pytest.raises(ModelChangedError, match="within deepspeed"), ema.average_parameters():
            pass
    live = read_whole(engine.module)
    with torch.no_grad():
        handle = engine.module.narrow.register_forward_pre_hook(cut_off)
        with pytest.raises(Cut):
            engine(batch(0))
        handle.remove()
        with ema.average_parameters():
            reference = Nasty(scalar=False)
            reference.load_state_dict(naive.values, strict=False)
            assert torch.equal(engine(batch(7)), reference(batch(7)))
    assert_same_bits(read_whole(engine.module), live)
    train(engine, 3)

    run, kind = engine.module.hidden.weight.ds_tensor, imported().runtime.zero.offload_config.OffloadDeviceEnum
    for attribute, value, told in (
        ("final_location", kind.nvme, "hidden.weight is offloaded to NVMe"),
        ("ds_quant_scale", torch.ones(1), "hidden.weight is quantised"),
    ):
        former = getattr(run, attribute, None)
        setattr(run, attribute, value)
        with pytest.raises(UnsupportedModelError, match=told):
            ShardedEMA(engine, SCHEDULE)
        setattr(run, attribute, former) if attribute == "final_location" else delattr(run, attribute)
    engine.module.hidden.weight.ds_tensor = run[:-1]
    with pytest.raises(UnsupportedModelError, match=r"hidden.weight is cut .* in runs of \d+ of 35 elements over 2"):
        ShardedEMA(engine, SCHEDULE)
    engine.module.hidden.weight.ds_tensor = run
    with pytest.raises(UnsupportedModelError, match="is partitioned by DeepSpeed ZeRO-3, whose runs have no form"):
        ema.sharded_state_dict()


def test_gathered_blocks_and_forwards_cut_off_do_not_mix_live_weights_and_averages(own_world) -> None:
    own_world(2).run(awkward_moments)


# Masters


def where_masters_lie() -> None:
    from deepspeeded import engine_of, read_whole, train

    rank, size = dist.get_rank(), dist.get_world_size()
    for kind in ("zero1_bf16", "zero2_bf16", "bf16"):
        engine = engine_of(kind)
        train(engine, 0)
        held = 0
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                assert not hasattr(parameter, "_hp_mapping"), name
                continue
            assert dist.get_process_group_ranks(parameter._dp_group) == list(range(size))
            run_numel = parameter.untyped_storage().nbytes() // parameter.element_size() // size
            if (mapping := parameter._hp_mapping) is not None:
                address = mapping.lp_fragment_address
                live = parameter.detach().flatten()[address.start : address.start + address.numel]
                assert torch.equal(mapping.hp_fragment.bfloat16(), live)
                assert rank * run_numel <= parameter.storage_offset() + address.start < (rank + 1) * run_numel
                held += address.numel
        total = torch.tensor(held)
        dist.all_reduce(total)
        assert total == sum(each.numel() for each in engine.module.parameters() if each.requires_grad)
    engine = engine_of("zero3_bf16")
    train(engine, 0)
    optimizer = engine.optimizer
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            group, start, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            masters = optimizer.fp32_partitioned_groups_flat[group][start : start + numel]
            held = min(numel, max(parameter.ds_numel - rank * numel, 0))  # without padding
            assert torch.equal(masters[:held].bfloat16(), parameter.ds_tensor[:held])
    for kind in ("none_fp16", "none_bf16"):
        engine = engine_of(kind)
        train(engine, 0)
        live = read_whole(engine.module)
        trained = [name for name, each in engine.module.named_parameters() if each.requires_grad]
        (group,), (of_group,) = engine.optimizer.fp16_groups, engine.optimizer.fp32_groups
        assert [id(each) for each in group] == [id(engine.module.get_parameter(name)) for name in trained]
        assert_same_bits(live, {name: one.to(live[name].dtype) for name, one in zip(trained, of_group, strict=True)})


def test_the_masters_lie_where_these_attributes_say(own_world) -> None:
    own_world(2).run(where_masters_lie)


def masters_life(kind: str, folder: str, whole_engine: bool) -> None:
    from deepspeeded import engine_of, masters, read_whole, train

    engine = engine_of(kind)
    model = engine if whole_engine else engine.module
    ema, naive = ShardedEMA(model, SCHEDULE, masters=True, exclude="narrow.bias"), NaiveAverage(SCHEDULE.momentum)
    averaged_live = ShardedEMA(model, SCHEDULE)
    differs = False
    for step in range(4):
        train(engine, step)
        with CommDebugMode() as traffic:
            ema.update()
        assert traffic.get_total_counts() == 0
        whole = masters(engine)
        naive.update(whole)
        averaged_live.update()
        differs |= any(not torch.equal(whole[name], value.float()) for name, value in read_whole(model).items())
    live = read_whole(model)
    assert differs == (live["hidden.weight"].dtype != torch.float32), "of the harness"
    not_averaged = naive.values.pop("narrow.bias")
    on_rank_0(ema.full_state_dict(), naive.values)
    dtype = live["hidden.weight"].dtype
    with ema.average_parameters():
        inside = read_whole(model)
        assert_same_bits(inside, {name: value.to(dtype) for name, value in naive.values.items()})
        assert torch.equal(inside["narrow.bias"], live["narrow.bias"]) and not_averaged.numel() == 1
    assert_same_bits(read_whole(model), live)
    ema.save(folder)
    if dist.get_rank() == 0:
        assert_same_bits(load_file(os.path.join(folder, "model.safetensors")), naive.values)
    resumed = ShardedEMA(model, SCHEDULE, masters=True, exclude="narrow.bias")
    resumed.load(folder)
    train(engine, 4)
    whole = masters(engine)
    naive.update({name: whole[name] for name in naive.values})
    for each in (ema, resumed):
        each.update()
        on_rank_0(each.full_state_dict(), naive.values)
    # For good: without it the next step would write the masters of before over the average.
    ema.copy_to_model()
    engine.optimizer.refresh_fp32_params()
    whole = masters(engine)
    assert_same_bits(
        {name: whole[name].float() for name in naive.values},
        {name: value.to(dtype).float() for name, value in naive.values.items()},
    )


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *(("zero1_bf16", size) for size in (2, 3)),
        *(("zero2_bf16", size) for size in (2, 3)),
        *(("zero3_bf16", size) for size in (2, 3)),
        *(
            (kind, 2)
            for kind in ("zero2", "zero2_fp16", "zero3_fp16", "zero3_offload", "bf16", "none_bf16", "none_fp16")
        ),
    ],
)
def test_masters_are_averaged_where_the_optimizer_has_them_and_shown_in_the_live_weights(
    own_world, tmp_path, kind, size
) -> None:
    own_world(size).run(masters_life, kind, str(tmp_path / "ema"), size == 2)


def without_masters() -> None:
    from deepspeeded import engine_of

    for model in (Nasty(scalar=False), engine_of("none")):
        with pytest.raises(ConfigError, match="no fp32 masters of DeepSpeed: give the engine"):
            ShardedEMA(model, SCHEDULE, masters=True)
    # There DeepSpeed's own record of the masters is that of another order than that of the live weights.
    with pytest.raises(UnsupportedModelError, match=r'where its masters lie is not .* without "round_robin_gradients"'):
        ShardedEMA(engine_of("zero2_round_robin"), SCHEDULE, masters=True)
    engine = engine_of("zero2")
    with pytest.raises(ConfigError, match="masters=True with into"):
        ShardedEMA(engine, SCHEDULE, masters=True, into=Nasty(scalar=False).requires_grad_(False))


def test_masters_that_are_not_there_are_refused_at_construction(own_world) -> None:
    own_world(2).run(without_masters)


# Through accelerate


@contextmanager
def accelerated(kind: str, *, accumulate: int = 1) -> Iterator[tuple[Any, Any, Any]]:
    """A fresh accelerator, engine and optimizer; what accelerate keeps per process is dropped before and after."""
    from accelerate.state import AcceleratorState, GradientState
    from cpu_deepspeed import deepspeed_on_cpu
    from deepspeeded import configuration, imported

    imported()
    torch.manual_seed(0)
    try:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        accelerator = deepspeed_on_cpu(
            configuration(kind, accumulate=accumulate), gradient_accumulation_steps=accumulate
        )
        model = Nasty(scalar=False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield accelerator, *accelerator.prepare(model, torch.optim.AdamW(trained, lr=0.01))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def micro_batch(accelerator: Any, engine: Any, optimizer: Any, step: int, factor: float = 1.0) -> None:
    from deepspeeded import batch

    with accelerator.accumulate(engine):
        accelerator.backward(engine(batch(step)).float().square().mean() * factor)
        optimizer.step()
        optimizer.zero_grad()


def attached_run(kind: str, whole_engine: bool, of_masters: bool) -> None:
    from deepspeeded import masters, read_whole

    with accelerated(kind, accumulate=2) as (accelerator, engine, optimizer):
        model = engine if whole_engine else engine.module
        ema = attach(accelerator, model, optimizer, SCHEDULE, masters=of_masters)
        naive = NaiveAverage(SCHEDULE.momentum)
        poisoned = 5 if kind.endswith("fp16") else None
        before = read_whole(engine.module)
        for step in range(10):
            micro_batch(accelerator, engine, optimizer, step, float("inf") if step == poisoned else 1.0)
            after = read_whole(engine.module)
            is_real = step % 2 == 1 and step != poisoned
            assert is_real == any(not torch.equal(after[name], before[name]) for name in after), "of the harness"
            if is_real:
                naive.update(masters(engine) if of_masters else after)
            before = after
            assert ema.num_updates == naive.num_updates
        on_rank_0(ema.full_state_dict(), naive.values)
        ema.detach()
        assert "step" not in vars(engine)
        for step in range(10, 12):
            micro_batch(accelerator, engine, optimizer, step)
        assert ema.num_updates == naive.num_updates


@pytest.mark.parametrize("kind", ["zero1", "zero2_fp16", "zero3", "zero3_persistent", "zero3_fp16", "none_bf16"])
def test_an_update_follows_each_step_of_the_engine_and_no_micro_batch_or_overflow(own_world, kind) -> None:
    """The hook of the inner optimizer fires before the live weights are written, and per sub-group under ZeRO-3."""
    own_world(2).run(attached_run, kind, kind != "zero3", False)


@pytest.mark.parametrize("kind", ["zero2_fp16", "zero3_bf16"])
def test_masters_are_averaged_after_each_step_of_the_engine_too(own_world, kind) -> None:
    own_world(2).run(attached_run, kind, False, True)


def interrupted_run(kind: str, folder: str) -> None:
    with accelerated(kind) as (accelerator, engine, optimizer):
        ema = attach(accelerator, engine, optimizer, SCHEDULE)
        for step in range(3):
            micro_batch(accelerator, engine, optimizer, step)
        accelerator.save_state(folder)
        for step in range(3, 6):
            micro_batch(accelerator, engine, optimizer, step)
        expected = ema.full_state_dict()
    with accelerated(kind) as (accelerator, engine, optimizer):
        ema = attach(accelerator, engine, optimizer, SCHEDULE)
        accelerator.load_state(folder)
        assert ema.num_updates == 3
        for step in range(3, 6):
            micro_batch(accelerator, engine, optimizer, step)
        assert ema.num_updates == 6
        assert_same_bits(ema.full_state_dict(), expected)


@pytest.mark.parametrize("kind", ["zero2", "zero3_persistent", "zero3_bf16"])
def test_save_state_of_deepspeed_has_the_average_and_a_resume_goes_on_bit_for_bit(own_world, tmp_path, kind) -> None:
    own_world(2).run(interrupted_run, kind, str(tmp_path / "checkpoint"))
    assert (tmp_path / "checkpoint" / "ema" / "manifest.json").exists()


def engines_refused() -> None:
    with accelerated("zero2") as (accelerator, engine, optimizer):
        other = AcceleratedOptimizer(torch.optim.SGD(engine.module.parameters(), lr=0.1))
        with pytest.raises(AttachError, match="not that of the model's DeepSpeed engine"):
            attach(accelerator, engine, other, SCHEDULE)
        with pytest.raises(AttachError, match="has not prepared"):
            attach(accelerator, Nasty(scalar=False), optimizer, SCHEDULE)


def test_an_optimizer_that_is_not_the_engines_is_refused(own_world) -> None:
    own_world(2).run(engines_refused)


# Across layouts


def saved_under(kind: str, folder: str) -> None:
    from deepspeeded import engine_of, train

    engine = engine_of(kind)
    ema = ShardedEMA(engine, SCHEDULE)
    for step in range(3):
        train(engine, step)
        ema.update()
    ema.save(folder)


def loaded_under(kind: str, folder: str, again: str) -> None:
    """Load, compare with the files, and save again: both folders have the same values."""
    from deepspeeded import engine_of
    from layouts_zoo import fsdp2

    torch.manual_seed(3)
    ema = ShardedEMA(fsdp2(Nasty(scalar=False)) if kind == "fsdp2" else engine_of(kind), SCHEDULE)
    ema.load(folder)
    assert ema.num_updates == 3
    ema.save(again)
    if dist.get_rank() == 0:
        former, latter = (load_file(os.path.join(path, "model.safetensors")) for path in (folder, again))
        parameters = {name: value for name, value in former.items() if name not in ("running", "count")}
        assert_same_bits(latter, parameters)


def test_what_zero_3_saved_fsdp2_loads_and_back_and_so_do_other_numbers_of_ranks(own_world, tmp_path) -> None:
    paths = [str(tmp_path / name) for name in ("saved", "fsdp2", "back", "whole", "three")]
    own_world(2).run(saved_under, "zero3", paths[0])
    own_world(2).run(loaded_under, "fsdp2", paths[0], paths[1])
    own_world(3).run(loaded_under, "zero3", paths[1], paths[2])
    own_world(2).run(loaded_under, "zero2", paths[2], paths[3])
    own_world(3).run(loaded_under, "zero3_persistent", paths[3], paths[4])
