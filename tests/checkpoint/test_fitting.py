"""The names under which other libraries keep an average: what fits is read, what is ambiguous is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from disks import on_disk, on_node, warnings_of
from safetensors.torch import save_file
from torch import nn
from zoo import build, set_live

from dist_ema import CheckpointError, CheckpointMismatchError, ConstantSchedule, DistEMAError, ShardedEMA

HALF = ConstantSchedule(momentum=0.5)


def average(model: nn.Module | None = None, **options: Any) -> ShardedEMA:
    return ShardedEMA(nn.Linear(3, 2) if model is None else model, HALF, **options)


def weights(value: float, prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}weight": torch.full((2, 3), value), f"{prefix}bias": torch.full((2,), value)}


def begun(content: Any, folder: Path, **options: Any) -> tuple[float, int]:
    """What the average begins with, and its counter."""
    torch.save(content, folder / "average.pt")
    ema = average()
    ema.start_from(folder / "average.pt", **options)
    state = ema.full_state_dict()
    (value,) = {*state["weight"].unique().tolist(), *state["bias"].unique().tolist()}
    return value, ema.num_updates


N = torch.tensor(7)
LIVE, EMA = weights(1.0), weights(2.0)

# What was saved, and with how many updates the average (2.0) begins.
RIGHT: dict[str, tuple[Any, int]] = {
    "names as they are": (EMA, 1),
    "a counter of something else": ({"model": EMA, "steps": N}, 1),
    "DataParallel": (weights(2.0, "module."), 1),
    "AveragedModel": ({**weights(2.0, "module."), "n_averaged": N}, 7),
    "mmengine's averaged model": ({**weights(2.0, "module."), "steps": N}, 7),
    "AveragedModel of a compiled model": ({**weights(2.0, "module._orig_mod."), "n_averaged": N}, 7),
    "compiled": (weights(2.0, "_orig_mod."), 1),
    "AveragedModel in DataParallel": ({**weights(2.0, "module.module."), "module.n_averaged": N}, 7),
    "ema-pytorch": (
        {**weights(2.0, "ema_model."), **weights(1.0, "online_model."), "initted": torch.tensor(True), "step": N},
        7,
    ),
    "an average in a module": ({**weights(1.0, "model."), **weights(2.0, "averaged_model.")}, 1),
    "timm": ({"state_dict": LIVE, "state_dict_ema": EMA, "optimizer": {"state": {0: LIVE}}, "epoch": 3}, 1),
    "torchvision": ({"model": LIVE, "model_ema": {**weights(2.0, "module."), "n_averaged": N}}, 7),
    "Lightning": ({"state_dict": EMA, "current_model_state": LIVE, "averaging_state": {"n_averaged": N}}, 7),
    "Lightning, the model in the module": (
        {"state_dict": weights(2.0, "model."), "averaging_state": {"n_averaged": N}},
        7,
    ),
    "mmengine's runner": (
        {
            "state_dict": EMA,
            "ema_state_dict": {**weights(1.0, "module."), "steps": N},
            "meta": {"mmengine_version": "0.10.7"},
        },
        7,
    ),
    "a dict in a dict": ({"trainer": {"ema": EMA, "model": LIVE}}, 1),
}


@pytest.mark.parametrize("form", RIGHT)
def test_the_averaged_weights_are_read_and_their_updates_are_counted(tmp_path, form) -> None:
    content, num_updates = RIGHT[form]
    assert begun(content, tmp_path) == (2.0, num_updates)
    assert begun(content, tmp_path, num_updates=4) == (2.0, 4), "what the user says counts"


# What was saved, and what is told of it. With a guess each of these would be read wrongly without a word.
WRONG: dict[str, tuple[Any, str]] = {
    "two averages": ({"ema": EMA, "swa": LIVE}, "several sets of weights that fit.*'ema' under.*'swa' under"),
    "two without a word": ({"a": EMA, "b": LIVE}, "several sets of weights.*does not say"),
    "a side each": ({**LIVE, **weights(2.0, "module.")}, "several sets of weights.*own names.*prefix module"),
    "mmengine, or by hand": (
        {"state_dict": EMA, "ema_state_dict": {**weights(1.0, "module."), "steps": N}},
        r"(?s)EMAHook exchanges the two.*weights_only=False",
    ),
    "half a prefix": ({"module.weight": EMA["weight"], "bias": EMA["bias"]}, "another model.*Forms that are known"),
    "an unknown prefix": (weights(2.0, "net."), "2 of its tensors are not in this model.*the prefixes module"),
    "more than the model": ({**weights(2.0, "module."), "module.scale": N.float(), "n_averaged": N}, "module.scale"),
    "less than the model": ({"weight": EMA["weight"]}, r"bias \[2\] \(found nothing\)"),
    "another shape": (
        {"module.weight": EMA["bias"], "module.bias": EMA["bias"]},
        r"weight \[2, 3\] \(found \[2\]\).*the prefix module",
    ),
    "no update yet": ({**weights(2.0, "module."), "n_averaged": torch.tensor(0)}, "0 updates.*num_updates=1"),
}


@pytest.mark.parametrize("form", WRONG)
def test_weights_that_do_not_say_which_they_are_or_do_not_fit_are_refused(tmp_path, form) -> None:
    content, told = WRONG[form]
    with pytest.raises(CheckpointMismatchError, match=told):
        begun(content, tmp_path)


def test_prefixes_and_counters_of_safetensors_files_are_read_too(tmp_path) -> None:
    save_file({**weights(2.0, "module."), "n_averaged": N}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"optimization_step": 30}))
    for path, options, count in (
        (tmp_path, {}, 30),
        (tmp_path / "model.safetensors", {"num_updates": 5}, 5),
    ):
        ema = average()
        ema.start_from(path, **options)
        assert ema.num_updates == count and ema.full_state_dict()["bias"].tolist() == [2.0, 2.0]
    for text in ("{", '{"optimization_step": "many"}', '{"optimization_step": -3}', "[]"):
        (tmp_path / "config.json").write_text(text)
        ema.start_from(tmp_path)
        assert ema.num_updates == 7, "of its own counter, as the configuration has none"


def test_what_is_new_or_dropped_may_be_named_with_or_without_the_prefix(tmp_path) -> None:
    more = {**weights(2.0, "module."), "module.head": torch.ones(3)}
    assert begun(more, tmp_path, dropped="head") == begun(more, tmp_path, dropped="module.head") == (2.0, 1)
    del more["module.bias"]
    torch.save(more, tmp_path / "average.pt")
    ema = average()
    ema.start_from(tmp_path / "average.pt", new="bias", dropped="head")
    assert ema.full_state_dict()["weight"].unique().tolist() == [2.0]


def test_names_within_which_a_wrapper_stands_are_those_of_the_model(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    names = {"0._orig_mod.weight": "0.weight", "0._orig_mod.bias": "0.bias"}
    state = {name: model.state_dict()[names.get(name, name)] for name in (*names, "1.weight", "1.bias")}
    torch.save({"ema": {f"module.{name}": value + 1 for name, value in state.items()}}, tmp_path / "average.pt")
    ema = average(model)
    ema.start_from(tmp_path / "average.pt")
    assert torch.equal(ema.full_state_dict()["0.weight"], model[0].weight.detach() + 1)


def base_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 3))


def adapters(*names: str, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["2"], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base_model(), config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
    with torch.no_grad():
        for number, (name, value) in enumerate(model.named_parameters()):
            if any(f".{adapter}" in name for adapter in names):
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(number)))
            value.requires_grad_(any(f".{adapter}" in name for adapter in names))
    return model


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_has_its_name_again_as_peft_itself_takes_it_away(tmp_path, use_dora) -> None:
    """By PEFT's own mapping; two adapters in one folder; as safetensors and as torch.save."""
    from peft import get_peft_model_state_dict

    theirs = adapters("default", "other", use_dora=use_dora)
    expected = {name: value.detach() for name, value in theirs.named_parameters() if value.requires_grad}
    for safe in (True, False):
        folder = tmp_path / str(safe)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.save_pretrained(folder, safe_serialization=safe)
        assert (folder / "other" / "adapter_config.json").exists()
        ours = adapters("default", "other", use_dora=use_dora)
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.zero_()
        ema = average(ours, trainable_only=True)
        ema.start_from(folder)
        state = ema.full_state_dict()
        assert len(expected) > 10 and all(torch.equal(state[name], value) for name, value in expected.items())
        for path in (folder / "other", folder):  # a model with one adapter, whatever its name
            one = adapters("mine" if path == folder else "other", use_dora=use_dora)
            ema = average(one, trainable_only=True)
            ema.start_from(path)
            adapter = "default" if path == folder else "other"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                in_file = get_peft_model_state_dict(theirs, adapter_name=adapter, save_embedding_layers=False)
                state = get_peft_model_state_dict(
                    one, ema.full_state_dict(), next(iter(one.peft_config)), save_embedding_layers=False
                )
            assert in_file.keys() == state.keys()
            assert all(torch.equal(state[name], value) for name, value in in_file.items())


def test_adapters_that_could_be_meant_twice_or_are_not_there_are_refused(tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapters("default").save_pretrained(tmp_path / "one")
        adapters("default").save_pretrained(tmp_path / "two")
        adapters("default").save_pretrained(tmp_path / "two" / "default")
    ema = average(adapters("default"), trainable_only=True)
    with pytest.raises(CheckpointMismatchError, match=r"two adapters that may be the model's 'default'.*Give "):
        ema.start_from(tmp_path / "two")
    ema.start_from(tmp_path / "two" / "default")
    ema.start_from(tmp_path / "two" / "adapter_model.safetensors")
    several = average(adapters("default", "other"), trainable_only=True)
    with pytest.raises(CheckpointMismatchError, match=r"other.* \(found nothing\).*Forms that are known"):
        several.start_from(tmp_path / "one")
    several.start_from(tmp_path / "one", new="*.other*")
    plain = average(base_model())
    with pytest.raises(CheckpointMismatchError, match="another model"):
        plain.start_from(tmp_path / "one")


def from_every_form(folder: str, layout: str) -> None:
    """Each rank reads its boxes, of the file that it sees or through rank 0; what is refused is refused on all."""
    root, rank = Path(folder), dist.get_rank()
    model = build(layout)
    expected = set_live(build("plain"), 3)
    state = {f"module.{name}": value for name, value in expected.items() if layout != "fsdp2" or value.dim()}
    disk = root / ("shared" if layout != "fsdp2" else f"disk{rank}")
    with on_node("one" if layout != "fsdp2" else f"node{rank}"), on_disk(disk) as here:
        if rank == 0:
            torch.save({**state, "n_averaged": N}, disk / "average.pt")
            torch.save({**state, "n_averaged": N}, disk / "old.pt", _use_new_zipfile_serialization=False)
            torch.save({"ema": state, "args": object}, disk / "hostile.pt")
            (disk / "cut.pt").write_bytes((disk / "average.pt").read_bytes()[:900])
        dist.barrier()
        ema = ShardedEMA(model, HALF)
        for name in ("average.pt", "old.pt"):
            told = warnings_of(lambda name=name: ema.start_from(f"{here}/{name}", dropped="*"))
            assert ("do not see" in told) == (layout == "fsdp2" and rank == 0), told
            found = ema.full_state_dict()
            assert ema.num_updates == 7
            if rank == 0:
                for fqn, value in expected.items():
                    assert fqn not in found or torch.equal(found[fqn], value), fqn
        texts = []
        for name in ("hostile.pt", "cut.pt"):
            with pytest.raises(DistEMAError) as refused:
                ema.start_from(f"{here}/{name}", dropped="*")
            texts.append(f"{type(refused.value).__name__}: {refused.value}")
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, texts)
        assert every == [texts] * len(every) and isinstance(refused.value, CheckpointError)


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "layout"), [(2, "ddp"), (2, "fsdp2")])
def test_every_rank_reads_its_part_of_a_file_of_torch_save(world, tmp_path, size, layout) -> None:
    world(size).run(from_every_form, str(tmp_path), layout)


def test_biases_that_are_trained_beside_an_adapter_are_found_in_its_folder(tmp_path) -> None:
    theirs = adapters("default", bias="all")
    with torch.no_grad():
        for number, (name, value) in enumerate(theirs.named_parameters()):
            value.requires_grad_(value.requires_grad or name.endswith("bias"))
            if value.requires_grad:
                value.add_(number + 1.0)
    expected = {name: value.detach() for name, value in theirs.named_parameters() if value.requires_grad}
    assert any(name.endswith("bias") for name in expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    ours = adapters("default", bias="all")
    for name, value in ours.named_parameters():
        value.requires_grad_(name in expected)
    ema = average(ours, trainable_only=True)
    ema.start_from(tmp_path / "theirs")
    state = ema.full_state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize("count", [torch.tensor(-3), torch.tensor(2**64 - 1, dtype=torch.uint64), torch.tensor(True)])
def test_a_counter_that_counts_nothing_is_not_taken_for_a_number_of_updates(tmp_path, count) -> None:
    model = nn.Linear(2, 2)
    state = {**{f"module.{name}": value for name, value in model.state_dict().items()}, "n_averaged": count}
    torch.save(state, tmp_path / "swa.pt")
    save_file(state, tmp_path / "swa.safetensors")
    for name in ("swa.pt", "swa.safetensors"):
        ema = average(model)
        with pytest.raises(CheckpointMismatchError, match="n_averaged"):
            ema.start_from(tmp_path / name)
        ema.start_from(tmp_path / name, dropped="n_averaged")


def test_of_two_dicts_under_one_key_neither_is_taken_silently(tmp_path) -> None:
    model = nn.Linear(2, 2)
    other = {name: value + 1 for name, value in model.state_dict().items()}
    torch.save({"a.b": model.state_dict(), "a": {"b": other}}, tmp_path / "two.pt")
    with pytest.raises(CheckpointMismatchError, match="two dicts of tensors of the same keys"):
        average(model).start_from(tmp_path / "two.pt")
