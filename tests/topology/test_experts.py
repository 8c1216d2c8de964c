"""Experts that each rank has of its own: plain tensors under equal names, as `experts=` declares them."""

from __future__ import annotations

import collections
import os
import re
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layouts_zoo import read_whole, set_whole, settle
from oracle import NaiveAverage
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from dist_ema import (
    CheckpointMismatchError,
    ConfigError,
    CosineSchedule,
    DistEMAError,
    Experts,
    ShardedEMA,
    UnsupportedModelError,
)

SCHEDULE = CosineSchedule(0.3, 0.01, total_steps=8)
NUM_EXPERTS = 12
PER_EXPERT = 3


def values_of(name: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
    return torch.randn(shape, generator=generator)


class Expert(nn.Module):
    """Two numbered layers, so that a name has two numbers; a bias tied to that of the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, PER_EXPERT), nn.Linear(PER_EXPERT, PER_EXPERT))
        self.net[1].bias = self.net[0].bias
        self.register_buffer("load", torch.zeros(2))


class Mixture(nn.Module):
    """A router that all ranks share, and experts of this rank: stacked along dim 0 and dim 1, and in a list."""

    def __init__(self, num_local: int) -> None:
        super().__init__()
        self.router = nn.Linear(4, NUM_EXPERTS)
        self.w1 = nn.Parameter(torch.zeros(num_local, 3, 4))
        self.w2 = nn.Parameter(torch.zeros(3, 2 * num_local))
        self.w3 = nn.Parameter(torch.zeros(num_local, 5, dtype=torch.bfloat16), requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(num_local, 0))
        self.register_buffer("load", torch.zeros(num_local))
        self.experts = nn.ModuleList(Expert() for _ in range(num_local))


def declared(group: Any = None) -> list[Experts]:
    return [
        Experts(["w[13]", "empty", "load"], dim=0, group=group),
        Experts("w2", dim=-1, group=group),
        Experts("experts.{}.*", dim=None, group=group),
    ]


class Whole:
    """The whole model, and the part of a rank in it, by slices of whole tensors alone."""

    def __init__(self, num_groups_ranks: int, position: int) -> None:
        self.num_local, self.position = NUM_EXPERTS // num_groups_ranks, position
        torch.manual_seed(0)
        self.model = Mixture(self.num_local)
        self.shapes = {name: tuple(value.shape) for name, value in Mixture(NUM_EXPERTS).state_dict().items()}
        self.dtypes = {name: value.dtype for name, value in Mixture(1).state_dict().items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.dtypes[re.sub(r"experts\.\d+", "experts.0", name)]

    def of_rank(self, name: str, whole: dict[str, torch.Tensor]) -> torch.Tensor:
        """What this rank has under one of its own names."""
        first, num_local = self.position * self.num_local, self.num_local
        if name.startswith("experts."):
            _, number, rest = name.split(".", 2)
            return whole[f"experts.{first + int(number)}.{rest}"]
        if name == "w2":
            return whole[name][:, 2 * first : 2 * (first + num_local)]
        return whole[name] if name.startswith("router") else whole[name][first : first + num_local]

    @torch.no_grad()
    def set(self, step: int) -> dict[str, torch.Tensor]:
        whole = {name: values_of(name, shape, step).to(self.dtype(name)) for name, shape in self.shapes.items()}
        for name in list(whole):
            if name.endswith("net.1.bias"):
                whole[name] = whole[name.replace("net.1", "net.0")]
        for name, value in self.model.state_dict().items():
            value.copy_(self.of_rank(name, whole))
        return whole

    def shows(self, averages: dict[str, torch.Tensor]) -> None:
        for name, value in self.model.state_dict().items():
            expected = self.of_rank(name, averages)
            assert torch.equal(value, expected.to(value.dtype)), name


def is_buffer(name: str) -> bool:
    return name.endswith("load")


def placed(num_in_group: int) -> tuple[Whole, Any]:
    """The part of this rank, and its group; the ranks of one place in their groups hold copies."""
    size = dist.get_world_size()
    if num_in_group == size:
        return Whole(num_in_group, dist.get_rank()), None
    mesh = init_device_mesh("cpu", (size // num_in_group, num_in_group), mesh_dim_names=("dp", "ep"))
    return Whole(num_in_group, dist.get_rank() % num_in_group), mesh["ep"].get_group()


def averaged_and_saved(num_in_group: int, folder: str) -> None:
    """Groups of this many ranks hold different experts; the other ranks hold copies of them."""
    whole, group = placed(num_in_group)
    ema, naive = None, NaiveAverage(SCHEDULE.momentum)
    for step in range(4):
        live = whole.set(step)
        if ema is None:
            ema = ShardedEMA(whole.model, SCHEDULE, experts=declared(group))
        with CommDebugMode() as counted:
            ema.update()
        assert counted.get_total_counts() == 0
        naive.update({name: value for name, value in live.items() if not is_buffer(name)})
    averages = naive.values | {name: value for name, value in live.items() if is_buffer(name)}
    assert ema is not None
    with ema.average_parameters():
        whole.shows(averages)
    whole.shows(live)
    ema.save(folder)
    ema.consolidate(folder + "-export", dtype=torch.bfloat16)
    dist.barrier()
    saved = load_file(os.path.join(folder, "model.safetensors"))
    tied = {name for name in averages if name.endswith("net.1.bias")}
    assert saved.keys() == averages.keys() - tied
    assert all(torch.equal(value, averages[name]) for name, value in saved.items())
    exported = load_file(os.path.join(folder + "-export", "model.safetensors"))
    assert all(torch.equal(value, averages[name].bfloat16()) for name, value in exported.items())
    of_the_user = Mixture(NUM_EXPERTS)  # one process loads the files with a plain load_state_dict
    of_the_user.load_state_dict(saved | {name: saved[name.replace("net.1", "net.0")] for name in tied}, strict=True)
    gathered = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert all(torch.equal(gathered[name], value) for name, value in averages.items())
    total = torch.tensor([sum(shard.box.numel for shard in ema.shards)])
    dist.all_reduce(total)
    assert total.item() == sum(value.numel() for name, value in naive.values.items() if name not in tied)


def loaded_again(num_in_group: int, folder: str) -> None:
    """By groups of another size, and a step on."""
    whole, group = placed(num_in_group)
    whole.set(9)
    ema = ShardedEMA(whole.model, SCHEDULE, experts=declared(group))
    ema.load(folder)
    saved = load_file(os.path.join(folder, "model.safetensors"))
    naive = NaiveAverage(SCHEDULE.momentum)
    naive.values, naive.num_updates = {name: saved[names_alike(name)] for name in whole.shapes}, 4
    live = whole.set(10)
    naive.update(live)
    ema.update()
    with ema.average_parameters():
        whole.shows(naive.values | {name: value for name, value in live.items() if is_buffer(name)})


def names_alike(name: str) -> str:
    """The name that the files have of a tied tensor."""
    return name.replace("net.1.bias", "net.0.bias")


GROUPS = [(1, 1), (2, 2), (3, 3), (4, 2)]


@pytest.mark.parametrize(("size", "num_in_group"), GROUPS)
def test_experts_of_each_rank_are_averaged_swapped_and_saved_as_whole_tensors(
    world, tmp_path, size, num_in_group
) -> None:
    world(size).run(averaged_and_saved, num_in_group, str(tmp_path / "ema"))
    for other, number in GROUPS:
        world(other).run(loaded_again, number, str(tmp_path / "ema"))


def as_dcp_has_it(num_in_group: int, folder: str, write: bool) -> None:
    """Another tool's checkpoint of what `sharded_state_dict` shows; read by groups of another size."""
    whole, group = placed(num_in_group)
    live = whole.set(0 if write else 5)
    ema = ShardedEMA(whole.model, SCHEDULE, experts=declared(group), dtype=torch.float64)
    ema.update()
    if write:
        dcp.save(ema.sharded_state_dict(), checkpoint_id=folder)
        return
    state = ema.sharded_state_dict()
    dcp.load(state, checkpoint_id=folder)
    ema.load_sharded_state_dict(state, num_updates=1)
    with ema.average_parameters():
        of_step_0 = {name: values_of(names_alike(name), whole.shapes[name], 0).to(whole.dtype(name)) for name in live}
        whole.shows({name: value for name, value in of_step_0.items() if not is_buffer(name)} | buffers_of(live))
    if num_in_group > 1:
        plain = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
        with pytest.raises(CheckpointMismatchError, match=r"sharded along dim 0 over the ranks of its group"):
            ema.load_sharded_state_dict(plain)


def buffers_of(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in values.items() if is_buffer(name)}


@pytest.mark.parametrize(("size", "num_in_group"), [(2, 2), (4, 2)])
def test_a_checkpoint_of_dcp_has_all_experts_and_not_those_of_one_rank(world, tmp_path, size, num_in_group) -> None:
    world(size).run(as_dcp_has_it, num_in_group, str(tmp_path), True)
    for other, number in ((2, 2), (3, 3), (1, 1)):
        world(other).run(as_dcp_has_it, number, str(tmp_path), False)


class Stacked(nn.Module):
    def __init__(self, rows: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(3, 3)
        torch.manual_seed(dist.get_rank())
        self.w = nn.Parameter(torch.randn(rows, 3))
        self.list = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(2))


LISTED = Experts("list.{}.*", dim=None)


def some_of_them_chosen(folder: str) -> None:
    """Names are those of the files: expert 3 is on rank 1 alone."""
    model = Stacked()
    ema = ShardedEMA(model, SCHEDULE, experts=[Experts("w", 0), LISTED], exclude=["list.3.*", "w"])
    assert not {"list.3.weight", "w"} & {shard.fqn for shard in ema.shards}
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        ema.update()
    live = {name: value.clone() for name, value in model.state_dict().items()}
    with ema.average_parameters():
        unchanged = {name for name, value in model.state_dict().items() if torch.equal(value, live[name])}
    assert unchanged == ({"w", "list.1.weight"} if dist.get_rank() else {"w"})
    ema.save(folder)
    for pattern in ("list.4.*", "list.3.bias"):
        with pytest.raises(ConfigError, match=f"exclude has the pattern '{pattern}', which matches none"):
            ShardedEMA(model, SCHEDULE, experts=[Experts("w", 0), LISTED], exclude=pattern)


def test_include_and_exclude_mean_the_names_in_the_files(world, tmp_path) -> None:
    world(2).run(some_of_them_chosen, str(tmp_path / "ema"))
    assert load_file(tmp_path / "ema" / "model.safetensors")["w"].shape == (4, 3)


def misfit(kind: str) -> str:
    rank, model = dist.get_rank(), Stacked()
    of_rank_0 = dist.new_group([0])
    experts: Any = [Experts("w", dim=0), LISTED]
    if kind == "matches nothing":
        experts[0] = Experts(["w", "w9"], dim=0)
    elif kind == "matches nothing in a list":
        experts[1] = Experts("lists.{}.*", dim=None)
    elif kind == "no such dim":
        experts[0] = Experts("w", dim=2)
    elif kind == "a group of others":
        experts[0] = Experts("w", dim=0, group=of_rank_0)
    elif kind == "no group":
        experts[0] = Experts("w", dim=0, group=(0, 1))
    elif kind == "a DTensor":
        model.w = nn.Parameter(distribute_tensor(model.w.data, init_device_mesh("cpu", (2,)), [Shard(0)]))
    elif kind == "in FSDP":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch")
            model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    elif kind == "twice":
        experts += [Experts(["router.*", "?"], dim=1)]
    elif kind == "patterns differ":
        experts[0] = Experts("w" if rank else "[w]", dim=0)
    elif kind == "dims differ":
        experts[0] = Experts("w", dim=rank)
    elif kind == "one rank declares":
        experts = experts if rank else []
    elif kind == "sizes differ":
        model = Stacked(2 + rank)
    elif kind == "numbers of all ranks":
        model.list = nn.ModuleDict({str(number): nn.Linear(3, 3) for number in (2 * rank, 2 * rank + 1)})
    elif kind == "tied to what is not numbered":
        model.other = nn.Module()
        model.other.weight = model.list[0].weight
    elif kind == "numbers on two sides":
        model.list = nn.ModuleList([nn.ModuleList([nn.Linear(3, 3, bias=False)])])
        experts[1] = Experts("list*.{}.*weight", dim=None)
    elif kind in ("fewer on rank 0", "fewer on rank 1"):
        torch.manual_seed(0)  # equal in content, too
        fewer = rank == int(kind[-1])
        model.list = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(1 if fewer else 2))
    elif kind == "in DDP":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["list.0.weight", "w"])
        model = DistributedDataParallel(model)
    with pytest.raises(DistEMAError) as caught:
        ShardedEMA(model, SCHEDULE, experts=experts)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("matches nothing", "experts has the pattern 'w9', which matches none"),
        ("matches nothing in a list", r"experts has the pattern 'lists\.{}\.\*', which matches none"),
        ("no such dim", r"w has shape \[2, 3\], and experts= declares it with dim=2"),
        (
            "a group of others",
            r"w is declared by experts= on rank 1 with the group .*expected a process group that this",
        ),
        ("no group", r"w is declared by experts= on rank 0 with the group \(0, 1\)"),
        ("a DTensor", r"w is a DTensor, and experts= declares it: .* Leave it out"),
        ("in FSDP", r"w is sharded by FSDP, and experts= declares it: .*ignored_states"),
        (
            "in DDP",
            r"list\.1\.weight is declared .* on each of the ranks 0, 1, but DistributedDataParallel keeps it",
        ),
        ("fewer on rank 0", r"list has 1 experts on this rank, .* the numbers 0, 2, 3 together: expected 0 to 1\."),
        ("fewer on rank 1", r"list has 2 experts on this rank, .* the numbers 0, 1 together: expected 0 to 3\."),
        ("twice", r"w is declared twice by experts=, by \('w',\) and by \('router\.\*', '\?'\)"),
        ("patterns differ", r"differ in experts.*'\[w\]'.* against .*'w'"),
        ("dims differ", r"differ in experts"),
        ("one rank declares", r"differ in experts"),
        ("sizes differ", r"w is a parameter of \[4, 3\] .* and a parameter of \[6, 3\] .*: two tensors of one name"),
        ("numbers of all ranks", r"list\.\* are numbered \[2, 3\] on rank 1, .* leave the declaration out"),
        ("tied to what is not numbered", r"other\.weight is tied to the expert's tensor list\.0\.weight"),
        ("numbers on two sides", r"list\.0\.0\.weight matches .* in several ways"),
    ],
)
def test_a_declaration_that_does_not_fit_is_one_error_on_all_ranks_that_names_the_tensor(world, kind, message) -> None:
    first, second = world(2).run(misfit, kind)
    assert first == second and re.search(message, first, re.DOTALL), first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), 0), "the names of Experts are empty"),
        ((3, 0), "the names of Experts is 3, expected a glob pattern"),
        (("w", "0"), "the dim of Experts is '0'"),
        (("w", True), "the dim of Experts is True"),
        (("experts.*", None), r"has the pattern 'experts\.\*' and dim=None, expected one part {} of the pattern"),
        (("layers.{}.experts.{}.*", None), "expected one part {}"),
        (("experts.{}.*", 0), "dim=0, expected no {}"),
    ],
)
def test_what_no_model_could_have_is_refused_when_it_is_declared(arguments, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Experts(*arguments)


def test_experts_are_given_as_a_list_of_declarations() -> None:
    with pytest.raises(ConfigError, match=r"experts has 'w', expected a list of dist_ema\.Experts"):
        ShardedEMA(nn.Linear(2, 1), SCHEDULE, experts="w")
    with pytest.raises(TypeError, match="dim"):
        Experts("w")


def too_small_a_group() -> str:
    """Every rank has experts of its own, and the groups have two of the four ranks."""
    group = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))["ep"].get_group()
    with pytest.raises(UnsupportedModelError) as caught:
        ShardedEMA(Stacked(), SCHEDULE, experts=[Experts("w", 0, group), Experts("list.{}.*", None, group)])
    return str(caught.value)


def test_a_group_that_leaves_out_ranks_with_other_experts_is_refused(world) -> None:
    messages = world(4).run(too_small_a_group)
    assert len(set(messages)) == 1
    assert re.search(r"\bw is not the same on rank [01] and rank [23]", messages[0])
    assert "the group being all ranks of different experts" in messages[0]


def wrapped(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """Stacked experts of a whole model, as a mesh (dp, ep) of four ranks or another wrapper holds them."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(collections.OrderedDict(router=nn.Linear(4, 8), experts=nn.Module()))
    whole = {"up": torch.randn(8, 4, 6), "down": torch.randn(8, 6, 4)}
    if kind == "ddp":
        for name, value in whole.items():
            model.experts.register_parameter(name, nn.Parameter(value.chunk(size)[rank].clone()))
        names = [f"experts.{name}" for name in whole]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        return DistributedDataParallel(model), {"experts": [Experts(names, dim=0)]}
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "ep"))
    if kind == "fsdp2":
        ep = mesh["ep"]
        for name, value in whole.items():
            model.experts.register_parameter(name, nn.Parameter(value.chunk(2)[ep.get_local_rank()].clone()))
        fully_shard(model, ignored_params=set(model.experts.parameters()))
        return model, {"experts": [Experts("experts.*", dim=0, group=ep.get_group())]}
    dims = {"up": 1, "down": 0} if kind == "dtensors along dim 1" else {"up": 0, "down": 0}
    for name, value in whole.items():
        sharded = distribute_tensor(value, mesh["ep"], [Shard(dims[name])], src_data_rank=None)
        model.experts.register_parameter(name, nn.Parameter(sharded))
    if kind.startswith("dtensors in fsdp2"):
        along_1 = {"shard_placement_fn": lambda _: Shard(1)} if kind.endswith("along dim 1") else {}
        fully_shard(model.experts, mesh=mesh["dp"], **along_1)
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    return model, {}


def step_of(model: nn.Module, kind: str, number: int) -> dict[str, torch.Tensor]:
    """Give the model values that depend on the name and the number alone; returns them whole."""
    if kind not in ("ddp", "fsdp2"):
        return set_whole(model, number)
    rank, size = (dist.get_rank() % 2, 2) if kind == "fsdp2" else (dist.get_rank(), dist.get_world_size())
    whole = set_whole(model, number)
    for name in ("experts.up", "experts.down"):
        whole[name] = values_of(name, (8, *whole[name].shape[1:]), number)
        with torch.no_grad():
            key = f"module.{name}" if kind == "ddp" else name
            model.get_parameter(key).copy_(whole[name].chunk(size)[rank])
    return whole


def in_other_wrappers(kind: str, folder: str) -> None:
    model, options = wrapped(kind)
    naive, ema = NaiveAverage(SCHEDULE.momentum), None
    for number in range(3):
        live = step_of(model, kind, number)
        ema = ShardedEMA(model, SCHEDULE, **options) if ema is None else ema
        with CommDebugMode() as counted:
            ema.update()
        assert counted.get_total_counts() == 0
        naive.update(live)
    before = locals_of(model)
    ema.save(folder)
    dist.barrier()
    saved = load_file(os.path.join(folder, "model.safetensors"))
    assert saved.keys() == naive.values.keys()
    assert all(torch.equal(value, naive.values[name]) for name, value in saved.items())
    with ema.average_parameters():
        shown = locals_of(model)
    assert all(torch.equal(value, before[name]) for name, value in locals_of(model).items())
    again = ShardedEMA(model, SCHEDULE, **options)
    again.load(folder)
    again.copy_to_model()
    assert all(torch.equal(value, shown[name]) for name, value in locals_of(model).items())
    if not options:
        assert all(torch.equal(value, naive.values[name]) for name, value in read_whole(model).items())
    state = ema.sharded_state_dict()
    for name, value in state.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        assert torch.equal(whole, naive.values[name]), name


def locals_of(model: nn.Module) -> dict[str, torch.Tensor]:
    settle(model)
    return {
        name: (value.to_local() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.named_parameters()
    }


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("ddp", 2),
        ("fsdp2", 4),
        ("dtensors", 4),
        ("dtensors along dim 1", 4),
        ("dtensors in fsdp2", 4),
        ("dtensors in fsdp2 along dim 1", 4),
    ],
)
def test_experts_beside_other_layouts_and_as_dtensors_are_exact(world, tmp_path, kind, size) -> None:
    """As torchtitan lays them out: over an axis of a mesh, and FSDP2 over the other axis on top of it."""
    world(size).run(in_other_wrappers, kind, str(tmp_path / "ema"))


def listed_in_fsdp2(folder: str) -> None:
    """Experts that each pair of ranks numbers from 0, sharded by FSDP2 over the ranks that hold the same ones."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    whole = Whole(2, mesh["ep"].get_local_rank()).model
    model = nn.ModuleDict({"experts": whole.experts})
    naive, ema, first = NaiveAverage(SCHEDULE.momentum), None, 6 * mesh["ep"].get_local_rank()
    for expert in model.experts:
        del expert.net[1].bias
        expert.net[1].register_parameter("bias", None)
        fully_shard(expert, mesh=mesh["dp"])
    for number in range(2):
        live = {}
        for at in range(NUM_EXPERTS):
            own = model.experts[at % 6].named_parameters()
            for name, parameter in own:
                value = live[f"experts.{at}.{name}"] = values_of(f"{at}.{name}", tuple(parameter.shape), number)
                if first <= at < first + 6:
                    sharded = distribute_tensor(value, mesh["dp"], [Shard(0)], src_data_rank=None)
                    with torch.no_grad():
                        parameter.to_local().copy_(sharded.to_local())
        listed = Experts("experts.{}.*", dim=None, group=mesh["ep"].get_group())
        ema = ShardedEMA(model, SCHEDULE, experts=[listed]) if ema is None else ema
        ema.update()
        naive.update(live)
    ema.save(folder)
    dist.barrier()
    saved = load_file(os.path.join(folder, "model.safetensors"))
    assert {name for name in saved if not is_buffer(name)} == naive.values.keys()
    assert all(torch.equal(saved[name], value) for name, value in naive.values.items())


def test_a_list_of_experts_may_be_sharded_over_the_ranks_that_hold_it(world, tmp_path) -> None:
    world(4).run(listed_in_fsdp2, str(tmp_path / "ema"))


def into_a_teacher() -> None:
    model, teacher = Stacked(), Stacked().requires_grad_(False)
    ema = ShardedEMA(model, SCHEDULE, experts=[Experts("w", 0), LISTED], into=teacher)
    naive = NaiveAverage(SCHEDULE.momentum)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        ema.update()
        naive.update(model.state_dict())
        assert all(torch.equal(value, naive.values[name]) for name, value in teacher.state_dict().items())


def test_a_teacher_has_the_experts_of_its_rank(world) -> None:
    world(2).run(into_a_teacher)


def numbers_of_all_ranks(folder: str) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank % 2)
    mine = {str(number): nn.Linear(3, 3, bias=False) for number in (2 * (rank % 2), 2 * (rank % 2) + 1)}
    model = nn.ModuleDict({"experts": nn.ModuleDict(mine)})
    ema = ShardedEMA(model, SCHEDULE)
    ema.update()
    ema.save(folder)
    dist.barrier()
    saved = load_file(os.path.join(folder, "model.safetensors"))
    assert sorted(saved) == [f"experts.{number}.weight" for number in range(4)]
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    assert sum(shard.box.numel for shard in ema.shards) == 2 * 9 * 2 // size


@pytest.mark.parametrize("size", [2, 4])
def test_experts_under_numbers_of_all_ranks_need_no_declaration(world, tmp_path, size) -> None:
    world(size).run(numbers_of_all_ranks, str(tmp_path / "ema"))


class Scaled(nn.Linear):
    """An expert with a scale that its state dict has as extra state, and whose position makes its values."""

    def get_extra_state(self) -> torch.Tensor:
        return self.weight.detach().abs().amax()

    def set_extra_state(self, state: torch.Tensor) -> None:
        pass


class Packed(torch.Tensor):
    """A tensor subclass with a dispatch of its own, whose bytes are not its values."""

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return [], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


def what_else_an_expert_has(folder: str) -> None:
    model = Stacked()
    model.list = nn.ModuleList(Scaled(3, 3, bias=False) for _ in range(2))
    for expert in model.list:
        expert.packed = nn.Parameter(Packed(torch.zeros(2)), requires_grad=False)
    # The names of the files again: those of rank 1 are list.2 and list.3.
    excluded = [f"list.{number}.packed" for number in range(4)]
    ema = ShardedEMA(model, SCHEDULE, experts=[Experts("w", 0), LISTED], exclude=excluded)
    ema.update()
    ema.save(folder)
    model.router = nn.Linear(3, 4)
    ema.save(folder + "-rest", only_unchanged=True)
    dist.barrier()
    saved = load_file(os.path.join(folder, "model.safetensors"))
    rest = load_file(os.path.join(folder + "-rest", "model.safetensors"))
    assert saved.keys() - rest.keys() == {"router.weight", "router.bias"}
    names = {f"list.{number}.{what}" for number in range(4) for what in ("weight", "_extra_state")}
    assert rest.keys() == names | {"w"}
    for number, expert in enumerate(model.list, start=2 * dist.get_rank()):
        for files in (saved, rest):
            assert torch.equal(files[f"list.{number}._extra_state"], expert.get_extra_state())
            assert torch.equal(files[f"list.{number}.weight"], expert.weight)


@pytest.mark.filterwarnings("ignore")
def test_extra_state_and_excluded_tensors_of_experts_are_numbered_too_also_when_the_model_has_changed(
    world, tmp_path
) -> None:
    world(2).run(what_else_an_expert_has, str(tmp_path / "ema"))


def copies_under_one_group_too_many(right: bool) -> list[str]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    torch.manual_seed(dist.get_rank() % 2)
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(2, 3))
    group = groups[dist.get_rank() // 2] if right else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ShardedEMA(model, SCHEDULE, experts=[Experts("w", 0, group)])
    return [str(warning.message) for warning in caught]


def test_copies_of_experts_that_no_group_tells_apart_are_not_saved_twice_without_a_word(world) -> None:
    with_group, without = (world(4).run(copies_under_one_group_too_many, right) for right in (True, False))
    assert not any(with_group) and not any(without[1:])
    assert len(without[0]) == 1 and "ranks 0 and 2 have the same values" in without[0][0]
