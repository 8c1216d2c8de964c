"""TRL's trainers on one rank with an average: SFTTrainer with a LoRA model, and DPOTrainer.

Not a test: `test_transformers.py` runs it. TRL raises FutureWarnings while it trains.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from trained import MOMENTUM, Naive, StopAt, assert_alike, folders, outcome, tiny_gpt2, whole
from transformers import PreTrainedTokenizerFast, Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from dist_ema import ConstantSchedule
from dist_ema.integrations.transformers import EMACallback

SCHEDULE = ConstantSchedule(momentum=MOMENTUM)
WORDS = ["<eos>", *(f"w{number}" for number in range(60))]
ARGUMENTS: dict[str, Any] = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.05,
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_steps": 1,
    "max_length": 8,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "bf16": False,
    "gradient_checkpointing": False,
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>", unk_token="<eos>")


def words(first: int, number: int = 4) -> str:
    return " ".join(WORDS[1 + (first + step) % 60] for step in range(number))


def lora() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["c_attn"], task_type="CAUSAL_LM")


def sft(folder: str, *callbacks: Any, **arguments: Any) -> SFTTrainer:
    torch.manual_seed(1)
    rows = Dataset.from_list([{"text": words(number, 6)} for number in range(32)])
    args = SFTConfig(folder, **{**ARGUMENTS, **arguments})
    datasets = {"train_dataset": rows, "eval_dataset": rows.select(range(4))}
    kinds = {"processing_class": tokenizer(), "peft_config": lora(), "callbacks": list(callbacks)}
    return SFTTrainer(model=tiny_gpt2(), args=args, **datasets, **kinds)


def dpo(folder: str, *callbacks: Any, **arguments: Any) -> DPOTrainer:
    torch.manual_seed(1)
    pairs = [(words(number, 2), " " + words(number, 3), " " + words(number + 9, 3)) for number in range(32)]
    rows = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs])
    args = DPOConfig(folder, **{**ARGUMENTS, **arguments})
    datasets = {"train_dataset": rows, "eval_dataset": rows.select(range(4))}
    kinds = {"ref_model": tiny_gpt2(), "processing_class": tokenizer(), "callbacks": list(callbacks)}
    return DPOTrainer(model=tiny_gpt2(), args=args, **datasets, **kinds)


def averaged(callback: EMACallback, naive: Naive) -> dict[str, torch.Tensor]:
    assert callback.ema is not None
    tensors = callback.ema.full_state_dict()
    return {name: tensors[name] for name in naive.average.values}


def evaluations(trainer: Trainer) -> list[dict[str, float]]:
    return [record for record in trainer.state.log_history if "eval_loss" in record]


def main(folder: str) -> None:
    plain = sft(os.path.join(folder, "plain"), save_strategy="no")
    plain.train()
    without = outcome(plain)
    callback, naive = EMACallback(SCHEDULE, evaluate="both", consolidate=True), Naive()
    uncut = sft(os.path.join(folder, "uncut"), callback, naive, save_total_limit=1)
    uncut.train()
    assert_alike(outcome(uncut), without)
    assert_alike(averaged(callback, naive), naive.average.values)
    assert folders(os.path.join(folder, "uncut")) == {"checkpoint-6": True, "ema": False}
    (manifest,) = Path(folder, "uncut", "checkpoint-6").rglob("manifest.json")
    tensors = json.loads(manifest.read_text())["tensors"]
    assert tensors and all("lora_" in name for name in tensors), "by default files hold the adapters alone"
    exported = PeftModel.from_pretrained(tiny_gpt2(), os.path.join(folder, "uncut", "ema")).state_dict()
    assert_alike({name: exported[name] for name in naive.average.values}, naive.average.values)
    for live, both in zip(evaluations(plain), evaluations(uncut), strict=True):
        for name in ("loss", "mean_token_accuracy", "entropy"):
            assert both[f"eval_{name}"] == live[f"eval_{name}"], name
        assert both["eval_ema_loss"] != both["eval_loss"] and both["eval_ema_entropy"] != both["eval_entropy"]

    sft(os.path.join(folder, "cut"), EMACallback(SCHEDULE), StopAt(3)).train()
    # At the top of this folder a resume would take it for a second adapter.
    assert os.path.exists(os.path.join(folder, "cut", "checkpoint-2", "ema", "default", "adapter_model.safetensors"))
    again = EMACallback(SCHEDULE, evaluate="both")
    resumed = sft(os.path.join(folder, "cut"), again)
    resumed.train(resume_from_checkpoint=True)
    assert list(resumed.model.peft_config) == ["default"]  # not the folder of the average as a second adapter
    assert_alike(outcome(resumed), without, without=("losses",))
    assert_alike(averaged(again, naive), naive.average.values)

    kept, kept_naive = EMACallback(SCHEDULE), Naive()
    # Whether losses rise or fall differs with the version of TRL; the second step has to be better than the fourth.
    second, fourth, _ = (record["eval_ema_loss"] for record in evaluations(uncut))
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": second > fourth}
    put_back = sft(os.path.join(folder, "best"), kept, kept_naive, max_steps=4, **best)
    put_back.train()
    assert put_back.state.best_global_step == 2
    assert_alike(whole(put_back.model), kept_naive.at[2])

    plain = dpo(os.path.join(folder, "dpo"), save_strategy="no", max_steps=4)
    plain.train()
    preferred, naive = EMACallback(SCHEDULE), Naive()
    other = dpo(os.path.join(folder, "dpo"), preferred, naive, max_steps=4)
    other.train()
    assert_alike(outcome(other), outcome(plain))
    assert_alike(averaged(preferred, naive), naive.average.values)
    assert evaluations(other)[-1]["eval_loss"] != evaluations(plain)[-1]["eval_loss"]
    print("nothing is lost: trl", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
