"""What files can hold: plain tensors under the model's own names. Anything else is refused by name at construction."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from dist_ema import ConstantSchedule, ModelChangedError, ShardedEMA, UnsupportedModelError

HALF = ConstantSchedule(momentum=0.5)


class Packed(nn.Parameter):
    """As bitsandbytes' Params4bit: bytes that only constants beside them explain."""

    def __new__(cls, data: torch.Tensor) -> Packed:
        made = torch.Tensor._make_subclass(cls, data, False)
        made.quant_type = "nf4"
        return made


class Named(torch.Tensor):
    """As torchvision's tv_tensors: plain values with a meaning."""


class Base(nn.Module):
    """A frozen quantised base under an adapter."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4, bias=False)
        self.base.weight = weight
        self.lora_A = nn.Linear(4, 2, bias=False)


def wrapper_subclass() -> nn.Module:
    return Base(nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4)), requires_grad=False))


def packed_parameter() -> nn.Module:
    return Base(Packed(torch.ones(8, dtype=torch.uint8)))


def wrapper_buffer() -> nn.Module:
    model = Base(nn.Parameter(torch.ones(4, 4)))
    del model.base.weight
    model.base.register_buffer("weight", TwoTensor(torch.ones(4), torch.ones(4)))
    return model


def torch_quantized() -> nn.Module:
    model = Base(nn.Parameter(torch.ones(4, 4)))
    del model.base.weight
    model.base.register_buffer("weight", torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8))
    return model


KINDS = {
    wrapper_subclass: "TwoTensor",
    packed_parameter: "Packed",
    wrapper_buffer: "TwoTensor",
    torch_quantized: "qint8",
}


@pytest.mark.parametrize("include", [None, "*lora_*"])
@pytest.mark.parametrize(("build", "kind"), KINDS.items())
def test_a_tensor_whose_bytes_are_not_its_values_is_refused_by_name_before_the_first_save(build, kind, include) -> None:
    """With include= it failed first at the first save, or left its constants out of the file without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build()
    with pytest.raises(UnsupportedModelError, match=rf"base\.weight is a .*{kind}") as caught:
        ShardedEMA(model, HALF, include=include)
    assert "exclude='base.weight'" in str(caught.value)


@pytest.mark.parametrize("build", KINDS)
def test_what_the_user_excludes_is_left_out_of_average_and_files_by_choice(build, tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build()
    ema = ShardedEMA(model, HALF, exclude="base.*")
    for _ in range(2):
        ema.update()
    with ema.average_parameters():
        pass
    ema.save(tmp_path / "ema")
    ema.consolidate(tmp_path / "export")
    for folder in ("ema", "export"):
        assert set(load_file(tmp_path / folder / "model.safetensors")) == {"lora_A.weight"}
    ema.load(tmp_path / "ema")


class Constants(nn.Linear):
    """Its state dict has a constant, and something that is no tensor, beside its weight."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight.absmax"] = torch.ones(1)
        destination[prefix + "weight_format"] = "row"


def test_constants_that_only_include_leaves_out_are_not_lost_in_silence(tmp_path) -> None:
    model = nn.ModuleDict({"base": Constants(4, 4), "lora_A": nn.Linear(4, 2)})
    with pytest.raises(UnsupportedModelError, match=r"base\.weight\.absmax, a Tensor, .* by choice with exclude="):
        ShardedEMA(model, HALF, include="*lora_*")
    with pytest.raises(UnsupportedModelError, match=r"base\.weight_format, a str, .* by choice with exclude="):
        ShardedEMA(model, HALF, include="*lora_*", exclude="*.absmax")
    ema = ShardedEMA(model, HALF, include="*lora_*", exclude=["*.absmax", "*_format"])
    ema.save(tmp_path / "ema")
    assert "base.weight" in load_file(tmp_path / "ema" / "model.safetensors")


def test_plain_subclasses_and_float8_stay_served(tmp_path) -> None:
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.ones(4, 4).as_subclass(Named))
    model.scale = nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False)
    ema = ShardedEMA(model, HALF, include="weight")
    ema.update()
    with torch.no_grad():
        model.weight.zero_()
    ema.update()
    ema.save(tmp_path / "ema")
    found = load_file(tmp_path / "ema" / "model.safetensors")
    assert torch.equal(found["weight"], torch.full((4, 4), 0.5))
    assert found["scale"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("kind", ["torchao", "bnb4", "bnb8"])
def test_quantised_layers_of_libraries_are_refused_by_name_or_left_out_by_choice(kind, tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer: nn.Module = nn.Linear(64, 64, bias=False)
        if kind == "torchao":
            quantization = pytest.importorskip("torchao.quantization")
            quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
        else:
            bnb = pytest.importorskip("bitsandbytes")
            four = kind == "bnb4"
            quantised = bnb.nn.Linear4bit(64, 64, bias=False) if four else bnb.nn.Linear8bitLt(64, 64, bias=False)
            quantised.load_state_dict(layer.state_dict())
            layer = quantised.to("cpu")
            if not four:
                layer.weight = bnb.nn.Int8Params(torch.ones(64, 64, dtype=torch.int8), requires_grad=False)
        model = nn.ModuleDict({"base": layer.requires_grad_(False), "lora_A": nn.Linear(64, 2)})
        for include in (None, "*lora_*"):
            with pytest.raises(UnsupportedModelError, match=r"base\.weight is a (torchao|bitsandbytes)\."):
                ShardedEMA(model, HALF, include=include)
        ShardedEMA(model, HALF, exclude="base.*").save(tmp_path / "ema")
    assert set(load_file(tmp_path / "ema" / "model.safetensors")) == {"lora_A.weight", "lora_A.bias"}


# Parameters without values


def partitioned(**attributes: object) -> nn.Module:
    """As DeepSpeed's ZeRO-3 leaves a parameter."""
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.empty(0))
    for name, value in attributes.items():
        setattr(model.weight, name, value)
    return model


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (
            lambda: partitioned(ds_id=0, ds_shape=torch.Size((4, 4)), ds_tensor=torch.zeros(8)),
            r"weight is partitioned by DeepSpeed ZeRO-3: it has shape \[0\] here, \[4, 4\] as a whole",
        ),
        (lambda: partitioned(_orig_size=torch.Size((4, 4))), r"weight has shape \[0\], but its attribute _orig_size"),
        (lambda: partitioned(full=torch.zeros(4)), r"weight has shape \[0\], but its attribute full holds 4"),
        (partitioned, r"weight has shape \[0\], but its module has out_features=4, in_features=4"),
    ],
)
def test_parameters_that_an_engine_has_emptied_are_refused_by_name_and_not_averaged_as_nothing(build, told) -> None:
    for options in ({}, {"include": "bias"}):
        with pytest.raises(UnsupportedModelError, match=told):
            ShardedEMA(build(), HALF, **options)


def test_a_gathered_parameter_of_zero_3_is_refused_too() -> None:
    model = nn.Linear(4, 4)
    model.weight.ds_id, model.weight.ds_shape = 0, torch.Size((4, 4))
    with pytest.raises(UnsupportedModelError, match="ZeRO-3"):
        ShardedEMA(model, HALF)


def test_a_parameter_whose_memory_was_freed_is_refused() -> None:
    model = nn.Linear(4, 4)
    model.weight.untyped_storage().resize_(0)
    with pytest.raises(UnsupportedModelError, match=r"weight has shape .* its memory was freed"):
        ShardedEMA(model, HALF)


def test_parameters_that_have_no_elements_by_their_own_shape_stay_served(tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 2))
    model.empty = nn.Parameter(torch.empty(0, 5))
    ShardedEMA(model, HALF).save(tmp_path / "ema")
    assert load_file(tmp_path / "ema" / "model.safetensors")["empty"].shape == (0, 5)


# Extra state


class Extra(nn.Module):
    def __init__(self, state: object = 3.0) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.state = state

    def get_extra_state(self) -> object:
        return torch.tensor([self.state]) if isinstance(self.state, float) else self.state

    def set_extra_state(self, state: object) -> None:
        self.state = float(state.item()) if isinstance(state, torch.Tensor) else state


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrapper", [lambda model: model, nn.DataParallel, compiled])
def test_a_tensor_of_extra_state_is_in_the_files_so_that_a_strict_load_works(tmp_path, wrapper) -> None:
    outer = nn.ModuleDict({"a": Extra(), "b": nn.Linear(2, 2)})
    ema = ShardedEMA(wrapper(outer), HALF, update_buffers=True)
    for state in (5.0, 7.0):
        outer["a"].state = state
        ema.update()
    with ema.average_parameters():
        assert outer["a"].state == 7.0, "a swap leaves it alone"
        outer["a"].state = 8.0
    assert outer["a"].state == 8.0
    outer["a"].state = 7.0
    ema.save(tmp_path / "ema")
    ema.consolidate(tmp_path / "export")
    states = [load_file(tmp_path / folder / "model.safetensors") for folder in ("ema", "export")]
    for state_dict in (*states, ema.full_state_dict(), ema.sharded_state_dict()):
        assert state_dict["a._extra_state"].item() == 7.0, "live, never averaged"
        fresh = nn.ModuleDict({"a": Extra(), "b": nn.Linear(2, 2)})
        fresh.load_state_dict(state_dict)
        assert fresh["a"].state == 7.0
    ema.load(tmp_path / "ema")


def test_extra_state_of_a_shared_module_is_stored_once_under_each_of_its_names(tmp_path) -> None:
    shared = Extra()
    model = nn.ModuleDict({"a": shared, "b": shared})
    state = ShardedEMA(model, HALF).full_state_dict()
    assert state["a._extra_state"] is state["b._extra_state"]
    nn.ModuleDict({"a": Extra(), "b": Extra()}).load_state_dict(state)


@pytest.mark.parametrize("state", [{"scale": 3.0}, b"bytes", None, 3, [torch.ones(1)]])
def test_extra_state_that_no_file_can_hold_is_refused_unless_it_is_excluded_by_name(tmp_path, state) -> None:
    model = nn.Sequential(Extra(state), nn.Linear(2, 2))
    for include in (None, "1.*"):
        with pytest.raises(UnsupportedModelError, match=r"0\._extra_state.*exclude='\*_extra_state'"):
            ShardedEMA(model, HALF, include=include)
    ema = ShardedEMA(model, HALF, exclude="*_extra_state")
    ema.update()
    ema.save(tmp_path / "ema")
    assert "0._extra_state" not in load_file(tmp_path / "ema" / "model.safetensors")


def test_extra_state_that_changes_its_shape_is_refused_at_the_save_and_nothing_is_written(tmp_path) -> None:
    model = Extra()
    ema = ShardedEMA(model, HALF)
    model.state = torch.ones(3)
    with pytest.raises(ModelChangedError, match=r"_extra_state is \[3\] now.*exclude='\*_extra_state'"):
        ema.save(tmp_path / "ema")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*it was saved with exclude")
def test_an_average_saved_without_extra_state_loads_into_a_model_that_has_some(tmp_path) -> None:
    ShardedEMA(Extra({}), HALF, exclude="*_extra_state").save(tmp_path / "ema")
    ShardedEMA(Extra(), HALF).load(tmp_path / "ema")
    ShardedEMA(Extra(), HALF).save(tmp_path / "with")
    ShardedEMA(Extra({}), HALF, exclude="*_extra_state").load(tmp_path / "with")
    ShardedEMA(Extra(torch.ones(3)), HALF).load(tmp_path / "with")
    ShardedEMA(Extra({}), HALF, exclude="*_extra_state").start_from(tmp_path / "with")
    ShardedEMA(Extra(), HALF).start_from(tmp_path / "ema")


def test_a_teacher_keeps_its_own_extra_state_and_files_hold_the_students(tmp_path) -> None:
    student, teacher = Extra(), Extra().requires_grad_(False)
    ema = ShardedEMA(student, HALF, into=teacher)
    student.state, teacher.state = 5.0, 4.0
    ema.update()
    ema.save(tmp_path / "ema")
    ema.load(tmp_path / "ema")
    assert (student.state, teacher.state) == (5.0, 4.0)
    assert load_file(tmp_path / "ema" / "model.safetensors")["_extra_state"].item() == 5.0


# Names through nn.DataParallel


class OwnModule(nn.Module):
    """A user's own attribute called `module`."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


@pytest.mark.parametrize("build", [OwnModule, lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))])
def test_files_of_nn_data_parallel_load_into_the_plain_model_and_resume_without_it(tmp_path, build) -> None:
    model = build()
    ema = ShardedEMA(nn.DataParallel(model), HALF)
    ema.update()
    ema.save(tmp_path / "ema")
    build().load_state_dict(load_file(tmp_path / "ema" / "model.safetensors"))
    resumed = ShardedEMA(build(), HALF)
    resumed.load(tmp_path / "ema")
    assert resumed.num_updates == 1
    again = ShardedEMA(compiled(nn.DataParallel(build())), HALF)
    again.load(tmp_path / "ema")


# Configurations


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=61, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    config.bos_token_id = config.eos_token_id = 1
    return transformers.GPT2LMHeadModel(config)


class Around(nn.Module):
    """A module of the user around a model, whose configuration it forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt2()
        self.config = self.inner.config


def adapted(how: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "around":
            return Around()
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=2, target_modules=["c_attn"])
        if how == "get_peft_model":
            return peft.get_peft_model(gpt2(), lora)
        model = gpt2()
        if how == "add_adapter":
            model.add_adapter(lora)
            return model
        return peft.inject_adapter_in_model(lora, model)


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter", "inject_adapter_in_model", "around"])
def test_no_configuration_is_written_beside_names_that_it_does_not_describe(tmp_path, how) -> None:
    """from_pretrained took such a folder, and gave a model of random weights."""
    from dist_ema import consolidate_checkpoint, synthesize

    model = adapted(how)
    ema = ShardedEMA(model, HALF, include=None if how == "around" else "*lora_*")
    for _ in range(2):
        ema.update()
        ema.snapshot(tmp_path / "snapshots")
    ema.save(tmp_path / "ema")
    ema.consolidate(tmp_path / "export")
    if how != "around":  # as an older version left it
        (tmp_path / "ema" / "config.json").write_text('{"model_type": "gpt2"}')
        for folder in (tmp_path / "snapshots").iterdir():
            (folder / "config.json").write_text('{"model_type": "gpt2"}')
    consolidate_checkpoint(tmp_path / "ema", tmp_path / "offline", dtype=torch.bfloat16)
    synthesize(tmp_path / "snapshots", tmp_path / "made", HALF)
    for folder in ("export", "offline", "made"):
        written = {path.name for path in (tmp_path / folder).glob("*config.json")}
        assert written == (set() if how == "around" else {"adapter_config.json"}), folder


def test_a_model_of_transformers_has_its_configuration_still(tmp_path) -> None:
    ShardedEMA(gpt2(), HALF).save(tmp_path / "ema")
    assert {path.name for path in Path(tmp_path / "ema").glob("*config.json")} == {
        "config.json",
        "generation_config.json",
    }


def test_a_configuration_of_a_former_save_is_not_carried_over_beside_an_adapter(tmp_path) -> None:
    """A former version wrote it: `from_pretrained` would go on making a model of random weights.

    The configuration of an adapter is none of these names either: transformers would look for PEFT's file beside it.
    """

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A = nn.Linear(2, 2)

    ema = ShardedEMA(Adapted(), ConstantSchedule(decay=0.5))
    ema.update()
    ema.save(tmp_path / "ema")
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / "ema" / name).write_text("{}")
    ema.save(tmp_path / "ema")
    assert not list((tmp_path / "ema").glob("*config.json"))


def test_the_configuration_of_the_whole_model_is_not_carried_over_beside_a_part_of_it(tmp_path) -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    ema = ShardedEMA(model, ConstantSchedule(decay=0.5))
    ema.update()
    ema.save(tmp_path / "ema")
    (tmp_path / "ema" / "config.json").write_text("{}")
    ema.save(tmp_path / "ema")
    assert (tmp_path / "ema" / "config.json").exists(), "what a user has added to a whole model stays"
    model["head"] = nn.Linear(2, 3)
    with pytest.warns(UserWarning, match="has changed since"):
        ema.save(tmp_path / "ema", only_unchanged=True)
    assert not (tmp_path / "ema" / "config.json").exists()
