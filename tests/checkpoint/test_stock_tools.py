"""What a checkpoint is for: each way that users load weights takes a saved or exported folder as it is."""

from __future__ import annotations

import json
import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from safetensors.torch import load_file, load_model
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dist_ema import ConstantSchedule, ShardedEMA, consolidate_checkpoint

HALF = ConstantSchedule(momentum=0.5)
TOKENS = torch.arange(24).view(2, 12) % 60


def gpt2(seed: int = 0) -> nn.Module:
    """Tied weights, transposed matrices, buffers that are not saved."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=61, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


MODELS = {"gpt2": gpt2, "llama": llama}


def averaged(name: str, layout: str) -> tuple[nn.Module, ShardedEMA]:
    model = MODELS[name]()
    inner = model
    if layout == "fsdp2":
        for block in model.transformer.h if name == "gpt2" else model.model.layers:
            fully_shard(block)
        fully_shard(model)
    elif layout == "ddp":
        model = DistributedDataParallel(model)
    ema = ShardedEMA(model, HALF)
    for _ in range(3):
        with torch.no_grad():
            for parameter in inner.parameters():
                parameter.mul_(1.1)
        ema.update()
    return model, ema


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def write(name: str, layout: str, folder: str) -> torch.Tensor:
    model, ema = averaged(name, layout)
    ema.save(f"{folder}/ckpt/ema", max_shard_size=6000)
    ema.consolidate(f"{folder}/export")
    ema.consolidate(f"{folder}/export16", dtype=torch.bfloat16, max_shard_size=4000)
    with ema.average_parameters():
        return logits_of(model)


@pytest.fixture(
    scope="module", params=[(name, layout) for name in MODELS for layout in ("plain", "ddp", "fsdp2")], ids="-".join
)
def written(request, world, tmp_path_factory):
    """A model of transformers, saved and exported by two ranks, and its averaged logits."""
    name, layout = request.param
    folder = tmp_path_factory.mktemp("written")
    size = 1 if layout == "plain" else 2
    return name, folder, world(size).run(write, name, layout, str(folder))[0]


def test_from_pretrained_takes_checkpoint_and_export_as_they_are(written) -> None:
    name, folder, logits = written
    for source in ("ckpt/ema", "export"):
        for kind in (AutoModelForCausalLM, type(MODELS[name]())):
            model = kind.from_pretrained(folder / source).eval()
            assert torch.equal(logits_of(model), logits), source
    half = AutoModelForCausalLM.from_pretrained(folder / "export16")
    assert half.dtype == torch.bfloat16
    expected = AutoModelForCausalLM.from_pretrained(folder / "export").bfloat16()
    for (key, value), other in zip(half.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    assert json.loads((folder / "export16" / "generation_config.json").read_text())["eos_token_id"] == 1


def test_the_collective_and_the_offline_export_are_the_same_bytes(written, tmp_path) -> None:
    _, folder, _ = written
    consolidate_checkpoint(folder / "ckpt", tmp_path / "export")
    consolidate_checkpoint(folder / "ckpt" / "ema", tmp_path / "export16", dtype=torch.bfloat16, max_shard_size=4000)
    for name in ("export", "export16"):
        ours, theirs = (
            {path.name: path.read_bytes() for path in (root / name).iterdir()} for root in (tmp_path, folder)
        )
        assert ours == theirs


def test_load_model_of_safetensors_ties_again(written) -> None:
    name, folder, logits = written
    model = MODELS[name](seed=1)
    load_model(model, folder / "export" / "model.safetensors")
    assert torch.equal(logits_of(model), logits)


def test_load_state_dict_takes_the_files(written) -> None:
    name, folder, logits = written
    model = MODELS[name](seed=1)
    state = {}
    for path in (folder / "ckpt" / "ema").glob("*.safetensors"):
        state |= load_file(path)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == [] and set(missing) <= {"lm_head.weight"}, "only the second name of a tied weight"
    assert torch.equal(logits_of(model), logits)


def test_load_checkpoint_and_dispatch_of_accelerate(written) -> None:
    name, folder, logits = written
    with init_empty_weights():
        model = MODELS[name]()
    model.tie_weights()
    for source in ("ckpt/ema", "export"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = load_checkpoint_and_dispatch(model, folder / source, device_map={"": "cpu"})
        assert torch.equal(logits_of(loaded), logits)


def read_by_dcp(name: str, folder: str, logits: torch.Tensor) -> None:
    model = MODELS[name](seed=1)
    fully_shard(model)
    state = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight" or name != "gpt2"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=HuggingFaceStorageReader(os.path.join(folder, "ckpt", "ema")))
    assert torch.equal(logits_of(model), logits)
    dist.barrier()


def test_dcp_reads_the_folder_into_an_fsdp2_model(written, world) -> None:
    name, folder, logits = written
    world(2).run(read_by_dcp, name, str(folder), logits)


def test_a_model_without_a_configuration_has_no_config_json(tmp_path) -> None:
    model = nn.Linear(2, 2)
    model.config = {"model_type": "mine"}
    ema = ShardedEMA(model, HALF)
    ema.save(tmp_path / "ema")
    assert not (tmp_path / "ema" / "config.json").exists()


@pytest.mark.parametrize("shares", [True, False])
def test_a_module_around_a_model_of_transformers_has_no_config_json(tmp_path, shares: bool) -> None:
    """AutoModel found the configuration there and none of the names, and loaded random weights."""

    class Reward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = gpt2()
            self.config = self.backbone.config if shares else GPT2Config()
            self.head = nn.Linear(2, 1)

    ema = ShardedEMA(Reward(), HALF)
    ema.update()
    ema.save(tmp_path / "ema")
    assert not (tmp_path / "ema" / "config.json").exists()


def test_a_configuration_that_cannot_be_told_does_not_end_the_run(tmp_path) -> None:
    class Config:
        model_type = "odd"

        def to_json_string(self) -> str:
            raise TypeError("not JSON serializable")

    model = nn.Linear(2, 2)
    model.config = Config()
    ema = ShardedEMA(model, HALF)
    with pytest.warns(UserWarning, match="not JSON serializable"):
        ema.save(tmp_path / "ema")
    assert (tmp_path / "ema" / "manifest.json").exists()
