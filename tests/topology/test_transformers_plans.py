"""Models that transformers itself lays out: tensor and expert parallel plans, alone and with its own FSDP."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts_zoo import local, settle
from oracle import NaiveAverage
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dist_ema import CosineSchedule, ShardedEMA

pytest.importorskip("transformers", minversion="5.20")

SCHEDULE = CosineSchedule(0.3, 0.01, total_steps=8)
NUM_STEPS = 3
TOKENS = torch.arange(10).view(2, 5)
_SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
# Six experts: transformers cannot load a model of which a rank of FSDP has none.
_EXPERTS = {"num_local_experts": 6, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
# Name -> class of the configuration, its arguments.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "phi3": ("Phi3Config", {}),
    "mixtral": ("MixtralConfig", _EXPERTS),
    "qwen3_moe": ("Qwen3MoeConfig", {**_EXPERTS, "decoder_sparse_step": 1, "head_dim": 4}),
}
# Name -> number of ranks, arguments of DistributedConfig.
PLANS: dict[str, tuple[int, dict[str, int]]] = {
    "plain": (1, {}),
    "tp": (2, {}),
    "ep and tp": (2, {"tp_size": 2, "ep_size": 2}),
    "fsdp": (3, {"fsdp_size": 3}),
    "tp x fsdp": (4, {"tp_size": 2, "fsdp_size": 2}),
    "ep x fsdp": (4, {"ep_size": 2, "fsdp_size": 4}),
    "hsdp": (4, {"fsdp_size": 2, "dp_replicate_size": 2}),
}


def plans_of(kind: str, known: set[str]) -> list[str]:
    """The plans that fit the model, of those that this version of transformers has: 5.20 has no hybrid sharding."""
    fit = [plan for plan in PLANS if "ep" not in plan.split() or kind in ("mixtral", "qwen3_moe")]
    return [plan for plan in fit if PLANS[plan][1].keys() <= known]


def prepare(kind: str, folder: str) -> set[str]:
    """Save the model; in larger worlds only import what takes ten seconds, as ranks would wait for each other.

    Returns the arguments of DistributedConfig.
    """
    transformers = importlib.import_module("transformers")
    distributed = importlib.import_module("transformers.distributed")
    name, arguments = KINDS[kind]
    config = getattr(transformers, name)(**{**_SIZES, **arguments})
    model = transformers.AutoModelForCausalLM.from_config(config)
    if dist.get_world_size() == 1:
        model.save_pretrained(folder)
    return set(inspect.signature(distributed.DistributedConfig).parameters)


def from_pretrained(folder: str, plan: str = "plain") -> nn.Module:
    transformers = importlib.import_module("transformers")
    distributed = importlib.import_module("transformers.distributed")
    _, arguments = PLANS[plan]
    how = {"distributed_config": distributed.DistributedConfig(**arguments)} if arguments else {}
    how = {"tp_plan": "auto"} if plan == "tp" else how
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **how)


def drawn(step: int, reference: nn.Module) -> dict[str, torch.Tensor]:
    """Whole values of every parameter; at step 0 those that the model was saved with."""
    with torch.no_grad():
        for name, value in reference.named_parameters():
            if step:
                value.copy_(
                    torch.randn(value.shape, generator=torch.Generator().manual_seed(step + sum(name.encode())))
                )
        return {name: value.clone() for name, value in reference.named_parameters()}


@torch.no_grad()
def held(model: nn.Module, whole: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What this rank holds of each parameter, and the same part of the whole values."""
    settle(model)
    parts = {}
    for name, value in model.named_parameters():
        part = whole[name]
        if isinstance(value, DTensor):
            part = local(distribute_tensor(part, value.device_mesh, value.placements, src_data_rank=None))
        parts[name] = local(value), part.to(value.dtype)
    return parts


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(TOKENS).logits
    return out.full_tensor() if isinstance(out, DTensor) else out


def averages(kind: str, source: str, plan: str, folder: str) -> int:
    """Returns how many boxes of one tensor this rank averages at most."""
    model, reference = from_pretrained(source, plan), from_pretrained(source)
    ema, naive = ShardedEMA(model, SCHEDULE), NaiveAverage(SCHEDULE.momentum)
    for step in range(NUM_STEPS):
        whole = drawn(step, reference)
        for live, part in held(model, whole).values():
            assert torch.equal(live, part) or step, "the whole model is what transformers has loaded"
            live.copy_(part)
        naive.update(whole)
        ema.update()
    live = {name: value.clone() for name, (value, _) in held(model, naive.values).items()}
    with ema.average_parameters():
        for name, (value, part) in held(model, naive.values).items():
            assert torch.equal(value, part), name
        with torch.no_grad():
            reference.load_state_dict(naive.values, strict=False)
        torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, live[name]) for name, (value, _) in held(model, naive.values).items())
    state, sharded = ema.full_state_dict(), ema.sharded_state_dict()
    assert sharded.keys() == model.state_dict().keys()
    for name, (_, part) in held(model, naive.values).items():
        assert torch.equal(local(sharded[name]), part), name
    ema.save(folder)
    ema.consolidate(f"{folder}-export", dtype=torch.bfloat16)
    files, export = (load_file(f"{at}/model.safetensors") for at in (folder, f"{folder}-export"))
    for name, value in naive.values.items():
        assert dist.get_rank() or torch.equal(state[name], value), name
        assert torch.equal(files[name], value) and torch.equal(export[name], value.bfloat16()), name
    per_tensor = [sum(shard.fqn == name for shard in ema.shards) for name in naive.values]
    return max(per_tensor)


def loads(source: str, plan: str, folders: list[str]) -> None:
    """Then one more update, and compare with the uninterrupted twin."""
    model, reference = from_pretrained(source, plan), from_pretrained(source)
    ema, naive = ShardedEMA(model, SCHEDULE), NaiveAverage(SCHEDULE.momentum)
    for step in range(NUM_STEPS + 1):
        whole = drawn(step, reference)
        naive.update(whole)
    for live, part in held(model, whole).values():
        live.copy_(part)
    for folder in folders:
        ema.load(folder)
        assert ema.num_updates == NUM_STEPS
        ema.update()
        state = ema.full_state_dict()
        for name, value in naive.values.items():
            assert dist.get_rank() or torch.equal(state[name], value), f"{folder}: {name}"


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_shards_by_its_own_plans_is_averaged_and_loaded_by_every_other_plan(
    world, tmp_path, kind
) -> None:
    source = str(tmp_path / "model")
    for size in (1, 2, 3, 4):
        known, *_ = world(size).run(prepare, kind, source)
    folders = {plan: str(tmp_path / plan.replace(" ", "-")) for plan in plans_of(kind, known)}
    boxes = {plan: world(PLANS[plan][0]).run(averages, kind, source, plan, folders[plan]) for plan in folders}
    assert len(folders) >= 4
    if kind in ("mixtral", "qwen3_moe"):
        assert max(boxes["tp"]) > 1 and max(boxes["tp x fsdp"]) > 1, "experts with fused weights are packed"
    for plan in folders:
        world(PLANS[plan][0]).run(loads, source, plan, list(folders.values()))
