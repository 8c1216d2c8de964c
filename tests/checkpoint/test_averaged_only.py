"""Files that hold the averaged tensors alone: nothing of a frozen base is written, read, or need be storable."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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

from dist_ema import (
    CheckpointMismatchError,
    ConstantSchedule,
    PowerSchedule,
    RankMismatchError,
    ShardedEMA,
    UnsupportedModelError,
    consolidate_checkpoint,
    synthesize,
)
from dist_ema.boxes.shards import Held
from dist_ema.cli.arguments import main
from dist_ema.disk.manifest import read_manifest

HALF = ConstantSchedule(momentum=0.5)


@contextmanager
def silence() -> Iterator[None]:
    """The libraries of adapters and quantised weights warn while they are imported, and of tiny models."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Adapted(nn.Module):
    """A frozen base with a buffer and an extra state, and what is trained: one weight of it is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.lora_A, self.lora_B = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.again = nn.Linear(4, 2, bias=False)
        self.again.weight = self.lora_A.weight

    def get_extra_state(self) -> object:
        return {"no": "tensor"}

    def set_extra_state(self, state: object) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.base(x)) + self.lora_B(self.lora_A(x))


TRAINED = {"lora_A.weight", "lora_B.weight", "norm.weight", "norm.bias"}


def adapted(seed: int = 0) -> Adapted:
    torch.manual_seed(seed)
    return Adapted()


def trained(model: nn.Module, ema: ShardedEMA, steps: range) -> ShardedEMA:
    """Move what requires a gradient, element by element, so that every layout gives the same values."""
    for step in steps:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1 + 0.25 / (step + 1)).add_(0.125)
        ema.update()
    return ema


def only(model: nn.Module, **options: Any) -> ShardedEMA:
    return ShardedEMA(model, HALF, **{"trainable_only": True, "averaged_only": True, **options})


def in_file(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_files_hold_the_averaged_tensors_alone_and_an_average_goes_on_from_them_bit_for_bit(tmp_path) -> None:
    model = adapted()
    ema = trained(model, only(model), range(3))
    ema.save(tmp_path / "ema")
    ema.snapshot(tmp_path / "snapshots")
    ema.consolidate(tmp_path / "export")
    for folder in ("ema", "snapshots/updates-000000003", "export"):
        assert set(in_file(tmp_path / folder)) == TRAINED, folder
    assert read_manifest(tmp_path / "ema").aliases == {"again.weight": "lora_A.weight"}
    expected = trained(model, ema, range(3, 6)).full_state_dict()
    live = {name: value.clone() for name, value in model.state_dict().items() if name != "_extra_state"}
    other = adapted()
    resumed = only(other)
    trained(other, only(other), range(3))  # the live weights come from the model's own checkpoint
    resumed.load(tmp_path / "ema")
    trained(other, resumed, range(3, 6))
    assert resumed.num_updates == 6
    assert_same_bits(resumed.full_state_dict(), expected)
    assert set(expected) == set(live), "a state dict still shows the live values of the rest"
    assert torch.equal(expected["base.weight"], live["base.weight"])


def test_nothing_of_the_frozen_base_is_read_at_a_save_or_a_load(tmp_path, monkeypatch) -> None:
    model = adapted()
    ema = trained(model, only(model), range(2))
    read: list[str] = []
    values = Held.values
    monkeypatch.setattr(Held, "values", lambda held: read.append(held.spec.fqn) or values(held))
    ema.save(tmp_path / "ema")
    ema.load(tmp_path / "ema")
    ema.state_dict()
    ema.stateful().state_dict()
    assert TRAINED.issuperset(read) and read


def test_the_average_of_an_adapter_writes_its_own_bytes(tmp_path) -> None:
    """14 GB a save for an adapter of 34 MB, beside a base of 7 billion elements."""
    model = nn.ModuleDict({"base": nn.Linear(1024, 2048), "lora": nn.Linear(256, 64)})
    model["base"].requires_grad_(False)
    ema = trained(model, only(model), range(2))
    with open("/proc/self/io") as counters:
        before = int(counters.read().split("wchar: ")[1].split()[0])
    ema.save(tmp_path / "ema")
    with open("/proc/self/io") as counters:
        written = int(counters.read().split("wchar: ")[1].split()[0]) - before
    on_disk = sum(path.stat().st_size for path in (tmp_path / "ema").iterdir())
    assert ema.nbytes <= on_disk <= written < 1.2 * ema.nbytes


# Which tensors


def test_trainable_only_and_include_must_both_allow_a_tensor_and_buffers_follow_update_buffers() -> None:
    averaged = {
        name: {shard.fqn for shard in only(adapted(), **options).shards}
        for name, options in {
            "all": {},
            "include": {"include": ["*lora_*", "base.*"]},
            "exclude": {"exclude": "norm.*"},
            "buffers": {"update_buffers": True},
        }.items()
    }
    assert averaged == {
        "all": TRAINED,
        "include": {"lora_A.weight", "lora_B.weight"},
        "exclude": {"lora_A.weight", "lora_B.weight"},
        "buffers": {*TRAINED, "norm.running_mean", "norm.running_var"},
    }


@pytest.mark.parametrize("options", [{}, {"include": "base.*"}])
def test_a_model_of_which_nothing_is_trained_is_refused_and_not_averaged_as_nothing(options) -> None:
    model = adapted() if options else adapted().requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match=r"trainable_only=True.* requires a gradient.*trainable_only=False"):
        only(model, **options)


def test_what_is_trained_is_decided_when_the_average_is_built() -> None:
    model = adapted()
    ema = only(model)
    model.base.requires_grad_(True)
    model.lora_A.requires_grad_(False)
    ema.update()
    assert {shard.fqn for shard in ema.shards} == TRAINED


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=61, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    config.bos_token_id = config.eos_token_id = 1
    return GPT2LMHeadModel(config)


def of_peft(how: str = "get_peft_model") -> nn.Module:
    import peft

    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    if how == "get_peft_model":
        return peft.get_peft_model(gpt2(), lora)
    if how == "prompt":
        return peft.get_peft_model(gpt2(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    model = gpt2()
    if how == "add_adapter":
        model.add_adapter(lora)
        return model
    model = peft.inject_adapter_in_model(lora, model)
    return nn.Sequential(model) if how == "within" else model


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter", "inject_adapter_in_model", "within", "prompt"])
def test_adapters_of_peft_beside_a_frozen_base_are_averaged_and_written_alone_by_default(tmp_path, how) -> None:
    with silence():
        model = of_peft(how)
    ema = ShardedEMA(model, HALF)
    assert "trainable_only=True, averaged_only=True" in repr(ema)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    ema.save(tmp_path / "ema")
    assert {shard.fqn for shard in ema.shards} == set(read_manifest(tmp_path / "ema").tensors) == names
    whole = ShardedEMA(model, HALF, trainable_only=False, averaged_only=False)
    assert "only" not in repr(whole) and len(whole.shards) > len(names)


def test_the_default_of_all_other_models_stays_what_it_was(tmp_path) -> None:
    with silence():
        unfrozen = of_peft().requires_grad_(True)
    for model in (unfrozen, nn.ModuleDict({"base": nn.Linear(2, 2).requires_grad_(False), "head": nn.Linear(2, 2)})):
        ema = ShardedEMA(model, HALF)
        assert "only" not in repr(ema) and len(ema.shards) == len([*model.parameters()])
        ema.save(tmp_path / "ema")
        options = read_manifest(tmp_path / "ema").options
        assert (options["trainable_only"], options["averaged_only"]) == (False, False)


# Bases that no file can hold


def quantised(kind: str) -> nn.Module:
    layer: nn.Module = nn.Linear(64, 64, bias=False)
    if kind.startswith("torchao"):
        quantization = pytest.importorskip("torchao.quantization")
        config = quantization.Int8WeightOnlyConfig if "int8" in kind else quantization.Float8WeightOnlyConfig
        quantization.quantize_(layer, config())
    elif kind == "float8":
        layer.weight.requires_grad_(False)
        layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
        layer.forward = lambda x: x @ layer.weight.float().T
    else:
        modules = pytest.importorskip("bitsandbytes").nn
        made = modules.Linear4bit if kind == "bnb4" else modules.Linear8bitLt
        further = {} if kind == "bnb4" else {"has_fp16_weights": False}
        packed = made(64, 64, bias=False, **further)
        packed.load_state_dict(layer.state_dict())
        layer = packed.to("cpu")
    return layer.requires_grad_(False)


class Lora(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = nn.Linear(64, 2, bias=False), nn.Linear(2, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


@pytest.mark.parametrize("kind", ["torchao int8", "torchao float8", "float8", "bnb4", "bnb8"])
def test_a_quantised_base_is_trained_on_swapped_saved_and_resumed(tmp_path, kind) -> None:
    with silence():
        torch.manual_seed(0)
        model, x = Lora(quantised(kind)), torch.randn(4, 64)
        if kind != "float8":
            for options in ({}, {"include": "*lora_*"}):
                with pytest.raises(UnsupportedModelError, match=r"base\.weight is a .*averaged_only=True.* exclude="):
                    ShardedEMA(model, HALF, **options)
        model(x)
        optimizer = torch.optim.SGD([model.lora_A.weight, model.lora_B.weight], lr=0.1)
        ema = only(model)
        for _ in range(3):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
        live = model(x)
        with ema.average_parameters(), torch.no_grad():
            assert not torch.equal(model(x), live)
        assert torch.equal(model(x), live)
        ema.save(tmp_path / "ema")
        assert set(in_file(tmp_path / "ema")) == {"lora_A.weight", "lora_B.weight"}
        resumed = only(model)
        resumed.load(tmp_path / "ema")
        assert_same_bits(
            in_file(tmp_path / "ema"), {name: resumed.full_state_dict()[name] for name in in_file(tmp_path / "ema")}
        )
        resumed.start_from(tmp_path / "ema")
        ema.sharded_state_dict()
        ShardedEMA(model, HALF, include="*lora_*", averaged_only=True).load(tmp_path / "ema")


@pytest.mark.parametrize(
    "base",
    [
        lambda: nn.Linear(4, 4, device="meta"),
        lambda: nn.ParameterDict({"weight": nn.Parameter(torch.ones(1, 4).expand(4, 4))}),
        lambda: nn.ParameterDict({"weight": nn.Parameter(torch.eye(4).to_sparse())}),
        lambda: nn.ParameterDict({"weight": nn.Parameter(torch.ones(4, dtype=torch.complex64))}),
    ],
)
def test_a_frozen_tensor_without_plain_values_is_no_hindrance(tmp_path, base) -> None:
    model = nn.ModuleDict({"base": base().requires_grad_(False), "lora": nn.Linear(2, 2)})
    ema = trained(model, only(model), range(2))
    with ema.average_parameters():
        pass
    ema.save(tmp_path / "ema")
    ema.load(tmp_path / "ema")
    assert set(in_file(tmp_path / "ema")) == {"lora.weight", "lora.bias"}


# Checkpoints of other options


@contextmanager
def one_warning(match: str) -> Iterator[None]:
    with pytest.warns(UserWarning, match=match) as caught:
        yield
    assert len(caught) == 1, [str(warning.message) for warning in caught]


class Plain(nn.Module):
    """As `Adapted`, without extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.norm = nn.Linear(4, 4).requires_grad_(False), nn.BatchNorm1d(4)
        self.lora = nn.Linear(4, 2)


def test_a_checkpoint_that_was_written_with_everything_loads_with_one_warning(tmp_path) -> None:
    model = Plain()
    whole = trained(model, ShardedEMA(model, HALF), range(3))
    whole.save(tmp_path / "ema")
    whole.consolidate(tmp_path / "export")
    expected = {name: value for name, value in whole.full_state_dict().items() if name.startswith(("lora", "norm."))}
    for options in ({}, {"averaged_only": False}):
        ema = only(model, **options)
        with one_warning(r"has \d tensors that this run does not average \(base\.weight, \.\.\.\)"):
            ema.load(tmp_path / "ema")
        assert ema.num_updates == 3
        assert_same_bits(ema.full_state_dict(), expected)
        ema.save(tmp_path / "again")
        only(model, **options).load(tmp_path / "again")  # without a warning
        ema.start_from(tmp_path / "export")
        ema.start_from(tmp_path / "ema")


def test_a_checkpoint_of_the_averaged_tensors_alone_loads_where_everything_is_written(tmp_path) -> None:
    model = Plain()
    ema = trained(model, only(model), range(3))
    ema.save(tmp_path / "ema")
    whole = ShardedEMA(model, HALF, trainable_only=True)
    with one_warning(
        r"saved with averaged_only=True, without 5 tensors .*\(base\.weight, \.\.\.\): they keep their live"
    ):
        whole.load(tmp_path / "ema")
    assert_same_bits(whole.full_state_dict(), ema.full_state_dict())
    everything = ShardedEMA(model, HALF)
    with pytest.raises(CheckpointMismatchError, match=r"2 tensors .* not in it.*new='base\.\*'.*options_changed=True"):
        everything.load(tmp_path / "ema")
    with pytest.warns(UserWarning, match="averaged_only=True"):
        everything.load(tmp_path / "ema", new="base.*")
    assert torch.equal(everything.full_state_dict()["base.weight"], model.base.weight)


def test_an_average_loads_beside_another_backbone_and_not_into_other_adapters(tmp_path) -> None:
    model = Plain()
    trained(model, only(model), range(2)).save(tmp_path / "ema")
    model.base = nn.Linear(3, 5).requires_grad_(False)
    only(model).load(tmp_path / "ema")
    model.lora = nn.Linear(4, 3)
    with pytest.raises(CheckpointMismatchError, match=r"lora\.weight as float32\[2, 4\]"):
        only(model).load(tmp_path / "ema")


def test_the_offline_tools_work_with_what_holds_a_part_of_a_model(tmp_path, capsys) -> None:
    model = Plain()
    ema = ShardedEMA(
        model, {"a": PowerSchedule(gamma=5), "b": PowerSchedule(gamma=9)}, trainable_only=True, averaged_only=True
    )
    for step in range(4):
        trained(model, ema, range(step, step + 1))
        ema.snapshot(tmp_path / "snapshots")
    ema.save(tmp_path / "ema")
    names = {"lora.weight", "lora.bias", "norm.weight", "norm.bias"}
    consolidate_checkpoint(tmp_path / "ema", tmp_path / "export", track="a")
    synthesize(tmp_path / "snapshots", tmp_path / "made", PowerSchedule(gamma=7))
    for folder in ("export", "made"):
        assert set(in_file(tmp_path / folder)) == names
        assert not (tmp_path / folder / "config.json").exists()
    for command in (["verify"], ["inspect"]):
        assert main([*command, str(tmp_path / "ema")]) == 0
    assert main(["diff", str(tmp_path / "ema"), str(tmp_path / "export"), "--track", "a"]) == 0
    assert "lora.weight" in capsys.readouterr().out


def test_no_configuration_is_written_beside_a_part_of_a_model(tmp_path) -> None:
    """from_pretrained would make the rest at random."""
    with silence():
        model = gpt2()
    model.transformer.requires_grad_(False)
    model.transformer.ln_f.requires_grad_(True)
    ema = only(model)
    ema.save(tmp_path / "ema")
    ema.consolidate(tmp_path / "export")
    assert sorted(path.name for path in (tmp_path / "ema").iterdir()) == ["manifest.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["README.md", "model.safetensors"]


# After a change of the model


def test_the_unchanged_part_of_the_averaged_part_is_kept(tmp_path) -> None:
    model = Plain()
    ema = trained(model, only(model), range(2))
    expected = ema.full_state_dict()
    model.base = nn.Linear(2, 2).requires_grad_(False)
    ema.save(tmp_path / "base", only_unchanged=True)  # without a warning: files have nothing of it
    assert set(in_file(tmp_path / "base")) == {"lora.weight", "lora.bias", "norm.weight", "norm.bias"}
    model.lora = nn.Linear(4, 3)
    with one_warning(r"lora\.weight, lora\.bias \(2 of 4 tensors\) are not as they were"):
        ema.save(tmp_path / "ema", only_unchanged=True)
    assert_same_bits(in_file(tmp_path / "ema"), {name: expected[name] for name in ("norm.weight", "norm.bias")})
    again = only(model)
    again.load(tmp_path / "ema", new="lora.*")
    assert torch.equal(again.full_state_dict()["norm.weight"], expected["norm.weight"])


def test_buffers_that_were_kept_with_the_average_are_in_its_files_while_they_fit(tmp_path) -> None:
    model = Plain()
    ema = trained(model, only(model), range(2))
    with ema.average_parameters(keep_buffers=True):
        model.norm.running_mean.fill_(7.0)
    ema.save(tmp_path / "ema")
    assert in_file(tmp_path / "ema")["norm.running_mean"].eq(7.0).all()
    assert "base.weight" not in in_file(tmp_path / "ema")
    resumed = only(model)
    resumed.load(tmp_path / "ema")
    with resumed.average_parameters():
        assert model.norm.running_mean.eq(7.0).all()
    assert model.norm.running_mean.eq(0.0).all()
    trained(model, ema, range(2, 3))
    with pytest.warns(UserWarning, match=r"kept with.*what is written has no buffers \(averaged_only=True\)"):
        ema.save(tmp_path / "later")
    assert set(in_file(tmp_path / "later")) == {"lora.weight", "lora.bias", "norm.weight", "norm.bias"}


def test_a_teacher_whose_student_has_a_frozen_base_follows_it_and_resumes(tmp_path) -> None:
    student, teacher = Plain(), Plain().requires_grad_(False)
    ema = trained(student, only(student, into=teacher), range(3))
    assert torch.equal(teacher.base.weight, student.base.weight)
    ema.save(tmp_path / "ema")
    assert set(in_file(tmp_path / "ema")) == {"lora.weight", "lora.bias", "norm.weight", "norm.bias"}
    expected = teacher.lora.weight.clone()
    teacher.lora.weight.data.zero_()
    ema.load(tmp_path / "ema")
    assert torch.equal(teacher.lora.weight, expected) and torch.equal(teacher.base.weight, student.base.weight)


# On several ranks


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.lora, self.head = nn.Linear(4, 5).requires_grad_(False), nn.Linear(5, 3), nn.Linear(3, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lora(self.base(x)))


DEEP = {"lora.weight", "lora.bias", "head.weight"}


def laid_out(layout: str) -> nn.Module:
    torch.manual_seed(0)
    if layout.startswith("peft"):
        with silence():
            model = of_peft()
        if layout == "peft fsdp2":
            for block in model.base_model.model.transformer.h:
                fully_shard(block)
            fully_shard(model)
        return DistributedDataParallel(model) if layout == "peft ddp" else model
    inner = Deep()
    cpu = torch.device("cpu")
    if layout == "ddp":
        return DistributedDataParallel(inner)
    if layout == "fsdp2":
        fully_shard(inner.lora)
        fully_shard(inner)
    elif layout == "fsdp1":
        return FullyShardedDataParallel(inner, use_orig_params=True, device_id=cpu)
    elif layout == "fsdp1 flat":
        # Without use_orig_params all that is in a flat parameter requires a gradient, or nothing.
        inner.head.requires_grad_(False)
        for name in ("base", "lora", "head"):
            setattr(inner, name, FullyShardedDataParallel(getattr(inner, name), use_orig_params=False, device_id=cpu))
        return FullyShardedDataParallel(inner, use_orig_params=False, device_id=cpu)
    return inner


def resumed_on_ranks(layout: str, folder: str) -> tuple[list[str], set[str]]:
    options = {} if layout.startswith("peft") else {"trainable_only": True, "averaged_only": True}
    model = laid_out(layout)
    ema = trained(model, ShardedEMA(model, HALF, **options), range(2))
    path, read = Path(folder, layout), []
    values = Held.values
    Held.values = lambda held: read.append(held.spec.fqn) or values(held)  # type: ignore[method-assign]
    try:
        ema.save(path)
    finally:
        Held.values = values  # type: ignore[method-assign]
    with ema.average_parameters():
        pass
    averaged = sorted(spec.fqn for spec in ema._state.plan.specs if spec.averaged)
    expected = trained(model, ema, range(2, 4)).full_state_dict()
    other = laid_out(layout)
    trained(other, ShardedEMA(other, HALF, **options), range(2))
    resumed = ShardedEMA(other, HALF, **options)
    resumed.load(path)
    trained(other, resumed, range(2, 4))
    assert_same_bits(resumed.full_state_dict(), expected)
    dist.barrier()
    return averaged, set(read)


@pytest.mark.parametrize("size", [1, 2])
def test_on_ranks_nothing_of_the_frozen_base_is_read_or_written_whatever_the_layout(world, tmp_path, size) -> None:
    for layout in ("ddp", "fsdp2", "fsdp1", "fsdp1 flat"):
        (averaged, *_), read = zip(*world(size).run(resumed_on_ranks, layout, str(tmp_path)), strict=True)
        expected = {"lora.weight", "lora.bias"} if layout == "fsdp1 flat" else DEEP
        assert set(averaged) == set(in_file(tmp_path / layout)) == expected, layout
        assert set().union(*read) <= expected, layout
    contents = [(tmp_path / layout / "model.safetensors").read_bytes() for layout in ("ddp", "fsdp2", "fsdp1")]
    assert contents[1:] == contents[:-1]


def test_adapters_of_peft_resume_bit_for_bit_on_ranks(world, tmp_path) -> None:
    layouts = {1: ("peft fsdp2",), 2: ("peft fsdp2", "peft ddp")}
    contents = []
    for size, of_size in layouts.items():
        for layout in of_size:
            folder = tmp_path / str(size)
            (averaged, *_), read = zip(*world(size).run(resumed_on_ranks, layout, str(folder)), strict=True)
            assert len(averaged) == 4 and all("lora_" in name for name in averaged)
            assert set().union(*read) <= set(averaged)
            contents.append((folder / layout / "adapter_model.safetensors").read_bytes())
    assert contents[1:] == contents[:-1]
    with silence():
        alone = of_peft()
    resumed = ShardedEMA(alone, HALF)
    resumed.load(tmp_path / "2" / "peft fsdp2")
    assert resumed.num_updates == 2


def disagreeing() -> list[str]:
    rank = dist.get_rank()
    model, errors = Deep(), []
    model.lora.bias.requires_grad_(rank == 0)
    for options in ({"trainable_only": True}, {"averaged_only": rank == 0}):
        with pytest.raises(RankMismatchError) as caught:
            ShardedEMA(model, HALF, **options)
        errors.append(str(caught.value))
    return errors


def test_ranks_that_train_other_parameters_or_have_other_options_are_refused_alike(world) -> None:
    first, second = world(2).run(disagreeing)
    assert first == second
    assert "lora.bias" in first[0] and "trainable_only" in first[0]
    assert "averaged_only" in first[1]


def unlike_bases(folder: str) -> None:
    model = Deep()
    model.base.weight.data.fill_(dist.get_rank())
    model.head.bias.data.zero_()
    for parameter in (model.lora.weight, model.lora.bias, model.head.weight):
        parameter.data.zero_()
    model.base.bias.data.zero_()
    ema = trained(model, only(model), range(2))
    ema.save(Path(folder, "ema"))
    with pytest.raises(UnsupportedModelError, match=r"base\.weight is not the same"):
        ShardedEMA(model, HALF)


def test_a_frozen_base_is_not_compared_over_ranks(world, tmp_path) -> None:
    """A digest of it would read it all at every save."""
    world(2).run(unlike_bases, str(tmp_path))
    assert set(in_file(tmp_path / "ema")) == DEEP
