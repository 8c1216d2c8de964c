"""Folders of averages of many libraries' models, each loaded by every library.

Not a test: `test_folders_of_libraries.py` runs it. The libraries warn while they are imported. Models are saved by one
process, and by two under FSDP2. What each loader made of each folder is printed as one JSON object.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from no_torchvision import import_timm
from torch import nn

timm = import_timm()

import peft  # noqa: E402
from diffusers import AutoModel as DiffusersAutoModel  # noqa: E402
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel  # noqa: E402
from huggingface_hub import ModelCard, PyTorchModelHubMixin  # noqa: E402
from safetensors.torch import load_model  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from dist_ema import ConstantSchedule, ShardedEMA, consolidate_checkpoint  # noqa: E402
from dist_ema.cli import main as cli  # noqa: E402

ROOT = Path(sys.argv[1])
BASE = ROOT / "base"
CODE = """
from torch import nn
from transformers import PreTrainedModel, PretrainedConfig


class OwnConfig(PretrainedConfig):
    model_type = "own-of-test"

    def __init__(self, width=4, **others):
        self.width = width
        super().__init__(**others)


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.inner = nn.Linear(config.width, config.width)
        self.post_init()


OwnConfig.register_for_auto_class()
OwnModel.register_for_auto_class("AutoModel")
"""


class Net(nn.Module, PyTorchModelHubMixin):
    def __init__(self, width: int = 8, name: str = "net") -> None:
        super().__init__()
        self.inner = nn.Linear(4, width)


def gpt2() -> nn.Module:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=8, n_embd=8, n_layer=1, n_head=2, **ends))


def t5() -> nn.Module:
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def own_code() -> nn.Module:
    (ROOT / "own_model.py").write_text(CODE)
    sys.path.insert(0, str(ROOT))
    import own_model

    return own_model.OwnModel(own_model.OwnConfig(width=6))


# What the smallest UNets of diffusers have alike.
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def unet() -> nn.Module:
    return UNet2DModel(
        **SMALL,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def conditioned() -> nn.Module:
    return UNet2DConditionModel(
        **SMALL,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def base() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(BASE)


def lora(**others: Any) -> peft.PeftConfig:
    return peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, **others)


def adapted(*configs: peft.PeftConfig, names: tuple[str, ...] = ("default",)) -> nn.Module:
    model = peft.get_peft_model(base(), configs[0], adapter_name=names[0])
    for config, name in zip(configs[1:], names[1:], strict=True):
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if any(f".{adapter}." in name for adapter in names):
            parameter.requires_grad_(True)
    return model


def with_adapter(model: Any) -> nn.Module:
    """By the mixins of transformers and diffusers."""
    targets = ["c_attn"] if isinstance(model, GPT2LMHeadModel) else ["to_q", "to_v"]
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return model


def tiny_timm() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, embed_dim=12, depth=1, num_heads=2)


def wrapped() -> nn.Module:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = gpt2()
            self.config = self.net.config

    return Wrapper()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "t5": t5,
    "own_code": own_code,
    "unet": unet,
    "lora": lambda: adapted(lora(task_type="CAUSAL_LM")),
    "dora": lambda: adapted(lora(use_dora=True, modules_to_save=["ln_f"], task_type="CAUSAL_LM")),
    "ia3": lambda: adapted(peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], task_type="CAUSAL_LM")),
    "two_adapters": lambda: adapted(lora(), lora(), names=("default", "style")),
    "prompt": lambda: adapted(peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
    "gpt2_adapter": lambda: with_adapter(base()),
    "unet_adapter": lambda: with_adapter(conditioned()),
    "timm": tiny_timm,
    "hub": lambda: Net(width=6, name="other"),
    "plain": lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)),
    "wrapped": wrapped,
}


def peft_model(folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(base(), folder)


def two_adapters(folder: Path) -> Any:
    model = peft_model(folder)
    model.load_adapter(folder / "style", adapter_name="style")
    return model


def lora_of_diffusers(folder: Path) -> Any:
    model = conditioned()
    model.load_lora_adapter(str(folder), prefix=None, weight_name="pytorch_lora_weights.safetensors")
    names = {".default_0.": ".default."}
    state = {name.replace(".default_0.", names[".default_0."]): value for name, value in model.state_dict().items()}
    return State(state)


class State:
    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state_dict = lambda: state


def pipeline(folder: Path) -> Any:
    """The folder as the unet of a pipeline."""
    whole = folder.parent / f"pipeline_{folder.name}"
    if not whole.exists():
        DDPMPipeline(unet(), DDPMScheduler()).save_pretrained(whole)
        for path in (whole / "unet").iterdir():
            path.unlink()
        (whole / "unet").rmdir()
        (whole / "unet").symlink_to(folder)
    return DDPMPipeline.from_pretrained(whole).unet


def of_safetensors(folder: Path) -> Any:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    load_model(model, folder / "model.safetensors")
    return model


LOADERS: dict[str, Callable[[Path], Any]] = {
    "AutoModelForCausalLM": lambda folder: AutoModelForCausalLM.from_pretrained(folder),
    "AutoModelForSeq2SeqLM": lambda folder: AutoModelForSeq2SeqLM.from_pretrained(folder),
    "AutoModel": lambda folder: AutoModel.from_pretrained(folder, trust_remote_code=True),
    "UNet2DModel": lambda folder: UNet2DModel.from_pretrained(folder.parent, subfolder=folder.name),
    "diffusers.AutoModel": lambda folder: DiffusersAutoModel.from_pretrained(str(folder)),
    "DDPMPipeline": pipeline,
    "load_lora_adapter": lora_of_diffusers,
    "PeftModel": peft_model,
    "PeftModel, two adapters": two_adapters,
    "AutoPeftModelForCausalLM": lambda folder: peft.AutoPeftModelForCausalLM.from_pretrained(folder),
    "timm": lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True),
    "hub": lambda folder: Net.from_pretrained(folder, strict=True),
    "safetensors": of_safetensors,
}


def save(name: str, folder: Path, *, sharded: bool) -> None:
    """Average a model, save and export it, and keep the average."""
    torch.manual_seed(len(name))
    model = MODELS[name]()
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    ema = ShardedEMA(model, ConstantSchedule(decay=0.5))
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.25).add_(0.0625)
        ema.update()
    ema.save(folder / "saved")
    ema.consolidate(folder / "export")
    ema.consolidate(folder / "half", dtype=torch.bfloat16)
    average = ema.full_state_dict()
    if not sharded or dist.get_rank() == 0:
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        frozen = any(not parameter.requires_grad for parameter in model.parameters())
        torch.save({key: average[key] for key in (trained if frozen else average)}, folder / "average.pt")


def over_each_other() -> dict[str, list[str]]:
    """The files that stay when models of other forms are saved into one folder, beside what the user has added."""
    stayed = {}
    added = ("notes.txt", "tokenizer.json", "style/notes.txt")
    for kind in ("saved", "export"):
        folder = ROOT / "over" / kind
        for name in (
            "two_adapters",
            "gpt2",
            "lora",
            "own_code",
            "unet",
            "two_adapters",
            "hub",
            "prompt",
            "unet_adapter",
        ):
            ema = ShardedEMA(MODELS[name](), ConstantSchedule(decay=0.5))
            ema.update()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if kind == "saved":
                    ema.save(folder, max_shard_size="1KB")
                else:
                    ema.consolidate(folder, max_shard_size="1KB")
            fresh = folder.parent / f"fresh_{kind}_{name}"
            (ema.save if kind == "saved" else ema.consolidate)(fresh, max_shard_size="1KB")
            here, there = ({file for file, _ in _files(each)} for each in (folder, fresh))
            stayed[f"{kind} {name}"] = sorted((here - there).difference(added))
            assert there <= here and all((folder / file).exists() for file in added if (folder / "notes.txt").exists())
            (folder / "style").mkdir(exist_ok=True)
            for file in added:
                (folder / file).write_text("of the user")
    return stayed


def out_of_a_trainer(name: str, folder: Path) -> dict[str, Any]:
    """The files of an export of an average in a checkpoint of the Trainer, and what `diff` says of the two."""
    torch.manual_seed(7)
    ema = ShardedEMA(MODELS[name](), ConstantSchedule(decay=0.5))
    ema.update()
    (folder / "checkpoint-4").mkdir(parents=True)
    (folder / "checkpoint-4" / "trainer_state.json").write_text("{}")
    ema.save(folder / "checkpoint-4" / "ema")
    ema.consolidate(folder / "export")
    consolidate_checkpoint(folder / "checkpoint-4", folder / "offline")
    compared, exported = io.StringIO(), folder / "export"
    with contextlib.redirect_stdout(compared):
        code = cli(["diff", str(folder / "checkpoint-4"), str(exported), "--json"])
    verified = io.StringIO()
    with contextlib.redirect_stdout(verified):
        cli(["verify", str(exported)])
    return {
        "top": sorted(path.name for path in (folder / "checkpoint-4" / "ema").glob("*.safetensors")),
        "files": [file for file, _ in _files(folder / "offline")],
        "same": all(path.read_bytes() == (folder / "offline" / file).read_bytes() for file, path in _files(exported)),
        "code": code,
        "verified": verified.getvalue(),
        "diff": json.loads(compared.getvalue()),
    }


def sharded(rank: int, names: list[str]) -> None:
    store = dist.FileStore(str(ROOT / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for name in names:
        save(name, ROOT / "2" / name, sharded=True)
    dist.barrier()


def forked(names: list[str]) -> None:
    """Two ranks, forked from this process, which has the libraries."""
    children = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                sharded(rank, names)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(pid)
    for pid in children:
        _, status = os.waitpid(pid, 0)
        assert status == 0, "a rank failed"


def verdict(load: Callable[[Path], Any], folder: Path, average: dict[str, torch.Tensor]) -> str:
    """What a loader makes of a folder."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            state = load(folder).state_dict()
    except Exception as error:
        return f"refuses: {type(error).__name__}: {str(error)[:200]}"
    # Loaders of an adapter, or of the model below a head, give other prefixes.
    pairs = {name: [whole for whole in average if _alike(name, whole)] for name in state}
    compared = {name: wholes[0] for name, wholes in pairs.items() if wholes}
    of_adapter = all("lora_" in name or "ia3" in name or "modules_to_save" in name for name in average)
    # A loader of one adapter leaves the other one alone.
    missing = {name for name in set(average) - set(compared.values()) if ".style." not in name}
    missing = missing if of_adapter else set(state) - set(compared)
    if missing or not compared:
        return f"other names: {sorted(missing)[:2]} of {list(state)[:2]}"
    other = [n for n, whole in compared.items() if not torch.equal(state[n], average[whole].to(state[n].dtype))]
    return f"other weights: {other[:2]}" if other else "equal"


def _alike(one: str, other: str) -> bool:
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")


def main() -> None:
    torch.set_num_threads(1)
    names = list(MODELS)
    for size in ("1", "2"):
        for name in names:
            (ROOT / size / name).mkdir(parents=True)
    gpt2().save_pretrained(BASE)
    own_code()
    for name in names:
        save(name, ROOT / "1" / name, sharded=False)
    forked([name for name in names if name != "prompt"])
    told: dict[str, Any] = {"files": {}, "table": {}, "sharded": {}, "card": {}}
    for name in names:
        at = ROOT / "1" / name
        consolidate_checkpoint(at / "saved", at / "offline", dtype=torch.bfloat16)
        files = {str(path.relative_to(at / "export")): path for path in (at / "export").rglob("*") if path.is_file()}
        told["files"][name] = sorted(files)
        told["card"][name] = ModelCard.load(at / "export" / "README.md").data.to_dict()
        same = all(path.read_bytes() == (at / "half" / file).read_bytes() for file, path in _files(at / "offline"))
        assert same and len(_files(at / "half")) == len(_files(at / "offline")), f"{name}: offline differs"
        average = torch.load(at / "average.pt")
        for folder in ("saved", "export", "half") if name in ("gpt2", "unet", "lora", "timm", "hub") else ("export",):
            cast = {key: value.bfloat16() if folder == "half" else value for key, value in average.items()}
            for loader, load in LOADERS.items():
                told["table"][f"{name} {folder} {loader}"] = verdict(load, at / folder, cast)
        if name == "prompt":
            continue
        average = torch.load(ROOT / "2" / name / "average.pt")
        for loader, load in LOADERS.items():
            if told["table"][f"{name} export {loader}"] == "equal":
                told["sharded"][f"{name} {loader}"] = verdict(load, ROOT / "2" / name / "export", average)
    told["over"] = over_each_other()
    adapters = ("lora", "two_adapters", "unet_adapter")
    told["out_of_a_trainer"] = {name: out_of_a_trainer(name, ROOT / "trained" / name) for name in adapters}
    adapter = MODELS["dora"]()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(1.5)
    adapter.save_pretrained(ROOT / "of_peft")
    trained = {name: value for name, value in adapter.state_dict().items() if "lora_" in name}
    told["dora of PEFT itself"] = verdict(LOADERS["AutoModelForCausalLM"], ROOT / "of_peft", trained)
    print("told:" + json.dumps(told))


def _files(folder: Path) -> list[tuple[str, Path]]:
    return sorted((str(path.relative_to(folder)), path) for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
