"""Whatever replaces live memory between two updates, of one tensor or of all: the next update reads the new values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dist_ema import ConstantSchedule, ShardedEMA
from dist_ema.topology.values import name_of_inner

MOMENTUM = 0.25


def net() -> nn.Module:
    """Tiny tensors that are packed, and larger ones."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 400))


def shown(model: nn.Module) -> dict[str, torch.Tensor]:
    """What this rank has of each parameter."""
    with torch.no_grad():
        return {
            name: (value.to_local() if isinstance(value, DTensor) else value).detach().clone()
            for name, value in model.state_dict(keep_vars=True).items()
        }


class Followed:
    """An average of fp32 beside a naive one of the values that the model shows."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.ema = ShardedEMA(model, ConstantSchedule(momentum=MOMENTUM))
        self.naive = shown(model)
        self.ema.update()
        self.update()

    def update(self) -> None:
        live = shown(self.model)
        self.ema.update()
        self.naive = {name: torch.lerp(self.naive[name], live[name].float(), MOMENTUM) for name in live}

    def wrong(self) -> list[str]:
        """The names whose averages do not follow."""
        owned = zip(self.ema.shards, self.ema._state.averages["ema"].values, strict=True)
        return [shard.fqn for shard, value in owned if not torch.equal(value, self.naive[shard.fqn])]


def other(value: torch.Tensor) -> torch.Tensor:
    return torch.randn(value.shape, dtype=value.dtype)


def data_of_one(model: Any) -> None:
    model[2].bias.data = other(model[2].bias)


def set_in_place(model: Any) -> None:
    with torch.no_grad():
        model[2].weight.set_(other(model[2].weight))


def storage_given_back(model: Any) -> None:
    """A storage that is freed and made anew, as engines do; what was in it is gone."""
    values, storage = other(model[1].weight), model[1].weight.untyped_storage()
    storage.resize_(0)
    storage.resize_(values.nbytes)
    model[1].weight.data.copy_(values)


def turned(model: Any) -> None:
    model[1].weight.data = model[1].weight.data.t()


def moved_within_its_storage(model: Any) -> None:
    wide = torch.randn(9, 8)
    model[1].weight.data = wide[:8]
    model[1].weight.data = wide[1:]


def to_float64_and_back(model: Any) -> None:
    model.double()
    model.float()


def assigned(model: Any) -> None:
    model.load_state_dict({name: other(value) for name, value in model.state_dict().items()}, assign=True)


def parameter_made_anew_around_its_memory(model: Any) -> None:
    """The next replacement is one of the new parameter."""
    model[3].weight = nn.Parameter(model[3].weight.data)
    model[3].weight.data = other(model[3].weight)


def storages_swapped(model: Any) -> None:
    """As an optimizer does that keeps two copies of the weights."""
    one, two = model[0].weight, model[1].weight
    one.data, two.data = two.data, one.data


def tensors_swapped(model: Any) -> None:
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(other(model[0].weight)))


PLAIN: list[Callable[[Any], None]] = [
    data_of_one,
    set_in_place,
    storage_given_back,
    turned,
    moved_within_its_storage,
    to_float64_and_back,
    assigned,
    parameter_made_anew_around_its_memory,
    storages_swapped,
    tensors_swapped,
]


@pytest.mark.parametrize("replace", PLAIN, ids=lambda replace: replace.__name__)
def test_an_update_reads_the_memory_that_a_plain_tensor_has_now(replace: Callable[[Any], None]) -> None:
    followed = Followed(net())
    for _ in range(2):
        replace(followed.model)
        followed.update()
        assert followed.wrong() == []
        followed.update()
        assert followed.wrong() == []


def local_replaced(model: Any) -> None:
    """FSDP gives a DTensor another local tensor when it pads one anew."""
    name = name_of_inner(model[1].weight)
    assert name is not None
    setattr(model[1].weight, name, other(model[1].weight.to_local()))


def memory_of_local_replaced(model: Any) -> None:
    local = getattr(model[1].weight, name_of_inner(model[1].weight) or "")
    local.data = other(local)


def around(local: torch.Tensor, like: DTensor) -> nn.Parameter:
    placed = like.device_mesh, like.placements
    return nn.Parameter(DTensor.from_local(local, *placed, run_check=False, shape=like.shape, stride=like.stride()))


def made_anew_around_its_memory(model: Any) -> None:
    """The pointer is the same; the next replacement is one of the new DTensor."""
    model[1].register_parameter("weight", around(model[1].weight.to_local().detach(), model[1].weight))


def made_anew_and_replaced(model: Any) -> None:
    made_anew_around_its_memory(model)
    local_replaced(model)


def one_assigned(model: Any) -> None:
    model[2].load_state_dict(
        {"bias": around(other(model[2].bias.to_local()), model[2].bias)}, assign=True, strict=False
    )


def all_assigned(model: Any) -> None:
    made = {name: around(other(value.to_local()), value) for name, value in model.state_dict().items()}
    model.load_state_dict(made, assign=True)


def dtensors_swapped(model: Any) -> None:
    model[0].weight, model[1].weight = model[1].weight, model[0].weight


DTENSORS: list[Callable[[Any], None]] = [
    local_replaced,
    memory_of_local_replaced,
    made_anew_around_its_memory,
    made_anew_and_replaced,
    one_assigned,
    all_assigned,
    dtensors_swapped,
    to_float64_and_back,
]


def follows_dtensors(kind: str) -> Mapping[str, list[str]]:
    """What replaces a local tensor -> the names whose averages do not follow."""
    bad: dict[str, list[str]] = {}
    for replace in DTENSORS:
        model = net()
        if kind == "layers":
            for layer in model.children():
                fully_shard(layer)
        fully_shard(model)
        followed = Followed(model)
        for _ in range(2):
            with torch.no_grad():
                replace(model)
            followed.update()
            followed.update()
            if followed.wrong():
                bad[replace.__name__] = followed.wrong()
    return bad


@pytest.mark.parametrize("kind", ["root", "layers"])
def test_an_update_reads_the_local_tensor_that_a_dtensor_has_now(world, kind: str) -> None:
    assert world(2).run(follows_dtensors, kind) == [{}, {}]


def while_gathered() -> list[list[str]]:
    """An update while the names have gathered copies; another, after local tensors were replaced meanwhile."""
    model = net()
    fully_shard(model)
    sharded = dict(model.named_parameters())
    ema = ShardedEMA(model, ConstantSchedule(momentum=MOMENTUM))
    naive = {name: value.to_local().detach().clone() for name, value in sharded.items()}
    wrong = []
    for step in range(5):
        with torch.no_grad():
            model(torch.zeros(2, 8))
            assert step == 1 or not isinstance(model[0].weight, DTensor)
            if step == 1:
                model.reshard()  # type: ignore[operator]
            if step in (1, 3):
                value = sharded["1.weight"]
                setattr(value, name_of_inner(value) or "", other(value.to_local()))
            live = {name: value.to_local().detach().clone() for name, value in sharded.items()}
        ema.update()
        naive = {name: torch.lerp(naive[name], live[name], MOMENTUM) for name in live}
        owned = zip(ema.shards, ema._state.averages["ema"].values, strict=True)
        wrong.append([shard.fqn for shard, value in owned if not torch.equal(value, naive[shard.fqn])])
    return wrong


def test_an_update_reads_the_sharded_weights_while_their_names_have_gathered_copies(world) -> None:
    assert world(2).run(while_gathered) == [[[]] * 5] * 2


def asked_for_local_tensors() -> int:
    """How often an update of unchanged DTensors calls `to_local`, which makes a parameter each time."""
    model = net()
    fully_shard(model)
    ema = ShardedEMA(model, ConstantSchedule(momentum=MOMENTUM))
    ema.update()
    ema.update()
    weight = model[0].weight
    with torch.no_grad():
        inner = getattr(weight, name_of_inner(weight) or "", None)
        assert isinstance(inner, torch.Tensor) and inner.is_set_to(weight.to_local())
    calls: list[int] = []
    to_local = DTensor.to_local
    try:
        DTensor.to_local = lambda self, **options: calls.append(1) or to_local(self, **options)  # type: ignore[method-assign,func-returns-value]
        ema.update()
    finally:
        DTensor.to_local = to_local  # type: ignore[method-assign]
    return len(calls)


def test_torch_names_the_local_tensor_of_a_dtensor_so_that_no_update_makes_parameters(world) -> None:
    assert world(2).run(asked_for_local_tensors) == [0, 0]
