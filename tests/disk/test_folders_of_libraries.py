"""The folders that people load: each library's loader on each model's folder, and what lies beside the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file
from torch import nn

from dist_ema import ConstantSchedule, PowerSchedule, ShardedEMA, consolidate_checkpoint, synthesize
from dist_ema.disk.forms.models import origin_of

SUPPORT = Path(__file__).parents[1] / "support"

# Model -> the loaders that give its average, of those in launched_folders.py. All others must refuse its folder.
SERVED = {
    "gpt2": ["AutoModelForCausalLM", "AutoModel", "diffusers.AutoModel"],
    "t5": ["AutoModelForSeq2SeqLM", "AutoModel", "diffusers.AutoModel"],
    "own_code": ["AutoModel"],
    "unet": ["UNet2DModel", "diffusers.AutoModel", "DDPMPipeline"],
    "lora": ["AutoModelForCausalLM", "AutoModel", "PeftModel", "AutoPeftModelForCausalLM"],
    "dora": ["PeftModel", "AutoPeftModelForCausalLM"],
    "ia3": ["AutoModelForCausalLM", "AutoModel", "PeftModel", "AutoPeftModelForCausalLM"],
    "two_adapters": ["PeftModel, two adapters", "PeftModel", "AutoPeftModelForCausalLM"],
    "prompt": [],
    "gpt2_adapter": ["AutoModelForCausalLM", "AutoModel", "PeftModel"],
    "unet_adapter": ["load_lora_adapter"],
    "timm": ["timm"],
    "hub": ["hub"],
    "plain": ["safetensors"],
    "wrapped": [],
}
CARD = ["README.md"]
FILES = {
    "gpt2": ["config.json", "generation_config.json", "model.safetensors"],
    "own_code": ["config.json", "model.safetensors", "own_model.py"],
    "unet": ["config.json", "diffusion_pytorch_model.safetensors"],
    "lora": ["adapter_config.json", "adapter_model.safetensors"],
    "two_adapters": [
        "adapter_config.json",
        "adapter_model.safetensors",
        "style/adapter_config.json",
        "style/adapter_model.safetensors",
    ],
    "prompt": ["model.safetensors"],
    "unet_adapter": ["pytorch_lora_weights.safetensors"],
    "timm": ["config.json", "model.safetensors"],
    "hub": ["config.json", "model.safetensors"],
    "plain": ["model.safetensors"],
    "wrapped": ["model.safetensors"],
}


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("folders")
    paths = [str(SUPPORT.parents[1]), str(SUPPORT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SUPPORT / "launched_folders.py"), str(folder)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr[-6000:]
    (line,) = (line for line in ran.stdout.splitlines() if line.startswith("told:"))
    record: dict[str, Any] = json.loads(line.removeprefix("told:"))
    return record


def test_no_loader_takes_a_folder_for_something_that_it_is_not(told) -> None:
    """Either it refuses, or it gives the average bit for bit, from a save and from exports of two dtypes."""
    # The loader of transformers leaves a vector of DoRA as it is made, also in a folder of PEFT itself.
    assert told["dora of PEFT itself"].startswith("other weights")
    for place, verdict in told["table"].items():
        if place not in ("dora export AutoModelForCausalLM", "dora export AutoModel"):
            assert verdict == "equal" or verdict.startswith("refuses"), f"{place}: {verdict}"


@pytest.mark.parametrize("name", SERVED)
def test_the_library_of_a_model_loads_its_average_bit_for_bit(told, name) -> None:
    for loader in SERVED[name]:
        verdicts = {place: verdict for place, verdict in told["table"].items() if place.endswith(f" {loader}")}
        own = {place: verdict for place, verdict in verdicts.items() if place.startswith(f"{name} ")}
        assert own and set(own.values()) == {"equal"}, own
        assert told["sharded"][f"{name} {loader}"] == "equal", "saved by two ranks under FSDP2"


@pytest.mark.parametrize("name", FILES)
def test_an_export_has_the_files_that_the_library_reads_and_no_others(told, name) -> None:
    assert told["files"][name] == sorted(FILES[name] + CARD)


def test_another_form_in_the_same_folder_leaves_nothing_stale(told) -> None:
    assert set(map(tuple, told["over"].values())) == {()}, told["over"]


@pytest.mark.parametrize("name", ["lora", "two_adapters", "unet_adapter"])
def test_an_export_of_a_trainers_checkpoint_has_no_adapter_where_its_library_does_not_look(told, name) -> None:
    of_trainer = told["out_of_a_trainer"][name]
    assert of_trainer["top"] == [], "at the top a resume of the Trainer takes the average for a second adapter"
    assert of_trainer["files"] == sorted([*FILES[name], *CARD]) and of_trainer["same"]


@pytest.mark.parametrize("name", ["lora", "two_adapters", "unet_adapter"])
def test_diff_of_an_adapters_average_and_its_export_finds_every_tensor_in_both(told, name) -> None:
    of_trainer = told["out_of_a_trainer"][name]
    assert of_trainer["code"] == 0 and of_trainer["diff"]["apart"] == []
    assert of_trainer["diff"]["relative"] == 0.0 and len(of_trainer["diff"]["tensors"]) > 1


def test_verify_of_an_export_looks_at_every_adapter_in_it(told) -> None:
    of_two = told["out_of_a_trainer"]["two_adapters"]["verified"]
    assert "4 tensors in 2 files" in of_two and "2 tensors in 1 file" in told["out_of_a_trainer"]["lora"]["verified"]


def test_the_hub_reads_the_card_of_every_export(told) -> None:
    names = {name: card["library_name"] for name, card in told["card"].items()}
    assert (names["gpt2"], names["unet"], names["lora"]) == ("transformers", "diffusers", "peft")
    assert all(card["tags"] == ["ema", "dist_ema"] for card in told["card"].values())


class Net(nn.Module, PyTorchModelHubMixin):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Linear(4, width)


def averaged(model: nn.Module, **options: Any) -> ShardedEMA:
    ema = ShardedEMA(model, ConstantSchedule(decay=0.5), **options)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.25)
        ema.update()
    return ema


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_the_private_names_of_libraries_are_what_their_folders_are_made_with(tmp_path) -> None:
    """Of huggingface_hub's mixin; the subprocess has timm's and diffusers' in use."""

    class Own(Net):
        def _save_pretrained(self, save_directory: Path) -> None:
            torch.save(self.state_dict(), save_directory / "own.pt")

    assert Net(width=3)._hub_mixin_config == {"width": 3}
    Net(width=3).save_pretrained(tmp_path / "theirs")
    averaged(Net(width=3)).consolidate(tmp_path / "ours")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours")]
    assert configs[0] == configs[1] == {"width": 3}
    averaged(Own(width=3)).consolidate(tmp_path / "own")
    assert "config.json" not in names_in(tmp_path / "own"), "the class writes files of its own"


def test_a_configuration_that_another_library_would_take_for_its_own_is_not_written(tmp_path) -> None:
    class Named(nn.Module, PyTorchModelHubMixin):
        def __init__(self, model_type: str = "bert") -> None:
            super().__init__()
            self.inner = nn.Linear(4, 2)

    with pytest.warns(UserWarning, match="the configuration of the model is not written: .*model_type"):
        averaged(Named()).consolidate(tmp_path / "export")
    assert names_in(tmp_path / "export") == ["README.md", "model.safetensors"]


def test_three_shards_then_one_leave_no_stale_shard_and_what_the_user_added_stays(tmp_path) -> None:
    ema = averaged(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)))
    for write, beside in ((ema.save, ["manifest.json"]), (ema.consolidate, ["README.md"])):
        folder = tmp_path / write.__name__
        write(folder, max_shard_size=300)
        assert len(names_in(folder)) == 5
        (folder / "tokenizer.json").write_text("{}")
        (folder / "adapter_config.json").write_text("{}")
        write(folder)
        assert names_in(folder) == sorted([*beside, "model.safetensors", "tokenizer.json"]), "no adapter is here"


def test_an_export_that_the_user_put_into_the_folder_of_an_average_stays(tmp_path) -> None:
    ema = averaged(nn.Linear(4, 2))
    ema.save(tmp_path / "ema")
    ema.consolidate(tmp_path / "ema" / "best")
    before = (tmp_path / "ema" / "best" / "model.safetensors").read_bytes()
    ema.save(tmp_path / "ema")
    assert (tmp_path / "ema" / "best" / "model.safetensors").read_bytes() == before


def test_weights_of_another_name_that_the_user_put_beside_an_average_stay(tmp_path) -> None:
    ema = averaged(nn.Linear(4, 2))
    ema.save(tmp_path / "ema")
    (tmp_path / "ema" / "diffusion_pytorch_model.safetensors").write_bytes(b"of the user")
    (tmp_path / "ema" / "model-00001-of-00002.safetensors").write_bytes(b"would be taken for these weights")
    ema.save(tmp_path / "ema")
    assert names_in(tmp_path / "ema") == ["diffusion_pytorch_model.safetensors", "manifest.json", "model.safetensors"]


def test_an_export_renews_its_own_card_and_never_one_of_the_user(tmp_path) -> None:
    ema = averaged(Net())
    ema.save(tmp_path / "ema")
    ema.consolidate(tmp_path / "export")
    card = tmp_path / "export" / "README.md"
    assert "- updates: 2\n" in card.read_text() and "ConstantSchedule" in card.read_text()
    ema.update()
    ema.consolidate(tmp_path / "export")
    assert "- updates: 3\n" in card.read_text()
    consolidate_checkpoint(tmp_path / "ema", tmp_path / "export")
    assert "- updates: 2\n" in card.read_text()
    assert ModelCard.load(card).data.library_name == "pytorch"
    card.write_text(card.read_text().replace("# Averaged weights", "# My model"))
    for write in (
        lambda: ema.consolidate(tmp_path / "export"),
        lambda: consolidate_checkpoint(tmp_path / "ema", tmp_path / "export"),
    ):
        write()
        assert "# My model" in card.read_text()
    assert "README.md" not in names_in(tmp_path / "ema"), "a checkpoint has no card"


def test_no_card_has_a_base_model_that_the_hub_would_refuse(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    for name in ("gpt2", "Qwen/Qwen3-0.6B", "a_b/c.d-e", "x"):
        validate_repo_id(name)
        assert origin_of(name) == name
    for name in (
        "my model",
        "a--b/c",
        "a..b",
        "me/model.git",
        "-a",
        "a/b/c",
        "",
        "\u00e9t\u00e9",
        "x" * 97,
    ):
        with pytest.raises(HFValidationError):
            validate_repo_id(name)
        assert origin_of(name) == ""
    assert origin_of("me/model\n") == "", "huggingface_hub 1 took it"
    assert [origin_of(path) for path in ("base", "./a", "/a/b", "~/a", "C:/a", "a\\b", None)] == [""] * 7


def test_a_synthesized_average_has_the_form_of_its_snapshots(tmp_path) -> None:
    model = Net(width=5)
    ema = ShardedEMA(model, {"short": PowerSchedule(sigma_rel=0.05), "long": PowerSchedule(sigma_rel=0.10)})
    for step in range(1, 41):
        ema.update()
        if step % 10 == 0:
            ema.snapshot(tmp_path / "snapshots")
    synthesize(tmp_path / "snapshots", tmp_path / "export", PowerSchedule(sigma_rel=0.075))
    assert names_in(tmp_path / "export") == ["README.md", "config.json", "model.safetensors"]
    assert Net.from_pretrained(tmp_path / "export").inner.weight.shape == (5, 4)
    assert "- updates: 40\n" in (tmp_path / "export" / "README.md").read_text()


def test_a_run_goes_on_from_files_whose_names_are_those_of_a_library(tmp_path, monkeypatch) -> None:
    """The names in the files are not those of the model; the manifest has both."""
    from dist_ema.disk.forms import deciding
    from dist_ema.disk.forms.form import PEFT, FolderForm

    names = {"0.weight": "zero.weight", "1.weight": "zero.weight"}
    form = FolderForm(kind=PEFT, names=names, folders={"1.weight": "one", "1.bias": "one"}, is_described=False)
    monkeypatch.setattr("dist_ema.construction.decide", lambda model, tensors: deciding.Decided(form, {}))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    ema = averaged(model)
    ema.save(tmp_path / "ema", max_shard_size=8)
    assert sorted(load_file(tmp_path / "ema" / "one" / "adapter_model.safetensors")) == ["1.bias", "zero.weight"]
    again = ShardedEMA(model, ConstantSchedule(decay=0.5))
    again.load(tmp_path / "ema")
    for name, value in ema.full_state_dict().items():
        assert torch.equal(again.full_state_dict()[name], value)
    consolidate_checkpoint(tmp_path / "ema", tmp_path / "export")
    assert names_in(tmp_path / "export") == ["README.md", "adapter_model.safetensors", "one"]
    ema.consolidate(tmp_path / "export")
    damaged = tmp_path / "ema" / "one" / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"1234")
    from dist_ema import CheckpointCorruptError

    with pytest.raises(CheckpointCorruptError, match=r"1\.(weight|bias)"):
        again.load(tmp_path / "ema")


def adapters(*names: str) -> nn.Module:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model: nn.Module = peft.get_peft_model(nn.Sequential(nn.Linear(4, 2)), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("names", [("default",), ("default", "style"), ("mine",), ("a", "b")])
def test_an_adapter_from_a_checkpoint_of_the_trainer_lies_at_the_top_of_an_export(tmp_path, names) -> None:
    """There it lies one folder deeper, where no loader of PEFT would look for it in an export."""
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    ema = averaged(adapters(*names), trainable_only=True)
    ema.save(checkpoint / "ema")
    assert not (checkpoint / "ema" / "adapter_config.json").exists()
    ema.consolidate(tmp_path / "online")
    consolidate_checkpoint(checkpoint, tmp_path / "offline")
    online, offline = (
        {str(path.relative_to(tmp_path / folder)): path.read_bytes() for path in (tmp_path / folder).rglob("*.*")}
        for folder in ("online", "offline")
    )
    assert online == offline and ("adapter_config.json" in online) == (names != ("a", "b"))
    again = averaged(adapters(*names), trainable_only=True)
    again.load(checkpoint)
    again.start_from(tmp_path / "offline")
    for name, value in ema.full_state_dict().items():
        assert torch.equal(again.full_state_dict()[name], value)
