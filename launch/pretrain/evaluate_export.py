"""Evaluate averaged weights in a fresh process that has never heard of dist_ema: safetensors alone.

    python launch/pretrain/evaluate_export.py OUT/checkpoint-600/ema/model.safetensors --model OUT/model.json

Same text, same windows and same arithmetic as the trainer, so the loss must be the one the trainer saw
under ``ema.average_parameters()``. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from byte_lm import ByteLM, ByteLMConfig
from evaluation import validation_loss
from safetensors.torch import load_file
from text import read_corpus, validation_windows


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss of a safetensors file of averaged weights.")
    parser.add_argument("weights", type=Path, help="a model.safetensors")
    parser.add_argument("--model", type=Path, required=True, help="the model.json that the trainer wrote")
    parser.add_argument("--data", type=Path, help="the trainer's --data")
    parser.add_argument("--eval-windows", type=int, default=256, help="the trainer's --eval-windows")
    parser.add_argument("--json", type=Path, help="write the line there too")
    options = parser.parse_args()

    config = ByteLMConfig.read(options.model)
    model = ByteLM(config)
    model.load_state_dict(load_file(options.weights))  # strict: every name must match
    corpus = read_corpus(options.data, context=config.context)
    windows = validation_windows(corpus.validation, context=config.context, num_windows=options.eval_windows)
    loss = validation_loss(model, windows)
    if "dist_ema" in sys.modules:
        raise RuntimeError("dist_ema was imported: this must show that the file is readable without it")

    line = json.dumps({"weights": str(options.weights), "loss": loss, "num_windows": len(windows)})
    print(line)
    if options.json is not None:
        options.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
