"""Stages of real pipelines: each rank has other names, the files have them all, and any other split reads them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from accelerated import accelerator_of
from oracle import NaiveAverage
from pipelines import (
    BATCH,
    MICRO_BATCHES,
    SYMBOLS,
    TIME,
    Pipeline,
    assert_equal,
    loss,
    num_elements,
    part,
    shard,
    whole_model,
    whole_tensors,
)
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, SplitPoint, pipeline
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from dist_ema import AttachError, CosineSchedule, ShardedEMA, UnsupportedModelError, attach

SCHEDULE = CosineSchedule(0.3, 0.01, total_steps=6)
NUM_STEPS = 3


def trained(made: Pipeline, given: object, folder: str) -> int:
    """Train, average, swap, restore, save, export, show a state dict. Returns the averaged bytes of this rank."""
    ema, naive = ShardedEMA(given, SCHEDULE), NaiveAverage(SCHEDULE.momentum)
    for number in range(NUM_STEPS):
        made.step(number)
        naive.update(whole_tensors(made.parts))
        with CommDebugMode() as counted:
            ema.update()
        assert counted.get_total_counts() == 0
    live = whole_tensors(made.parts, buffers=True)
    with ema.average_parameters():
        assert_equal(whole_tensors(made.parts), naive.values)
        made.evaluate()  # the pipeline itself runs on the averages
    assert_equal(whole_tensors(made.parts, buffers=True), live)
    made.step(NUM_STEPS)  # it trains on
    ema.save(folder)
    buffers = {
        name: value for name, value in whole_tensors(made.parts, buffers=True).items() if name not in naive.values
    }
    files = load_file(f"{folder}/model.safetensors")
    assert_equal(files, naive.values | buffers)
    ema.consolidate(f"{folder}-export", dtype=torch.bfloat16)
    exported = load_file(f"{folder}-export/model.safetensors")
    assert_equal(
        {name: exported[name] for name in naive.values},
        {name: value.bfloat16() for name, value in naive.values.items()},
    )
    state = ema.full_state_dict()
    assert dist.get_rank() != 0 or all(torch.equal(state[name], value) for name, value in naive.values.items())
    sharded = ema.sharded_state_dict()
    assert sharded.keys() == {name for module in made.parts for name in module.state_dict()}
    # The names are those of the model as one piece.
    whole_model(made.parts[0].tied).load_state_dict(files)
    return ema.nbytes


def trains(split: str, tied: bool, folder: str, kind: str) -> int:
    made = Pipeline(split, tied, Schedule1F1B if kind == "1f1b" else ScheduleGPipe)
    given = {"stage": made.stages[0], "stages": made.stages}.get(kind, made.parts)
    return trained(made, given, folder)


CELLS = [
    (2, "2", False, "gpipe"),
    (2, "2", False, "1f1b"),
    (2, "2", False, "stage"),
    (2, "2", True, "gpipe"),
    (2, "4", False, "stages"),
    (2, "4", True, "parts"),
    (4, "4", False, "1f1b"),
    (4, "2 x fsdp2", False, "gpipe"),
    (4, "2 x fsdp2", True, "stage"),
    (4, "4 x fsdp2", False, "parts"),
    (4, "4 x fsdp2", True, "stages"),
]


@pytest.mark.parametrize(("size", "split", "tied", "kind"), CELLS, ids=lambda value: str(value))
def test_a_pipeline_averages_swaps_and_saves_the_whole_model_exactly(world, tmp_path, size, split, tied, kind) -> None:
    owned = world(size).run(trains, split, tied, str(tmp_path / "ema"), kind)
    assert sum(owned) == 4 * num_elements(whole_model(tied))  # nothing is averaged twice
    # Rank 0 and the last one share the embedding, where it is tied; else a rank owns what its stage has.
    assert min(owned) > 0


def saved_by(split: str, tied: bool, folder: str) -> None:
    trained(made := Pipeline(split, tied), made.parts, folder)


def loaded(layout: str, tied: bool, folder: str) -> None:
    """Load what a pipeline saved, see it in the model, and write the very same file."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    if layout in ("plain", "ddp", "fsdp2"):
        model: nn.Module = whole_model(tied)
        if layout == "fsdp2":
            shard(model, mesh)
        parts = [model]
        given: object = DistributedDataParallel(model) if layout == "ddp" else model
    elif layout == "uneven":  # three stages of the four layers
        parts = [part(dist.get_rank(), size, tied)]
        given = parts[0]
    else:
        parts = given = Pipeline(layout, tied).parts
    ema, files = ShardedEMA(given, SCHEDULE), load_file(f"{folder}/model.safetensors")
    ema.load(folder)
    assert ema.num_updates == NUM_STEPS
    with ema.average_parameters():
        averaged = whole_tensors(parts)
    assert_equal(averaged, {name: files[name] for name in averaged})
    assert averaged.keys() == dict(whole_model(tied).named_parameters()).keys()
    again = f"{folder}-{layout}-{size}".replace(" ", "")
    ema.save(again)
    written = load_file(f"{again}/model.safetensors")
    assert_equal({name: written[name] for name in averaged}, averaged)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("size", "split"), [(2, "4"), (4, "2 x fsdp2")], ids=["4 on 2", "2 x fsdp2"])
def test_what_a_pipeline_saved_is_loaded_by_every_other_split(world, tmp_path, size, split, tied) -> None:
    folder = str(tmp_path / "ema")
    world(size).run(saved_by, split, tied, folder)
    for others, layouts in {
        1: ["plain"],
        2: ["ddp", "fsdp2", "2", "4"],
        3: ["fsdp2", "uneven"],
        4: ["ddp", "fsdp2", "4", "2 x fsdp2", "4 x fsdp2"],
    }.items():
        for layout in layouts:
            world(others).run(loaded, layout, tied, folder)


def whole_saved_is_read_by_stages(folder: str) -> None:
    model = whole_model()
    shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    ema = ShardedEMA(model, SCHEDULE)
    ema.update()
    ema.save(folder)


def test_a_pipeline_goes_on_from_what_fsdp2_saved(world, tmp_path) -> None:
    folder = str(tmp_path / "ema")
    world(3).run(whole_saved_is_read_by_stages, folder)
    world(4).run(stages_read, folder)


def stages_read(folder: str) -> None:
    made = Pipeline("4 x fsdp2")
    ema = ShardedEMA(made.parts, SCHEDULE)
    ema.load(folder)
    with ema.average_parameters():
        files = load_file(f"{folder}/model.safetensors")
        averaged = whole_tensors(made.parts)
        assert_equal(averaged, {name: files[name] for name in averaged})


def traced(folder: str) -> list[str]:
    """A model that `pipeline` has cut, in the stage module and in the stage that torch makes of it."""
    rank, tokens = dist.get_rank(), torch.zeros(BATCH // MICRO_BATCHES, TIME, dtype=torch.long)
    model = nn.Sequential(nn.Embedding(SYMBOLS, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, SYMBOLS))
    expected = {name: tuple(value.shape) for name, value in model.named_parameters()}
    pipe = pipeline(model, (tokens,), split_spec={"2": SplitPoint.BEGINNING})
    module, stage = pipe.get_stage_module(rank), pipe.build_stage(rank, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, MICRO_BATCHES, loss_fn=loss)
    averages, naive = (
        [ShardedEMA(given, SCHEDULE) for given in (module, stage, [module])],
        NaiveAverage(SCHEDULE.momentum),
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for number in range(NUM_STEPS):
        tokens = torch.randint(0, SYMBOLS, (2, BATCH, TIME), generator=torch.Generator().manual_seed(number))
        schedule.step(*([tokens[0]] if rank == 0 else []), **({"target": tokens[1]} if rank else {}))
        optimizer.step()
        optimizer.zero_grad()
        naive.update(whole_tensors([module]))
        for ema in averages:
            ema.update()
    assert {name: tuple(value.shape) for name, value in naive.values.items()} == expected
    for number, ema in enumerate(averages):
        ema.save(f"{folder}-{number}")
        assert_equal(load_file(f"{folder}-{number}/model.safetensors"), naive.values)
    return sorted({shard.fqn for shard in averages[1].shards})


def test_what_torch_has_cut_keeps_the_names_of_the_model(world, tmp_path) -> None:
    first, second = world(2).run(traced, str(tmp_path / "ema"))
    assert (first, second) == (["0.weight", "1.bias", "1.weight"], ["3.bias", "3.weight"])


def torn_ties(folder: str) -> str:
    made = Pipeline("2", True)
    ema = ShardedEMA(made.parts, SCHEDULE)
    made.step(0, ties=False)
    ema.update()
    with pytest.raises(UnsupportedModelError) as caught:
        ema.save(folder)
    return str(caught.value)


def test_tied_embeddings_that_go_apart_are_refused_by_name(world, tmp_path) -> None:
    first, second = world(2).run(torn_ties, str(tmp_path / "ema"))
    assert first == second and "embed.weight is not the same on rank 0 and rank 1" in first
    assert not (tmp_path / "ema").exists()


def two_copies_on_a_rank() -> str:
    parts = Pipeline("4").parts
    parts[1].temperature = parts[1].temperature.clone()
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(parts, SCHEDULE)
    return str(caught.value)


def test_a_buffer_that_every_part_of_a_rank_copies_is_refused_with_the_way_out(world) -> None:
    first, second = world(2).run(two_copies_on_a_rank)
    assert first == second and "called 'temperature'" in first and "let these parts share it" in first


def begun_apart() -> str:
    made = Pipeline("2", True)
    with torch.no_grad():
        if dist.get_rank():
            made.parts[0].embed.weight.add_(1.0)
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(made.parts, SCHEDULE)
    return str(caught.value)


def test_tied_embeddings_that_begin_apart_are_refused_at_construction(world) -> None:
    first, second = world(2).run(begun_apart)
    assert first == second and "embed.weight is not the same on rank 0 and rank 1" in first


def attached(folder: str, of_stages: bool) -> int:
    """accelerate has no pipeline for training: it prepares optimizer and parts, and wraps none of them."""
    with accelerator_of("ddp") as accelerator:
        made = Pipeline("4", True)
        for module in made.parts:
            assert accelerator.prepare_model(module, device_placement=False, evaluation_mode=True) is module
        optimizer = accelerator.prepare(made.optimizer)
        given = made.stages if of_stages else made.parts
        ema, naive = attach(accelerator, given, optimizer, SCHEDULE), NaiveAverage(SCHEDULE.momentum)
        made.optimizer = optimizer
        for number in range(NUM_STEPS):
            made.step(number)
            naive.update(whole_tensors(made.parts))
        assert ema.num_updates == NUM_STEPS
        accelerator.save_state(folder)
        files = load_file(f"{folder}/ema/model.safetensors")
        assert_equal({name: files[name] for name in naive.values}, naive.values)
        made.step(NUM_STEPS)
        ema.load(f"{folder}/ema")  # load_state would give every rank the stage of the main process
        assert ema.num_updates == NUM_STEPS
        with ema.average_parameters():
            assert_equal(whole_tensors(made.parts), naive.values)
        ema.detach()
    return ema.num_updates


@pytest.mark.parametrize("of_stages", [False, True])
def test_parts_are_attached_as_one_model(world, tmp_path, of_stages) -> None:
    assert world(2).run(attached, str(tmp_path / "state"), of_stages) == [NUM_STEPS, NUM_STEPS]


def unprepared_part() -> str:
    with accelerator_of("ddp") as accelerator:
        parts = Pipeline("4").parts
        accelerator.prepare_model(parts[0], device_placement=False, evaluation_mode=True)
        optimizer = accelerator.prepare(torch.optim.SGD(parts[0].parameters(), lr=0.1))
        with pytest.raises(AttachError) as caught:
            attach(accelerator, parts, optimizer, SCHEDULE)
    return str(caught.value)


def test_a_part_that_was_not_prepared_is_refused_on_all_ranks(world) -> None:
    first, second = world(2).run(unprepared_part)
    assert first == second and "model is a Transformer that this accelerator has not prepared" in first
