"""Ranks that should hold the same weights and do not: refused, or warned about, before anything is written or shown."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import warnings
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from layouts_zoo import build_layout
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dist_ema import ConstantSchedule, RankMismatchError, ShardedEMA, UnsupportedModelError
from dist_ema.disk.formats.tensor_checksums import CHUNK_NUMEL, chunks, device_checksum, tensor_checksums
from dist_ema.live.holders import replicas as replicas_module

HALF = ConstantSchedule(momentum=0.5)
CAUSES = ("experts", "pipeline", "DistributedDataParallel", "broadcast")


class Experts(nn.Module):
    """A router that all ranks share, and one plain expert of each rank under the same name."""

    def __init__(self, *, own: bool, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(4, 4)
        torch.manual_seed(dist.get_rank() if own else 0)
        self.expert = nn.Linear(4, 4, bias=False).requires_grad_(not frozen)


def refused_from_the_start(kind: str) -> str:
    if kind == "expert":
        model, options = Experts(own=True), {}
    elif kind == "frozen expert":
        model, options = Experts(own=True, frozen=True), {}
    elif kind == "excluded expert":
        model, options = Experts(own=True), {"exclude": "expert.*"}
    elif kind == "bfloat16 expert":
        model, options = Experts(own=True).bfloat16(), {}
    elif kind == "integer table":
        model, options = Experts(own=False), {}
        table = torch.arange(4) + dist.get_rank()
        model.expert.table = nn.Parameter(table, requires_grad=False)
    else:  # no DDP, no broadcast of the initial weights
        torch.manual_seed(dist.get_rank())
        model, options = nn.Sequential(nn.Linear(4, 4)), {}
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(model, HALF, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "fqn"),
    [
        ("expert", "expert.weight"),
        ("frozen expert", "expert.weight"),
        ("excluded expert", "expert.weight"),
        ("bfloat16 expert", "expert.weight"),
        ("integer table", "expert.table"),
        ("no broadcast", "0.weight"),
    ],
)
def test_plain_tensors_that_each_rank_has_of_its_own_are_refused_by_name_at_construction(world, kind, fqn) -> None:
    messages = world(3).run(refused_from_the_start, kind)
    assert len(set(messages)) == 1
    assert f"{fqn} is not the same on rank 0 and rank 1, 2" in messages[0]
    assert all(cause in messages[0] for cause in CAUSES)


def whatever_wraps_it(wrapper: str) -> str:
    """The expert of each rank is kept out of what the wrapper synchronises."""
    model: nn.Module = Experts(own=True)
    ignored = {"ignored_states": [model.expert.weight]}
    if wrapper == "ddp that ignores it":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["expert.weight"])
        model = DistributedDataParallel(model)
    elif wrapper.startswith("fsdp1"):
        if wrapper == "fsdp1 that ignores the module":
            ignored = {"ignored_modules": [model.expert]}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch")
            model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True, **ignored)
    elif wrapper == "fsdp2 that ignores it":
        fully_shard(model, ignored_params={model.expert.weight})
    elif wrapper == "compile":
        model = torch.compile(model)
    elif wrapper == "data parallel":
        model = nn.DataParallel(model)
    elif wrapper == "a wrapper of one's own":
        model = nn.ModuleDict({"inner": model})
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(model, HALF)
    return str(caught.value)


@pytest.mark.parametrize(
    "wrapper",
    [
        "ddp that ignores it",
        "fsdp1 that ignores the tensor",
        "fsdp1 that ignores the module",
        "fsdp2 that ignores it",
        "compile",
        "data parallel",
        "a wrapper of one's own",
    ],
)
def test_an_expert_of_each_rank_is_refused_at_construction_whatever_wraps_the_model(world, wrapper) -> None:
    first, second = world(2).run(whatever_wraps_it, wrapper)
    assert first == second and "expert.weight is not the same on rank 0 and rank 1" in first
    assert "experts=[Experts(names, dim, group)]" in first


def other_layouts(layout: str) -> str:
    model = build_layout(layout)
    moved = 2 if dist.get_world_size() == 4 else 1
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
            if dist.get_rank() == moved and local.numel():
                local.view(-1)[local.numel() // 2] += 1.0
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(model, HALF)
    return str(caught.value)


@pytest.mark.parametrize(
    ("layout", "size"),
    [("hsdp", 4), ("fsdp_tp", 4), ("tp", 2), ("ddp", 2), ("fsdp1_no_shard", 2), ("fsdp1_hybrid", 4)],
)
def test_replicas_of_other_layouts_are_compared_too_and_every_element_of_them(world, layout, size) -> None:
    messages = world(size).run(other_layouts, layout)
    told = re.search(r"is not the same on rank (\d) and rank (\d),", messages[0])
    assert len(set(messages)) == 1 and told is not None
    if size == 2 or layout == "hsdp":
        assert told.groups() == (("0", "2") if size == 4 else ("0", "1"))


def drift(amount: float, call: str, folder: str) -> list[str]:
    """Replicas that have drifted apart a little: all that is warned about, from construction on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def move() -> None:
        with torch.no_grad():
            model[1].weight.mul_(1 + amount * dist.get_rank())
            model[0].bias.mul_(1 + amount * dist.get_rank() / 10)

    if call == "construction":
        move()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ema = ShardedEMA(model, HALF)
        ema.update()
        move()
        ema.save(folder)
        with ema.average_parameters():
            pass
        ema.save(folder)
        ema.consolidate(folder + "-export")
    return [str(each.message) for each in caught if "drifted" in str(each.message)]


@pytest.mark.parametrize("call", ["construction", "save"])
def test_replicas_that_have_drifted_apart_are_warned_about_once_with_the_worst_and_its_number(
    world, tmp_path, call
) -> None:
    first, second = world(2).run(drift, 1e-5, call, str(tmp_path / "ema"))
    assert len(first) == 1 and second == []
    assert "replicas of 2 tensors have drifted apart: the worst is 1.weight" in first[0]
    assert "relative L2 difference 1e-05 between rank 0 and rank 1" in first[0]
    assert (tmp_path / "ema" / "manifest.json").exists()


def on_the_edge(relative: float) -> str:
    model = nn.Linear(100, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        if dist.get_rank():
            model.weight[0, 50] += relative * math.sqrt(100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ShardedEMA(model, HALF)
        except UnsupportedModelError as error:
            return str(error)
    return ""


def test_a_thousandth_is_where_drift_ends(world) -> None:
    assert world(2).run(on_the_edge, 0.99e-3) == ["", ""]
    first, second = world(2).run(on_the_edge, 1.01e-3)
    assert first == second and "relative L2 difference 0.00101, allowed 0.001" in first


CALLS: dict[str, Callable[[ShardedEMA, str], object]] = {
    "save": lambda ema, folder: ema.save(folder),
    "save in the background": lambda ema, folder: (ema.save(folder, background=True), ema.wait()),
    "snapshot": lambda ema, folder: ema.snapshot(folder),
    "consolidate": lambda ema, folder: ema.consolidate(folder),
    "average_parameters": lambda ema, folder: ema.average_parameters().__enter__(),
    "copy_to_model": lambda ema, folder: ema.copy_to_model(),
    "sharded_state_dict": lambda ema, folder: ema.sharded_state_dict(),
    "full_state_dict": lambda ema, folder: ema.full_state_dict(),
}


def experts_that_part(folder: str) -> None:
    """They start alike, as a deep copy of one expert does, and are trained apart."""
    for name, call in CALLS.items():
        model = Experts(own=False)
        ema = ShardedEMA(model, HALF)
        with ema.average_parameters():  # an evaluation before training: they are alike
            pass
        for step in range(3):
            with torch.no_grad():
                model.expert.weight.add_(dist.get_rank() * step)
                model.router.weight.add_(step)
            ema.update()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        for _ in range(2):  # not the first time alone
            with pytest.raises(UnsupportedModelError, match=r"expert\.weight is not the same on rank 0 and rank 1"):
                call(ema, os.path.join(folder, name))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), name
        ema.update()  # not left swapped


def test_experts_that_start_alike_and_part_later_are_refused_before_anything_is_written_or_shown(
    world, tmp_path
) -> None:
    world(2).run(experts_that_part, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def saved_then_parted(folder: str) -> None:
    model = Experts(own=False)
    ema = ShardedEMA(model, HALF)
    ema.update()
    ema.save(folder)
    with torch.no_grad():
        model.expert.weight.add_(dist.get_rank())
    ema.update()
    with pytest.raises(UnsupportedModelError):
        ema.save(folder)


def test_every_save_compares_and_the_former_one_stays(world, tmp_path) -> None:
    world(2).run(saved_then_parted, str(tmp_path / "ema"))
    assert '"num_updates": 1' in (tmp_path / "ema" / "manifest.json").read_text()
    assert len(list(tmp_path.iterdir())) == 1


def non_finite(kind: str) -> str:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    with torch.no_grad():
        if kind == "alike":
            model.weight[0] = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
        elif kind == "alike, but for a drift":
            model.weight[0] = torch.tensor([math.nan, math.inf, -math.inf, 1.0 + 1e-6 * dist.get_rank()])
        elif dist.get_rank() == 1:
            model.weight[0, 0] = {"nan": math.nan, "inf": math.inf, "zero": -0.0}[kind]
        if kind == "zero" and dist.get_rank() == 0:
            model.weight[0, 0] = 0.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            ShardedEMA(model, HALF)
        except UnsupportedModelError as error:
            return str(error)
    return " ".join(str(each.message) for each in caught)


def test_a_nan_or_an_infinity_of_one_rank_is_refused_and_the_same_bits_on_all_are_alike(world) -> None:
    assert world(2).run(non_finite, "alike") == ["", ""]
    assert world(2).run(non_finite, "zero") == ["", ""], "minus zero is zero"
    assert "drifted" in world(2).run(non_finite, "alike, but for a drift")[0]
    assert "relative L2 difference nan" in world(2).run(non_finite, "nan")[1]
    assert "relative L2 difference inf" in world(2).run(non_finite, "inf")[1]


def odd_kinds() -> None:
    """Alike on both ranks, in every dtype that a parameter may have, and strides of each rank's own."""
    model = nn.Module()
    for index, dtype in enumerate((torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn)):
        torch.manual_seed(index)
        values = torch.randn(5, 3).to(dtype)
        model.register_parameter(f"p{index}", nn.Parameter(values, requires_grad=False))
    image = torch.randn(2, 3, 4, 5)
    if dist.get_rank():
        image = image.to(memory_format=torch.channels_last)
    model.image = nn.Parameter(image)
    model.scalar = nn.Parameter(torch.tensor(2.0))
    model.empty = nn.Parameter(torch.empty(0, 3))
    model.register_buffer("of_each_rank", torch.full((3,), float(dist.get_rank())))  # not compared
    ema = ShardedEMA(model, HALF, exclude=["p2", "p3", "p4"])  # warnings are errors here
    ema.update()
    ema.sharded_state_dict()


def test_replicas_that_are_alike_give_no_warning_whatever_their_dtypes_strides_and_buffers(world) -> None:
    world(2).run(odd_kinds)


def large(where: int) -> tuple[str, int, int]:
    """One element of a tensor of several chunks differs. Also the bytes that travelled."""
    model = nn.Module()
    model.large = nn.Parameter(torch.ones(3, CHUNK_NUMEL + 5))
    model.same = nn.Parameter(torch.ones(3, CHUNK_NUMEL + 5))
    with torch.no_grad():
        model.large.view(-1)[where] += dist.get_rank()
    sent: list[int] = []
    real = replicas_module.Wires.send

    def send(self, values, target):
        sent.append(values.numel())
        real(self, values, target)

    with (
        mock.patch.object(replicas_module.Wires, "send", send),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        ShardedEMA(model, HALF)
    return " ".join(str(each.message) for each in caught), max(sent, default=0), sum(sent)


@pytest.mark.parametrize("where", [0, CHUNK_NUMEL, 2 * CHUNK_NUMEL + 13, -1])
def test_values_travel_in_bounded_pieces_and_only_of_tensors_whose_checksums_differ(world, where) -> None:
    (told, largest, total), (_, largest_of_1, _) = world(2).run(large, where)
    assert "worst is large" in told and "replicas of 1 tensors" in told
    assert largest <= 4 * CHUNK_NUMEL and largest_of_1 == 0
    assert total == 4 * 3 * (CHUNK_NUMEL + 5)


def a_failure_between(kind: str) -> str:
    """Bringing a piece to the host fails on one rank only, while the other counts on its message."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    with torch.no_grad():
        model.weight.mul_(1 + 1e-5 * dist.get_rank())
    function = "_host_bytes" if kind == "piece" else "tensor_checksums"

    def fail(*arguments):
        raise RuntimeError("not enough memory: you tried to allocate 8388608 bytes")

    on_rank_0 = fail if dist.get_rank() == 0 else getattr(replicas_module, function)
    patch = mock.patch.object(replicas_module, function, on_rank_0)
    with patch, pytest.raises(Exception) as caught:
        ShardedEMA(model, HALF)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("kind", ["piece", "checksum"])
def test_a_rank_that_runs_out_of_memory_while_comparing_ends_the_call_on_all(world, kind) -> None:
    first, second = world(2).run(a_failure_between, kind)
    assert first == second and first.startswith("DistEMAError") and "not enough memory" in first


def stages_of_equal_names() -> str:
    """A pipeline whose stages count their layers from 0."""
    torch.manual_seed(dist.get_rank())
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(3, 3) for _ in range(2))})
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(model, HALF)
    return str(caught.value)


def experts_of_other_numbers() -> str:
    """Rank 1 has one more; the tensors of the others have equal names."""
    torch.manual_seed(dist.get_rank())
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(3, 3) for _ in range(2 + dist.get_rank()))})
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(model, HALF)
    return str(caught.value)


@pytest.mark.parametrize("case", [stages_of_equal_names, experts_of_other_numbers])
def test_stages_and_experts_of_equal_names_are_named_as_the_cause(world, case) -> None:
    first, second = world(2).run(case)
    assert first == second and "layers.0.weight is not the same on rank 0 and rank 1" in first
    assert "stage of a pipeline" in first and "experts" in first


def experts_of_other_sizes() -> str:
    model = nn.ModuleDict({"experts": nn.Linear(3, 3 + dist.get_rank())})
    with pytest.raises(RankMismatchError) as caught:
        ShardedEMA(model, HALF)
    return str(caught.value)


def test_tensors_of_one_name_and_other_sizes_are_refused_with_the_way_to_go(world) -> None:
    first, second = world(2).run(experts_of_other_sizes)
    assert first == second and "experts.weight is a parameter of [3, 3]" in first and "[4, 3]" in first
    assert "stages of a pipeline" in first and "experts=[Experts(names, dim, group)]" in first


def test_a_checksum_of_a_device_sees_what_replicas_may_differ_in() -> None:
    torch.manual_seed(0)

    def told(values: torch.Tensor) -> int:
        assert device_checksum(values).item() == device_checksum(values.clone()).item()
        return int(device_checksum(values))

    values = torch.randn(100, 30)
    assert told(values) == told(values.t().contiguous().t())
    others = [-values, values.flip(0), values[torch.randperm(100)], values + 0.0 * values.sign() + 1e-7]
    swapped = values.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    signs = values.clone()
    signs[::2] *= -1  # an even number of flipped signs adds up to nothing in a plain sum
    assert len({told(each) for each in (values, swapped, signs, *others)}) == 7
    for dtype in (torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float64):
        for numel in (0, 1, 3, 8, 1001):
            offset = torch.randn(numel + 3).to(dtype)[3:]  # not aligned to 8 bytes
            assert told(offset) == told(offset.clone())
            assert tensor_checksums([offset]) == tensor_checksums([offset.clone()])


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (5,), (7, 3), (2, 20), (3, 1, 17), (2, 3, 7, 2)])
def test_where_pieces_are_cut_the_shape_alone_tells(shape) -> None:
    with mock.patch.object(replicas_module, "CHUNK_NUMEL", 16):
        sizes = replicas_module._sizes(shape)
    values = torch.arange(float(math.prod(shape))).view(shape)
    pieces = list(chunks(values, 16))
    assert [piece.numel() for piece in pieces] == sizes
    assert torch.equal(torch.cat(pieces), values.reshape(-1))


def shared_with_rank_dependent_layouts() -> None:
    """DDP, replicated DTensors and FSDP1 that keeps nothing alike but by its own means: no new warning."""
    torch.manual_seed(dist.get_rank())
    ShardedEMA(DistributedDataParallel(nn.Linear(3, 2)), HALF)  # broadcasts
    torch.manual_seed(dist.get_rank())
    model = nn.Linear(3, 2)
    mesh = init_device_mesh("cpu", (2,))
    model.weight = nn.Parameter(distribute_tensor(model.weight.data, mesh, [Replicate()]))  # broadcasts
    model.bias = None
    ShardedEMA(model, HALF)
    torch.manual_seed(dist.get_rank())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        sharded = FullyShardedDataParallel(nn.Linear(3, 2), device_id=torch.device("cpu"))
    ShardedEMA(sharded, HALF)  # each rank its shard, of other weights: no replicas


def test_what_wrappers_keep_alike_or_hold_once_is_not_warned_about(world) -> None:
    world(2).run(shared_with_rank_dependent_layouts)


def test_an_error_names_the_first_ranks_that_differ_and_counts_the_others_whatever_was_combined_first() -> None:
    """A thousand ranks without a broadcast of the initial weights; every third has only drifted."""
    own = [
        {"key": ("w", 0, [], 0, [(rank, rank / 1e7)]) if rank % 3 == 0 else ("w", 0, [(rank, float(rank))], 1, [])}
        for rank in range(1, 1000)
    ]
    for fan_in in (2, 7, 128, 1000):
        level = json.loads(json.dumps([{}, *own]))
        while len(level) > 1:
            groups = [level[at : at + fan_in] for at in range(0, len(level), fan_in)]
            level = json.loads(json.dumps([functools.reduce(replicas_module._with_further_ranks, g) for g in groups]))
        difference = replicas_module._Difference(*level[0]["key"])
        assert difference.worst == [[999, 999 / 1e7]] and difference.num_refused == 666
        told = replicas_module._refusal("save", difference)
        assert "rank 0 and rank 1, 2, 4, 5, 7, 8, 10, 11 and 658 further ranks, which" in told
        assert "relative L2 difference 1, allowed" in told and len(told) < 700
